/** What check makes of a machine's arguments, and the domain that they stand for. Pure: asks no host. */
import { createHash } from "node:crypto";
import type { DiskSpec, InterfaceSpec, ObservedDisk, ObservedInterface } from "../libvirt/domain-devices.ts";
import { type DomainSpec, type ObservedDomain, type OwnVolume, parseDomain, renderDomain } from "../libvirt/domain.ts";
import { encodeIso9660 } from "../image/iso9660.ts";
import { isSame } from "../libvirt/same.ts";
import type { DeclaredHost } from "./connect.ts";
import type { DiskRef } from "./schema.ts";
import type { VirtualMachineArgs } from "./virtual-machine-schema.ts";

type DeclaredDisk = VirtualMachineArgs["disks"][number];
type DeclaredNetwork = VirtualMachineArgs["networks"][number];

/** An imported disk of which it is known where it lies. */
export type PlacedDiskRef = DiskRef & { readonly path: string; readonly format: "qcow2" | "raw" };

/** A template that was found, and the machine's own volume that is made from it, always qcow2. */
export type PlacedImage = NonNullable<VirtualMachineArgs["image"]> & {
  readonly template: { readonly path: string; readonly format: "qcow2" | "raw" };
  readonly volumeName: string;
  readonly volumePath: string;
};

/** A further disk of which it is known where it lies. */
export type PlacedDisk = DeclaredDisk & {
  /** Undefined: a CD-ROM drive that is empty. */
  readonly path?: string | undefined;
  readonly format: "qcow2" | "raw";
  readonly bus: NonNullable<DeclaredDisk["bus"]>;
  /** The volume's name, of a blank disk. */
  readonly volumeName?: string;
};

/** A seed for cloud-init, and the volume that it is written to. */
export type PlacedSeed = NonNullable<VirtualMachineArgs["cloudInit"]> & { readonly volumeName: string; readonly volumePath: string };

export type PlacedNetwork = DeclaredNetwork & { readonly mac: string; readonly model: NonNullable<DeclaredNetwork["model"]> };

/** A machine as checked: all of it is known in preview. */
export interface MachineInputs extends Omit<
  VirtualMachineArgs,
  "host" | "name" | "uuid" | "importedDisk" | "image" | "disks" | "networks" | "domainType" | "serialLog" | "cloudInit"
> {
  readonly host: DeclaredHost;
  readonly name: string;
  readonly uuid: string;
  readonly importedDisk?: PlacedDiskRef | undefined;
  readonly image?: PlacedImage | undefined;
  readonly disks: readonly PlacedDisk[];
  readonly networks: readonly PlacedNetwork[];
  readonly cloudInit?: PlacedSeed | undefined;
  readonly domainType: "kvm" | "qemu" | "test";
  /** In the order of `networks`. */
  readonly macAddresses: readonly string[];
  /** Absolute paths on the host, the boot disk first; an empty text for a CD-ROM drive that is empty. */
  readonly diskPaths: readonly string[];
  /** The names by which libvirt knows the disks, the boot disk first, the seed's drive last. A state that was stored without them has those that `targetsOf` gives. */
  readonly diskTargets?: readonly string[] | undefined;
  /** Absolute path, on the host, of the file that keeps what the guest writes to its first serial port. */
  readonly serialLog: string;
  /** The properties that the user gave: only these drift. */
  readonly declared: readonly string[];
}

/** A volume that is made for a machine and goes with it. */
export interface VolumePlan {
  readonly pool: string;
  readonly name: string;
  readonly path: string;
  readonly format: "qcow2" | "raw";
  /** Undefined: the template's. */
  readonly capacityBytes: number | undefined;
  readonly template?: { readonly path: string; readonly format: "qcow2" | "raw"; readonly mode: "copy" | "overlay" };
  /** All that is to be in it; undefined: it is blank or the template's. */
  readonly content?: Uint8Array;
}

type Volumes = Pick<MachineInputs, "name" | "uuid" | "image" | "disks" | "cloudInit">;

