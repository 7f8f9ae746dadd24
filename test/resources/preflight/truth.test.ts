/**
 * Blocking rules against the real thing, both sides: with the rule the check stops; without it, the thing fails there, or comes out broken. A rule that
 * cannot be waived is gone around: what it refused is created all the same. The last test sees that no rule is forgotten.
 */
import { existsSync } from "node:fs";
import { copyFile, mkdir, rm, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test as base, vi } from "vitest";
import type { DiskInputs } from "../../../provider/resources/imported-disk.ts";
import { openHost } from "../../../provider/resources/connect.ts";
import { deploymentOf } from "../../../provider/resources/preflight/deployment.ts";
import { gatherMachine } from "../../../provider/resources/preflight/machine-facts.ts";
import { describeMachine } from "../../../provider/resources/machine-description.ts";
import { MACHINE_RULES } from "../../../provider/resources/preflight/machine-rules.ts";
import type { CheckFailure } from "../../../provider/resources/resource.ts";
import { judge } from "../../../provider/resources/preflight/rule.ts";
import { RULES } from "../../../provider/resources/preflight/rules.ts";
import { runCommand } from "../../../scripts/setup/command.ts";
import { type Libvirtd, openLibvirtd } from "../../bed/libvirtd.ts";
import { openDiskPool, openFsPool } from "../../bed/pools.ts";
import { guestOf, qemuImg, writeRaw } from "../../image/qemu.ts";
import { vmxSeed } from "../../image/seeds.ts";
import { BIOS_WORDS, writeBiosDisk, writeEfiDisk } from "./boot-disks.ts";
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

/** Rules that block and are not shown here, and why. */
const ELSEWHERE: Readonly<Record<string, string>> = {
  "virtlift/machine-made": "test/resources/virtual-machine.test.ts shows it beside what is taken over",
  "virtlift/machine-replaced": "test/resources/virtual-machine.test.ts shows it beside what update and delete then refuse",
  "virtlift/argument": "what is no argument means nothing that could be tried",
  "virtlift/no-host": "without a host there is nothing to try it on",
  "virtlift/libvirt-too-old": "no libvirt older than what it asks for is to be had beside the machine's own",
  "virtlift/device-libvirt": "no libvirt older than what it asks for is to be had beside the machine's own",
  "virtlift/guest-driver": "no Windows is to be had",
};

const shown = new Set<string>();

/** Notes that a test shows both sides of rules; stands where its options do. */
function shows(...rules: readonly string[]): object {
  for (const rule of rules) shown.add(rule);
  return {};
}

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
  "virtlift/device-missing": { args: () => ({ networks: [{ direct: "eth-none" }] }), truth: /eth-none/ },
  "virtlift/vlan-refused": { args: () => ({ networks: [{ type: "user", vlan: [42] }] }), truth: /vlan tag not supported/ },
  "virtlift/no-hugepages": { args: () => ({ hugepages: "1GiB" }), truth: /hugetlbfs|hugepage|huge pages/ },
  "virtlift/template-missing": {
    args: ({ poolPath }) => ({ importedDisk: undefined, image: { path: join(poolPath, "base.qcow2"), format: "qcow2", mode: "overlay" } }),
    truth: /base\.qcow2/,
  },
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
  "virtlift/machine-type": { args: () => ({ domainType: "kvm" }), truth: /does not support virt type 'kvm'/ },
  "virtlift/path-unreachable": {
    args: ({ directory }) => ({ importedDisk: { diskId: "own", path: join(directory, "closed/own.qcow2") } }),
    truth: /Permission denied/,
  },
};

