/** Checks as a whole: they change nothing, cry no wolf, can be overruled with a reason, ask once for all, and work without a program. */
import { copyFile, mkdir, open, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { describe, expect, test as base, vi } from "vitest";
import { prepareGuest } from "../../../scripts/guest/guest.ts";
import { runCommand } from "../../../scripts/setup/command.ts";
import { prepareGuestOva } from "../../../scripts/guest/ova.ts";
import { importedDisk } from "../../../provider/resources/imported-disk.ts";
import { checkSource } from "../../../provider/resources/preflight/check.ts";
import { virtualMachine } from "../../../provider/resources/virtual-machine.ts";
import { type KvmHost, type Libvirtd, openKvmHost, openLibvirtd } from "../../bed/libvirtd.ts";
import { qemuImg } from "../../image/qemu.ts";
import { openWebServer } from "../../transfer/web-server.ts";
import { writeBiosDisk } from "./boot-disks.ts";
import { countingHosts } from "./counting-hosts.ts";
import { type Desk, openDesk, rulesOf } from "./desk.ts";

interface Fixtures {
  readonly libvirtd: Libvirtd;
  readonly kvm: KvmHost;
  readonly desk: Desk;
}

/** Making the proof guest for the first time takes a minute. */
vi.setConfig({ testTimeout: 120_000 });

const test = base.extend<Fixtures>({
  libvirtd: [
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    async ({}, use) => {
      await using libvirtd = await openLibvirtd({ network: true });
      await use(libvirtd);
    },
    { scope: "file" },
  ],
  kvm: [
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    async ({}, use) => {
      await using kvm = await openKvmHost({ network: true });
      await use(kvm);
    },
    { scope: "file" },
  ],
  desk: async ({ libvirtd }, use) => {
    await using desk = openDesk(libvirtd.uri);
    await use(desk);
  },
});

/** Descriptors as exporters write them. */
const EXPORTS = join(import.meta.dirname, "../../fixtures/ovf");

const sshTo = (kvm: KvmHost) => ({ uri: kvm.sshUri(), identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile });

/** This machine's address as the host sees it: the one before its own in their network of two. */
function seenBy({ address }: KvmHost): string {
  return address.replace(/\d+$/, (last) => String(Number(last) - 1));
}

/** All of a host that a check could change: files with their times, volumes, machines, networks. */
async function portrait(bed: Libvirtd): Promise<string> {
  const files = await Promise.all(
    (await readdir(bed.poolPath, { recursive: true })).toSorted().map(async (name) => {
      const { size, mtimeMs, ctimeMs, mode } = await stat(join(bed.poolPath, name));
      return [name, size, mtimeMs, ctimeMs, mode].join(" ");
    }),
  );
  const { mtimeMs, ctimeMs } = await stat(bed.poolPath);
  const told = await Promise.all(
    [
      ["vol-list", "default", "--details"],
      ["list", "--all"],
      ["net-list", "--all"],
      ["pool-list", "--all"],
      ["dumpxml", "there"],
    ].map((argv) => bed.virsh(...argv)),
  );
  const settings = await bed.run("find", "/etc/libvirt", bed.directory, "-xdev", "-name", "*.[xqr]*", "-printf", "%p %s %T@ %C@\\n");
  return [...files, mtimeMs, ctimeMs, ...told, settings].join("\n");
}

async function defineThere(bed: Libvirtd): Promise<void> {
  const path = join(bed.poolPath, "there.qcow2");
  await qemuImg("create", "-q", "-f", "qcow2", path, "16M");
  const xml = join(bed.directory, "there.xml");
  await writeFile(
    xml,
    `<domain type="qemu"><name>there</name><memory unit="MiB">64</memory><os><type>hvm</type></os><devices><disk type="file"><driver name="qemu" type="qcow2"/><source file="${path}"/><target dev="sda" bus="sata"/></disk></devices></domain>`,
  );
  await bed.virsh("define", xml);
  await bed.virsh("pool-refresh", "default");
}

describe("a check", () => {
  test("changes nothing on the host, whatever it finds, by the socket and over SSH", async ({ libvirtd, kvm }) => {
    const [guest, ova] = [await prepareGuest("vmdk-stream"), await prepareGuestOva()];
    for (const [bed, host] of [
      [libvirtd, libvirtd.uri],
      [kvm, sshTo(kvm)],
    ] as const) {
      await defineThere(bed);
      const [free, outside] = [join(bed.poolPath, "free.qcow2"), join(bed.directory, "outside.qcow2")];
      for (const path of [free, outside]) await copyFile(join(bed.poolPath, "there.qcow2"), path);
      await bed.virsh("pool-refresh", "default");
      await using server = await openWebServer("address" in bed ? { address: seenBy(bed) } : {});
      server.files.set("/disk.vmdk", { bytes: await readFile(guest.path) });
      const url = `${server.origin}/disk.vmdk`;
      const before = await portrait(bed);
      await using desk = openDesk(host);
      const disk = await desk.checkDisk("web-root", { source: { file: guest.path } });
      await desk.checkDisk("taken", { source: { file: guest.path }, name: "there" });
      await desk.checkDisk("none", { source: { file: "/none" }, layout: "full" });
      for (const source of [
        { ova: ova.path },
        { url },
        { url, fetch: "host" },
        { hostPath: outside },
        { hostPath: outside, mode: "move" },
        { hostPath: free, mode: "adopt" },
        { volume: "there.qcow2" },
      ]) {
        const { failures } = await desk.checkDisk(`from-${JSON.stringify(source)}`.replaceAll(/[^a-z0-9]/g, ""), { source });
        expect(failures).toEqual([]);
      }
      const importedDisk = { diskId: disk.inputs.diskId, path: disk.inputs.path };
      await desk.checkMachine("web", { importedDisk, networks: [{ network: "default" }], disks: [{ size: "1GiB", name: "data" }] });
      await desk.checkMachine("there", { importedDisk, name: "there", firmware: "uefi", tpm: true });
      expect(await portrait(bed)).toBe(before);
    }
  });

  test("blocks nothing of what is good: every format of a guest that boots, on every bus and by either firmware", async ({
    libvirtd,
    desk,
  }) => {
    for (const format of ["raw", "qcow2", "vmdk", "vmdk-stream"] as const) {
      const { path } = await prepareGuest(format);
      for (const layout of ["sparse", "compressed", "full"] as const) {
        expect((await desk.checkDisk(`${format}-${layout}`, { source: { file: path }, layout })).failures).toEqual([]);
      }
      for (const machine of [
        { bus: "virtio" },
        { bus: "sata", firmware: "uefi" },
        { bus: "scsi", firmware: "uefi", secureBoot: true, tpm: true },
        { bus: "ide", machine: "pc" },
        { networks: [{ network: "default" }, { type: "user", model: "e1000e" }], cpu: { mode: "maximum" }, powerState: "stopped" },
      ]) {
        await using alone = openDesk(libvirtd.uri);
        const { inputs } = await alone.checkDisk("root", { source: { file: path } });
        const importedDisk = { diskId: inputs.diskId, path: inputs.path };
        expect((await alone.checkMachine("web", { importedDisk, memoryMiB: 256, ...machine })).failures).toEqual([]);
      }
    }
  });

  test("blocks no image of another format or kind, nor one that is wrapped", async ({ libvirtd, desk }) => {
    const path = await writeBiosDisk(join(libvirtd.directory, "bios.raw"));
    const written = (name: string): string => join(libvirtd.directory, name);
    const kinds = {
      "v2.qcow2": ["qcow2", "-o", "compat=0.10"],
      "zstd.qcow2": ["qcow2", "-c", "-o", "compression_type=zstd"],
      "flat.vmdk": ["vmdk", "-o", "subformat=monolithicFlat"],
      "split.vmdk": ["vmdk", "-o", "subformat=twoGbMaxExtentSparse"],
      "dynamic.vhd": ["vpc"],
      "fixed.vhd": ["vpc", "-o", "subformat=fixed"],
      "disk.vhdx": ["vhdx"],
      "disk.vdi": ["vdi"],
    };
    for (const [name, options] of Object.entries(kinds)) await qemuImg("convert", "-f", "raw", "-O", ...options, path, written(name));
    await runCommand([
      "sh",
      "-c",
      'gzip -1 < "$1" > "$2.raw.gz"; zstd -q < "$1" > "$2.raw.zst"; xz -0 < "$1" > "$2.raw.xz"',
      "sh",
      path,
      written("wrapped"),
    ]);
    for (const name of [...Object.keys(kinds), "wrapped.raw.gz", "wrapped.raw.zst", "wrapped.raw.xz"]) {
      const { failures } = await desk.checkDisk(name, { source: { file: written(name) } });
      expect([name, ...failures]).toEqual([name]);
    }
  });

  test("blocks no package of any exporter", async ({ libvirtd, desk }) => {
    const stream = (await prepareGuest("vmdk-stream")).path;
    const other = (await prepareGuest("qcow2")).path;
    const blocked: Record<string, readonly (string | undefined)[]> = {};
    for (const exporter of await readdir(EXPORTS)) {
      const folder = join(libvirtd.directory, exporter);
      // Its files and its memory are larger than those of a guest for tests.
      const text = (await readFile(join(EXPORTS, exporter), "utf8"))
        .replaceAll(/ ovf:size="\d+"/g, "")
        .replaceAll(/>(8192|16384)</g, ">256<");
      for (const [, href] of text.matchAll(/ovf:href="([^"]+)"/g)) {
        const file = join(folder, href!);
        await mkdir(dirname(file), { recursive: true });
        if (file.endsWith(".vhd")) await qemuImg("convert", "-f", "qcow2", "-O", "vpc", other, file);
        else await copyFile(file.endsWith(".vmdk") ? stream : other, file);
      }
      await writeFile(join(folder, exporter), text);
      const report = await checkSource(desk.context, { path: join(folder, exporter), host: libvirtd.uri });
      blocked[exporter] = report.findings.filter(({ level }) => level === "block").map(({ rule }) => rule);
    }
    expect(blocked).toEqual({
      "aws.ovf": [],
      // Its disks lie in folders of their own, and only what lies beside a descriptor is read.
      "ovirt.ovf": ["virtlift/source-refused"],
      "virtualbox.ovf": [],
      "vmware.ovf": [],
      "xenserver.ovf": [],
    });
  });

  test("blocks no disk that UEFI starts though no table says so, nor a card that its slots only seem to lack", async ({
    libvirtd,
    desk,
  }) => {
    const { path } = await prepareGuest("raw");
    const file = join(libvirtd.directory, "typed-linux.raw");
    await copyFile(path, file);
    const table = await open(file, "r+");
    await table.write(Buffer.of(0x83), 0, 1, 450);
    await table.close();
    const { inputs } = await desk.checkDisk("root", { source: { file } });
    const importedDisk = { diskId: inputs.diskId, path: inputs.path };
    const pc = { machine: "pc", networks: [{ type: "user", model: "e1000e" }] };
    expect((await desk.checkMachine("web", { importedDisk, memoryMiB: 256, firmware: "uefi", ...pc })).failures).toEqual([]);
  });

  test("says what will be done, and the machine's XML on request, once", async ({ kvm }) => {
    const guest = await prepareGuest("vmdk-stream");
    await using desk = openDesk(sshTo(kvm), { "virtlift:showXml": "true" });
    for (let round = 1; round <= 2; round++) {
      const disk = await desk.checkDisk("web-root", { source: { file: guest.path } });
      await desk.checkMachine("web", { importedDisk: { diskId: disk.inputs.diskId, path: disk.inputs.path } });
    }
    const copies = desk.lines.filter((line) => line.includes(" -> "));
    expect(copies).toEqual([
      expect.stringMatching(
        /^info: web-root-[0-9a-f]{8}: \/\S+ \(vmdk streamOptimized, 64.0 MiB virtual\) -> root@\S+:\/\S+\.qcow2, about \d+\.?\d* MiB to send, about \d+ s \(at \d+\.?\d* \w+\/s, (as measured on this connection just now|assumed, as nothing was measured that is slower)\)$/,
      ),
    ]);
    expect(desk.lines.filter((line) => line.includes('<domain type="'))).toHaveLength(1);
    const isEmulated = desk.lines.some((line) => line.includes('<domain type="qemu">'));
    expect(desk.lines.some((line) => line.endsWith("(virtlift/no-acceleration)"))).toBe(isEmulated);
  });
});

