/** Where files of this machine hold data. Node cannot ask for holes; qemu-img, where it is installed, can. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import type { FileHandle } from "node:fs/promises";
import { isZero } from "../image/bytes.ts";
import type { RunList } from "../image/image.ts";
import { RunListBuilder } from "../image/runs.ts";
import type { HashThread } from "./hash-thread.ts";
import type { OpenSource } from "./source.ts";

/** Data is told in blocks of this, aligned in the file: also what `sha256-data` is made of, see `ImportResult.sourceDigest`. */
export const DATA_BLOCK_BYTES = 64 * 1024;

/** Smaller holes are taken for data: that takes less than a second, and the digest is the one that every tool knows. */
export const MIN_HOLES_BYTES = 1024 * 1024 * 1024;

/** The most that is taken of the list of a file's extents; one in more pieces, some 200,000, is read whole. */
const MAX_MAP_BYTES = 8 * 1024 * 1024;

/** A stretch of a file that may hold other bytes than zeros. */
export interface DataExtent {
  readonly offset: number;
  readonly end: number;
}

/** Feeds a hash with what `sha256-data` is made of: blocks of DATA_BLOCK_BYTES that are not all zeros, each behind its offset. */
export class DataHash {
  readonly #hash: HashThread;
  readonly #place = Buffer.alloc(8);

  constructor(hash: HashThread) {
    this.#hash = hash;
  }

  /** Takes whole blocks, the last one perhaps shorter; offsets ascend. The bytes are free again when the promise resolves. */
  async update(offset: number, bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length; at += DATA_BLOCK_BYTES) {
      const block = bytes.subarray(at, at + DATA_BLOCK_BYTES);
      if (isZero(block)) continue;
      this.#place.writeBigUInt64BE(BigInt(offset + at));
      await this.#hash.update(this.#place);
      await this.#hash.update(block);
    }
  }
}

/** What is to be read of a source. */
export interface DataPlan {
  readonly runs: RunList;
  /** Where the source's only file holds data; undefined when all of it is to be read. */
  readonly extents: readonly DataExtent[] | undefined;
}

/** A source's runs, large holes of its file left out. Throws as `OpenSource.runs` does. */
export async function planData(source: OpenSource): Promise<DataPlan> {
  const runs = await source.runs();
  const [file, ...others] = source.files;
  const whole: DataPlan = { runs, extents: undefined };
  // Runs that hold much more than their file does lie over holes; packed ones never do.
  if (file === undefined || others.length > 0 || runs.dataBytes - file.allocatedBytes < MIN_HOLES_BYTES) return whole;
  const extents = await file.dataExtents();
  if (extents === undefined) return whole;
  const { files, virtualSizeBytes } = source.image;
  const builder = new RunListBuilder({ files, virtualSizeBytes });
  let next = 0;
  for (const run of runs) {
    if (run.encoding !== "plain") return whole;
    const runEnd = run.fileOffset + run.lengthBytes;
    while (next < extents.length && extents[next]!.end <= run.fileOffset) next++;
    for (let index = next; index < extents.length && extents[index]!.offset < runEnd; index++) {
      const fileOffset = Math.max(run.fileOffset, extents[index]!.offset);
      const lengthBytes = Math.min(runEnd, extents[index]!.end) - fileOffset;
      const virtualOffset = run.virtualOffset + fileOffset - run.fileOffset;
      builder.add({ ...run, fileOffset, virtualOffset, lengthBytes, storedBytes: lengthBytes });
    }
  }
  return { runs: builder.finish(), extents };
}

/** The extents of a file of `sizeBytes`, ascending and apart, in whole blocks of DATA_BLOCK_BYTES; undefined when nothing on this machine tells. */
export async function readDataExtents(handle: FileHandle, sizeBytes: number): Promise<readonly DataExtent[] | undefined> {
  const map = await qemuMap(handle);
  if (map === undefined) return undefined;
  const extents: { readonly offset: number; end: number }[] = [];
  for (const [, from, length] of map.matchAll(/^(0x[0-9a-f]+|0)\s+(0x[0-9a-f]+)\s/gm)) {
    const offset = Math.floor(Number(from) / DATA_BLOCK_BYTES) * DATA_BLOCK_BYTES;
    const end = Math.min(sizeBytes, Math.ceil((Number(from) + Number(length)) / DATA_BLOCK_BYTES) * DATA_BLOCK_BYTES);
    const last = extents.at(-1);
    if (last !== undefined && offset <= last.end) last.end = Math.max(last.end, end);
    else extents.push({ offset, end });
  }
  return extents;
}

/** What qemu-img(1) map prints: a line for each extent with its offset, length, place and file; undefined when it is not here, fails, or tells too much. */
async function qemuMap(handle: FileHandle): Promise<string | undefined> {
  // The file itself, whatever has its name by now; -U takes no lock on it.
  const child = spawn("qemu-img", ["map", "-U", "-f", "raw", "/dev/stdin"], { stdio: [handle.fd, "pipe", "ignore"] });
  const chunks: Buffer[] = [];
  let lengthBytes = 0;
  child.stdout?.on("data", (chunk: Buffer) => {
    lengthBytes += chunk.length;
    if (lengthBytes > MAX_MAP_BYTES) child.kill();
    else chunks.push(chunk);
  });
  try {
    const [exitCode]: unknown[] = await once(child, "close");
    return exitCode === 0 ? Buffer.concat(chunks).toString("latin1") : undefined;
  } catch {
    // ENOENT: it is not installed.
    return undefined;
  }
}
