/** Storage pools as imports see them: what kind of volumes they have, and where. */
import { posix } from "node:path";
import { XMLParser } from "fast-xml-parser";
import { LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { quoteArgument } from "../host/quote.ts";
import { LIST_STORAGE_POOLS, STORAGE_POOL_STATE } from "../libvirt/constants.ts";

/** VIR_ERR_NO_STORAGE_POOL of virterror.h. */
const NO_STORAGE_POOL = 49;

/** Types of pools whose volumes are files in a folder, and those whose volumes are devices. Source: libvirt's storage.html. */
const FILE_TYPES: ReadonlySet<string> = new Set(["dir", "fs", "netfs"]);
const BLOCK_TYPES: ReadonlySet<string> = new Set(["logical", "disk"]);

/** The pool is not one that a disk can be imported into. */
export class PoolError extends Error {
  override readonly name = "PoolError";
}

/** An active pool that can get volumes. */
export interface ActivePool {
  readonly name: string;
  readonly type: string;
  /** Whether its volumes are devices. */
  readonly isBlock: boolean;
  /** Absolute: the folder of its files, or of its devices. */
  readonly path: string;
  /** The disk whose partitions are the volumes of a pool of type `disk`, as the pool names it. */
  readonly device: string | undefined;
}

/** The pool of that name. Throws PoolError with the remedy when there is none, when it is not active, or when its type is none that we write to. */
export async function activePool(host: Host, name: string): Promise<ActivePool> {
  const libvirt = await host.libvirt();
  let pool: Awaited<ReturnType<typeof libvirt.storagePoolLookupByName>>;
  try {
    pool = await libvirt.storagePoolLookupByName(name);
  } catch (error) {
    if (!(error instanceof LibvirtError) || error.code !== NO_STORAGE_POOL) throw error;
    const names = (await libvirt.connectListAllStoragePools()).map((each) => each.name);
    const remedy =
      names.length > 0
        ? `it has ${names.join(", ")}`
        : `define one: virsh pool-define-as ${quoteArgument(name)} dir --target /var/lib/libvirt/images, then pool-build, pool-start and pool-autostart of it`;
    throw new PoolError(`there is no pool ${name} on ${host.label}: ${remedy}`);
  }
  if ((await libvirt.storagePoolGetInfo(pool)).state !== STORAGE_POOL_STATE.running) {
    throw new PoolError(`the pool ${name} on ${host.label} is not active: virsh pool-start ${name}`);
  }
  const described = describe(await libvirt.storagePoolGetXMLDesc(pool));
  if (!isForImports(described)) {
    const types = [...FILE_TYPES, ...BLOCK_TYPES].join(", ");
    throw new PoolError(
      `the pool ${name} on ${host.label} is of type ${described.type}: disks are imported into pools of the types ${types}`,
    );
  }
  return { name, ...described };
}

/** Every active pool of the host that disks are imported into. */
export async function importPools(host: Host): Promise<readonly ActivePool[]> {
  const libvirt = await host.libvirt();
  const pools = await libvirt.connectListAllStoragePools(LIST_STORAGE_POOLS.active);
  const described = pools.map(async (pool) => ({ name: pool.name, ...describe(await libvirt.storagePoolGetXMLDesc(pool)) }));
  return (await Promise.all(described)).filter(isForImports);
}

function isForImports({ type, isBlock, path }: Omit<ActivePool, "name">): boolean {
  return (isBlock || FILE_TYPES.has(type)) && path.startsWith("/");
}

/** The folder of an active pool whose volumes are files. Throws PoolError with the remedy when it is not one. */
export async function poolFolder(host: Host, name: string): Promise<string> {
  const { isBlock, type, path } = await activePool(host, name);
  if (isBlock) throw new PoolError(`the pool ${name} on ${host.label} is of type ${type}: a pool whose volumes are files is needed`);
  return path;
}

/** Every active directory pool of the host. */
export async function directoryPools(host: Host): Promise<readonly { readonly name: string; readonly folder: string }[]> {
  return (await importPools(host)).filter(({ type }) => type === "dir").map(({ name, path }) => ({ name, folder: path }));
}

/**
 * The name that the next volume of a pool of type `disk` must have: libvirt makes the first partition that is free, and takes no other name for it.
 * Source: storage_backend_disk.c virStorageBackendDiskMakeDataVol.
 */
export async function nextPartition(host: Host, { name, device }: ActivePool): Promise<string> {
  const libvirt = await host.libvirt();
  const volumes = await libvirt.storagePoolListAllVolumes(await libvirt.storagePoolLookupByName(name));
  const disk = posix.basename(device ?? "");
  const prefix = /[0-9]$/.test(disk) ? `${disk}p` : disk;
  const taken = new Set(volumes.map((volume) => volume.name));
  let number = 1;
  while (taken.has(`${prefix}${number}`)) number++;
  return `${prefix}${number}`;
}

interface PoolXml {
  readonly "@_type"?: string;
  readonly target?: { readonly path?: string };
  readonly source?: { readonly device?: { readonly "@_path"?: string } };
}

function describe(xml: string): Omit<ActivePool, "name"> {
  const { pool } = new XMLParser({ ignoreAttributes: false, parseTagValue: false, trimValues: false }).parse(xml) as {
    readonly pool?: PoolXml;
  };
  const type = pool?.["@_type"] ?? "";
  return { type, isBlock: BLOCK_TYPES.has(type), path: pool?.target?.path ?? "", device: pool?.source?.device?.["@_path"] };
}
