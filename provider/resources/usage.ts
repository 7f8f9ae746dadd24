/** Who uses a volume: machines by any of their disks, other volumes by their backing file. */
import { XMLParser } from "fast-xml-parser";
import { isNotFound } from "../errors.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_XML, LIST_STORAGE_POOLS } from "../libvirt/constants.ts";

const parser = new XMLParser({ ignoreAttributes: false, attributeNamePrefix: "", parseTagValue: false });

/** Names of the machines, running or only defined, that name the path anywhere among their disks, backing chains and mirrors included. `flags` narrow the list. */
export async function domainsUsing(libvirt: Libvirt, path: string, flags = 0): Promise<readonly string[]> {
  const users: string[] = [];
  for (const domain of await libvirt.connectListAllDomains(flags)) {
    const descriptions = await Promise.all([0, DOMAIN_XML.inactive].map((flags) => goneAs(libvirt.domainGetXMLDesc(domain, flags), "")));
    if (descriptions.some((xml) => xml.includes("<disk") && mentions(parser.parse(xml), path))) users.push(domain.name);
  }
  return users;
}

/** Paths of the volumes, of any active pool, that have the path as their backing file. What came into a pool behind libvirt's back is known after its refresh. */
export async function volumesBackedBy(libvirt: Libvirt, path: string): Promise<readonly string[]> {
  const backed: string[] = [];
  for (const pool of await libvirt.connectListAllStoragePools(LIST_STORAGE_POOLS.active)) {
    for (const volume of await goneAs(libvirt.storagePoolListAllVolumes(pool), [])) {
      const xml = await goneAs(libvirt.storageVolGetXMLDesc(volume), "");
      if (
        xml.includes("<backingStore>") &&
        mentions((parser.parse(xml) as { volume?: { backingStore?: unknown } }).volume?.backingStore, path)
      )
        backed.push(volume.key);
    }
  }
  return backed;
}

/** Another user may remove a thing between the list and the look at it. */
async function goneAs<T>(asked: Promise<T>, value: T): Promise<T> {
  try {
    return await asked;
  } catch (error) {
    if (isNotFound(error)) return value;
    throw error;
  }
}

/** Whether any value inside equals the path. */
function mentions(node: unknown, path: string): boolean {
  if (typeof node === "string") return node === path;
  return typeof node === "object" && node !== null && Object.values(node).some((value) => mentions(value, path));
}
