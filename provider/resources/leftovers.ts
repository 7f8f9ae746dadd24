/** What interrupted imports left on a host, over all its pools: for whoever clears up. */
import { CommandError, ConnectionError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import {
  type Leftover,
  listLeftovers,
  listUnfinishedUploads,
  removeLeftover,
  removeUnfinishedUpload,
  type UnfinishedUpload,
} from "../transfer/leftovers.ts";
import { machinesReaching } from "./file-users.ts";
import { importPools } from "./pool.ts";
import { domainsUsing, volumesBackedBy } from "./usage.ts";

export interface PoolLeftover extends Leftover {
  readonly pool: string;
}

interface Found {
  readonly leftover: PoolLeftover;
  /** Resolves with whether it was still there to be removed. */
  readonly remove: () => Promise<boolean>;
}

/** Every part file and every unfinished upload in the active pools of the host. `silenceMs` as for `listUnfinishedUploads`. */
export async function findLeftovers(host: Host, silenceMs?: number): Promise<readonly PoolLeftover[]> {
  return (await find(host, silenceMs)).map(({ leftover }) => leftover);
}

/** Removes those that nobody writes, but for devices, which may be another's by now. Resolves with what was removed. */
export async function clearLeftovers(host: Host, silenceMs?: number): Promise<readonly PoolLeftover[]> {
  const removed: PoolLeftover[] = [];
  for (const { leftover, remove } of await find(host, silenceMs)) {
    const isStale = !leftover.isWriting && leftover.modifiedSeconds !== undefined;
    if (isStale && (await remove())) removed.push(leftover);
  }
  return removed;
}

async function find(host: Host, silenceMs: number | undefined): Promise<readonly Found[]> {
  const libvirt = await host.libvirt();
  const found: Found[] = [];
  for (const { name: pool, path, isBlock } of await importPools(host)) {
    for (const part of isBlock ? [] : await orNone(listLeftovers(host, path))) {
      found.push({ leftover: { ...part, pool }, remove: () => removeLeftover(host, part).then(() => true) });
    }
    for (const upload of await listUnfinishedUploads(libvirt, pool, silenceMs)) {
      const { volume: _volume, ...leftover } = upload;
      if (!(await isUsed(host, upload))) found.push({ leftover: { ...leftover, pool }, remove: () => removeUpload(host, upload) });
    }
  }
  return found;
}

async function removeUpload(host: Host, upload: UnfinishedUpload): Promise<boolean> {
  return !(await isUsed(host, upload)) && removeUnfinishedUpload(await host.libvirt(), upload);
}

/** Whether a machine, by whatever name, or another volume has it: then it is a disk whose guest wrote what looks like our mark. */
async function isUsed(host: Host, { path }: UnfinishedUpload): Promise<boolean> {
  const libvirt = await host.libvirt();
  const users = [await domainsUsing(libvirt, path), await volumesBackedBy(libvirt, path), await orNone(machinesReaching(host, path))];
  return users.some((each) => each.length > 0);
}

/** None where the host gives no shell: what came there came by libvirt, and nothing but libvirt can be asked. */
async function orNone<T>(asked: Promise<readonly T[]>): Promise<readonly T[]> {
  try {
    return await asked;
  } catch (error) {
    if (error instanceof CommandError || (error instanceof ConnectionError && error.phase === "login")) return [];
    throw error;
  }
}
