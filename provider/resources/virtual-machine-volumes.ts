/** The volumes that are made for a machine: copies and overlays of templates, and blank disks. Knows no machine. */
import { isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { element, renderXml } from "../libvirt/render.ts";
import type { VolumePlan } from "./virtual-machine-spec.ts";

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
  const capacityBytes = plan.capacityBytes ?? (template && (await capacityOf(calls, template.path)));
  await calls.storageVolCreateXML(pool, volumeXml({ ...plan, capacityBytes }));
}

/** Undefined, which libvirt takes for the template's own, when the template is in no pool. */
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

/** Deletes a volume by its path; gone already is success. */
export async function deleteVolume(libvirt: Libvirt, path: string): Promise<void> {
  try {
    await libvirt.storageVolDelete(await libvirt.storageVolLookupByPath(path));
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
}
