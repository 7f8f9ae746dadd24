/** Blocking rules against the real thing, both sides: with the rule the check stops; without it, the thing fails there, or comes out broken. */
import { copyFile, mkdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test as base, vi } from "vitest";
import { prepareGuest } from "../../../scripts/guest/guest.ts";
import { type Libvirtd, openLibvirtd } from "../../bed/libvirtd.ts";
import { guestOf, qemuImg, writeRaw } from "../../image/qemu.ts";
import { type Desk, openDesk, rulesOf, waive } from "./desk.ts";

const MIB = 1024 * 1024;

interface Fixtures {
  readonly libvirtd: Libvirtd;
  readonly desk: Desk;
}

/** Making the proof guest for the first time takes a minute. */
vi.setConfig({ testTimeout: 120_000 });

const test = base.extend<Fixtures>({
  libvirtd: [
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    async ({}, use) => {
      await using libvirtd = await openLibvirtd({ poolMiB: 64 });
      await mkdir(join(libvirtd.directory, "closed"), { mode: 0o700 });
      for (const name of ["own", "other", "closed/own"]) {
        const path = name.includes("/") ? join(libvirtd.directory, `${name}.qcow2`) : join(libvirtd.poolPath, `${name}.qcow2`);
        await qemuImg("create", "-q", "-f", "qcow2", path, "16M");
      }
      await libvirtd.virsh("pool-refresh", "default");
      await defineOther(libvirtd);
      await use(libvirtd);
    },
    { scope: "file" },
  ],
  desk: async ({ libvirtd }, use) => {
    await using desk = openDesk(libvirtd.uri);
    await use(desk);
  },
});

const OTHER_UUID = "0b0e6d2e-5a4e-4d8c-9f8e-3f1c55f0a001";
const OTHER_MAC = "52:54:00:00:00:01";

/** A machine of somebody else, which runs. */
async function defineOther(libvirtd: Libvirtd): Promise<void> {
  const file = join(libvirtd.directory, "other.xml");
  await writeFile(
    file,
    `<domain type="qemu"><name>other</name><uuid>${OTHER_UUID}</uuid><memory unit="MiB">64</memory><os><type>hvm</type></os>
    <devices><disk type="file"><driver name="qemu" type="qcow2"/><source file="${libvirtd.poolPath}/other.qcow2"/><target dev="sda" bus="sata"/></disk>
    <interface type="user"><mac address="${OTHER_MAC}"/></interface></devices></domain>`,
  );
  await libvirtd.virsh("define", file);
  await libvirtd.virsh("start", "other");
}

interface Case {
  readonly args: (libvirtd: Libvirtd) => object;
  /** What creating it says without the rule; `made` where it comes out, broken, without a word. */
  readonly truth: RegExp;
}

const own = (libvirtd: Libvirtd) => ({ importedDisk: { diskId: "own", path: join(libvirtd.poolPath, "own.qcow2") } });

const MACHINES: Readonly<Record<string, Case>> = {
  "virtlift/name-taken": { args: () => ({ name: "other" }), truth: /domain 'other' already exists with uuid/ },
  "virtlift/uuid-taken": { args: () => ({ uuid: OTHER_UUID }), truth: /has the UUID .* and is not ours/ },
  "virtlift/mac-taken": { args: () => ({ networks: [{ type: "user", mac: OTHER_MAC }] }), truth: /^made$/ },
  "virtlift/mac-twice": {
    args: () => ({ networks: Array(2).fill({ type: "user", mac: "52:54:00:00:00:02" }) as object[] }),
    truth: /^made$/,
  },
  "virtlift/disk-taken": {
    args: ({ poolPath }) => ({ importedDisk: { diskId: "other", path: join(poolPath, "other.qcow2") } }),
    truth: /Failed to get "write" lock/,
  },
  "virtlift/disk-twice": {
    args: ({ poolPath }) => ({ disks: [{ path: join(poolPath, "own.qcow2") }] }),
    truth: /Failed to get "write" lock/,
  },
  "virtlift/own-volume-taken": {
    args: () => ({ name: "other2", disks: [{ size: "1MiB", name: "data" }] }),
    truth: /exists already/,
  },
  "virtlift/network-missing": { args: () => ({ networks: [{ network: "lan" }] }), truth: /no network with matching name 'lan'/ },
  "virtlift/network-inactive": { args: () => ({ networks: [{ network: "default" }] }), truth: /network 'default' is not active/ },
  "virtlift/bridge-missing": { args: () => ({ networks: [{ bridge: "br-none" }] }), truth: /br-none/ },
  "virtlift/cpu-mode": {
    args: () => ({ cpu: { mode: "custom", model: "Nonsense" } }),
    truth: /Unknown CPU model Nonsense|unsupported configuration/,
  },
  "virtlift/memory-beyond-host": {
    args: () => ({ memoryMiB: 4 * 1024 * 1024 }),
    truth: /cannot set up guest memory|Cannot allocate memory/,
  },
  "virtlift/vcpus-beyond-type": {
    args: () => ({ machine: "pc", vcpus: 300 }),
    truth: /greater than/,
  },
  "virtlift/path-unreachable": {
    args: ({ directory }) => ({ importedDisk: { diskId: "own", path: join(directory, "closed/own.qcow2") } }),
    truth: /Permission denied/,
  },
};