describe("the user's word", () => {
  const noise = async (libvirtd: Libvirtd): Promise<string> => {
    const file = join(libvirtd.directory, "plain.raw");
    await writeFile(file, Buffer.alloc(65_536, 1));
    return file;
  };

  test("makes a rule more or less, for one resource before the whole stack", async ({ libvirtd }) => {
    const source = { file: await noise(libvirtd) };
    const configured = { "virtlift:preflight": JSON.stringify({ "virtlift/no-checksum": { level: "block", reason: "our policy" } }) };
    await using desk = openDesk(libvirtd.uri, configured);
    expect(rulesOf((await desk.checkDisk("a", { source })).failures)).toEqual(["virtlift/no-checksum"]);
    const preflight = { "virtlift/no-checksum": { reason: "made on this machine" } };
    const { inputs, failures } = await desk.checkDisk("a", { source, preflight });
    expect(failures).toEqual([]);
    expect(inputs.preflight).toEqual(preflight);
    expect(desk.lines.some((line) => line.endsWith("(virtlift/no-checksum); waived: made on this machine"))).toBe(true);
  });

  test("is refused where it names no rule, one that cannot be changed, or gives no reason", async ({ libvirtd, desk }) => {
    const source = { file: await noise(libvirtd) };
    const reasons = async (preflight: object) => (await desk.checkDisk("a", { source, preflight })).failures.map(({ reason }) => reason);
    expect(await reasons({ "virtlift/no-such": { reason: "x" } })).toEqual([
      "preflight: virtlift/no-such, and there is no such rule: docs/rules.md lists them",
    ]);
    expect(await reasons({ "virtlift/pool": { reason: "x" } })).toEqual([
      expect.stringMatching(/^preflight: virtlift\/pool, which cannot be changed: /),
    ]);
    expect(await reasons({ "virtlift/no-room": { level: "warn" } })).toEqual([
      expect.stringMatching(/^preflight\.virtlift\/no-room\.reason: /),
    ]);
    for (const [config, words] of [
      ["{", "is no JSON"],
      ['{"virtlift/no-room": {}}', "is not right"],
      ['{"virtlift/no-such": {"reason": "x"}}', "there is no such rule"],
    ] as const) {
      await using other = openDesk(libvirtd.uri, { "virtlift:preflight": config });
      expect((await other.checkDisk("a", { source })).failures).toEqual([
        { property: "preflight", reason: expect.stringContaining(words) },
      ]);
    }
  });
});

