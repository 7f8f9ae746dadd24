/** The rules on facts that cannot be had on the machine that runs the tests, the settings of users, and the page. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { readPartitions } from "../../../provider/image/partitions.ts";
import type { DiskFacts } from "../../../provider/resources/preflight/disk-facts.ts";
import { DISK_RULES } from "../../../provider/resources/preflight/disk-rules.ts";
import type { MachineFacts } from "../../../provider/resources/preflight/machine-facts.ts";
import { MACHINE_RULES } from "../../../provider/resources/preflight/machine-rules.ts";
import { judge, type PreflightSettings, type Rule } from "../../../provider/resources/preflight/rule.ts";
import { RULES } from "../../../provider/resources/preflight/rules.ts";
import { renderRulesPage } from "../../../scripts/rules/page.ts";

const PARTITIONS = readPartitions(Buffer.alloc(32 * 1024));

const MACHINE = {
  inputs: {
    name: "web",
    machine: "q35",
    domainType: "kvm",
    firmware: "bios",
    secureBoot: false,
    cpu: { mode: "host-passthrough" },
    bus: "sata",
    vcpus: 2,
    memoryMiB: 2048,
    powerState: "running",
    importedDisk: { diskId: "a", path: "/pool/a.qcow2", format: "qcow2" },
    disks: [],
    networks: [],
    diskPaths: ["/pool/a.qcow2"],
    declared: [],
  },
  host: {
    label: "root@kvm1",
    isLocal: false,
    domainTypes: new Set(["kvm", "qemu"]),
    security: { models: ["dac"], qemuUser: { uid: 107, gid: 107 } },
    memoryMiB: 65_536,
    cpus: 16,
    libvirtVersion: 9_000_000,
    hypervisorVersion: 7_002_000,
  },
  system: { bridges: new Set(["br0"]), clockAheadSeconds: 0.2 },
  offer: {
    uefi: true,
    secureBoot: true,
    maxVcpus: 288,
    cpuModes: ["host-passthrough", "custom"],
    cpuModels: new Set(["Skylake-Server", "Westmere"]),
    diskBuses: ["sata", "virtio", "scsi"],
    tpm: true,
  },
  cpuGaps: [],
  networks: [],
  neighbours: [],
  takenVolumes: new Set(),
  folders: [],
  siblings: [],
  boot: undefined,
};

const FOLDER = { path: "/pool", names: new Set(), parts: new Map(), freeBytes: 1e12, fileSystem: "ext2/ext3", device: "1", steps: [] };
const step = (mode: string, uid = 0, gid = 0) => ({ path: "/pool", mode, uid, gid });

const system = (more: object = {}) => ({
  guest: { cimId: undefined, vendorId: "windows2019srv_64Guest", description: undefined },
  firmware: "bios",
  hasVtpm: false,
  usbControllers: [],
  others: [],
  floppies: [],
  nics: [],
  cpuHotAdd: false,
  memoryHotAdd: false,
  ...more,
});
const packed = (more: object = {}, bus = "scsi") => {
  const disk = { index: 0, place: { name: "a.vmdk" }, controller: { bus, model: "lsilogic", busNumber: 0 }, capacityBytes: 1024 };
  return { package: { system: system(more), disks: [disk], manifest: new Map() }, disk };
};

/** The ids of the rules that speak, with the facts changed at the places named. */
const asked = <Facts>(rules: readonly Rule<Facts>[], facts: object, settings: PreflightSettings = {}) =>
  judge(rules, facts as Facts, settings).map(({ rule }) => rule);

