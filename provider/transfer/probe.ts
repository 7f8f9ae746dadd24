/** What the host's file system says before and after an import: one command, which only reads. */
import { posix } from "node:path";
import { CommandError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { readStamp } from "../image/qcow2.ts";
import { ImageError, type Parser } from "../image/parser.ts";
import { WORK_FOLDER } from "./part-file.ts";
import { RECEIVER_TOOLS } from "./receiver.ts";

/** Room for a qcow2's first cluster, where the stamp lies. */
const HEAD_BYTES = 64 * 1024;

const PROBE = `
folder=$1 final=$2 id=$3 tools=$4
echo 'shell yes'
for tool in $tools; do command -v "$tool" >/dev/null 2>&1 || printf 'missing %s\\n' "$tool"; done
command -v qemu-img >/dev/null 2>&1 && echo 'converter yes'
if [ ! -d "$folder" ]; then echo 'folder none'; elif [ -w "$folder" ] && [ -x "$folder" ]; then echo 'folder writable'; else echo 'folder refused'; fi
[ "$(stat -c %d -- "$folder" 2>/dev/null)" = "$(stat -c %d -- "$folder/.." 2>/dev/null)" ] || echo 'mount yes'
printf 'under %s\\n' "$(stat -L -c %m -- "$folder" 2>/dev/null)"
printf 'mounted %s\\n' "$(findmnt -n -r -o FSTYPE,OPTIONS -T "$folder" 2>/dev/null)"
printf 'user %s\\n' "$(id -un)"
printf 'free %s\\n' "$(df --output=avail -B1 -- "$folder" 2>/dev/null | tail -n 1)"
if [ -e "$final" ] || [ -L "$final" ]; then
  printf 'file %s\\n' "$(stat -c '%i %.9Y %b %s' -- "$final")"
fi
work=$folder/${WORK_FOLDER}
if [ -f "$work/$id.part" ]; then printf 'part %s\\n' "$(($(stat -c %b -- "$work/$id.part") * 512))"; fi
if [ -f "$work/$id.stamp" ]; then printf 'stamp %s\\n' "$(tr '\\n' ' ' <"$work/$id.stamp")"; fi
exit 0
`;

/** What is kept in a volume that we made, or beside it. */
export interface Stamp {
  readonly importId: string;
  readonly [key: string]: unknown;
}

export interface Probe {
  /** Tools that the receiver needs and the host lacks. */
  readonly missingTools: readonly string[];
  /** Whether the host has qemu-img, which reads a volume's content. */
  readonly hasQemuImg: boolean;
  readonly folder: "none" | "writable" | "refused";
  /** Whether another file system begins at the folder. */
  readonly isMountPoint: boolean;
  /** Where the file system that holds the folder is mounted; undefined without the folder. Source: stat(1) %m. */
  readonly mountPoint: string | undefined;
  /** What that is; undefined where the host has no findmnt. Source: findmnt(8). */
  readonly fileSystem: FileSystem | undefined;
  /** Who writes there. */
  readonly user: string;
  /** Bytes that the user may still write; undefined when the host's df does not say. */
  readonly freeBytes: number | undefined;
  /** Bytes that an interrupted run of this import has allocated. */
  readonly partBytes: number;
  /** The file at the final path, if there is one. */
  readonly file: VolumeFile | undefined;
}

/** A file system that is mounted. */
export interface FileSystem {
  /** As the kernel calls it: `ext4`, `vfat`. */
  readonly type: string;
  /** Whether it is mounted so that nobody may write. */
  readonly isReadOnly: boolean;
}

export interface VolumeFile {
  /** Our stamp, if this is a volume of ours. */
  readonly stamp: Stamp | undefined;
  /** Whether its modification time is still the one of the import's end: nobody has written to it. Undefined when nothing tells. */
  readonly untouched: boolean | undefined;
  /** Seconds since 1970 with nine decimals; undefined where no such time tells of writes. */
  readonly modifiedAt: string | undefined;
  readonly allocatedBytes: number;
  /** Bytes of the file or the device. */
  readonly sizeBytes: number;
}

/** Looks at the place of a volume on the host. `id` is the import's. Changes nothing. Throws ConnectionError, or CommandError where there is no shell. */
export async function probe(host: Host, finalPath: string, id: string): Promise<Probe> {
  const folder = posix.dirname(finalPath);
  const { stdout } = await host.run(["sh", "-c", PROBE, "virtlift", folder, finalPath, id, RECEIVER_TOOLS.join(" ")]);
  const lines = stdout.toString("utf8").split("\n");
  const values = (key: string) => lines.filter((line) => line.startsWith(`${key} `)).map((line) => line.slice(key.length + 1).trim());
  const value = (key: string) => values(key)[0];
  const free = Number.parseInt(value("free") ?? "", 10);
  if (value("shell") === undefined) {
    throw new CommandError(`${host.label} runs another command than the one that it is given`, { argv: ["sh"], stderrTail: "" });
  }
  return {
    missingTools: values("missing"),
    hasQemuImg: value("converter") !== undefined,
    folder: value("folder") === "writable" ? "writable" : value("folder") === "refused" ? "refused" : "none",
    isMountPoint: value("mount") !== undefined,
    mountPoint: value("under") || undefined,
    fileSystem: parseFileSystem(value("mounted")),
    user: value("user") ?? "?",
    freeBytes: Number.isNaN(free) ? undefined : free,
    partBytes: Number(value("part") ?? 0),
    file: await volumeFile(host, finalPath, value("file"), value("stamp")),
  };
}

/** A type and its comma-separated options. */
function parseFileSystem(text: string | undefined): FileSystem | undefined {
  const [type, options = ""] = (text ?? "").split(/ +/);
  return type ? { type, isReadOnly: options.split(",").includes("ro") } : undefined;
}

async function volumeFile(
  host: Host,
  path: string,
  stat: string | undefined,
  sidecar: string | undefined,
): Promise<VolumeFile | undefined> {
  const [inode, modified, blocks, size] = stat?.split(" ") ?? [];
  if (inode === undefined || modified === undefined) return undefined;
  const stamp = sidecar?.startsWith(`${inode} `) ? parseStamp(sidecar.slice(inode.length + 1)) : stampInside(await headOf(host, path));
  const file = { stamp, modifiedAt: modified, allocatedBytes: Number(blocks) * 512, sizeBytes: Number(size) };
  return { ...file, untouched: isUntouched(file) };
}

/** A time that could not be set came within this after the one of the stamp, a half-second. */
const MAX_LATE_SECONDS = 2.5;

/** Whether a volume's modification time is the one of its import's end. Undefined when nothing tells. */
export function isUntouched(file: Pick<VolumeFile, "stamp" | "modifiedAt">): boolean | undefined {
  const importedAt = file.stamp?.["importedAt"];
  if (file.modifiedAt === undefined || typeof importedAt !== "number") return undefined;
  const lateSeconds = Number(file.modifiedAt) - importedAt;
  return Number.isInteger(importedAt) ? lateSeconds === 0 : lateSeconds >= 0 && lateSeconds < MAX_LATE_SECONDS;
}

/** Removes the stamp that lay beside a volume, and the work folder when nothing else is in it. */
export async function removeStamp(host: Host, finalPath: string, id: string): Promise<void> {
  const work = posix.join(posix.dirname(finalPath), WORK_FOLDER);
  await host.run(["sh", "-c", 'rm -f -- "$1/$2.stamp" "$1/$2.lock"; rmdir -- "$1" 2>/dev/null; exit 0', "virtlift", work, id]);
}

async function headOf(host: Host, path: string): Promise<Buffer> {
  return (await host.run(["head", "-c", String(HEAD_BYTES), "--", path])).stdout;
}

/** Our stamp in the first cluster of a file; undefined when it is no qcow2, or not one of ours. */
export function stampInside(head: Buffer): Stamp | undefined {
  try {
    const stamp = fromBuffer(readStamp(), head);
    return stamp && parseStamp(Buffer.from(stamp).toString("utf8"));
  } catch (error) {
    // No qcow2 at all: a file of somebody else.
    if (error instanceof ImageError) return undefined;
    throw error;
  }
}

function fromBuffer<T>(parser: Parser<T>, bytes: Buffer): T {
  for (let step = parser.next(); ;) {
    if (step.done) return step.value;
    const ask = step.value;
    step = parser.next(ask.kind === "size" ? bytes.length : bytes.subarray(ask.offset, ask.offset + ask.length));
  }
}

/** The stamp in a text; undefined when it is none of ours. */
export function parseStamp(text: string | undefined): Stamp | undefined {
  if (text === undefined) return undefined;
  try {
    const stamp: unknown = JSON.parse(text);
    return typeof stamp === "object" && stamp !== null && "importId" in stamp && typeof stamp.importId === "string"
      ? (stamp as Stamp)
      : undefined;
  } catch {
    // Foreign bytes under our extension's number: not ours.
    return undefined;
  }
}
