/** What compressed runs hold: guest data when inflated, or the deflate stream itself. */
import { promisify } from "node:util";
import { constants, createInflate, createInflateRaw, zstdDecompress } from "node:zlib";
import { viewOf } from "../image/bytes.ts";
import type { Run } from "../image/image.ts";
import { ImageError } from "../image/parser.ts";
import { zstdFrameLength } from "../image/zstd.ts";

/** A VMDK grain's marker: u64 LBA, u32 size of the zlib stream behind it. Source: VMware's Virtual Disk Format 5.0. */
const GRAIN_MARKER_BYTES = 12;

/** CMF and FLG before, Adler-32 behind. Source: RFC 1950, section 2.2. */
const ZLIB_HEADER_BYTES = 2;
const ZLIB_TRAILER_BYTES = 4;
const DEFLATE_METHOD = 8;
const HAS_DICTIONARY = 0x20;

/** The largest cluster that any format compresses: qcow2's. */
const MAX_CLUSTER_BYTES = 2 * 1024 * 1024;

interface Limits {
  readonly maxOutputLength: number;
  readonly chunkSize: number;
}
const zstdAsync = promisify<Uint8Array, Limits, Buffer>(zstdDecompress);

/**
 * The `lengthBytes` of guest data in a run that is not plain, on one of libuv's threads. `stored` is what the file holds there.
 * Throws ImageError when it is damaged, also when a grain's Adler-32 is another.
 */
export async function inflateRun(run: Run, stored: Uint8Array, virtualSizeBytes: number): Promise<Buffer> {
  // The cluster that crosses the disk's end is stored whole.
  const isLast = run.virtualOffset + run.lengthBytes === virtualSizeBytes;
  let bytes: Buffer;
  try {
    bytes = await inflated(run, stored, isLast ? MAX_CLUSTER_BYTES : run.lengthBytes);
  } catch (error) {
    if (error instanceof ImageError) throw error;
    const reason = error instanceof Error ? error.message : String(error);
    throw new ImageError(`the compressed data at ${run.fileOffset} is damaged: ${reason}`);
  }
  if (bytes.length < run.lengthBytes || (bytes.length > run.lengthBytes && !isLast)) {
    throw new ImageError(`the compressed data at ${run.fileOffset} inflates to ${bytes.length} bytes instead of ${run.lengthBytes}`);
  }
  return bytes.subarray(0, run.lengthBytes);
}

/**
 * The raw deflate stream (RFC 1951) of a run, a view of `stored`; undefined for one that is compressed otherwise. What a `deflate` run's stream ends
 * in may be up to a sector of other bytes. Throws ImageError when a grain is not what its table says, or not framed as zlib frames.
 */
export function deflateStreamOf(run: Run, stored: Uint8Array): Uint8Array | undefined {
  if (run.encoding === "deflate") return stored;
  if (run.encoding !== "grain") return undefined;
  const zlib = grainStream(run, stored);
  const [method = 0, flags = 0] = zlib;
  const isZlib = (method & 0x0f) === DEFLATE_METHOD && method >>> 4 <= 7 && (method * 256 + flags) % 31 === 0;
  if (!isZlib || (flags & HAS_DICTIONARY) !== 0 || zlib.length <= ZLIB_HEADER_BYTES + ZLIB_TRAILER_BYTES) {
    throw new ImageError(`the grain at ${run.fileOffset} does not begin as a zlib stream does: it is damaged`);
  }
  return zlib.subarray(ZLIB_HEADER_BYTES, zlib.length - ZLIB_TRAILER_BYTES);
}

async function inflated(run: Run, stored: Uint8Array, maxOutputLength: number): Promise<Buffer> {
  // A little more than comes: so zlib sees the end in its first call.
  const limits: Limits = { maxOutputLength, chunkSize: run.lengthBytes + 64 };
  switch (run.encoding) {
    case "grain":
      return inflateOnce(createInflate, grainStream(run, stored), limits);
    case "deflate":
      return inflateOnce(createInflateRaw, stored, limits);
    case "zstd":
      return zstdAsync(stored.subarray(0, zstdFrameLength(stored)), limits);
    case "plain":
      throw new Error("a plain run is not inflated");
  }
}

/** As zlib's own inflate(), which goes to another thread a second time to learn that nothing is left: a third of what a small stream costs. */
async function inflateOnce(open: typeof createInflate | typeof createInflateRaw, stored: Uint8Array, limits: Limits): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const stream = open({ chunkSize: limits.chunkSize, flush: constants.Z_FINISH });
    const pieces: Buffer[] = [];
    let lengthBytes = 0;
    stream.on("error", reject);
    stream.on("data", (piece: Buffer) => {
      pieces.push(piece);
      lengthBytes += piece.length;
      if (lengthBytes > limits.maxOutputLength) stream.destroy(new Error(`it inflates to more than ${limits.maxOutputLength} bytes`));
    });
    stream.write(stored, (error) => {
      // It comes as an event, too.
      if (error) return;
      stream.close();
      resolve(pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces));
    });
  });
}

function grainStream(run: Run, stored: Uint8Array): Uint8Array {
  if (stored.length < GRAIN_MARKER_BYTES || Number(viewOf(stored).getBigUint64(0, true)) * 512 !== run.virtualOffset) {
    throw new ImageError(`the grain at ${run.fileOffset} is not the one that the grain table names`);
  }
  const end = GRAIN_MARKER_BYTES + viewOf(stored).getUint32(8, true);
  if (end > stored.length) throw new ImageError(`the grain at ${run.fileOffset} is longer than the room before the next`);
  return stored.subarray(GRAIN_MARKER_BYTES, end);
}
