/** The quickstart's own directory pool on a host. It is made through libvirt, and so is its end. */
import { LibvirtError } from "../../provider/errors.ts";
import type { Host } from "../../provider/host/hosts.ts";
import type { Libvirt } from "../../provider/libvirt/client.ts";

export const POOL_NAME = "virtlift-quickstart";
const SYSTEM_FOLDER = "/var/lib/libvirt/images";
/** Below the home folder of the user whose session it is. */
const SESSION_FOLDER = ".local/share/libvirt/images";
/** VIR_ERR_NO_STORAGE_POOL of virterror.h. */
const NO_STORAGE_POOL = 49;

type StoragePool = Awaited<ReturnType<Libvirt["storagePoolLookupByName"]>>;

/** Makes the pool and its folder where it is not there, and starts it. Gives the folder when it made it, undefined when the pool was there. */
export async function preparePool(host: Host): Promise<string | undefined> {
  const libvirt = await host.libvirt();
  const known = await findPool(libvirt);
  const path = await poolPath(host);
  const xml = `<pool type="dir"><name>${POOL_NAME}</name><target><path>${path}</path></target></pool>`;
  const pool = known ?? (await libvirt.storagePoolDefineXML(xml));
  if (await libvirt.storagePoolIsActive(pool)) return undefined;
  await libvirt.storagePoolBuild(pool);
  await libvirt.storagePoolCreate(pool);
  return known === undefined ? path : undefined;
}

/** Removes the pool and its folder; a folder that holds something still is left, and the error says so. Gone already is success. */
export async function removePool(host: Host): Promise<void> {
  const libvirt = await host.libvirt();
  const pool = await findPool(libvirt);
  if (pool === undefined) return;
  if (await libvirt.storagePoolIsActive(pool)) await libvirt.storagePoolDestroy(pool);
  await libvirt.storagePoolDelete(pool);
  await libvirt.storagePoolUndefine(pool);
}

async function findPool(libvirt: Libvirt): Promise<StoragePool | undefined> {
  try {
    return await libvirt.storagePoolLookupByName(POOL_NAME);
  } catch (error) {
    if (error instanceof LibvirtError && error.code === NO_STORAGE_POOL) return undefined;
    throw error;
  }
}

async function poolPath(host: Host): Promise<string> {
  if (!new URL(host.spec.uri).pathname.endsWith("/session")) return `${SYSTEM_FOLDER}/${POOL_NAME}`;
  const { stdout } = await host.run(["sh", "-c", "cd && pwd"]);
  return `${stdout.toString().trim()}/${SESSION_FOLDER}/${POOL_NAME}`;
}
