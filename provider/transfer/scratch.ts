/** Files that live as long as an import and have no name: where bytes wait that can only be read forward, and are needed anywhere. */
import { randomBytes } from "node:crypto";
import { type FileHandle, open, statfs, unlink } from "node:fs/promises";
import { join } from "node:path";
import { DiskError } from "../errors.ts";
import { isZero } from "../image/bytes.ts";
import { ImageError } from "../image/parser.ts";
import { readFully } from "./files.ts";
import { readDataExtents } from "./holes.ts";
import { formatBytes } from "./progress.ts";
import { Range } from "./range.ts";

/** Blocks that are all zeros become holes. */
const BLOCK_BYTES = 64 * 1024;

/** What may be taken of the free room: others use the folder too. */
const USABLE_SHARE = 0.9;

/** The largest file that is staged: 64 TiB, holes included. */
const MAX_STAGED_BYTES = 2 ** 46;

/** Bytes that may still be written to a folder. */
export async function scratchRoom(folder: string): Promise<number> {
  try {
    const { bavail, bsize } = await statfs(folder);
    return Math.floor(bavail * bsize * USABLE_SHARE);
  } catch (error) {
    throw unusable(folder, error);
  }
}

/** A file without a name that only grows. Close it, and it is gone; so it is when the process dies. */
export class ScratchFile {
  readonly #handle: FileHandle;
  readonly #folder: string;
  readonly #roomBytes: number;
  /** What has not filled a block yet. */
  #rest: Buffer = Buffer.alloc(0);
  #sizeBytes = 0;
  #dataBytes = 0;

  private constructor(handle: FileHandle, folder: string, roomBytes: number) {
    this.#handle = handle;
    this.#folder = folder;
    this.#roomBytes = roomBytes;
  }

  /** Makes the file, readable for its owner only. Throws DiskError (step "source") when the folder cannot be written. */
  static async open(folder: string): Promise<ScratchFile> {
    const roomBytes = await scratchRoom(folder);
    const path = join(folder, `virtlift-${randomBytes(12).toString("hex")}`);
    let handle: FileHandle;
    try {
      handle = await open(path, "wx+", 0o600);
    } catch (error) {
      throw unusable(folder, error);
    }
    await unlink(path);
    return new ScratchFile(handle, folder, roomBytes);
  }

  /** Bytes appended so far, holes included. */
  get sizeBytes(): number {
    return this.#sizeBytes + this.#rest.length;
  }

  /** Bytes that lie in blocks which are not all zeros. */
  get dataBytes(): number {
    return this.#dataBytes;
  }

  /** Throws DiskError (step "source") when the folder runs full, ImageError beyond 64 TiB. */
  async append(bytes: Uint8Array): Promise<void> {
    const waiting =
      this.#rest.length === 0 ? Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length) : Buffer.concat([this.#rest, bytes]);
    const wholeBytes = waiting.length - (waiting.length % BLOCK_BYTES);
    for (let at = 0; at < wholeBytes; at += BLOCK_BYTES) await this.#put(waiting.subarray(at, at + BLOCK_BYTES));
    this.#rest = Buffer.from(waiting.subarray(wholeBytes));
    if (this.#sizeBytes > MAX_STAGED_BYTES) throw new ImageError(`it has no end: ${formatBytes(this.#sizeBytes)} were read`);
  }

  /** What was appended, for reading. Nothing may be appended any more. */
  async finish(name: string): Promise<Range> {
    await this.#put(this.#rest);
    this.#rest = Buffer.alloc(0);
    await this.#handle.truncate(this.#sizeBytes);
    return this.#range(name);
  }

  /** What was written so far, as if it were all of a file of that size. */
  peek(sizeBytes: number): Range {
    return this.#range("", sizeBytes);
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }

  #range(name: string, sizeBytes = this.#sizeBytes): Range {
    const size = { sizeBytes, allocatedBytes: this.#dataBytes };
    return new Range(name, size, {
      readAt: (offset, length) => readFully(this.#handle, `the temporary copy of ${name}`, offset, length),
      dataExtents: () => readDataExtents(this.#handle, sizeBytes),
    });
  }

  async #put(block: Buffer): Promise<void> {
    if (!isZero(block)) {
      this.#dataBytes += block.length;
      if (this.#dataBytes > this.#roomBytes) throw this.#full();
      try {
        for (let at = 0; at < block.length;) {
          const { bytesWritten } = await this.#handle.write(block, at, block.length - at, this.#sizeBytes + at);
          at += bytesWritten;
        }
      } catch (error) {
        if (error instanceof Error && "code" in error && error.code === "ENOSPC") throw this.#full(error);
        throw unusable(this.#folder, error);
      }
    }
    this.#sizeBytes += block.length;
  }

  #full(cause?: unknown): DiskError {
    return new DiskError(
      `${this.#folder} has no room for a temporary copy of the source (more than ${formatBytes(this.#dataBytes)}): make room, or name another folder in the configuration virtlift:scratch`,
      { step: "source", path: this.#folder, cause },
    );
  }
}

function unusable(folder: string, error: unknown): DiskError {
  const reason = error instanceof Error ? error.message : String(error);
  return new DiskError(`cannot keep a temporary copy in ${folder}: ${reason}; name another folder in the configuration virtlift:scratch`, {
    step: "source",
    path: folder,
    cause: error,
  });
}