describe("a machine", () => {
  test.for(Object.entries(MACHINES))("%s stops what would fail", async ([rule, { args, truth }], { libvirtd, desk }) => {
    if (rule === "virtlift/own-volume-taken") await writeFile(join(libvirtd.poolPath, "other2-data.qcow2"), "somebody's");
    await libvirtd.virsh("pool-refresh", "default");
    const declared = {
      ...own(libvirtd),
      name: "mine",
      memoryMiB: 64,
      domainType: "qemu",
      serialLog: join(libvirtd.directory, "mine.log"),
      ...args(libvirtd),
    };
    const { failures } = await desk.checkMachine("mine", declared);
    expect(rulesOf(failures)).toEqual([rule]);

    const waived = await desk.checkMachine("mine", { ...declared, ...waive(rule) });
    expect(waived.failures).toEqual([]);
    expect(desk.lines.filter((line) => line.includes(`(${rule}); no block: a test looks`))).not.toEqual([]);
    const outcome = await desk.createMachine(waived.inputs).then(() => "made", String);
    expect(outcome).toMatch(truth);
    for (const name of (await libvirtd.virsh("list", "--all", "--name")).split("\n")) {
      if (name.trim() === "" || name === "other") continue;
      await libvirtd.virsh("destroy", name).catch(() => undefined);
      await libvirtd.virsh("undefine", name, "--nvram").catch(() => undefined);
    }
  });

  test("UEFI is not promised where there is no firmware for it, nor a TPM without swtpm", async ({ libvirtd }) => {
    await using bare = await openLibvirtd();
    await bare.run("mount", "-t", "tmpfs", "none", "/usr/share/qemu/firmware");
    await bare.run("sh", "-c", "for tool in /usr/bin/swtpm /usr/bin/swtpm_setup; do mount --bind /dev/null $tool; done");
    await bare.killDaemon();
    const path = join(bare.poolPath, "own.qcow2");
    await copyFile(join(libvirtd.poolPath, "own.qcow2"), path);
    const declared = { importedDisk: { diskId: "own", path }, memoryMiB: 64, domainType: "qemu" };
    for (const [rule, args, truth] of [
      ["virtlift/no-uefi-firmware", { firmware: "uefi" }, /Unable to find any firmware/],
      ["virtlift/no-tpm", { tpm: true }, /unsupported configuration/],
    ] as const) {
      const name = `bare-${rule.slice(-3)}`;
      await using desk = openDesk(bare.uri);
      expect(rulesOf((await desk.checkMachine(name, { ...declared, ...args })).failures)).toEqual([rule]);
      const waived = await desk.checkMachine(name, { ...declared, ...args, ...waive(rule) });
      await expect(desk.createMachine(waived.inputs)).rejects.toThrow(truth);
      await bare.virsh("undefine", name).catch(() => undefined);
    }
  });
});