/** Declarations of a machine that is good, the same with what does not go with it, and what then comes out: words of the error, or of the definition. */
const COMBINATIONS: readonly (readonly [string, (data: object) => object, (data: object) => object, RegExp])[] = [
  [
    "Secure Boot and BIOS",
    () => ({ firmware: "uefi", powerState: "stopped" }),
    () => ({ firmware: "bios", secureBoot: true }),
    /^made\n(?![^]*secure)/,
  ],
  ["Secure Boot and pc", () => ({ firmware: "uefi", machine: "pc" }), () => ({ secureBoot: true }), /Unable to find any firmware/],
  ["IDE and q35", () => ({}), () => ({ bus: "ide" }), /IDE controllers are unsupported|IDE bus/],
  [
    "CD-ROM and virtio",
    (data) => ({ disks: [{ ...data, device: "cdrom" }] }),
    (data) => ({ disks: [{ ...data, device: "cdrom", bus: "virtio" }] }),
    /does not support ejectable media|target 'sdb' .* bus 'virtio'|virtio/,
  ],
  ["more CPUs than at most", () => ({}), () => ({ vcpus: 3, maxVcpus: 2 }), /maximum vCPU count must not be less/],
  [
    "more memory than at most",
    () => ({ powerState: "stopped" }),
    () => ({ memoryMiB: 64, maxMemoryMiB: 32 }),
    /^made\n[^]*<memory unit='KiB'>32768</,
  ],
  [
    "no balloon and memory for it",
    () => ({ powerState: "stopped", maxMemoryMiB: 128 }),
    () => ({ ballooning: false }),
    /^made\n[^]*<memory unit='KiB'>131072<[^]*<memballoon model='none'/,
  ],
  ["another topology and CPUs", () => ({}), () => ({ cpuTopology: { sockets: 2, cores: 1, threads: 1 } }), /CPU topology doesn't match/],
  ["pinning and no such CPU", () => ({ powerState: "stopped" }), () => ({ cpuPinning: { "5": "0" } }), /^made\n(?![^]*cpuset='0')/],
  [
    "native io and a cache",
    () => ({}),
    () => ({ bootDisk: { io: "native", cache: "writeback" } }),
    /io='native' needs either no disk cache/,
  ],
  ["two disks and one place", (data) => ({ disks: [data] }), (data) => ({ disks: [{ ...data, bootOrder: 1 }] }), /boot order '1' used/],
  [
    "sharing and qcow2",
    (data) => ({ disks: [data] }),
    (data) => ({ disks: [{ ...data, shareable: true, format: "qcow2" }] }),
    /requires use of supported storage format/,
  ],
  [
    "a loader and BIOS",
    () => ({ powerState: "stopped" }),
    () => ({ loader: { path: "/usr/share/OVMF/OVMF_CODE_4M.fd" } }),
    /^made\n(?![^]*<loader)/,
  ],
  ["Hyper-V and emulation", () => ({}), () => ({ hyperv: true }), /HyperV/],
  ["the host's CPU and emulation", () => ({}), () => ({ cpu: { mode: "host-passthrough" } }), /'host-passthrough' .* is not supported/],
  [
    "two blank disks and one name",
    () => ({ disks: [{ size: "1MiB", name: "a" }] }),
    () => ({ disks: Array(2).fill({ size: "1MiB", name: "a" }) as object[] }),
    /exists already|target/,
  ],
];

describe("a machine", () => {
  test.for(Object.entries(MACHINES))(
    "%s stops what would fail",
    shows(...Object.keys(MACHINES)),
    async ([rule, { args, truth }], { libvirtd, desk }) => {
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
    },
  );

  test(
    "neither Secure Boot nor UEFI nor a TPM is promised where the host has nothing for it",
    shows("virtlift/no-secure-boot", "virtlift/no-uefi-firmware", "virtlift/no-tpm"),
    async ({ libvirtd }) => {
      await using bare = await openLibvirtd();
      await bare.run("sh", "-c", "for tool in /usr/bin/swtpm /usr/bin/swtpm_setup; do mount --bind /dev/null $tool; done");
      await bare.run("sh", "-c", "mkdir /run/plain && cp $(grep -L secure-boot /usr/share/qemu/firmware/*.json) /run/plain");
      await bare.run("mount", "--bind", "/run/plain", "/usr/share/qemu/firmware");
      const path = join(bare.poolPath, "own.qcow2");
      await copyFile(join(libvirtd.poolPath, "own.qcow2"), path);
      const declared = { importedDisk: { diskId: "own", path }, memoryMiB: 64, domainType: "qemu" };
      for (const [rule, args, truth] of [
        ["virtlift/no-secure-boot", { firmware: "uefi", secureBoot: true }, /Unable to find any firmware/],
        ["virtlift/no-uefi-firmware", { firmware: "uefi" }, /Unable to find any firmware/],
        ["virtlift/no-tpm", { tpm: true }, /unsupported configuration/],
      ] as const) {
        if (rule === "virtlift/no-uefi-firmware") await bare.run("sh", "-c", "rm /run/plain/*");
        if (rule !== "virtlift/no-tpm") await bare.killDaemon();
        const name = `bare-${rule.slice(-3)}`;
        await using desk = openDesk(bare.uri);
        expect(rulesOf((await desk.checkMachine(name, { ...declared, ...args })).failures)).toEqual([rule]);
        const waived = await desk.checkMachine(name, { ...declared, ...args, ...waive(rule) });
        await expect(desk.createMachine(waived.inputs)).rejects.toThrow(truth);
        await bare.virsh("undefine", name).catch(() => undefined);
      }
    },
  );

  test("a CPU is refused where KVM would not start it, and only there", shows("virtlift/cpu-unusable"), async ({ libvirtd, skip }) => {
    skip(!existsSync("/dev/kvm"), "this machine has no KVM");
    await using fast = await openLibvirtd();
    // What libvirt found out with KVM is not for the other daemons of the tests.
    await fast.run("mount", "-t", "tmpfs", "none", "/var/cache/libvirt");
    await fast.run("mknod", "-m", "666", "/dev/kvm", "c", "10", "232");
    await fast.killDaemon();
    const path = join(fast.poolPath, "own.qcow2");
    await copyFile(join(libvirtd.poolPath, "own.qcow2"), path);
    const offered = await fast.virsh("domcapabilities", "--machine", "q35", "--virttype", "kvm").catch(() => "");
    skip(offered === "", "the KVM of this machine cannot be used");
    await using desk = openDesk(fast.uri);
    const declared = (model: string, features: object = {}) => ({
      importedDisk: { diskId: "own", path },
      memoryMiB: 64,
      domainType: "kvm",
      cpu: { mode: "custom", model, features },
      serialLog: join(fast.directory, "mine.log"),
    });
    const start = async (args: object): Promise<string> => {
      const { inputs } = await desk.checkMachine("mine", args);
      const outcome = await desk.createMachine(inputs).then(() => "made", String);
      await fast.virsh("destroy", "mine").catch(() => undefined);
      return outcome;
    };
    const models = [...offered.matchAll(/<model usable='(?:yes|no)'[^>]*>([^<]+)</g)].map(([, model]) => model!);
    const fits = new Map<string, readonly CheckFailure[]>();
    for (const model of models) {
      fits.set(model, (await desk.checkMachine("mine", declared(model))).failures);
      if (new Set([...fits.values()].map(({ length }) => length)).size > 1) break;
    }
    const [unfit = "", refused = []] = [...fits].find(([, failures]) => failures.length > 0) ?? [];
    const [fit = ""] = [...fits].find(([, failures]) => failures.length === 0) ?? [];
    expect(rulesOf(refused)).toEqual(["virtlift/cpu-unusable"]);
    expect(await start({ ...declared(unfit), ...waive("virtlift/cpu-unusable") })).toMatch(/does not provide required features/);
    expect(await start(declared(fit))).toBe("made");
    const gaps = /\(it lacks ([^)]+)\)/.exec(refused[0]!.reason)?.[1]?.split(", ") ?? [];
    const without = declared(unfit, Object.fromEntries(gaps.map((feature) => [feature, "disable"])));
    expect((await desk.checkMachine("mine", without)).failures).toEqual([]);
    expect(await start(without)).toBe("made");
  });

  test(
    "a bus that QEMU has not is refused where no combination refuses it before",
    shows("virtlift/disk-bus"),
    async ({ libvirtd, desk }) => {
      const { inputs } = await desk.checkMachine("mine", { ...own(libvirtd), memoryMiB: 64, domainType: "qemu" });
      const onIde = { ...inputs, bus: "ide" as const, diskTargets: ["hda"] };
      const facts = await gatherMachine(openHost(desk.context, inputs.host), onIde, {
        deployment: deploymentOf(desk.context.hosts),
        ownUuid: undefined,
      });
      expect(judge(MACHINE_RULES, facts, {}).map(({ rule }) => rule)).toEqual(["virtlift/disk-bus"]);
      await expect(desk.createMachine(onIde)).rejects.toThrow(/IDE controllers are unsupported/);
    },
  );

  test.for(COMBINATIONS)(
    "%s are refused together, and come out as they were not declared, or not at all",
    shows("virtlift/combination"),
    async ([, good, bad, truth], { libvirtd, desk }) => {
      const data = { path: join(libvirtd.poolPath, "data.raw"), format: "raw" };
      const declared = {
        ...own(libvirtd),
        name: "mine",
        memoryMiB: 64,
        domainType: "qemu",
        serialLog: join(libvirtd.directory, "mine.log"),
      };
      const { inputs, failures } = await desk.checkMachine("mine", { ...declared, ...good(data) });
      expect(failures).toEqual([]);
      const refused = await desk.checkMachine("mine", { ...declared, ...good(data), ...bad(data) });
      expect(new Set(rulesOf(refused.failures))).toEqual(new Set(["virtlift/combination"]));
      const changed = refused.inputs;
      const disks = changed.disks.map((disk, index) => ({ ...(inputs.disks[index] ?? inputs.disks[0]), ...disk }));
      const outcome = await desk
        .createMachine({ ...inputs, ...changed, disks, diskTargets: [...(inputs.diskTargets ?? []), "sdz"] })
        .then(() => "made", String);
      const xml = await libvirtd.virsh("dumpxml", "--inactive", "mine").catch(() => "");
      await libvirtd.virsh("destroy", "mine").catch(() => undefined);
      await libvirtd.virsh("undefine", "mine", "--nvram").catch(() => undefined);
      expect(`${outcome}\n${xml}`).toMatch(truth);
    },
  );
});

