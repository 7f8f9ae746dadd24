/** The example `batch`, with real boots: two hosts, one of them over SSH, and a driver that is killed on the way. */
import { existsSync, readFileSync } from "node:fs";
import { copyFile, cp, mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { parseGuestReport } from "../../scripts/guest/report.ts";
import { descendants } from "../bed/daemon.ts";
import { type Libvirtd, openKvmHost, openLibvirtd } from "../bed/libvirtd.ts";
import type { BatchReport } from "../../sdk/batch/report.ts";
import { openBatchBed } from "./bed.ts";

const PASSPHRASE = "only-the-batch-knows-it";
const EXAMPLE = join(import.meta.dirname, "../../examples/batch");

interface ExampleManifest {
  readonly defaults: { readonly machine: object };
  readonly hosts: { readonly kvm2: object };
  readonly machines: { readonly db: object };
}

test("three machines boot from their OVAs' bytes on two hosts, though the driver is killed on the way", async () => {
  await using here = await openLibvirtd();
  await using kvm2 = await openKvmHost({ name: "kvm2" });
  // A distribution's package brings this folder; libvirt does not make it.
  for (const host of [here, kvm2]) await host.run("mkdir", "-p", "/var/log/libvirt/qemu");
  await using bed = await openBatchBed();
  const guest = await prepareGuestOva({ stay: true });
  await cp(EXAMPLE, bed.directory, { recursive: true });
  await mkdir(join(bed.directory, "exports"));
  for (const name of ["db", "cache", "web"]) await symlink(guest.path, join(bed.directory, `exports/${name}.ova`));
  const manifest = parse(await readFile(join(EXAMPLE, "migrations.yaml"), "utf8")) as ExampleManifest;
  const key = join(kvm2.directory, "key-with-passphrase");
  await copyFile(kvm2.sshd.clientKey.path, key);
  await runCommand(["ssh-keygen", "-q", "-p", "-P", "", "-N", PASSPHRASE, "-f", key]);
  await writeFile(join(bed.directory, "key-passphrase"), `${PASSPHRASE}\n`);
  const uri = `${kvm2.sshUri()}?keyfile=${key}&known_hosts=${kvm2.sshd.knownHostsFile}`;
  bed.write({
    ...manifest,
    hosts: { kvm1: here.uri, kvm2: { ...manifest.hosts.kvm2, uri, passphrase: { file: "key-passphrase" } } },
    defaults: {
      ...manifest.defaults,
      machine: { ...manifest.defaults.machine, domainType: "qemu", waitFor: [{ type: "serial", text: "virtlift-guest done" }] },
    },
    // The private daemon's own /var/log cannot be seen from outside.
    machines: { ...manifest.machines, db: { ...manifest.machines.db, machine: { serialLog: join(here.directory, "db-serial0.log") } } },
  });

  const killed = bed.start("up");
  await expect.poll(() => killed.stderr(), { timeout: 90_000, interval: 50 }).toMatch(/: defining/);
  const left = descendants(killed.pid);
  const lines = left.map((pid) => (existsSync(`/proc/${pid}/cmdline`) ? readFileSync(`/proc/${pid}/cmdline`, "utf8") : ""));
  expect(lines.join("\n")).toContain("pulumi");
  expect(lines.join("\n")).not.toContain(PASSPHRASE);
  process.kill(killed.pid, "SIGKILL");
  await killed.ended;
  expect(left.length).toBeGreaterThan(0);

  const moved = await bed.cli("up");
  expect(moved).toMatchObject({ code: 0, stdout: expect.stringMatching(/^3 done$/m) as string });
  expect(moved.stdout).toContain("all machines may start");
  expect(moved.stderr).toMatch(/wave 1: up db, cache[\s\S]*wave 2: up web/);

  const report = JSON.parse((await bed.cli("report", "--json")).stdout) as BatchReport;
  const hosts: Readonly<Record<string, Libvirtd>> = { db: here, cache: kvm2, web: kvm2 };
  for (const { name, made } of report.machines) {
    const { serialLog, uuid, macAddresses } = (made?.machine ?? {}) as { serialLog: string; uuid: string; macAddresses: readonly [string] };
    const proof = parseGuestReport(await hosts[name]!.run("cat", serialLog));
    expect(proof).toMatchObject({
      uuid,
      vcpus: name === "web" ? 2 : 1,
      interfaces: [{ mac: macAddresses[0] }],
      disks: [{ sizeBytes: guest.virtualSizeBytes, sha256: guest.contentSha256 }],
    });
  }
  expect((await readdir(here.poolPath)).filter((name) => name !== ".virtlift")).toHaveLength(1);

  for (const text of [moved.stdout, moved.stderr, killed.stderr(), bed.journal(), JSON.stringify(report)])
    expect(text).not.toContain(PASSPHRASE);
  // Grep exits 1 when it finds nothing.
  await expect(
    runCommand(["grep", "--recursive", "--fixed-strings", "--files-with-matches", PASSPHRASE, join(bed.directory, ".virtlift")]),
  ).rejects.toThrow("exited 1");

  expect(await bed.cli("destroy", "--yes")).toMatchObject({ code: 0, stdout: "3 destroyed\n" });
  for (const host of [here, kvm2]) {
    expect((await host.virsh("list", "--all", "--name").catch(() => "")).trim()).toBe("");
    expect(await readdir(host.poolPath)).toEqual([]);
  }
}, 300_000);
