/** What check makes of a machine's arguments, and the domain that they stand for. Pure: asks no host. */
import { createHash } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import type { DiskSpec, DomainSpec, InterfaceSpec, ObservedDisk, ObservedDomain, OwnVolume } from "../libvirt/domain.ts";
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
  readonly path: string;
  readonly format: "qcow2" | "raw";
  readonly bus: NonNullable<DeclaredDisk["bus"]>;
  /** The volume's name, of a blank disk. */
  readonly volumeName?: string;
};

export type PlacedNetwork = DeclaredNetwork & { readonly mac: string; readonly model: NonNullable<DeclaredNetwork["model"]> };

/** A machine as checked: all of it is known in preview. */
export interface MachineInputs extends Omit<
  VirtualMachineArgs,
  "host" | "name" | "uuid" | "importedDisk" | "image" | "disks" | "networks" | "domainType" | "serialLog"
> {
  readonly host: DeclaredHost;
  readonly name: string;
  readonly uuid: string;
  readonly importedDisk?: PlacedDiskRef | undefined;
  readonly image?: PlacedImage | undefined;
  readonly disks: readonly PlacedDisk[];
  readonly networks: readonly PlacedNetwork[];
  readonly domainType: "kvm" | "qemu" | "test";
  /** In the order of `networks`. */
  readonly macAddresses: readonly string[];
  /** Absolute paths on the host, the boot disk first. */
  readonly diskPaths: readonly string[];
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
}

/** The volumes that the machine is to have of its own. */
export function ownVolumes({ image, disks }: Pick<MachineInputs, "image" | "disks">): readonly VolumePlan[] {
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
    volumeName === undefined ? [] : [{ pool, name: volumeName, path, format, capacityBytes: size }],
  );
  return [...boot, ...blank];
}

/** The domain that the inputs stand for. `volumes` are those that the machine owns on its host, whether it still uses them or not. */
export function domainSpec(inputs: MachineInputs, volumes: readonly OwnVolume[]): DomainSpec {
  const { importedDisk, image } = inputs;
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
    },
    memoryKiB: inputs.memoryMiB * 1024,
    vcpus: inputs.vcpus,
    arch: "x86_64",
    machine: inputs.machine,
    firmware: inputs.firmware,
    secureBoot: inputs.secureBoot,
    cpu: inputs.cpu && { mode: inputs.cpu.mode, model: inputs.cpu.model },
    clock: "utc",
    disks: withTargets([
      {
        device: "disk",
        path: importedDisk?.path ?? image?.volumePath ?? "",
        format: importedDisk?.format ?? "qcow2",
        bus: inputs.bus,
        bootOrder: 1,
        serial: undefined,
        isReadOnly: false,
      },
      ...inputs.disks.map((disk) => ({
        device: disk.device,
        path: disk.path,
        format: disk.format,
        bus: disk.bus,
        bootOrder: undefined,
        serial: disk.serial,
        isReadOnly: disk.readOnly || disk.device === "cdrom",
      })),
    ]),
    interfaces: inputs.networks.map(interfaceSpec),
    serialLog: inputs.serialLog,
  };
}

const TARGET_PREFIX = { virtio: "vd", sata: "sd", scsi: "sd", ide: "hd" } as const;

/** libvirt knows disks by names: `vda`, `vdb`, ..., `vdaa`, counted for each prefix. */
function withTargets(disks: readonly Omit<DiskSpec, "target">[]): readonly DiskSpec[] {
  const used = new Map<string, number>();
  return disks.map((disk) => {
    const prefix = TARGET_PREFIX[disk.bus];
    const index = used.get(prefix) ?? 0;
    used.set(prefix, index + 1);
    const letter = (position: number): string => String.fromCharCode("a".charCodeAt(0) + position);
    return { ...disk, target: prefix + (index < 26 ? letter(index) : letter(Math.floor(index / 26) - 1) + letter(index % 26)) };
  });
}

function interfaceSpec({ network, bridge, mac, model }: PlacedNetwork): InterfaceSpec {
  if (network !== undefined) return { type: "network", source: network, mac, model };
  return bridge === undefined ? { type: "user", source: undefined, mac, model } : { type: "bridge", source: bridge, mac, model };
}

/** Whether two values are the same once they are stored: a key that is undefined counts as absent. */
export function isSame(one: unknown, other: unknown): boolean {
  return isDeepStrictEqual(asStored(one), asStored(other));
}

function asStored(value: unknown): unknown {
  return value === undefined ? undefined : (JSON.parse(JSON.stringify(value)) as unknown);
}

/** Whether a running machine has the hardware that `wanted` has. Title, metadata and the like are no hardware. */
export function hasHardware(live: ObservedDomain, wanted: ObservedDomain): boolean {
  return isSame(hardware(live), hardware(wanted)) && hasCpu(live, wanted);
}

function hardware({ type, memoryKiB, vcpus, machine, firmware, secureBoot, clock, disks, interfaces, serialLog }: ObservedDomain) {
  return { type, memoryKiB, vcpus, machine, firmware, secureBoot, clock, disks, interfaces, serialLog };
}

/** While a machine runs, libvirt writes what host-model stood for in its place. */
function hasCpu({ cpu: live }: ObservedDomain, { cpu: wanted }: ObservedDomain): boolean {
  if (wanted === undefined || (wanted.mode === "host-model" && live?.mode === "custom")) return true;
  return live?.mode === wanted.mode && live.model === wanted.model;
}

/**
 * The specification with the files that snapshots put on top of the declared ones: a definition with the declared file would break the chain.
 * `declaredPaths` are those of the last definition of ours; a file that is not among them and sits where one of them was is such a top.
 */
export function keepSnapshots(spec: DomainSpec, defined: ObservedDomain, declaredPaths: readonly string[]): DomainSpec {
  const disks = spec.disks.map((disk): DiskSpec => {
    const found = snapshotTop(disk, defined.disks, declaredPaths);
    return found === undefined ? disk : { ...disk, path: found, format: "qcow2" };
  });
  return { ...spec, disks };
}

/** The file that a snapshot put on top of the disk's; undefined when it has none. */
function snapshotTop(disk: DiskSpec, defined: readonly ObservedDisk[], declaredPaths: readonly string[]): string | undefined {
  const found = defined.find(({ target }) => target === disk.target);
  if (found?.path === undefined || found.format !== "qcow2" || disk.device !== "disk") return undefined;
  return declaredPaths.includes(disk.path) && !declaredPaths.includes(found.path) ? found.path : undefined;
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
