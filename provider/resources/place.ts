/** Where a disk goes or lies, and the way there: by programs on the host, or by libvirt alone where those cannot do it. */
import { posix } from "node:path";
import { CommandError, ConnectionError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { type FileSystem, isUntouched, probe, type VolumeFile } from "../transfer/probe.ts";
import { lookAtVolume } from "../transfer/volume.ts";
import { type ActivePool, activePool } from "./pool.ts";

/** What names a disk on its host. */
export interface PlacedDisk {
  readonly pool: string;
  readonly volumeName: string;
  readonly path: string;
  readonly importId: string;
}

export interface Place {
  readonly pool: ActivePool;
  /** Why the bytes must go through libvirt's upload stream, as half a sentence; undefined where programs on the host can take them. */
  readonly uploadReason: string | undefined;
  /** Bytes that may still be written there, as far as the host tells. */
  readonly freeBytes: number | undefined;
  /** Bytes that an interrupted run of the same import has allocated. */
  readonly partBytes: number;
  /** Where the file system that holds the folder is mounted, as commands on the host see it. */
  readonly mountPoint?: string | undefined;
  /** What that is, as commands on the host see it. */
  readonly fileSystem?: FileSystem | undefined;
  /** Whether the host has qemu-img; undefined where no commands can be run. */
  readonly hasQemuImg?: boolean;
  /** What is there under the disk's name, unless it is that part. */
  readonly file: VolumeFile | undefined;
}

/** Looks at a disk's place. Changes nothing. Throws PoolError, LibvirtError or ConnectionError. */
export async function lookAtPlace(host: Host, disk: PlacedDisk): Promise<Place> {
  const pool = await activePool(host, disk.pool);
  if (pool.isBlock) return lookByLibvirt(host, pool, disk, `the volumes of a pool of type ${pool.type} are devices`);
  let seen: Awaited<ReturnType<typeof probe>>;
  try {
    seen = await probe(host, disk.path, disk.importId);
  } catch (error) {
    // libvirt answered: that nothing can be run is what the host allows, not a broken connection.
    const hasNoShell = error instanceof CommandError || (error instanceof ConnectionError && error.phase === "login");
    if (!hasNoShell) throw error;
    return lookByLibvirt(host, pool, disk, `no commands can be run on ${host.label} (${error.message})`);
  }
  const folder = posix.dirname(disk.path);
  const { freeBytes, partBytes, mountPoint, fileSystem, hasQemuImg, file } = seen;
  const byLibvirt = async (reason: string): Promise<Place> => ({
    ...(await lookByLibvirt(host, pool, disk, reason)),
    fileSystem,
    hasQemuImg,
  });
  if (seen.missingTools.length > 0) return byLibvirt(`${host.label} lacks ${seen.missingTools.join(", ")}`);
  if (seen.folder === "refused") return byLibvirt(`${seen.user} may not write to ${folder} on ${host.label}`);
  if (seen.folder === "none" || (pool.type !== "dir" && !seen.isMountPoint)) {
    return lookByLibvirt(host, pool, disk, `commands on ${host.label} do not see the storage that libvirt has at ${folder}`);
  }
  return { pool, uploadReason: undefined, freeBytes, partBytes, mountPoint, fileSystem, hasQemuImg, file };
}

async function lookByLibvirt(host: Host, pool: ActivePool, disk: PlacedDisk, uploadReason: string): Promise<Place> {
  const libvirt = await host.libvirt();
  const seen = await lookAtVolume(libvirt, pool.name, disk.volumeName);
  const { available } = await libvirt.storagePoolGetInfo(await libvirt.storagePoolLookupByName(pool.name));
  const place = { pool, uploadReason, freeBytes: available };
  if (seen?.mark?.importId === disk.importId) return { ...place, partBytes: seen.allocatedBytes, file: undefined };
  if (seen === undefined) return { ...place, partBytes: 0, file: undefined };
  return { ...place, partBytes: 0, file: { ...seen, untouched: isUntouched(seen) } };
}
