/** The volumes that are made for a machine: copies and overlays of templates, and blank disks. Knows no machine. */
import { isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import type { ObservedDomain } from "../libvirt/domain.ts";
import { element, renderXml } from "../libvirt/render.ts";
import { child, text } from "../libvirt/tree.ts";
import { parseXml } from "../image/xml.ts";
import type { IsSnapshot, VolumePlan } from "./virtual-machine-spec.ts";

/** More than any chain that QEMU runs on without pain. */
const MAX_CHAIN = 100;

/**
 * Makes the volume. A copy takes as long as its bytes take, on a connection of its own.
 * Throws LibvirtError, with the code of virterror.h's STORAGE_VOL_EXIST when the name is taken; then nothing was changed.
 */
export async function makeVolume(host: Host, plan: VolumePlan, signal: AbortSignal): Promise<void> {
  await using libvirt = await host.openLibvirt();
  const calls = libvirt.withSignal(signal);
  const pool = await calls.storagePoolLookupByName(plan.pool);
  const { template } = plan;
  if (template?.mode === "copy") {
    const source = await calls.storageVolLookupByPath(template.path);
    const capacityBytes = plan.capacityBytes ?? (await calls.storageVolGetInfo(source)).capacity;
    await calls.storageVolCreateXMLFrom(pool, volumeXml({ ...plan, capacityBytes }), source);
    // A copy between files of one format keeps the template's size, whatever the XML says.
    const made = await calls.storageVolLookupByName(pool, plan.name);
    if ((await calls.storageVolGetInfo(made)).capacity < capacityBytes) await calls.storageVolResize(made, capacityBytes);
    return;
  }
  // libvirt takes none for the template's own.
  const capacityBytes = plan.capacityBytes ?? (template && (await capacityOf(calls, template.path)));
  const volume = await calls.storageVolCreateXML(pool, volumeXml({ ...plan, capacityBytes }));
  if (plan.content === undefined) return;
  const upload = await calls.storageVolUpload(volume, 0, plan.content.length);
  try {
    await upload.write(plan.content);
    await upload.finish();
  } finally {
    await upload.abort();
  }
}

/**
 * Which of the machine's files lie on top of declared ones. A qcow2 file that no pool knows counts as such wherever it is, as those that snapshots have
 * just made: a chain that is not known is not broken.
 */
export async function findSnapshots(libvirt: Libvirt, { disks }: ObservedDomain, declared: readonly string[]): Promise<IsSnapshot> {
  const chains = new Map<string, readonly string[] | undefined>();
  for (const { path, format, device } of disks) {
    if (path !== undefined && format === "qcow2" && device === "disk" && !declared.includes(path))
      chains.set(path, await chainBelow(libvirt, path));
  }
  return (top, below) => chains.has(top) && declared.includes(below) && (chains.get(top)?.includes(below) ?? true);
}

/**
 * The size, in bytes, of each of the volumes that has a declared one: by its path, as the guest sees it. Left out are volumes that are no disk of the
 * machine, as under a snapshot, and those that no pool knows.
 */
export async function sizesOf(
  libvirt: Libvirt,
  volumes: readonly VolumePlan[],
  { disks }: ObservedDomain,
): Promise<ReadonlyMap<string, number>> {
  const sizes = new Map<string, number>();
  for (const { path, capacityBytes, content } of volumes) {
    if (capacityBytes === undefined || content !== undefined || !disks.some((disk) => disk.path === path)) continue;
    const size = await capacityOf(libvirt, path);
    if (size !== undefined) sizes.set(path, size);
  }
  return sizes;
}

/** The files that a volume stands on, the next one first; undefined when no pool knows it. */
async function chainBelow(libvirt: Libvirt, path: string): Promise<readonly string[] | undefined> {
  const chain: string[] = [];
  for (let next = path; chain.length < MAX_CHAIN;) {
    let xml: string;
    try {
      xml = await libvirt.storageVolGetXMLDesc(await libvirt.storageVolLookupByPath(next));
    } catch (error) {
      if (isNotFound(error)) return next === path ? undefined : chain;
      throw error;
    }
    const below = text(child(parseXml(xml, "the volume's XML"), "backingStore"), "path");
    if (below === undefined) return chain;
    chain.push(below);
    next = below;
  }
  return chain;
}

/** The volume's size in bytes; undefined when it is in no pool. */
async function capacityOf(libvirt: Libvirt, path: string): Promise<number | undefined> {
  try {
    return (await libvirt.storageVolGetInfo(await libvirt.storageVolLookupByPath(path))).capacity;
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

function volumeXml({ name, format, capacityBytes, template }: VolumePlan): string {
  return renderXml(
    element(
      "volume",
      {},
      element("name", {}, name),
      capacityBytes === undefined ? undefined : element("capacity", { unit: "bytes" }, String(capacityBytes)),
      element("allocation", { unit: "bytes" }, "0"),
      element("target", {}, element("format", { type: format })),
      template?.mode === "overlay"
        ? element("backingStore", {}, element("path", {}, template.path), element("format", { type: template.format }))
        : undefined,
    ),
  );
}

/** Whether a pool knows a volume at the path. */
export async function isVolume(libvirt: Libvirt, path: string): Promise<boolean> {
  return (await capacityOf(libvirt, path)) !== undefined;
}

/** Deletes a volume by its path; gone already is success. */
export async function deleteVolume(libvirt: Libvirt, path: string): Promise<void> {
  try {
    await libvirt.storageVolDelete(await libvirt.storageVolLookupByPath(path));
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
}