describe("a machine", () => {
  const inputs = (more: object) => ({ ...MACHINE, inputs: { ...MACHINE.inputs, ...more } });
  const host = (more: object) => ({ ...MACHINE, host: { ...MACHINE.host, ...more } });
  const boot = (partitions: object, more: object = {}, holdsFat = false) => ({
    ...inputs(more),
    boot: { partitions: { ...PARTITIONS, ...partitions }, holdsFat, packed: undefined },
  });
  const efi = { table: "gpt", hasEfiSystemPartition: true };

  const CASES: Readonly<Record<string, readonly [object, readonly string[]]>> = {
    "that is all right": [MACHINE, []],
    "of a chipset that the host lacks": [{ ...MACHINE, offer: "unsupported" }, ["virtlift/machine-type"]],
    "where libvirt cannot tell": [{ ...inputs({ firmware: "uefi", tpm: true }), offer: undefined }, []],
    "on a bus that QEMU lacks": [inputs({ bus: "ide" }), ["virtlift/disk-bus"]],
    "with a CPU that the processor is not": [
      { ...inputs({ cpu: { mode: "custom", model: "Skylake-Server" } }), cpuGaps: ["mpx"] },
      ["virtlift/cpu-unusable"],
    ],
    "with more vCPUs than processors": [inputs({ vcpus: 17 }), ["virtlift/vcpus-beyond-host"]],
    "beside others that want the memory too": [
      { ...MACHINE, siblings: [{ origin: "o", name: "db", uuid: "u", macs: [], writablePaths: [], memoryMiB: 64_000, isRunning: true }] },
      ["virtlift/memory-for-all"],
    ],
    "that falls back on emulation": [
      { ...inputs({ domainType: "qemu" }), host: { ...MACHINE.host, domainTypes: new Set(["qemu"]) } },
      ["virtlift/no-acceleration"],
    ],
    "that was declared as emulated": [
      { ...inputs({ domainType: "qemu", declared: ["domainType"] }), host: { ...MACHINE.host, domainTypes: new Set(["qemu"]) } },
      [],
    ],
    "on an old libvirt": [
      { ...host({ libvirtVersion: 7_000_000 }), inputs: { ...MACHINE.inputs, firmware: "uefi" } },
      ["virtlift/libvirt-too-old"],
    ],
    "on a host whose clock is wrong": [{ ...MACHINE, system: { ...MACHINE.system, clockAheadSeconds: -90 } }, ["virtlift/clock-skew"]],
    "with BIOS and a disk for UEFI": [boot(efi), ["virtlift/uefi-disk-on-bios"]],
    "with BIOS and a disk for both": [boot({ ...efi, hasBootCode: true, hasBiosBootPartition: true }), []],
    "with UEFI and a disk for it": [boot(efi, { firmware: "uefi" }), []],
    "with UEFI and a disk for BIOS": [
      boot({ table: "mbr", hasBootCode: true, partitions: [{ type: "83" }] }, { firmware: "uefi" }),
      ["virtlift/bios-disk-on-uefi"],
    ],
    "with UEFI and a FAT partition of any type": [
      boot({ table: "mbr", hasBootCode: true, partitions: [{ type: "83" }] }, { firmware: "uefi" }, true),
      [],
    ],
    "with UEFI and logical partitions": [boot({ table: "mbr", hasBootCode: true, partitions: [{ type: "05" }] }, { firmware: "uefi" }), []],
    "with a blank disk": [boot({}), ["virtlift/nothing-to-boot"]],
    "of Windows, put on virtio": [{ ...inputs({ bus: "virtio" }), boot: { packed: packed() } }, ["virtlift/guest-driver"]],
    "of Windows that was on virtio": [{ ...inputs({ bus: "virtio" }), boot: { packed: packed({}, "virtio") } }, []],
    "of Windows, put on sata": [{ ...MACHINE, boot: { packed: packed() } }, []],
    "of Windows XP, put on sata": [
      { ...MACHINE, boot: { packed: packed({ guest: { cimId: undefined, vendorId: "winXPProGuest", description: undefined } }) } },
      ["virtlift/guest-driver"],
    ],
    "of Windows 10 as VMware names it, put on sata": [
      { ...MACHINE, boot: { packed: packed({ guest: { cimId: undefined, vendorId: "windows9_64Guest", description: undefined } }) } },
      [],
    ],
    "of Linux, put on virtio": [
      {
        ...inputs({ bus: "virtio" }),
        boot: { packed: packed({ guest: { cimId: 94, vendorId: "ubuntu64Guest", description: undefined } }) },
      },
      [],
    ],
    "of Windows with a virtio card": [
      { ...inputs({ networks: [{ type: "user", mac: "m", model: "virtio" }] }), boot: { packed: packed() } },
      ["virtlift/guest-nic-driver"],
    ],
    "of UEFI in its package, with BIOS": [
      { ...MACHINE, boot: { partitions: { ...PARTITIONS, ...efi, hasBootCode: true }, packed: packed({ firmware: "efi" }) } },
      ["virtlift/uefi-disk-on-bios"],
    ],
    "below a folder of root's alone": [
      { ...MACHINE, folders: [{ ...FOLDER, steps: [step("drwx------")] }] },
      ["virtlift/path-unreachable"],
    ],
    "below a folder with an access control list": [{ ...MACHINE, folders: [{ ...FOLDER, steps: [step("drwx------+")] }] }, []],
    "below a folder of QEMU's own": [{ ...MACHINE, folders: [{ ...FOLDER, steps: [step("drwx------", 107, 107)] }] }, []],
    "below a folder that all may pass": [{ ...MACHINE, folders: [{ ...FOLDER, steps: [step("drwx--x--x")] }] }, []],
    "on NFS under SELinux": [
      { ...host({ security: { models: ["selinux", "dac"], qemuUser: undefined } }), folders: [{ ...FOLDER, fileSystem: "nfs" }] },
      ["virtlift/path-confined"],
    ],
    "in a hidden folder under AppArmor": [
      {
        ...host({ security: { models: ["apparmor"], qemuUser: undefined } }),
        inputs: { ...MACHINE.inputs, diskPaths: ["/home/ada/.vm/a.qcow2"] },
      },
      ["virtlift/path-confined"],
    ],
  };
  test.for(Object.entries(CASES))("%s", ([, [facts, expected]]) => {
    expect(asked(MACHINE_RULES, facts)).toEqual(expected);
  });

  test("is told by its kind where the host has none of that kind, and else by its chipset", () => {
    const propertyOf = (facts: object) => judge(MACHINE_RULES, facts as MachineFacts, {}).map(({ property }) => property);
    expect(propertyOf({ ...MACHINE, offer: "unsupported" })).toEqual(["machine"]);
    expect(propertyOf({ ...host({ domainTypes: new Set(["qemu"]) }), offer: "unsupported" })).toEqual(["domainType"]);
  });
});

