import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { manifestJsonSchema, parseManifest, readManifest } from "../../sdk/batch/manifest.ts";

const MINIMAL = "machines:\n  web:\n    source: { ova: web.ova }\n    host: qemu:///system\n";

test("fills in defaults: project by the file, wave 1, the key as the name, a reference of the migration", () => {
  const manifest = parseManifest(MINIMAL, "/moves/autumn.yaml");
  expect(manifest).toMatchObject({ project: "autumn", onFailure: "finish-wave", retry: { attempts: 3, delaySeconds: 5 } });
  expect(manifest.machines).toEqual([
    expect.objectContaining({
      name: "web",
      wave: 1,
      hostName: "qemu:///system",
      maxPerHost: 2,
      declaration: expect.objectContaining({
        source: { ova: "web.ova" },
        host: { uri: "qemu:///system" },
        name: "web",
        migrationRef: "wave-1/web",
      }) as unknown,
    }),
  ]);
  expect(parseManifest(MINIMAL, "/moves/migrations.yaml").project).toBe("moves-migrations");
});

test("lays a machine's own words over the defaults", () => {
  const text = `
hosts:
  kvm1: { uri: "qemu+ssh://root@kvm1/system", sudo: true, maxConcurrent: 1, passphrase: { env: KEY } }
defaults: { host: kvm1, wave: 2, machine: { vcpus: 2, memoryMiB: 512 }, labels: { a: "1", b: "1" } }
machines:
  web: { source: { ova: web.ova }, machine: { vcpus: 4 }, labels: { b: "2" }, wave: 3 }
`;
  expect(parseManifest(text, "/m.yaml").machines[0]).toMatchObject({
    wave: 3,
    hostName: "kvm1",
    maxPerHost: 1,
    labels: { a: "1", b: "2" },
    declaration: {
      host: { uri: "qemu+ssh://root@kvm1/system", sudo: true, passphrase: { env: "KEY" } },
      machine: { vcpus: 4, memoryMiB: 512 },
    },
  });
});

test.for([
  [
    "machines:\n  web:\n    source: { ova: a }\n    hots: x\n",
    "/m.yaml:4:5: machines.web.hots is nothing that a manifest has: remove it or mend its name",
  ],
  ["machines:\n  web:\n    host: qemu:///system\n", "/m.yaml:2:3: machines.web.source: "],
  ["machines: {}\n", "/m.yaml:1:1: machines: there is no machine in it"],
  ["machines:\n  web:\n    source: { ova: a }\n", "/m.yaml:2:3: machines.web has no host: give it one, or all of them in defaults.host"],
  [
    "hosts: { kvm1: qemu:///system }\nmachines:\n  web:\n    source: { ova: a }\n    host: kvm2\n",
    "/m.yaml:5:5: machines.web.host: there is no host kvm2 in `hosts`: it has kvm1; a libvirt URI will do, too",
  ],
  [
    "defaults: { host: 'qemu:///system' }\nmachines:\n  web:\n    source: { ova: a }\n    dependsOn:\n      - db\n",
    "/m.yaml:6:9: machines.web.dependsOn: there is no machine db: mend its name",
  ],
  [
    "defaults: { host: 'qemu:///system' }\nmachines:\n  web:\n    source: { ova: a }\n    dependsOn: [db]\n  db: { source: { ova: b }, wave: 2 }\n",
    "db comes in wave 2, after web in wave 1: move one of them",
  ],
  [
    "defaults: { host: 'qemu:///system' }\nmachines:\n  a: { source: { ova: a }, dependsOn: [b] }\n  b: { source: { ova: b }, dependsOn: [a] }\n",
    "machines.a.dependsOn leads back to a: no order satisfies it",
  ],
  [
    "hosts: { kvm1: { uri: 'qemu:///system', password: hunter2 } }\nmachines: { web: { source: { ova: a }, host: kvm1 } }\n",
    "a secret is never written here: give { env: NAME } or { file: path }",
  ],
  ["machines: [\n", "/m.yaml:2:1: "],
  [
    `${MINIMAL}    machine:\n      vcpu: 2\n`,
    "/m.yaml:6:7: machines.web.machine.vcpu: it is nothing that VirtualMachine has here: remove it or mend its name",
  ],
  [
    `${MINIMAL}    machine:\n      disks:\n        - { size: 1GiB }\n`,
    "/m.yaml:7:11: machines.web.machine.disks.0: a blank disk has a `size` and a `name`",
  ],
  [
    `${MINIMAL}    machine:\n      name: foo\n`,
    "/m.yaml:6:7: machines.web.machine.name: a machine's name is the key `name` beside `machine`",
  ],
  [
    `defaults:\n  machine: { name: foo }\n${MINIMAL}`,
    "/m.yaml:2:14: defaults.machine.name: a machine's name is the key `name` beside `machine`",
  ],
  [
    `${MINIMAL}    machine: { host: 'qemu:///system' }\n`,
    "/m.yaml:5:16: machines.web.machine.host: a machine's host is the key `host` beside",
  ],
  [
    `${MINIMAL}  web:\n    source: { ova: a }\n`,
    "/m.yaml:5:3: the key web is there already, in line 2: remove one of them or give it another name",
  ],
  ["machines:\n  web:\n    source: { ova: 5 }\n    host: test:///default\n", "/m.yaml:3:15: machines.web.source.ova: "],
  [
    "machines:\n  web:\n    source: { fiel: a }\n    host: test:///default\n",
    "/m.yaml:3:15: machines.web.source.fiel: a source is exactly one of { ova }, { vmx }, { file }, { url }, { hostPath }, { volume }, got { fiel }",
  ],
  [
    "machines:\n  web:\n    source: { ova: a, vmx: b }\n    host: test:///default\n",
    "/m.yaml:3:5: machines.web.source: a source is exactly one of ",
  ],
  [
    "machines:\n  web:\n    source: { ova: a, disk: 1 }\n    host: test:///default\n",
    "/m.yaml:3:23: machines.web.source.disk: a machine has all disks of its package: leave one out by `disks` beside `source`",
  ],
  [
    "machines:\n  web:\n    source: { file: a, disk: 1 }\n    host: test:///default\n",
    "/m.yaml:3:24: machines.web.source.disk: it does not go with { file }: remove it or mend its name",
  ],
  [
    "machines:\n  web:\n    source: web.ova\n    host: test:///default\n",
    "/m.yaml:3:5: machines.web.source: say where the machine comes from: ",
  ],
  [`${MINIMAL}    machine: { domainType: xen }\n`, "/m.yaml:5:16: machines.web.machine.domainType: it is `kvm` or `qemu`"],
  [`defaults:\n  machine: { memoryMiB: 1 }\n${MINIMAL}`, "/m.yaml:2:14: defaults.machine.memoryMiB: "],
  [`${MINIMAL}    disks:\n      "0": { layout: thin }\n      "1": false\n`, "/m.yaml:6:14: machines.web.disks.0.layout: "],
  [`${MINIMAL}    networks: { a: default, b: false, "*": { typ: user } }\n`, "/m.yaml:5:46: machines.web.networks.*.typ: "],
  [
    `${MINIMAL}limits: { bandwidth: 50 apples }\n`,
    '/m.yaml:5:11: limits.bandwidth: a rate is a number of bytes per second from 1024 on, or a string such as "50MiB"',
  ],
  [`${MINIMAL}limits: { bandwidth: 50 }\n`, "limits.bandwidth: a rate is a number of bytes per second from 1024 on"],
] as const)("says where a manifest is wrong, and what would mend it: %j", ([text, sentence]) => {
  expect(() => parseManifest(text, "/m.yaml")).toThrow(sentence);
});

