/** Storage pools as imports see them: folders of the host that libvirt watches. */
import { setTimeout as sleep } from "node:timers/promises";
import { XMLParser } from "fast-xml-parser";
import { LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";

/** VIR_ERR_NO_STORAGE_POOL of virterror.h. */
const NO_STORAGE_POOL = 49;
/** VIR_STORAGE_POOL_RUNNING of libvirt-storage.h. */
const STORAGE_POOL_RUNNING = 2;
/** VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE and _DIR of libvirt-storage.h. */
const LIST_ACTIVE_DIRECTORIES = 2 | 64;

/** The pool is not one that a disk can be imported into. */
export class PoolError extends Error {
  override readonly name = "PoolError";
}

/** The folder of a directory pool that is active. Throws PoolError with the remedy when it is not one. */
export async function poolFolder(host: Host, name: string): Promise<string> {
  const libvirt = await host.libvirt();
  let pool: Awaited<ReturnType<typeof libvirt.storagePoolLookupByName>>;
  try {
    pool = await libvirt.storagePoolLookupByName(name);
  } catch (error) {
    if (!(error instanceof LibvirtError) || error.code !== NO_STORAGE_POOL) throw error;
    const names = (await libvirt.connectListAllStoragePools()).map((each) => each.name);
    const remedy = names.length > 0 ? `it has ${names.join(", ")}` : "define one with virsh pool-define-as";
    throw new PoolError(`there is no pool ${name} on ${host.label}: ${remedy}`);
  }
  if ((await libvirt.storagePoolGetInfo(pool)).state !== STORAGE_POOL_RUNNING) {
    throw new PoolError(`the pool ${name} on ${host.label} is not active: virsh pool-start ${name}`);
  }
  const { type, path } = describe(await libvirt.storagePoolGetXMLDesc(pool));
  if (type !== "dir" || !path.startsWith("/")) {
    throw new PoolError(`the pool ${name} on ${host.label} is of type ${type}: disks are imported into a pool of type dir`);
  }
  return path;
}

/** Every active directory pool of the host. */
export async function directoryPools(host: Host): Promise<readonly { readonly name: string; readonly folder: string }[]> {
  const libvirt = await host.libvirt();
  const pools = await libvirt.connectListAllStoragePools(LIST_ACTIVE_DIRECTORIES);
  return Promise.all(pools.map(async (pool) => ({ name: pool.name, folder: describe(await libvirt.storagePoolGetXMLDesc(pool)).path })));
}

function describe(xml: string): { readonly type: string; readonly path: string } {
  const parsed: unknown = new XMLParser({ ignoreAttributes: false, parseTagValue: false }).parse(xml);
  const { pool } = parsed as { pool?: { "@_type"?: string; target?: { path?: string } } };
  return { type: pool?.["@_type"] ?? "", path: pool?.target?.path ?? "" };
}

/** Makes libvirt see what changed in the pool's folder. Waits while it is busy with another volume. */
export async function refreshPool(host: Host, name: string): Promise<void> {
  const libvirt = await host.libvirt();
  const pool = await libvirt.storagePoolLookupByName(name);
  for (let attempt = 1; ; attempt++) {
    try {
      return await libvirt.storagePoolRefresh(pool);
    } catch (error) {
      // VIR_ERR_INTERNAL_ERROR "pool has asynchronous jobs running": its own text is all that tells it apart. Source: storage_driver.c.
      const busy = error instanceof LibvirtError && error.message.includes("asynchronous jobs running");
      if (!busy || attempt === 60) throw error;
      await sleep(1000);
    }
  }
}