/** A package of a machine with a graphics card of its host, as VMware writes it. */
const GPU_OVF = `<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References><File ovf:href="gpu.vmdk" ovf:id="file1"/></References>
  <DiskSection><Disk ovf:capacity="1048576" ovf:diskId="disk1" ovf:fileRef="file1"/></DiskSection>
  <VirtualSystem ovf:id="gpu"><VirtualHardwareSection>
    <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>20</rasd:ResourceType></Item>
    <Item><rasd:HostResource>ovf:/disk/disk1</rasd:HostResource><rasd:InstanceID>2</rasd:InstanceID><rasd:Parent>1</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
    <Item><rasd:ElementName>PCI device 0</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>vmware.pcipassthrough</rasd:ResourceSubType><rasd:ResourceType>1</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>`;

describe("a disk", () => {
  const content = guestOf(20 * MIB, [{ offset: 0, length: 20 * MIB, content: "noise" }]);

  test(
    "what is no image, not there, or taken is refused, and fails without the rule",
    shows("virtlift/source-missing", "virtlift/source-refused", "virtlift/volume-taken"),
    async ({ libvirtd, desk }) => {
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
    },
  );

  test("a path that a machine names as its own is not imported under it", shows("virtlift/volume-in-use"), async ({ libvirtd, desk }) => {
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

  test(
    "a capacity under the source's would not be what comes out, and a raw volume is not compressed",
    shows("virtlift/capacity-too-small", "virtlift/raw-compressed"),
    async ({ libvirtd, desk }) => {
      const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
      const small = { source: { file }, capacity: 512 * 1024 };
      expect(rulesOf((await desk.checkDisk("small", small)).failures)).toEqual(["virtlift/capacity-too-small"]);
      const cut = await desk.checkDisk("small", { ...small, ...waive("virtlift/capacity-too-small") });
      expect((await desk.createDisk(cut.inputs)).virtualSizeBytes).toBe(MIB);
      const packed = { source: { file }, format: "raw", layout: "compressed" };
      expect(rulesOf((await desk.checkDisk("packed", packed)).failures)).toEqual(["virtlift/raw-compressed"]);
      const unpacked = await desk.checkDisk("packed", { ...packed, ...waive("virtlift/raw-compressed") });
      // As large as any raw one, however well its bytes compress.
      expect((await desk.createDisk(unpacked.inputs)).allocatedBytes).toBeGreaterThanOrEqual(MIB);
    },
  );

  const where = ["virtlift/no-room", "virtlift/pool-file-system"] as const;
  test(
    "two disks that fit one by one, but not together, are refused before either is copied, and any where none may write",
    shows(...where),
    async () => {
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

      await runCommand(["mount", "-o", "remount,ro", narrow.poolPath]);
      await using later = openDesk(narrow.uri);
      const third = await later.checkDisk("third", { source: { file }, ...waive("virtlift/no-room") });
      expect(rulesOf(third.failures)).toEqual(["virtlift/pool-file-system"]);
      const waived = await later.checkDisk("third", { source: { file }, ...waive(...where) });
      await expect(later.createDisk(waived.inputs)).rejects.toThrow(/Read-only file system/);
    },
  );

  test("a copy that is under way counts with what is missing of it only", async () => {
    await using narrow = await openLibvirtd({ poolMiB: 50 });
    await using desk = openDesk(narrow.uri);
    const file = await writeRaw(join(narrow.directory, "noise.raw"), content);
    const first = await desk.checkDisk("first", { source: { file } });
    await desk.createDisk(first.inputs);
    expect((await desk.checkDisk("second", { source: { file } })).failures).toEqual([]);
  });

  test("two disks of one name are refused, and the second would fail", shows("virtlift/volume-twice"), async ({ libvirtd, desk }) => {
    const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
    const first = await desk.checkDisk("twin-a", { source: { file }, name: "twin" });
    const second = await desk.checkDisk("twin-b", { source: { file }, name: "twin" });
    expect(rulesOf(second.failures)).toEqual(["virtlift/volume-twice"]);
    const waived = await desk.checkDisk("twin-b", { source: { file }, name: "twin", ...waive("virtlift/volume-twice") });
    await desk.createDisk(first.inputs);
    await expect(desk.createDisk(waived.inputs)).rejects.toThrow(/exists on this machine and is not overwritten/);
  });

  test(
    "a device holds a raw disk under the partition's own name, or none",
    shows("virtlift/device-format", "virtlift/partition-name"),
    async ({ libvirtd, desk }) => {
      await using pool = await openDiskPool(libvirtd);
      const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
      const name = `${pool.device}p1`;
      const asQcow2 = { source: { file }, pool: "disk", name };
      expect(rulesOf((await desk.checkDisk("part", asQcow2)).failures)).toEqual(["virtlift/device-format"]);
      const waived = await desk.checkDisk("part", { ...asQcow2, ...waive("virtlift/device-format") });
      await expect(desk.createDisk(waived.inputs)).rejects.toThrow(/No space left on device|does not hold the bytes/);
      const misnamed = { source: { file }, pool: "disk", format: "raw", name: "root" };
      expect(rulesOf((await desk.checkDisk("part", misnamed)).failures)).toEqual(["virtlift/partition-name"]);
      const free = await desk.checkDisk("part", { ...misnamed, ...waive("virtlift/partition-name") });
      await expect(desk.createDisk(free.inputs)).rejects.toThrow(/invalid partition name/);
    },
  );

  test(
    "the content is not promised to be read by a program where none may run",
    shows("virtlift/verify-without-shell"),
    async ({ libvirtd, desk }) => {
      await using pool = await openFsPool(libvirtd);
      const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
      const args = { source: { file }, pool: pool.name, verify: "content" };
      expect(rulesOf((await desk.checkDisk("read", args)).failures)).toEqual(["virtlift/verify-without-shell"]);
      const waived = await desk.checkDisk("read", { ...args, ...waive("virtlift/verify-without-shell") });
      await expect(desk.createDisk(waived.inputs)).rejects.toThrow(/cannot be verified on this machine/);
    },
  );

  test(
    "a changed declaration takes neither the name nor what a guest wrote",
    shows("virtlift/name-reused", "virtlift/written-since-import"),
    async ({ libvirtd, desk }) => {
      const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
      const named = { source: { file }, name: "kept" };
      const state = await desk.createDisk((await desk.checkDisk("kept", named)).inputs);
      const larger = { ...named, capacity: "2MiB" };
      expect(rulesOf((await desk.checkDisk("kept", larger, state)).failures)).toEqual(["virtlift/name-reused"]);
      // As the engine asks for the new one of a replacement: without the old one.
      const anew = await desk.checkDisk("kept", { ...larger, ...waive("virtlift/volume-taken") });
      await expect(desk.createDisk(anew.inputs)).rejects.toThrow(/exists on this machine and is not overwritten/);

      await utimes(state.path, new Date(), new Date(Date.now() + 60_000));
      const other = { source: { file }, name: "moved", capacity: "2MiB" };
      expect(rulesOf((await desk.checkDisk("kept", other, state)).failures)).toEqual(["virtlift/written-since-import"]);
      const consented = await desk.checkDisk("kept", { ...other, replaceWritten: true }, state);
      expect(consented.failures).toEqual([]);
      await desk.createDisk(consented.inputs);
      await desk.deleteDisk(state);
      expect(existsSync(state.path)).toBe(false);
    },
  );

  test(
    "hardware that was passed through is missing from what comes out",
    shows("virtlift/passthrough-lost"),
    async ({ libvirtd, desk }) => {
      const ovf = join(libvirtd.directory, "gpu.ovf");
      await qemuImg("create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", join(libvirtd.directory, "gpu.vmdk"), "1M");
      await writeFile(ovf, GPU_OVF);
      const disk = await desk.checkDisk("gpu-root", { source: { ova: ovf } });
      expect(rulesOf(disk.failures)).toEqual(["virtlift/passthrough-lost"]);
      const waived = await desk.checkDisk("gpu-root", { source: { ova: ovf }, ...waive("virtlift/passthrough-lost") });
      const { diskId, path } = await desk.createDisk(waived.inputs);
      const declared = { importedDisk: { diskId, path }, ...describeMachine(ovf).hardware, domainType: "qemu", powerState: "stopped" };
      const machine = await desk.checkMachine("gpu", JSON.parse(JSON.stringify(declared)) as object);
      expect(machine.failures).toEqual([]);
      await desk.createMachine(machine.inputs);
      expect(await libvirtd.virsh("dumpxml", "gpu")).not.toContain("hostdev");
      await libvirtd.virsh("undefine", "gpu");

      const vmx = join(libvirtd.directory, "gpu.vmx");
      await writeFile(vmx, vmxSeed(['pciPassthru0.present = "TRUE"'], "gpu.vmdk"));
      const file = join(libvirtd.directory, "gpu.vmdk");
      const unpacked = await desk.checkDisk("gpu-file", { source: { file, vmx } });
      expect(rulesOf(unpacked.failures)).toEqual(["virtlift/passthrough-lost"]);
      expect((await desk.checkDisk("gpu-file", { source: { file, vmx }, ...waive("virtlift/passthrough-lost") })).failures).toEqual([]);
      // Which machine it was of is no part of what the disk is.
      expect((await desk.checkDisk("gpu-file", { source: { file } })).inputs.path).toBe(unpacked.inputs.path);
    },
  );
});

describe("a deployment", () => {
  test(
    "names, UUIDs, addresses and disks that two machines want are refused at the second",
    shows("virtlift/name-twice", "virtlift/uuid-twice"),
    async ({ libvirtd, desk }) => {
      const both = { name: "twin", uuid: "0b0e6d2e-5a4e-4d8c-9f8e-3f1c55f0a077", networks: [{ type: "user", mac: "52:54:00:00:00:09" }] };
      const declared = { ...own(libvirtd), ...both, memoryMiB: 64, domainType: "qemu", powerState: "stopped" };
      const first = await desk.checkMachine("twin-a", declared);
      expect(first.failures).toEqual([]);
      const twice = ["virtlift/name-twice", "virtlift/uuid-twice", "virtlift/mac-twice", "virtlift/disk-twice"];
      expect(rulesOf((await desk.checkMachine("twin-b", declared)).failures)).toEqual(twice);
      const { inputs } = await desk.checkMachine("twin-b", { ...declared, ...waive(...twice) });
      await using again = openDesk(libvirtd.uri);
      expect((await again.checkMachine("twin-a", declared)).failures).toEqual([]);
      expect((await again.checkMachine("twin-a", declared)).failures).toEqual([]);

      await desk.createMachine(first.inputs);
      await expect(desk.createMachine(inputs)).rejects.toThrow(/twin on this machine has the UUID .* and is not ours/);
      const otherUuid = { ...inputs, uuid: "0b0e6d2e-5a4e-4d8c-9f8e-3f1c55f0a078" };
      await expect(desk.createMachine(otherUuid)).rejects.toThrow(/'twin' already exists with uuid/);
      await libvirtd.virsh("undefine", "twin");
    },
  );

  test("the firmware is compared with what the disk's bytes said, also when its source is gone", async ({ libvirtd, desk }) => {
    const file = await writeBiosDisk(join(libvirtd.directory, "gone.raw"));
    const disk = await desk.checkDisk("gone", { source: { file } });
    expect(disk.failures).toEqual([]);
    await rm(file);
    await using later = openDesk(libvirtd.uri);
    const stored = JSON.parse(JSON.stringify(disk.inputs)) as DiskInputs;
    const again = await later.checkDisk("gone", { source: { file } }, stored);
    expect(again).toEqual({ inputs: stored, failures: [] });
    const declared = { importedDisk: { diskId: again.inputs.diskId, path: again.inputs.path }, memoryMiB: 64, domainType: "qemu" };
    expect(rulesOf((await later.checkMachine("m", { ...declared, firmware: "uefi" })).failures)).toEqual(["virtlift/bios-disk-on-uefi"]);
    expect((await later.checkMachine("m", declared)).failures).toEqual([]);
  });
});

describe("a guest's disk", () => {
  const words = (text: string, timeoutSeconds = 60) => ({ type: "serial", text, timeoutSeconds });

  test(
    "whose firmware or sectors are others than the machine's does not start, and starts with its own",
    shows("virtlift/uefi-disk-on-bios", "virtlift/bios-disk-on-uefi", "virtlift/sector-size"),
    async () => {
      await using libvirtd = await openLibvirtd();
      await using desk = openDesk(libvirtd.uri);
      const path = (name: string): string => join(libvirtd.directory, name);
      const disks = {
        efi: await writeEfiDisk(path("efi.raw"), 512),
        wide: await writeEfiDisk(path("wide.raw"), 4096),
        bios: await writeBiosDisk(path("bios.raw")),
      };
      // SeaBIOS says what it does on the serial console when it is told to.
      const talking = { firmware: "bios", xmlPatches: [{ path: "os", add: "<bios useserial='yes'/>" }] };
      const rules = ["virtlift/uefi-disk-on-bios", "virtlift/bios-disk-on-uefi", "virtlift/sector-size"];
      const start = async (name: string, disk: keyof typeof disks, args: object) => {
        const declared = { source: { file: disks[disk] } };
        const { inputs, failures } = await desk.checkDisk(name, { ...declared, ...waive(...rules) });
        expect(failures).toEqual([]);
        const machine = {
          importedDisk: { diskId: inputs.diskId, path: inputs.path },
          memoryMiB: 128,
          domainType: "qemu",
          serialLog: path(`${name}.log`),
          ...args,
        };
        const waived = await desk.checkMachine(name, { ...machine, ...waive(...rules) });
        expect(waived.failures).toEqual([]);
        const stopped = [...(await desk.checkDisk(name, declared)).failures, ...(await desk.checkMachine(name, machine)).failures];
        await desk.createDisk(inputs);
        const outcome = await desk.createMachine(waived.inputs).then(() => "made", String);
        await libvirtd.virsh("destroy", name).catch(() => undefined);
        return [rulesOf(stopped), outcome];
      };
      const seen = (text: string) => ({ firmware: "uefi", waitFor: [words(text)] });
      const inVain = { ...talking, waitFor: [words("Booting from Hard Disk"), words("virtlift-guest", 3)] };
      const outcomes = await Promise.all([
        start("efi-uefi", "efi", seen("starting Boot0001")),
        start("efi-bios", "efi", inVain),
        start("wide-uefi", "wide", seen("failed to load Boot0001")),
        start("bios-bios", "bios", { waitFor: [words(BIOS_WORDS)] }),
        start("bios-uefi", "bios", seen("failed to load Boot0001")),
      ]);
      expect(outcomes).toEqual([
        [[], "made"],
        [["virtlift/uefi-disk-on-bios"], expect.stringContaining('showed no "virtlift-guest"')],
        [["virtlift/sector-size"], "made"],
        [[], "made"],
        [["virtlift/bios-disk-on-uefi"], "made"],
      ]);
    },
  );
});

describe("what cannot be waived", () => {
  test(
    "is refused, and fails when it is gone around",
    shows("virtlift/host", "virtlift/pool", "virtlift/placement", "virtlift/no-boot-disk"),
    async ({ libvirtd, desk }) => {
      const file = await writeRaw(join(libvirtd.directory, "small.raw"), Buffer.alloc(MIB, 1));
      const disk = await desk.checkDisk("lost", { source: { file } });
      const nowhere = { uri: "qemu+unix:///system?socket=/none" };
      expect(rulesOf((await desk.checkDisk("lost", { source: { file }, host: nowhere })).failures)).toEqual(["virtlift/host"]);
      await expect(desk.createDisk({ ...disk.inputs, host: nowhere })).rejects.toThrow(/no libvirt daemon answers/);
      expect(rulesOf((await desk.checkDisk("lost", { source: { file }, pool: "none" })).failures)).toEqual(["virtlift/pool"]);
      await expect(desk.createDisk({ ...disk.inputs, pool: "none" })).rejects.toThrow(/there is no pool none/);

      const declared = { ...own(libvirtd), name: "mine", memoryMiB: 64, domainType: "qemu" };
      const { inputs } = await desk.checkMachine("mine", declared);
      const further = { ...declared, disks: [{ volume: "none.qcow2" }] };
      expect(rulesOf((await desk.checkMachine("mine", further)).failures)).toEqual(["virtlift/placement"]);
      const two = (await desk.checkMachine("mine", { ...declared, disks: [{ path: join(libvirtd.poolPath, "data.raw"), format: "raw" }] }))
        .inputs;
      const none = { ...two.disks[0]!, path: join(libvirtd.poolPath, "none.raw") };
      await expect(desk.createMachine({ ...two, disks: [none] })).rejects.toThrow(/No such file or directory/);
      await libvirtd.virsh("undefine", "mine");

      expect(rulesOf((await desk.checkMachine("mine", { ...declared, importedDisk: undefined })).failures)).toEqual([
        "virtlift/no-boot-disk",
      ]);
      await expect(desk.createMachine({ ...inputs, importedDisk: undefined })).rejects.toThrow(/missing source information/);
    },
  );

  test(
    "is a change that a machine, or its running guest, cannot take",
    shows("virtlift/change-refused", "virtlift/restart-needed"),
    async ({ libvirtd, desk }) => {
      const declared = {
        ...own(libvirtd),
        name: "mine",
        memoryMiB: 64,
        domainType: "qemu",
        serialLog: join(libvirtd.directory, "mine.log"),
        disks: [{ size: "2MiB", name: "data" }],
      };
      const state = await desk.createMachine((await desk.checkMachine("mine", declared)).inputs);
      const smaller = await desk.checkMachine("mine", { ...declared, disks: [{ size: "1MiB", name: "data" }] }, state as never);
      expect(rulesOf(smaller.failures)).toEqual(["virtlift/change-refused"]);
      const kept = await desk.updateMachine(state, smaller.inputs);
      expect(kept.disks[0]?.size).toBe(MIB);
      expect(await libvirtd.virsh("vol-info", "--pool", "default", "mine-data.qcow2")).toMatch(/Capacity: +2.00 MiB/);
      const other = await desk.checkMachine("mine", { ...declared, firmware: "uefi" }, state as never);
      expect(rulesOf(other.failures)).toEqual(["virtlift/restart-needed"]);
      await expect(desk.updateMachine(state, other.inputs)).rejects.toThrow(/is running, and this changes at its next start only/);
      await libvirtd.virsh("destroy", "mine");
      await libvirtd.virsh("undefine", "mine", "--nvram");
    },
  );
});

test("every rule that blocks is shown here, elsewhere, or cannot be", () => {
  const blocking = RULES.filter(({ level }) => level === "block").map(({ id }) => id);
  expect(blocking.filter((id) => !shown.has(id) && !(id in ELSEWHERE))).toEqual([]);
  expect(Object.keys(ELSEWHERE).filter((id) => shown.has(id) || !blocking.includes(id))).toEqual([]);
});