/** The volumes that the machine is to have of its own. */
export function ownVolumes({ name: machine, uuid, image, disks, cloudInit }: Volumes): readonly VolumePlan[] {
  const boot: readonly VolumePlan[] = image
    ? [
        {
          pool: image.pool,
          name: image.volumeName,
          path: image.volumePath,
          format: "qcow2",
          capacityBytes: image.capacity,
          template: { ...image.template, mode: image.mode },
        },
      ]
    : [];
  const blank = disks.flatMap(({ pool, volumeName, path, format, size }): readonly VolumePlan[] =>
    volumeName === undefined || path === undefined ? [] : [{ pool, name: volumeName, path, format, capacityBytes: size }],
  );
  if (cloudInit === undefined) return [...boot, ...blank];
  const content = encodeSeed(cloudInit, { machine, uuid });
  const { pool, volumeName: name, volumePath: path } = cloudInit;
  return [...boot, ...blank, { pool, name, path, format: "raw", capacityBytes: content.length, content }];
}

/** The seed's image: what cloud-init's NoCloud source looks for on a file system with the label `cidata`. */
export function encodeSeed(
  { userData, metaData, networkData, vendorData }: NonNullable<VirtualMachineArgs["cloudInit"]>,
  { machine, uuid }: { readonly machine: string; readonly uuid: string },
): Uint8Array {
  const files: Readonly<Record<string, string | undefined>> = {
    "meta-data": metaData ?? `instance-id: ${uuid}\nlocal-hostname: ${JSON.stringify(machine)}\n`,
    "network-config": networkData,
    "user-data": userData ?? "#cloud-config\n{}\n",
    "vendor-data": vendorData,
  };
  return encodeIso9660(
    "cidata",
    Object.entries(files).flatMap(([name, text]) => (text === undefined ? [] : [{ name, content: Buffer.from(text, "utf8") }])),
  );
}

