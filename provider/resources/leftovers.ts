/** What interrupted imports left on a host, over all its pools: for whoever clears up. */
import type { Host } from "../host/hosts.ts";
import { type Leftover, listLeftovers, removeLeftover } from "../transfer/leftovers.ts";
import { directoryPools } from "./pool.ts";

export interface PoolLeftover extends Leftover {
  readonly pool: string;
}

/** Every part file in the active directory pools of the host. */
export async function findLeftovers(host: Host): Promise<readonly PoolLeftover[]> {
  const found: PoolLeftover[] = [];
  for (const { name, folder } of await directoryPools(host)) {
    for (const leftover of await listLeftovers(host, folder)) found.push({ ...leftover, pool: name });
  }
  return found;
}

/** Removes those that nobody writes. Resolves with what was removed. */
export async function clearLeftovers(host: Host): Promise<readonly PoolLeftover[]> {
  const stale = (await findLeftovers(host)).filter((leftover) => !leftover.isWriting);
  for (const leftover of stale) await removeLeftover(host, leftover);
  return stale;
}