describe("a disk", () => {
  const SOURCE = {
    path: "/a.ova",
    format: "vmdk",
    variant: "streamOptimized",
    virtualSizeBytes: 1024,
    dataBytes: 512,
    fileBytes: 300,
    digests: [{ algorithm: "sha256", hex: "" }],
    notes: [],
    partitions: PARTITIONS,
    packed: packed(),
  };
  const DISK = {
    inputs: { format: "qcow2", layout: "sparse", path: "/pool/a.qcow2", volumeName: "a.qcow2", source: { ova: "a.ova" } },
    host: MACHINE.host,
    place: {
      pool: { name: "default", type: "dir", isBlock: false, path: "/pool" },
      uploadReason: undefined,
      freeBytes: 1e9,
      partBytes: 0,
      file: undefined,
    },
    users: [],
    givenName: undefined,
    source: SOURCE,
    siblings: [],
    pending: [],
  } as unknown as DiskFacts;
  const source = (more: object) => ({ ...DISK, source: { ...SOURCE, ...more } });
  const place = (more: object) => ({ ...DISK, place: { ...DISK.place, ...more } });

  const CASES: Readonly<Record<string, readonly [object, readonly string[]]>> = {
    "that is all right": [DISK, []],
    "in a folder without hard links": [place({ fileSystem: { type: "exfat", isReadOnly: false } }), ["virtlift/pool-file-system"]],
    "in such a folder, written by libvirt": [
      place({ fileSystem: { type: "vfat", isReadOnly: false }, uploadReason: "root may not write there" }),
      ["virtlift/upload-stream"],
    ],
    "in a folder as most are": [place({ fileSystem: { type: "ext4", isReadOnly: false } }), []],
    "partitioned for other sectors": [source({ partitions: { ...PARTITIONS, sectorBytes: 4096 } }), ["virtlift/sector-size"]],
    "that is empty": [source({ dataBytes: 0 }), ["virtlift/empty-image"]],
    "of another size than its package says": [source({ virtualSizeBytes: 2048 }), ["virtlift/size-differs"]],
    "of a package without a manifest": [source({ digests: [undefined] }), ["virtlift/no-manifest"]],
    "that nothing vouches for": [source({ digests: [undefined], packed: undefined }), ["virtlift/no-checksum"]],
    "that only SHA-1 vouches for": [source({ digests: [{ algorithm: "sha1", hex: "" }] }), ["virtlift/weak-checksum"]],
    "of a machine with a TPM": [source({ packed: packed({ hasVtpm: true }) }), ["virtlift/vtpm-lost"]],
    "of a machine with UEFI": [source({ packed: packed({ firmware: "efi" }) }), ["virtlift/nvram-lost"]],
    "of a machine with USB": [source({ packed: packed({ usbControllers: ["ehci"] }) }), ["virtlift/usb-lost"]],
    "of a machine with sound": [
      source({ packed: packed({ others: ['sound card "s"', "other device (vmware.vmci)"] }) }),
      ["virtlift/hardware-lost"],
    ],
    "of a machine with a device of its host": [
      source({ packed: packed({ others: ['other device "gpu" (vmware.pcipassthrough)'] }) }),
      ["virtlift/passthrough-lost"],
    ],
    "of a machine that could grow": [source({ packed: packed({ memoryHotAdd: true }) }), ["virtlift/hot-add-lost"]],
    "on a pool of devices": [
      {
        ...DISK,
        place: { ...DISK.place, pool: { ...DISK.place.pool, isBlock: true } },
        host: { ...MACHINE.host, libvirtVersion: 6_000_000 },
      },
      ["virtlift/device-format", "virtlift/device-libvirt"],
    ],
  };
  test.for(Object.entries(CASES))("%s", ([, [facts, expected]]) => {
    expect(asked(DISK_RULES, facts)).toEqual(expected);
  });

  test("speaks for its machine only as the first of its disks", () => {
    const second = { index: 1, place: { name: "b.vmdk" }, controller: undefined, capacityBytes: 1024 };
    const first = packed({ hasVtpm: true });
    const both = { ...first.package, disks: [first.disk, second] };
    expect(asked(DISK_RULES, source({ packed: { package: both, disk: second } }))).toEqual([]);
  });

  test("of a change is judged with its level and its reason", () => {
    const facts = source({ dataBytes: 0 }) as unknown as DiskFacts;
    const judged = (setting: PreflightSettings[string]) => judge(DISK_RULES, facts, { "virtlift/empty-image": setting })[0];
    expect(judged({ level: "block", reason: "never" })).toMatchObject({ level: "block", waiver: "never", isWaived: false });
    expect(judged({ reason: "a template" })).toMatchObject({ level: "info", waiver: "a template", isWaived: true });
  });
});

describe("every rule", () => {
  test("has an id of its own, and says what it finds and what to do", () => {
    expect(new Set(RULES.map(({ id }) => id)).size).toBe(RULES.length);
    for (const { id, summary, remedy } of RULES) {
      expect(id).toMatch(/^virtlift\/[a-z0-9]+(-[a-z0-9]+)*$/);
      expect(`${id}: ${summary}`).toMatch(/: [A-Z"].*\.$/);
      expect(`${id}: ${remedy}`).toMatch(/: .*\.$/);
    }
  });

  test("stands on the page as it is: node scripts/rules.ts", async () => {
    expect(await readFile(join(import.meta.dirname, "../../../docs/rules.md"), "utf8")).toBe(renderRulesPage());
  });
});
