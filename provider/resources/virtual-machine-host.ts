/** Where the things of a machine lie on its host, or will lie. Changes nothing there. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import { isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { parseXml } from "../image/xml.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { attribute, child, text } from "../libvirt/tree.ts";
import { PoolError, poolFolder } from "./pool.ts";
import { factsOf } from "./preflight/host-facts.ts";
import type { DiskRef } from "./schema.ts";
import type { VirtualMachineArgs } from "./virtual-machine-schema.ts";
import {
  encodeSeed,
  type MachineInputs,
  type PlacedDisk,
  type PlacedDiskRef,
  type PlacedImage,
  type PlacedSeed,
} from "./virtual-machine-spec.ts";

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

/** Finds the template and names the machine's own volume. `isComing` says whether a disk is declared to come to a path. Throws PlacementError. */
export async function placeImage(
  host: Host,
  image: NonNullable<VirtualMachineArgs["image"]>,
  { machine, isComing }: { readonly machine: string; readonly isComing: (path: string) => boolean },
): Promise<PlacedImage> {
  const folder = await folderOf(host, "image.pool", image.pool);
  const found =
    image.path === undefined ? await volumeNamed(host, "image.volume", image.pool, image.volume!) : await volumeAt(host, image.path);
  if (found === undefined && image.mode === "copy" && !isComing(image.path!)) {
    throw new PlacementError(
      "image.path",
      `${image.path} on ${host.label} is in no active pool, which a copy needs: refresh its pool, or use the mode "overlay"`,
    );
  }
  const path = found?.path ?? image.path!;
  const format = image.format ?? asFormat("image.format", path, found?.format);
  const { capacity } = image;
  if (capacity !== undefined && found?.capacityBytes !== undefined && capacity < found.capacityBytes) {
    throw new PlacementError(
      "image.capacity",
      `${capacity} bytes are less than the template ${path} on ${host.label} has, and a disk is never cut: give at least ${found.capacityBytes}`,
    );
  }
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
  if (disk.path === undefined && disk.volume === undefined) return { ...disk, format: "raw", bus };
  const found =
    disk.path === undefined ? await volumeNamed(host, `${property}.volume`, disk.pool, disk.volume!) : await volumeAt(host, disk.path);
  const path = found?.path ?? disk.path!;
  const format = disk.format ?? (disk.device === "cdrom" ? "raw" : asFormat(`${property}.format`, path, found?.format));
  return { ...disk, path, format, bus };
}

/** Names the seed's volume by its content, so that another content is another volume. `old` is the one that the machine has. Throws PlacementError. */
export async function placeSeed(
  host: Host,
  seed: NonNullable<VirtualMachineArgs["cloudInit"]>,
  { name: machine, uuid }: Pick<MachineInputs, "name" | "uuid">,
  old: PlacedSeed | undefined,
): Promise<PlacedSeed> {
  if (old && seed.onChange === "ignore") return { ...old, onChange: "ignore" };
  const digest = createHash("sha256").update(encodeSeed(seed, { machine, uuid })).digest("hex");
  const volumeName = `${machine}-seed-${digest.slice(0, 8)}.iso`;
  return { ...seed, volumeName, volumePath: posix.join(await folderOf(host, "cloudInit.pool", seed.pool), volumeName) };
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
  /** As a guest sees it. */
  readonly capacityBytes: number | undefined;
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
  const xml = parseXml(await libvirt.storageVolGetXMLDesc(volume), "the volume's XML");
  const capacityBytes = Number(text(xml, "capacity")) || undefined;
  return { path: volume.key, format: attribute(child(child(xml, "target"), "format"), "type"), capacityBytes };
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

/** The kind of machine to run when the user named none: with acceleration where the host offers it. Throws PlacementError. */
export async function defaultDomainType(host: Host): Promise<MachineInputs["domainType"]> {
  const { domainTypes } = await factsOf(host).nature();
  const type = (["kvm", "qemu", "test"] as const).find((each) => domainTypes.has(each));
  if (type === undefined) throw new PlacementError("domainType", `${host.label} runs no x86_64 machines: install qemu-system-x86`);
  return type;
}