describe("a disk", () => {
  const content = guestOf(20 * MIB, [{ offset: 0, length: 20 * MIB, content: "noise" }]);

  test("what is no image, not there, or taken is refused, and fails without the rule", async ({ libvirtd, desk }) => {
    const directory = libvirtd.directory;
    const file = await writeRaw(join(directory, "noise.raw"), content);
    const backed = join(directory, "backed.qcow2");
    await qemuImg("create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backed);
    const cases: readonly (readonly [string, object, RegExp])[] = [
      ["virtlift/source-missing", { source: { file: join(directory, "none.raw") } }, /there is no file/],
      ["virtlift/source-refused", { source: { file: backed } }, /backing file/],
      ["virtlift/volume-taken", { source: { file }, name: "own" }, /exists on this machine and is not overwritten/],
    ];
    for (const [rule, args, truth] of cases) {
      expect(rulesOf((await desk.checkDisk("disk", args)).failures)).toEqual([rule]);
      const waived = await desk.checkDisk("disk", { ...args, ...waive(rule) });
      expect(waived.failures).toEqual([]);
      await expect(desk.createDisk(waived.inputs)).rejects.toThrow(truth);
    }
  });

  test("a path that a machine names as its own is not imported under it", async ({ libvirtd, desk }) => {
    const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
    await rm(join(libvirtd.poolPath, "ghost.qcow2"), { force: true });
    const xml = join(libvirtd.directory, "ghost.xml");
    await writeFile(
      xml,
      `<domain type="qemu"><name>ghost</name><memory unit="MiB">64</memory><os><type>hvm</type></os><devices><disk type="file"><driver name="qemu" type="qcow2"/><source file="${libvirtd.poolPath}/ghost.qcow2"/><target dev="sda" bus="sata"/></disk></devices></domain>`,
    );
    await libvirtd.virsh("define", xml);
    const args = { source: { file }, name: "ghost" };
    expect(rulesOf((await desk.checkDisk("ghost", args)).failures)).toEqual(["virtlift/volume-in-use"]);
    const waived = await desk.checkDisk("ghost", { ...args, ...waive("virtlift/volume-in-use") });
    await expect(desk.createDisk(waived.inputs)).rejects.toThrow(/the machine ghost on this machine uses/);
    await libvirtd.virsh("undefine", "ghost");
  });

  test("a capacity under the source's would not be what comes out, and a raw volume is not compressed", async ({ libvirtd, desk }) => {
    const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
    const small = { source: { file }, capacity: 512 * 1024 };
    expect(rulesOf((await desk.checkDisk("small", small)).failures)).toEqual(["virtlift/capacity-too-small"]);
    const cut = await desk.checkDisk("small", { ...small, ...waive("virtlift/capacity-too-small") });
    expect((await desk.createDisk(cut.inputs)).virtualSizeBytes).toBe(MIB);
    const packed = { source: { file }, format: "raw", layout: "compressed" };
    expect(rulesOf((await desk.checkDisk("packed", packed)).failures)).toEqual(["virtlift/raw-compressed"]);
  });

  test("two disks that fit one by one, but not together, are refused before either is copied", async () => {
    await using narrow = await openLibvirtd({ poolMiB: 30 });
    await using desk = openDesk(narrow.uri);
    const file = await writeRaw(join(narrow.directory, "noise.raw"), content);
    const first = await desk.checkDisk("first", { source: { file } });
    expect(first.failures).toEqual([]);
    // A replacement is checked twice, and does not count itself.
    expect((await desk.checkDisk("first", { source: { file } })).failures).toEqual([]);
    const second = await desk.checkDisk("second", { source: { file } });
    expect(rulesOf(second.failures)).toEqual(["virtlift/no-room"]);
    expect(second.failures[0]?.reason).toMatch(/takes up to 20.0 MiB beside 20.0 MiB of 1 other disk of this deployment/);
    await using bold = openDesk(narrow.uri);
    const all = await Promise.all(
      ["first", "second"].map((name) => bold.checkDisk(name, { source: { file }, ...waive("virtlift/no-room") })),
    );
    await bold.createDisk(all[0]!.inputs);
    await expect(bold.createDisk(all[1]!.inputs)).rejects.toThrow(/No space left on device|full/);
  });

  test("a copy that is under way counts with what is missing of it only", async () => {
    await using narrow = await openLibvirtd({ poolMiB: 50 });
    await using desk = openDesk(narrow.uri);
    const file = await writeRaw(join(narrow.directory, "noise.raw"), content);
    const first = await desk.checkDisk("first", { source: { file } });
    await desk.createDisk(first.inputs);
    expect((await desk.checkDisk("second", { source: { file } })).failures).toEqual([]);
  });

  test("two disks of one name are refused, and the second would fail", async ({ libvirtd, desk }) => {
    const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
    const first = await desk.checkDisk("twin-a", { source: { file }, name: "twin" });
    const second = await desk.checkDisk("twin-b", { source: { file }, name: "twin" });
    expect(rulesOf(second.failures)).toEqual(["virtlift/volume-twice"]);
    const waived = await desk.checkDisk("twin-b", { source: { file }, name: "twin", ...waive("virtlift/volume-twice") });
    await desk.createDisk(first.inputs);
    await expect(desk.createDisk(waived.inputs)).rejects.toThrow(/exists on this machine and is not overwritten/);
  });
});

describe("a deployment", () => {
  test("names, UUIDs, addresses and disks that two machines want are refused at the second", async ({ libvirtd, desk }) => {
    const both = { name: "twin", uuid: "0b0e6d2e-5a4e-4d8c-9f8e-3f1c55f0a077", networks: [{ type: "user", mac: "52:54:00:00:00:09" }] };
    const declared = { ...own(libvirtd), ...both, memoryMiB: 64 };
    expect((await desk.checkMachine("twin-a", declared)).failures).toEqual([]);
    expect(rulesOf((await desk.checkMachine("twin-b", declared)).failures)).toEqual([
      "virtlift/name-twice",
      "virtlift/uuid-twice",
      "virtlift/mac-twice",
      "virtlift/disk-twice",
    ]);
    await using again = openDesk(libvirtd.uri);
    expect((await again.checkMachine("twin-a", declared)).failures).toEqual([]);
    expect((await again.checkMachine("twin-a", declared)).failures).toEqual([]);
  });

  test("the firmware is compared with what the disk's bytes say", async ({ libvirtd }) => {
    await using desk = openDesk(libvirtd.uri);
    const bios = await prepareGuest("vmdk-stream");
    const disk = await desk.checkDisk("root", { source: { file: bios.path } });
    expect(disk.failures).toEqual([]);
    const importedDisk = { diskId: disk.inputs.diskId, path: disk.inputs.path };
    const declared = { importedDisk, memoryMiB: 64 };
    for (const firmware of ["bios", "uefi"]) expect((await desk.checkMachine("m", { ...declared, firmware })).failures).toEqual([]);
  });
});