test("tells everything that is wrong at once, and never a secret that was written in", () => {
  const text =
    "hosts: { kvm1: { uri: 'qemu:///system', password: hunter2 } }\nmachines:\n  web: { source: { ova: a }, host: kvm1, wave: 0 }\n";
  expect(() => parseManifest(text, "/m.yaml")).toThrow(/:1:\d+: .*\n.*:3:\d+: /);
  expect(() => parseManifest(text, "/m.yaml")).not.toThrow("hunter2");
});

test("says in one sentence that there is no manifest, or none that can be read", () => {
  expect(() => readManifest("/there/is/none.yaml")).toThrow(/^there is no manifest at \/there\/is\/none\.yaml$/);
  expect(() => readManifest("/")).toThrow("cannot read the manifest at /: EISDIR");
});

test("refuses an alias bomb and a manifest that is too large", () => {
  const names = "abcdefghijklmnopqrstuvwxyz".split("");
  const bomb = names
    .map((name, index) => `${name}: &${name} ${index === 0 ? "[x, x]" : `[*${names[index - 1]}, *${names[index - 1]}]`}`)
    .join("\n");
  expect(() => parseManifest(bomb, "/m.yaml")).toThrow("/m.yaml:1:1: Excessive alias count");
  expect(() => parseManifest("#".repeat(9_000_000), "/m.yaml")).toThrow("larger than");
});

test("has a JSON Schema with the documentation of its keys", () => {
  const schema = JSON.stringify(manifestJsonSchema());
  expect(schema).toContain("Waves run one after the other. Default 1.");
  expect(schema).toContain('"additionalProperties":false');
});

test("takes the example", () => {
  const path = join(import.meta.dirname, "../../examples/batch/migrations.yaml");
  expect(parseManifest(readFileSync(path, "utf8"), path).machines.map(({ name, wave, hostName }) => [name, wave, hostName])).toEqual([
    ["db", 1, "kvm1"],
    ["cache", 1, "kvm2"],
    ["web", 2, "kvm2"],
  ]);
});
