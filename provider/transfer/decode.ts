/** What compressed runs hold: guest data when inflated, or the deflate stream itself. */
import { promisify } from "node:util";
import { constants, createInflate, createInflateRaw, type Inflate, type InflateRaw, zstdDecompress } from "node:zlib";
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

/** Inflated clusters lie in buffers of this: of the usual 64 KiB every fifth is put together from two. */
const OUTPUT_BYTES = 256 * 1024 + 64;

const zstdAsync = promisify<Uint8Array, { maxOutputLength: number; chunkSize: number }, Buffer>(zstdDecompress);

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
  switch (run.encoding) {
    case "grain":
      return inflateBy(grainInflaters, grainStream(run, stored), maxOutputLength);
    case "deflate":
      return inflateBy(deflateInflaters, stored, maxOutputLength);
    case "zstd":
      // A little more than comes: so zstd sees the end in its first call.
      return zstdAsync(stored.subarray(0, zstdFrameLength(stored)), { maxOutputLength, chunkSize: run.lengthBytes + 64 });
    case "plain":
      throw new Error("a plain run is not inflated");
  }
}

/** Inflaters without work. A new one for each stream costs half a dozen objects and 50 KiB that only a full collection gives back. */
const grainInflaters: Inflater[] = [];
const deflateInflaters: Inflater[] = [];
const MAX_IDLE_INFLATERS = 16;

async function inflateBy(idle: Inflater[], stored: Uint8Array, maxOutputLength: number): Promise<Buffer> {
  const inflater = idle.pop() ?? new Inflater(idle === grainInflaters ? createInflate : createInflateRaw);
  const bytes = await inflater.inflate(stored, maxOutputLength);
  if (inflater.isReusable && idle.length < MAX_IDLE_INFLATERS) idle.push(inflater);
  else inflater.close();
  return bytes;
}

/** One stream of Node's, for one whole deflate stream after the other. zlib's own inflate() makes a new one each time, and asks it twice. */
class Inflater {
  readonly #stream: Inflate | InflateRaw;
  #pieces: Buffer[] = [];
  #lengthBytes = 0;
  #maxOutputLength = 0;
  #reject: (error: Error) => void = () => {};
  #isReusable = false;

  constructor(open: typeof createInflate | typeof createInflateRaw) {
    this.#stream = open({ chunkSize: OUTPUT_BYTES, flush: constants.Z_FINISH });
    this.#stream.on("error", (error) => this.#reject(error));
    this.#stream.on("data", (piece: Buffer) => {
      this.#pieces.push(piece);
      this.#lengthBytes += piece.length;
      if (this.#lengthBytes > this.#maxOutputLength)
        this.#stream.destroy(new Error(`it inflates to more than ${this.#maxOutputLength} bytes`));
    });
  }

  /** False after a failure, and when the stream ended before its bytes did: Node takes that for the end of all. */
  get isReusable(): boolean {
    return this.#isReusable;
  }

  async inflate(stored: Uint8Array, maxOutputLength: number): Promise<Buffer> {
    this.#isReusable = false;
    this.#maxOutputLength = maxOutputLength;
    this.#lengthBytes = 0;
    const writtenBefore = this.#stream.bytesWritten;
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      this.#stream.write(stored, (error) => {
        // It comes as an event, too; so does that there is too much, which leaves the write itself without one.
        if (error || this.#stream.destroyed) return;
        const pieces = this.#pieces;
        this.#pieces = [];
        this.#isReusable = this.#stream.bytesWritten - writtenBefore === stored.length;
        if (this.#isReusable) this.#stream.reset();
        resolve(pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces));
      });
    });
  }

  close(): void {
    this.#stream.close();
  }
}

function grainStream(run: Run, stored: Uint8Array): Uint8Array {
  if (stored.length < GRAIN_MARKER_BYTES || Number(viewOf(stored).getBigUint64(0, true)) * 512 !== run.virtualOffset) {
    throw new ImageError(`the grain at ${run.fileOffset} is not the one that the grain table names`);
  }
  const end = GRAIN_MARKER_BYTES + viewOf(stored).getUint32(8, true);
  if (end > stored.length) throw new ImageError(`the grain at ${run.fileOffset} is longer than the room before the next`);
  return stored.subarray(GRAIN_MARKER_BYTES, end);
}