/** Whether Windows runs inside, by the word of the user or an id of libosinfo. */
export function isWindows(guest: string | undefined): boolean {
  return guest !== undefined && (/^win/i.test(guest) || /^https?:\/\/microsoft\.com\//i.test(guest));
}

/** The domain that the inputs stand for. `volumes` are those that the machine owns on its host, whether it still uses them or not. */
export function domainSpec(inputs: MachineInputs, volumes: readonly OwnVolume[]): DomainSpec {
  const { importedDisk, cpu, cpuPinning, graphics = { type: "vnc" }, maxMemoryMiB = inputs.memoryMiB, xmlPatches = [] } = inputs;
  const maxVcpus = inputs.maxVcpus ?? inputs.vcpus;
  const windows = isWindows(inputs.guest);
  return {
    type: inputs.domainType,
    name: inputs.name,
    uuid: inputs.uuid,
    title: inputs.title,
    description: inputs.description,
    metadata: {
      origin: inputs.origin,
      disks: [importedDisk, ...inputs.disks.map(({ disk }) => disk)].flatMap((disk) =>
        disk ? [{ diskId: disk.diskId, source: disk.source, migrationRef: disk.migrationRef }] : [],
      ),
      volumes,
      tags: inputs.tags,
      patches: xmlPatches.length === 0 ? undefined : createHash("sha256").update(JSON.stringify(xmlPatches)).digest("hex").slice(0, 16),
    },
    memoryKiB: inputs.memoryMiB * 1024,
    maxMemoryKiB: maxMemoryMiB === inputs.memoryMiB ? undefined : maxMemoryMiB * 1024,
    hugepagesKiB: inputs.hugepages && HUGEPAGES_KIB[inputs.hugepages],
    vcpus: inputs.vcpus,
    maxVcpus: maxVcpus === inputs.vcpus ? undefined : maxVcpus,
    pinning:
      cpuPinning && Object.keys(cpuPinning).length > 0
        ? Object.entries(cpuPinning)
            .map(([vcpu, cpus]) => ({ vcpu: Number(vcpu), cpus }))
            .toSorted((one, other) => one.vcpu - other.vcpu)
        : undefined,
    arch: "x86_64",
    machine: inputs.machine,
    firmware: inputs.firmware,
    secureBoot: inputs.secureBoot,
    loader: inputs.loader,
    smbios: inputs.smbios && writtenTables(inputs.smbios),
    cpu: cpu && {
      mode: cpu.mode,
      model: cpu.model,
      features: cpu.features && Object.keys(cpu.features).length > 0 ? cpu.features : undefined,
      isMigratable: cpu.migratable === false ? false : undefined,
    },
    topology: inputs.cpuTopology,
    clock: inputs.clock ?? (windows ? "localtime" : "utc"),
    hasHyperv: inputs.hyperv ?? (windows && inputs.domainType === "kvm"),
    disks: diskSpecs(inputs),
    interfaces: inputs.networks.map(interfaceSpec),
    serialLog: inputs.serialLog,
    graphics: graphics.type === "none" ? undefined : { type: graphics.type, listen: graphics.listen ?? "127.0.0.1" },
    video: videoOf(inputs),
    hasTpm: inputs.tpm ?? false,
    hasBalloon: inputs.ballooning ?? true,
    hasRng: inputs.rng ?? true,
    watchdog: inputs.watchdog,
    xmlPatches,
  };
}

const HUGEPAGES_KIB = { default: 0, "2MiB": 2048, "1GiB": 1024 * 1024 } as const;

function videoOf({ video, graphics }: MachineInputs): string | undefined {
  const model = video ?? (graphics?.type === "none" ? "none" : "vga");
  return model === "none" ? undefined : model;
}

/** Without the tables that have no entry. */
function writtenTables(smbios: NonNullable<MachineInputs["smbios"]>): DomainSpec["smbios"] {
  const tables = Object.entries(smbios).map(([table, entries]) => [
    table,
    Object.fromEntries(Object.entries(entries ?? {}).filter(([, value]) => value !== undefined)),
  ]);
  return Object.fromEntries(tables.filter(([, entries]) => Object.keys(entries ?? {}).length > 0)) as DomainSpec["smbios"];
}

/** The machine's disks: the boot disk first, then the further ones, then the seed's drive. */
export function diskSpecs(inputs: MachineInputs): readonly DiskSpec[] {
  const { importedDisk, image, bootDisk = {}, cloudInit } = inputs;
  const targets = inputs.diskTargets ?? targetsOf(inputs);
  const serving = ({ cache, io, discard, serial, bootOrder }: NonNullable<MachineInputs["bootDisk"]>) => ({
    cache,
    io,
    discard,
    serial,
    bootOrder,
  });
  const boot = {
    ...serving({ bootOrder: 1, discard: "unmap", ...bootDisk }),
    device: "disk" as const,
    path: importedDisk?.path ?? image?.volumePath ?? "",
    format: importedDisk?.format ?? "qcow2",
    bus: inputs.bus,
    isReadOnly: false,
  };
  const further = inputs.disks.map((disk) => ({
    // libvirt lets what is shared go past the host's cache by itself.
    ...serving({ ...(disk.device === "disk" && { discard: "unmap" }), ...(disk.shareable && { cache: "none" }), ...disk }),
    device: disk.device,
    path: disk.path,
    format: disk.path === undefined ? undefined : disk.format,
    bus: disk.bus,
    isReadOnly: disk.readOnly || disk.device === "cdrom",
    isShareable: disk.shareable === true ? (true as const) : undefined,
  }));
  const seed = cloudInit && {
    device: "cdrom" as const,
    path: cloudInit.volumePath,
    format: "raw" as const,
    bus: seedBus(inputs),
    isReadOnly: true,
  };
  return [boot, ...further, ...(seed ? [seed] : [])].map((disk, index) => ({ ...disk, target: targets[index] ?? "" }));
}

function seedBus({ machine }: Pick<MachineInputs, "machine">): "sata" | "ide" {
  return machine === "q35" ? "sata" : "ide";
}

const TARGET_PREFIX = { virtio: "vd", sata: "sd", scsi: "sd", ide: "hd" } as const;

/** The names by which libvirt is to know the disks of a machine. */
type Slots = Pick<MachineInputs, "bus" | "machine" | "importedDisk" | "image" | "disks" | "cloudInit" | "diskTargets">;

/**
 * The disks' names in libvirt: `vda`, `vdb`, ..., `vdaa`, counted for each prefix; the boot disk's first, the seed's drive last. A disk that was there
 * before keeps its name, so that what comes and goes beside it does not move it.
 */
export function targetsOf(inputs: Omit<Slots, "diskTargets">, olds?: Slots): readonly string[] {
  const before =
    olds === undefined
      ? []
      : drivesOf(olds).map((drive, index) => ({ ...drive, target: (olds.diskTargets ?? targetsOf(olds))[index] ?? "" }));
  const wanted = drivesOf(inputs);
  const kept = new Map<number, string>();
  const free = (target: string): boolean => ![...kept.values()].includes(target);
  const keep = (fits: (drive: Drive, old: Drive) => boolean): void => {
    for (const [index, drive] of wanted.entries()) {
      if (kept.has(index)) continue;
      const old = before.find((each) => each.bus === drive.bus && each.device === drive.device && free(each.target) && fits(drive, each));
      if (old) kept.set(index, old.target);
    }
  };
  keep((drive, old) => drive.role === old.role && drive.role !== "further");
  keep((drive, old) => drive.role === old.role && drive.path !== undefined && drive.path === old.path);
  // Another medium is in the same drive.
  keep((drive, old) => drive.role === old.role && drive.device === "cdrom");
  const used = new Set(kept.values());
  return wanted.map(({ bus }, index) => {
    const known = kept.get(index);
    if (known !== undefined) return known;
    for (let number = 0; ; number++) {
      const target = TARGET_PREFIX[bus] + letters(number);
      if (used.has(target)) continue;
      used.add(target);
      return target;
    }
  });
}

interface Drive {
  readonly role: "boot" | "further" | "seed";
  readonly device: "disk" | "cdrom";
  readonly bus: DiskSpec["bus"];
  readonly path: string | undefined;
}

function drivesOf(inputs: Omit<Slots, "diskTargets">): readonly Drive[] {
  const further = inputs.disks.map(({ device, bus, path }): Drive => ({ role: "further", device, bus, path }));
  return [
    { role: "boot", device: "disk", bus: inputs.bus, path: undefined },
    ...further,
    ...(inputs.cloudInit ? [{ role: "seed", device: "cdrom", bus: seedBus(inputs), path: undefined } as const] : []),
  ];
}

/** 0 is `a`, 25 `z`, 26 `aa`. */
function letters(number: number): string {
  const letter = String.fromCharCode("a".charCodeAt(0) + (number % 26));
  return number < 26 ? letter : letters(Math.floor(number / 26) - 1) + letter;
}

/** A network as the interface that it stands for. */
export function interfaceSpec({ network, bridge, direct, mode, mac, model, vlan, link, mtu, queues }: PlacedNetwork): InterfaceSpec {
  const more = { mac, model, vlan, isLinkDown: link === "down" ? (true as const) : undefined, mtu, queues };
  if (network !== undefined) return { type: "network", source: network, ...more };
  if (bridge !== undefined) return { type: "bridge", source: bridge, ...more };
  if (direct !== undefined) return { type: "direct", source: direct, mode: mode ?? "bridge", ...more };
  return { type: "user", source: undefined, ...more };
}

/** What is defined, when the specification is. Disks are in the order of their names, as libvirt keeps them, interfaces in that of their addresses. */
export function definitionOf(spec: DomainSpec): ObservedDomain {
  return inOrder(parseDomain(renderDomain(spec)));
}

/** Whether the machine is defined as the specification says. Throws PatchError. */
export function isDefined(defined: ObservedDomain, spec: DomainSpec): boolean {
  return isSame(inOrder(defined), definitionOf(spec));
}

function inOrder(domain: ObservedDomain): ObservedDomain {
  const byTarget = (one: ObservedDisk, other: ObservedDisk): number =>
    one.target.length - other.target.length || (one.target < other.target ? -1 : 1);
  const byMac = (one: ObservedInterface, other: ObservedInterface): number => (one.mac < other.mac ? -1 : 1);
  return { ...domain, disks: domain.disks.toSorted(byTarget), interfaces: domain.interfaces.toSorted(byMac) };
}

/** Whether a running machine has the hardware that `wanted` has. Title, metadata and the like are no hardware. */
export function hasHardware(live: ObservedDomain, wanted: ObservedDomain): boolean {
  // While a machine runs, libvirt shows the firmware that it chose as if it had been given.
  const loader = wanted.loader && live.loader;
  return isSame(hardware({ ...live, loader }), hardware(wanted)) && hasCpu(live, wanted);
}

/** How much of its memory a guest has given back is for it to decide, and on which CPUs it runs for its host. */
function hardware(domain: ObservedDomain) {
  const {
    uuid: _u,
    title: _t,
    description: _d,
    metadata,
    cpu: _c,
    name: _n,
    arch: _a,
    pinning: _p,
    memoryKiB,
    maxMemoryKiB = memoryKiB,
    ...rest
  } = domain;
  return { ...rest, ...devicesOf(inOrder(domain)), maxMemoryKiB, patches: metadata?.patches };
}

function devicesOf({ disks, interfaces }: ObservedDomain) {
  return { disks, interfaces };
}

/** While a machine runs, libvirt writes what host-model stood for in its place, and features that the model has or lacks by itself. */
function hasCpu({ cpu: live }: ObservedDomain, { cpu: wanted }: ObservedDomain): boolean {
  if (wanted === undefined || (wanted.mode === "host-model" && live?.mode === "custom")) return true;
  return live?.mode === wanted.mode && live.model === wanted.model && live.isMigratable === wanted.isMigratable;
}

/** Whether the file `top` lies on top of the declared one, by a snapshot. */
export type IsSnapshot = (top: string, declared: string) => boolean;

/** The specification with the files that snapshots put on top of the declared ones: a definition with the declared file would break the chain. */
export function keepSnapshots(spec: DomainSpec, defined: ObservedDomain, isSnapshot: IsSnapshot): DomainSpec {
  const disks = spec.disks.map((disk): DiskSpec => {
    const top = disk.device === "disk" ? defined.disks.find(({ target }) => target === disk.target) : undefined;
    if (top?.path === undefined || disk.path === undefined || top.path === disk.path || !isSnapshot(top.path, disk.path)) return disk;
    return { ...disk, path: top.path, format: "qcow2" };
  });
  return { ...spec, disks };
}

/** The namespace of the UUIDs that machines get by their origin: UUID version 5 of the DNS name virtlift.dev. */
const UUID_NAMESPACE = "5b5a2bb5-322b-58f3-81df-a4ce02bcce18";

/** The machine's UUID by its identity: version 5 of RFC 9562. */
export function uuidOf(origin: string): string {
  const hash = createHash("sha1")
    .update(Buffer.from(UUID_NAMESPACE.replaceAll("-", ""), "hex"))
    .update(origin)
    .digest();
  hash[6] = (hash[6]! & 0x0f) | 0x50;
  hash[8] = (hash[8]! & 0x3f) | 0x80;
  return hash.toString("hex", 0, 16).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** The address of the machine's interface at `index`, in the range that QEMU and libvirt use. */
export function macOf(origin: string, index: number): string {
  const hash = createHash("sha256").update(`${origin}#${index}`).digest("hex");
  return `52:54:00:${hash.slice(0, 2)}:${hash.slice(2, 4)}:${hash.slice(4, 6)}`;
}

/** The logical name as a machine's name. */
export function nameOf(origin: string): string {
  const logicalName = origin.split("/").slice(3).join("/");
  return (
    logicalName
      .replaceAll(/[^A-Za-z0-9._+-]+/g, "-")
      .replace(/^[^A-Za-z0-9]+/, "")
      .slice(0, 100) || "machine"
  );
}
