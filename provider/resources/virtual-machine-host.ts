/** What check asks of a machine's host: where things lie, what the host offers, and what is taken. Changes nothing there. */
import { posix } from "node:path";
import { isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { parseXml } from "../image/xml.ts";
import { parseDomainTypes, parseOffer } from "../libvirt/capabilities.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_XML } from "../libvirt/constants.ts";
import { type ObservedDomain, parseDomain } from "../libvirt/domain.ts";
import { PoolError, poolFolder } from "./pool.ts";
import type { CheckFailure } from "./resource.ts";
import type { DiskRef } from "./schema.ts";
import type { VirtualMachineArgs } from "./virtual-machine-schema.ts";
import { type MachineInputs, ownVolumes, type PlacedDisk, type PlacedDiskRef, type PlacedImage } from "./virtual-machine-spec.ts";

/** VIR_ERR_NO_SUPPORT of virterror.h. */
const NO_SUPPORT = 3;

/** Something that the user named is not there, or is not what it should be. `property` is the user's path to it. */
export class PlacementError extends Error {
  override readonly name = "PlacementError";
  readonly property: string;

  constructor(property: string, reason: string) {
    super(`${property}: ${reason}`);
    this.property = property;
  }
}

/** Where an imported disk lies or will lie. Throws PlacementError. */
export async function placeDiskRef(host: Host, property: string, disk: DiskRef): Promise<PlacedDiskRef> {
  const format = disk.format ?? "qcow2";
  const path = disk.path ?? posix.join(await folderOf(host, property, disk.pool ?? "default"), `${disk.diskId}.${format}`);
  return { ...disk, path, format };
}

/** Finds the template and names the machine's own volume. Throws PlacementError. */
export async function placeImage(host: Host, image: NonNullable<VirtualMachineArgs["image"]>, machine: string): Promise<PlacedImage> {
  const folder = await folderOf(host, "image.pool", image.pool);
  const found =
    image.path === undefined ? await volumeNamed(host, "image.volume", image.pool, image.volume!) : await volumeAt(host, image.path);
  if (found === undefined && image.mode === "copy") {
    throw new PlacementError(
      "image.path",
      `${image.path} on ${host.label} is in no active pool, which a copy needs: refresh its pool, or use the mode "overlay"`,
    );
  }
  const path = found?.path ?? image.path!;
  const format = image.format ?? asFormat("image.format", path, found?.format);
  const volumeName = `${machine}-boot.qcow2`;
  return { ...image, template: { path, format }, volumeName, volumePath: posix.join(folder, volumeName) };
}

/** Where a further disk lies or will lie, in what format and on what bus. Throws PlacementError. */
export async function placeDisk(
  host: Host,
  property: string,
  disk: VirtualMachineArgs["disks"][number],
  machine: Pick<MachineInputs, "name" | "machine" | "bus">,
): Promise<PlacedDisk> {
  const bus = disk.bus ?? (disk.device === "disk" ? machine.bus : machine.machine === "q35" ? "sata" : "ide");
  if (disk.disk) {
    const placed = await placeDiskRef(host, `${property}.disk`, disk.disk);
    return { ...disk, disk: placed, path: placed.path, format: placed.format, bus };
  }
  if (disk.size !== undefined) {
    const format = disk.format ?? "qcow2";
    const volumeName = `${machine.name}-${disk.name}.${format}`;
    return { ...disk, path: posix.join(await folderOf(host, `${property}.pool`, disk.pool), volumeName), volumeName, format, bus };
  }
  const found =
    disk.path === undefined ? await volumeNamed(host, `${property}.volume`, disk.pool, disk.volume!) : await volumeAt(host, disk.path);
  const path = found?.path ?? disk.path!;
  const format = disk.format ?? (disk.device === "cdrom" ? "raw" : asFormat(`${property}.format`, path, found?.format));
  return { ...disk, path, format, bus };
}

async function folderOf(host: Host, property: string, pool: string): Promise<string> {
  try {
    return await poolFolder(host, pool);
  } catch (error) {
    if (!(error instanceof PoolError)) throw error;
    throw new PlacementError(property, error.message);
  }
}

interface FoundVolume {
  readonly path: string;
  /** As libvirt read it from the volume's first bytes. */
  readonly format: string | undefined;
}

async function volumeNamed(host: Host, property: string, poolName: string, name: string): Promise<FoundVolume> {
  const folder = await folderOf(host, property, poolName);
  const libvirt = await host.libvirt();
  try {
    return await describeVolume(libvirt, await libvirt.storageVolLookupByName(await libvirt.storagePoolLookupByName(poolName), name));
  } catch (error) {
    if (!isNotFound(error)) throw error;
    throw new PlacementError(
      property,
      `there is no volume ${name} in the pool ${poolName} (${folder}) on ${host.label}: give its name, or virsh pool-refresh ${poolName}`,
    );
  }
}

/** Undefined when no active pool has it. */
async function volumeAt(host: Host, path: string): Promise<FoundVolume | undefined> {
  const libvirt = await host.libvirt();
  try {
    return await describeVolume(libvirt, await libvirt.storageVolLookupByPath(path));
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

async function describeVolume(libvirt: Libvirt, volume: Awaited<ReturnType<Libvirt["storageVolLookupByPath"]>>): Promise<FoundVolume> {
  const target = parseXml(await libvirt.storageVolGetXMLDesc(volume), "the volume's XML").children.find(({ name }) => name === "target");
  const format = target?.children.find(({ name }) => name === "format")?.attributes.get("type");
  return { path: volume.key, format };
}

function asFormat(property: string, path: string, found: string | undefined): "qcow2" | "raw" {
  if (found === "qcow2" || found === "raw") return found;
  throw new PlacementError(
    property,
    found === undefined
      ? `${path} is in no active pool that could tell its format: say "qcow2" or "raw"`
      : `${path} is of the format ${found}, which a machine of ours does not run on: import it with ImportedDisk`,
  );
}

/** The capabilities of each connection: they cost a second, and stay the same as long as the daemon runs. */
const domainTypes = new WeakMap<Libvirt, Promise<ReadonlySet<string>>>();
const firmwares = new WeakMap<Libvirt, Map<string, ReturnType<typeof askFirmwares>>>();

/** The kind of machine to run when the user named none: with acceleration where the host offers it. Throws PlacementError. */
export async function defaultDomainType(host: Host): Promise<MachineInputs["domainType"]> {
  const libvirt = await host.libvirt();
  let asked = domainTypes.get(libvirt);
  if (asked === undefined) {
    asked = libvirt.connectGetCapabilities().then(parseDomainTypes);
    domainTypes.set(libvirt, asked);
    asked.catch(() => domainTypes.delete(libvirt));
  }
  const offered = await asked;
  const type = (["kvm", "qemu", "test"] as const).find((each) => offered.has(each));
  if (type === undefined) throw new PlacementError("domainType", `${host.label} runs no x86_64 machines: install qemu-system-x86`);
  return type;
}

/** A machine on the host, ours or not. */
export interface Neighbour extends ObservedDomain {
  readonly isOwn: boolean;
}

/** Every machine of the host by its definition. `isOwn` where it is the resource's own: by UUID when we made it, by its metadata else. */
export async function listNeighbours(
  libvirt: Libvirt,
  machine: { readonly origin: string; readonly ownUuid: string | undefined },
): Promise<readonly Neighbour[]> {
  const domains = await libvirt.connectListAllDomains();
  const found = await Promise.all(
    domains.map(async (domain) => {
      try {
        return [parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive))];
      } catch (error) {
        // Another user may remove a machine between the list and the look at it.
        if (isNotFound(error)) return [];
        throw error;
      }
    }),
  );
  return found.flat().map((each) => ({ ...each, isOwn: each.uuid === machine.ownUuid || each.metadata?.origin === machine.origin }));
}

/** What a finding is made from. */
export interface Facts {
  readonly host: Host;
  readonly inputs: MachineInputs;
  readonly neighbours: readonly Neighbour[];
}

/** Everything that would make the machine fail on its host, or harm another. */
export async function hostFailures(facts: Facts): Promise<readonly CheckFailure[]> {
  const found = [takenIdentity, takenMacs, takenDisks].flatMap((finding) => finding(facts));
  const asked = [missingNetworks, missingFirmware, takenVolumes].map(async (finding) => finding(facts));
  return [...found, ...(await Promise.all(asked)).flat()];
}

function takenIdentity({ host, inputs, neighbours }: Facts): readonly CheckFailure[] {
  return neighbours
    .filter(({ isOwn }) => !isOwn)
    .flatMap(({ name, uuid, metadata }): readonly CheckFailure[] => {
      const owner = metadata ? ` (of ${metadata.origin})` : "";
      if (name === inputs.name) {
        return [
          {
            property: "name",
            reason: `name: there is a machine ${name}${owner} on ${host.label} already, which is not touched: choose another \`name\``,
          },
        ];
      }
      if (uuid !== inputs.uuid) return [];
      return [
        {
          property: "uuid",
          reason: `uuid: the machine ${name}${owner} on ${host.label} has the UUID ${uuid} already: choose another \`uuid\``,
        },
      ];
    });
}

function takenMacs({ host, inputs, neighbours }: Facts): readonly CheckFailure[] {
  return inputs.networks.flatMap(({ mac }, index): readonly CheckFailure[] => {
    const property = `networks[${index}].mac`;
    if (inputs.networks.findIndex((other) => other.mac === mac) < index) {
      return [{ property, reason: `${property}: ${mac} is given to two interfaces of this machine: choose another` }];
    }
    const user = neighbours.find(({ isOwn, interfaces }) => !isOwn && interfaces.some((other) => other.mac === mac));
    if (!user) return [];
    return [
      {
        property,
        reason: `${property}: the machine ${user.name} on ${host.label} has the address ${mac} already: choose another, or remove it there`,
      },
    ];
  });
}

/** Files that a guest may write to belong to one machine. */
function takenDisks({ host, inputs, neighbours }: Facts): readonly CheckFailure[] {
  return inputs.diskPaths.flatMap((path, index): readonly CheckFailure[] => {
    const further = inputs.disks[index - 1];
    if (further?.readOnly || further?.device === "cdrom") return [];
    const property = index > 0 ? `disks[${index - 1}]` : inputs.importedDisk ? "importedDisk" : "image";
    const user = neighbours.find(({ isOwn, disks }) => !isOwn && disks.some((disk) => disk.path === path));
    if (user)
      return [
        { property, reason: `${property}: the machine ${user.name} on ${host.label} uses ${path} already: two machines would destroy it` },
      ];
    if (inputs.diskPaths.indexOf(path) === index) return [];
    return [{ property, reason: `${property}: ${path} is given to this machine twice: give each disk once` }];
  });
}

async function missingNetworks({ host, inputs }: Facts): Promise<readonly CheckFailure[]> {
  const libvirt = await host.libvirt();
  const found = await Promise.all(
    inputs.networks.map(async ({ network: name }, index): Promise<readonly CheckFailure[]> => {
      const property = `networks[${index}].network`;
      if (name === undefined) return [];
      try {
        if (await libvirt.networkIsActive(await libvirt.networkLookupByName(name))) return [];
        if (inputs.powerState === "stopped") return [];
        return [{ property, reason: `${property}: the network ${name} on ${host.label} is not active: virsh net-start ${name}` }];
      } catch (error) {
        if (!isNotFound(error)) throw error;
        const names = (await libvirt.connectListAllNetworks()).map((network) => network.name);
        const remedy = names.length > 0 ? `it has ${names.join(", ")}` : "define one with virsh net-define";
        return [{ property, reason: `${property}: there is no network ${name} on ${host.label}: ${remedy}` }];
      }
    }),
  );
  return found.flat();
}

async function missingFirmware({ host, inputs }: Facts): Promise<readonly CheckFailure[]> {
  if (inputs.firmware === "bios") return [];
  const libvirt = await host.libvirt();
  const asked = firmwares.get(libvirt) ?? new Map<string, ReturnType<typeof askFirmwares>>();
  firmwares.set(libvirt, asked);
  const key = `${inputs.machine} ${inputs.domainType}`;
  const asking = asked.get(key) ?? askFirmwares(libvirt, inputs);
  asked.set(key, asking);
  asking.catch(() => asked.delete(key));
  const offered = await asking;
  if (!offered?.uefi && offered) {
    return [
      {
        property: "firmware",
        reason: `firmware: ${host.label} has no UEFI firmware for ${inputs.machine} machines: install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)`,
      },
    ];
  }
  if (!inputs.secureBoot || !offered || offered.secureBoot) return [];
  return [
    {
      property: "secureBoot",
      reason: `secureBoot: ${host.label} has no UEFI firmware with Secure Boot: install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)`,
    },
  ];
}

/** Undefined where the driver cannot tell, as libvirt's test driver. */
async function askFirmwares(
  libvirt: Libvirt,
  { machine, domainType }: MachineInputs,
): Promise<ReturnType<typeof parseOffer> | undefined> {
  try {
    return parseOffer(await libvirt.connectGetDomainCapabilities(undefined, "x86_64", machine, domainType));
  } catch (error) {
    if (error instanceof LibvirtError && error.code === NO_SUPPORT) return undefined;
    throw error;
  }
}

/** A volume of the machine's own is made, never taken: what is there already is somebody's. */
async function takenVolumes({ host, inputs, neighbours }: Facts): Promise<readonly CheckFailure[]> {
  const known = neighbours.filter(({ isOwn }) => isOwn).flatMap(({ metadata }) => metadata?.volumes.map(({ path }) => path) ?? []);
  const found = await Promise.all(
    ownVolumes(inputs).map(async ({ path }): Promise<readonly CheckFailure[]> => {
      if (known.includes(path) || !(await volumeAt(host, path))) return [];
      const index = inputs.disks.findIndex((disk) => disk.path === path);
      const property = index < 0 ? "image" : `disks[${index}].name`;
      return [
        { property, reason: `${property}: ${path} exists on ${host.label} and is not overwritten: choose another name, or remove it` },
      ];
    }),
  );
  return found.flat();
}