describe("without a program", () => {
  test("a package is judged as a machine with its disks, in plain JSON", async ({ libvirtd, desk }) => {
    const { path } = await prepareGuestOva();
    const report = await checkSource(desk.context, { path, host: libvirtd.uri });
    expect(JSON.parse(JSON.stringify(report))).toEqual(report);
    expect(report.findings.filter(({ level }) => level === "block")).toEqual([]);
    expect(report.plan).toEqual([expect.stringContaining(`${path} (vmdk streamOptimized`)]);
    const refused = await checkSource(desk.context, { path, host: libvirtd.uri, pool: "none", network: "lan" });
    expect(refused.verdict).toBe("block");
    expect(refused.findings).toContainEqual({
      resource: "disk 0",
      rule: "virtlift/pool",
      level: "block",
      property: "pool",
      reason: expect.stringContaining("there is no pool none"),
    });
  });

  test("what is no package is a disk's finding, and a host that is not there too", async ({ libvirtd, desk }) => {
    const path = join(libvirtd.directory, "broken.ova");
    await writeFile(path, "no tar at all");
    const report = await checkSource(desk.context, { path, host: libvirtd.uri });
    expect(report).toMatchObject({ verdict: "block", plan: [], findings: [{ resource: "disk 0", rule: "virtlift/source-refused" }] });
    const nowhere = await checkSource(desk.context, { path, host: "qemu+unix:///system?socket=/none" });
    expect(nowhere.findings).toMatchObject([{ rule: "virtlift/host" }]);
  });

  test("an argument that is none has an id as well, beside all others and a host that is missing", async ({ libvirtd, desk }) => {
    const path = join(libvirtd.directory, "plain.raw");
    await writeFile(path, Buffer.alloc(65_536, 1));
    const nameless = await desk.checkDisk("two\nlines", { source: { file: path }, layout: "flat", sauce: 1, host: undefined });
    expect(nameless.failures.map(({ property, reason }) => `${property} ${/\([^)]*\)$/.exec(reason)?.[0]}`)).toEqual([
      "host (virtlift/no-host)",
      "layout (virtlift/argument)",
      "origin (virtlift/argument)",
      "sauce (virtlift/argument)",
    ]);
    expect(nameless.failures[2]?.reason).toMatch(/^origin: the logical name of a resource is one line of plain text/);
    const machine = await desk.checkMachine("two\nlines", { vcpus: 0 });
    expect(rulesOf(machine.failures)).toEqual(["virtlift/argument", "virtlift/argument", "virtlift/no-boot-disk"]);
    expect(await checkSource(desk.context, { path, host: libvirtd.uri, pool: "" })).toMatchObject({
      verdict: "block",
      findings: [{ resource: "disk 0", rule: "virtlift/argument", property: "pool" }],
    });
  });

  test("that nothing vouches for a package is said once", async ({ libvirtd, desk }) => {
    const folder = join(libvirtd.directory, "loose");
    await mkdir(folder);
    await runCommand(["tar", "-C", folder, "-xf", (await prepareGuestOva()).path]);
    await rm(join(folder, "virtlift-guest.mf"));
    await desk.checkDisk("loose", { source: { ova: join(folder, "virtlift-guest.ovf") } });
    expect(desk.lines.filter((line) => line.includes("manifest"))).toEqual([expect.stringContaining("(virtlift/no-manifest)")]);
  });
});

