/** What interrupted imports left on a host: parts that a next run goes on with, or that somebody clears away. */
import { posix } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { STORAGE_VOL_TYPE } from "../libvirt/constants.ts";
import type { StorageVol } from "../libvirt/procedures.ts";
import { WORK_FOLDER } from "./part-file.ts";
import { MARK_BYTES, type Mark, markInside, modificationTime, readVolume, refreshPool } from "./volume.ts";

/** A host that lost its power in the middle of an end may have kept any of an import's files: the first that is there speaks for all. */
const LIST = `
for file in "$1"/*.part "$1"/*.source "$1"/*.guest "$1"/*.packed "$1"/*.journal "$1"/*.log; do
  [ -f "$file" ] || continue
  base=\${file%.*} blocks=0 modified=0 first=
  for each in "$base.part" "$base.source" "$base.guest" "$base.packed" "$base.journal" "$base.log"; do
    [ -f "$each" ] || continue
    first=\${first:-$each}
    blocks=$((blocks + $(stat -c %b -- "$each")))
    seconds=$(stat -c %Y -- "$each")
    [ "$seconds" -le "$modified" ] || modified=$seconds
  done
  [ "$file" = "$first" ] || continue
  state=stale
  flock -n "$base.lock" true || state=writing
  printf '%s %s %s %s\\n' "$blocks" "$modified" "$state" "$file"
done
`;

/** Under the lock, so that a writer who came in between keeps his part. The stamp of a part that has its final name already is the volume's. */
const REMOVE = `
stamp=$1/$2.stamp
[ "$(stat -c %h -- "$1/$2.part" 2>/dev/null)" = 1 ] || stamp=
flock -n "$1/$2.lock" rm -f -- "$1/$2.part" "$1/$2.journal" "$1/$2.guest" "$1/$2.packed" "$1/$2.log" "$1/$2.source" "$1/$2.source.etag" \${stamp:+"$stamp"} || exit 75
rm -f -- "$1/$2.lock"
rmdir -- "$1" 2>/dev/null
exit 0
`;

/** How long a volume must have been silent to count as left: a writer that is silent for as long makes sure of it before it goes on. */
const SILENCE_MS = 3000;

/** What an unfinished import has on a host: the files in the work folder of a pool, or a volume that libvirt's upload stream was to fill. */
export interface Leftover {
  /** The import's id. */
  readonly id: string;
  readonly path: string;
  readonly allocatedBytes: number;
  /**
   * Last written, in seconds since 1970; undefined for a device, whose time does not tell. Nor does what lies on one: who deletes a partition and makes
   * another one in its place has the old one's bytes.
   */
  readonly modifiedSeconds: number | undefined;
  /** Whether an import is writing it right now. Of a device nobody knows: false. */
  readonly isWriting: boolean;
}

/** The parts under a pool's folder. Changes nothing but makes sure of each part's lock file. */
export async function listLeftovers(host: Host, folder: string): Promise<readonly Leftover[]> {
  const { stdout } = await host.run(["sh", "-c", LIST, "virtlift", posix.join(folder, WORK_FOLDER)]);
  return stdout
    .toString("utf8")
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [blocks, modified, state, ...name] = line.split(" ");
      const path = name.join(" ");
      return {
        id: posix.basename(path, posix.extname(path)),
        path,
        allocatedBytes: Number(blocks) * 512,
        modifiedSeconds: Number(modified),
        isWriting: state === "writing",
      };
    });
}

/** Removes a part that nobody writes, and what belongs to it. Throws CommandError when somebody does by now. */
export async function removeLeftover(host: Host, leftover: Pick<Leftover, "id" | "path">): Promise<void> {
  await host.run(["sh", "-c", REMOVE, "virtlift", posix.dirname(leftover.path), leftover.id]);
}

/** A volume that begins with the mark of an unfinished upload. */
export interface UnfinishedUpload extends Leftover {
  readonly volume: StorageVol;
}

/**
 * The unfinished uploads of an active pool by their paths; it is looked at anew. Where there are any, it takes `silenceMs` to see whether somebody writes them.
 * A guest can write such a mark to its own disk: whoever removes a volume makes sure first that no machine has it.
 */
export async function listUnfinishedUploads(
  libvirt: Libvirt,
  poolName: string,
  silenceMs = SILENCE_MS,
): Promise<readonly UnfinishedUpload[]> {
  const pool = await refreshPool(libvirt, poolName);
  const found: { readonly volume: StorageVol; readonly mark: Mark; readonly modifiedAt: string | undefined }[] = [];
  for (const volume of await libvirt.storagePoolListAllVolumes(pool)) {
    const mark = await markOf(libvirt, volume);
    if (mark) found.push({ volume, mark, modifiedAt: await modificationTime(libvirt, volume) });
  }
  if (found.length > 0) await sleep(silenceMs);
  const uploads = found.map(async ({ volume, mark, modifiedAt }): Promise<UnfinishedUpload> => {
    const { type, allocation } = await libvirt.storageVolGetInfo(volume);
    const isFile = type === STORAGE_VOL_TYPE.file;
    return {
      volume,
      id: mark.importId,
      path: await libvirt.storageVolGetPath(volume),
      allocatedBytes: allocation,
      modifiedSeconds: isFile ? Math.floor(Number(modifiedAt)) : undefined,
      isWriting: isFile && (await modificationTime(libvirt, volume)) !== modifiedAt,
    };
  });
  return (await Promise.all(uploads)).toSorted((a, b) => (a.path < b.path ? -1 : 1));
}

/** Removes a volume that is still that unfinished upload; resolves with whether it was. */
export async function removeUnfinishedUpload(libvirt: Libvirt, { volume, id }: UnfinishedUpload): Promise<boolean> {
  if ((await markOf(libvirt, volume))?.importId !== id) return false;
  await libvirt.storageVolDelete(volume);
  return true;
}

async function markOf(libvirt: Libvirt, volume: StorageVol): Promise<Mark | undefined> {
  try {
    const { type } = await libvirt.storageVolGetInfo(volume);
    if (type !== STORAGE_VOL_TYPE.file && type !== STORAGE_VOL_TYPE.block) return undefined;
    return markInside(await readVolume(libvirt, volume, 0, MARK_BYTES));
  } catch (error) {
    // Gone by now, or busy, or not to be read: nothing that we know as ours.
    if (error instanceof LibvirtError) return undefined;
    throw error;
  }
}
