/** A source on this machine: a file and those beside it. */
import { type BigIntStats, constants } from "node:fs";
import { open, type FileHandle } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { DiskError } from "../errors.ts";
import { readDataExtents } from "./holes.ts";
import { type Folder, MissingFile, Range, refusePath } from "./range.ts";

interface OpenFile {
  readonly handle: FileHandle;
  readonly range: Range;
  /** As it was when it was opened. */
  readonly seen: BigIntStats;
  readonly path: string;
}

/** The folder of a source: opens its files once each and remembers what they looked like. */
export class LocalFolder implements Folder {
  readonly #path: string;
  readonly #open = new Map<string, Promise<OpenFile>>();

  constructor(path: string) {
    this.#path = path;
  }

  async file(name: string): Promise<Range> {
    if (name !== "") refusePath(name);
    const key = name === basename(this.#path) ? "" : name;
    let opened = this.#open.get(key);
    if (!opened) {
      opened = openFile(key === "" ? this.#path : join(dirname(this.#path), key), key === "");
      this.#open.set(key, opened);
    }
    return (await opened).range;
  }

  async assertUnchanged(): Promise<void> {
    for (const opened of await Promise.allSettled(this.#open.values())) {
      // Of what was asked for and is not there, nothing was read.
      if (opened.status === "rejected") continue;
      const { handle, seen, path } = opened.value;
      if (!isSameState(seen, await handle.stat({ bigint: true }))) {
        throw new DiskError(`${path} changed while it was read: stop what writes it, then run up again`, { step: "source", path });
      }
    }
  }

  async close(): Promise<void> {
    const opened = await Promise.allSettled(this.#open.values());
    await Promise.all(opened.filter((result) => result.status === "fulfilled").map(({ value }) => value.handle.close()));
  }
}

async function openFile(path: string, isImage: boolean): Promise<OpenFile> {
  // A link beside the image could lead anywhere; O_NONBLOCK keeps a FIFO from hanging the open.
  const flags = constants.O_RDONLY | constants.O_NONBLOCK | (isImage ? 0 : constants.O_NOFOLLOW);
  let handle: FileHandle;
  try {
    handle = await open(path, flags);
  } catch (error) {
    throw unreadable(path, error, isImage);
  }
  const stat = await handle.stat({ bigint: true });
  if (!stat.isFile()) {
    await handle.close();
    throw new DiskError(`${path} is not a regular file`, { step: "source", path });
  }
  const size = { sizeBytes: Number(stat.size), allocatedBytes: Number(stat.blocks) * 512 };
  const range = new Range(basename(path), size, {
    readAt: (offset, length) => readFully(handle, path, offset, length),
    dataExtents: () => readDataExtents(handle, size.sizeBytes),
  });
  return { handle, range, seen: stat, path };
}

/** Whoever writes can set the time of that back, but not the one of the last change of any kind; a backup that links the file changes only the latter. */
function isSameState(before: BigIntStats, now: BigIntStats): boolean {
  const isUnwritten = (["dev", "ino", "size", "mtimeNs"] as const).every((key) => before[key] === now[key]);
  return isUnwritten && (before.ctimeNs === now.ctimeNs || before.nlink !== now.nlink);
}

function unreadable(path: string, error: unknown, isImage: boolean): DiskError {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  if (code === "ENOENT") {
    return new MissingFile(isImage ? `there is no file ${path}` : `the image needs ${path}, which is not there`, { step: "source", path });
  }
  if (code === "ELOOP") return new DiskError(`${path} is a symbolic link: a part of an image must be a file`, { step: "source", path });
  const reason = error instanceof Error ? error.message : String(error);
  return new DiskError(`cannot read ${path}: ${reason}`, { step: "source", path, cause: error });
}

/** Fills a buffer from the file. Throws DiskError naming `path`. */
export async function readFully(handle: FileHandle, path: string, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(length);
  let filled = 0;
  while (filled < length) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await handle.read(buffer, filled, length - filled, offset + filled));
    } catch (error) {
      throw new DiskError(`cannot read ${path} at ${offset + filled}: ${String(error)}`, { step: "source", path, cause: error });
    }
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}