describe("a hundred disks and machines", () => {
  for (const way of ["its socket", "SSH"] as const) {
    test(`ask a host that is reached by ${way} once for all`, async ({ libvirtd, kvm }) => {
      const guest = await prepareGuest("vmdk-stream");
      await using plain = openDesk(way === "SSH" ? sshTo(kvm) : libvirtd.uri);
      const { hosts, count } = countingHosts(plain.context.hosts);
      const context = { ...plain.context, hosts };
      const host = way === "SSH" ? sshTo(kvm) : libvirtd.uri;
      const pair = async (index: number) => {
        const origin = `acme/shop/prod/vm-${index}`;
        const disk = await importedDisk.check(context, undefined, { host, origin: `${origin}-root`, source: { file: guest.path } });
        const { diskId, path } = disk.inputs;
        const declared = { host, origin, importedDisk: { diskId, path }, memoryMiB: 64, networks: [{ network: "default" }] };
        const machine = await virtualMachine.check(context, undefined, declared);
        expect([...disk.failures, ...machine.failures]).toEqual([]);
      };
      await pair(0);
      const first = { ...count };
      const startedMs = performance.now();
      for (let index = 1; index < 100; index++) await pair(index);
      const eachMs = (performance.now() - startedMs) / 99 / 2;
      expect(count.connections).toBe(1);
      // What may change is asked again every five seconds.
      expect(count.calls - first.calls).toBeLessThan(100);
      expect(count.commands - first.commands).toBeLessThan(20);
      expect(eachMs).toBeLessThan(50);
    });
  }
});
