/** Volumes as libvirt shows them: for hosts where it is the only way to look at a disk. */
import { createHash } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { isNotFound, LibvirtError } from "../errors.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { STORAGE_VOL_INFO, STORAGE_VOL_TRANSFER, STORAGE_VOL_TYPE } from "../libvirt/constants.ts";
import type { StoragePool, StorageVol } from "../libvirt/procedures.ts";
import { type Stamp, stampInside } from "./probe.ts";

/** Room for a qcow2's first cluster, where the stamp lies, and for the mark of an unfinished volume. */
export const HEAD_BYTES = 64 * 1024;

/** The first sector of an unfinished volume: it begins with MARK_TEXT and a JSON of `Mark`, up to a line's end. */
export const MARK_BYTES = 512;
const MARK_TEXT = "virtlift part ";

/** How often a pool that is busy is asked again, once a second. */
const MAX_REFRESHES = 60;

/** What tells an unfinished volume's import and who writes it. */
export interface Mark {
  readonly importId: string;
  readonly writer: string;
}

/** A volume in an active pool. */
export interface SeenVolume {
  readonly volume: StorageVol;
  readonly path: string;
  readonly isBlock: boolean;
  /** Bytes of the file or the device. */
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
  /** Seconds since 1970 with nine decimals, as libvirt prints them; undefined for a device, whose time says nothing about its content. */
  readonly modifiedAt: string | undefined;
  /** Our stamp, if this is a finished qcow2 of ours. */
  readonly stamp: Stamp | undefined;
  /** Our mark, if this is an unfinished volume of ours. */
  readonly mark: Mark | undefined;
}

/** Looks at a volume; undefined when the pool, freshly refreshed, has none of that name. Throws LibvirtError, as when the pool is not active. */
export async function lookAtVolume(libvirt: Libvirt, poolName: string, volumeName: string): Promise<SeenVolume | undefined> {
  const pool = await refreshPool(libvirt, poolName);
  try {
    return await seen(libvirt, await libvirt.storageVolLookupByName(pool, volumeName));
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

async function seen(libvirt: Libvirt, volume: StorageVol): Promise<SeenVolume> {
  const [path, { type, allocation }, { allocation: sizeBytes }, modifiedAt, head] = [
    await libvirt.storageVolGetPath(volume),
    await libvirt.storageVolGetInfo(volume),
    await libvirt.storageVolGetInfoFlags(volume, STORAGE_VOL_INFO.physical),
    await modificationTime(libvirt, volume),
    await readVolume(libvirt, volume, 0, HEAD_BYTES),
  ];
  const isBlock = type === STORAGE_VOL_TYPE.block;
  return {
    volume,
    path,
    isBlock,
    sizeBytes,
    allocatedBytes: allocation,
    modifiedAt: isBlock ? undefined : modifiedAt,
    stamp: stampInside(head),
    mark: markInside(head),
  };
}

/** A volume's modification time as libvirt prints it, asked anew: seconds since 1970 and nine decimals. */
export async function modificationTime(libvirt: Libvirt, volume: StorageVol): Promise<string | undefined> {
  return /<mtime>([0-9.]+)<\/mtime>/.exec(await libvirt.storageVolGetXMLDesc(volume))?.[1];
}

/** Makes libvirt see what is in the pool, and gives the pool. Waits while it is busy with another volume. */
export async function refreshPool(libvirt: Libvirt, name: string): Promise<StoragePool> {
  const pool = await libvirt.storagePoolLookupByName(name);
  for (let attempt = 1; ; attempt++) {
    try {
      await libvirt.storagePoolRefresh(pool);
      return pool;
    } catch (error) {
      // VIR_ERR_INTERNAL_ERROR "pool has asynchronous jobs running": its own text is all that tells it apart. Source: storage_driver.c.
      const isBusy = error instanceof LibvirtError && error.message.includes("asynchronous jobs running");
      if (!isBusy || attempt === MAX_REFRESHES) throw error;
      await sleep(1000);
    }
  }
}

/** Bytes of a volume, fewer only where it ends. */
export async function readVolume(libvirt: Libvirt, volume: StorageVol, offset: number, lengthBytes: number): Promise<Buffer> {
  const pieces: Uint8Array[] = [];
  for await (const bytes of volumeBytes(libvirt, volume, offset, lengthBytes)) pieces.push(bytes);
  return Buffer.concat(pieces);
}

/** The SHA-256 of bytes of a volume, in hex, and how many there were before its end. */
export async function hashVolume(
  libvirt: Libvirt,
  volume: StorageVol,
  offset: number,
  lengthBytes: number,
  hash = createHash("sha256"),
): Promise<{ readonly digest: string; readonly lengthBytes: number }> {
  let found = 0;
  for await (const bytes of volumeBytes(libvirt, volume, offset, lengthBytes)) {
    hash.update(bytes);
    found += bytes.length;
  }
  return { digest: hash.digest("hex"), lengthBytes: found };
}

const ZEROS = new Uint8Array(1024 * 1024);

/** `lengthBytes` must not be 0, which is libvirt's word for "all". Holes do not cross the wire. */
async function* volumeBytes(
  libvirt: Libvirt,
  volume: StorageVol,
  offset: number,
  lengthBytes: number,
): AsyncGenerator<Uint8Array, void, undefined> {
  for await (const piece of await libvirt.storageVolDownload(volume, offset, lengthBytes, STORAGE_VOL_TRANSFER.sparse)) {
    if ("data" in piece) yield piece.data;
    else for (let left = piece.hole; left > 0; left -= ZEROS.length) yield ZEROS.subarray(0, Math.min(left, ZEROS.length));
  }
}

/** The first sector of an unfinished volume. */
export function encodeMark(mark: Mark): Uint8Array {
  const sector = Buffer.alloc(MARK_BYTES);
  sector.write(`${MARK_TEXT}${JSON.stringify(mark)}\n`);
  return sector;
}

/** The mark at a volume's beginning; undefined when it is not one of ours, or finished. */
export function markInside(head: Buffer): Mark | undefined {
  const [line = ""] = head.subarray(0, MARK_BYTES).toString("latin1").split("\n", 1);
  if (!line.startsWith(MARK_TEXT)) return undefined;
  try {
    const mark = JSON.parse(line.slice(MARK_TEXT.length)) as Partial<Mark>;
    const { importId, writer } = mark;
    return typeof importId === "string" && typeof writer === "string" ? { importId, writer } : undefined;
  } catch {
    // Foreign bytes behind the same text: not ours.
    return undefined;
  }
}
