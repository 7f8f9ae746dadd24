/** Takes gzip, xz, zstd and a zip's deflate off a source: inflates it forward, bounded, into a file without a name. */
import { createHash, type Hash } from "node:crypto";
import { constants, crc32, createGunzip, createInflateRaw, createZstdDecompress } from "node:zlib";
import xz from "xz-decompress";
import { ImageError } from "../image/parser.ts";
import type { Digest } from "../image/manifest.ts";
import { openImage } from "../image/open.ts";
import { quoted } from "../image/words.ts";
import { declaredSize, type Wrapping, WRAPPING_MAGIC_BYTES, wrappingOf } from "../image/wrapping.ts";
import { ZstdSplitter } from "../image/zstd.ts";
import { formatBytes } from "./progress.ts";
import { drive, type Range } from "./range.ts";
import { ScratchFile } from "./scratch.ts";

const READ_BYTES = 1024 * 1024;

/** What of a wrapped source is inflated to look at its header. */
const PEEKED_BYTES = 4 * 1024 * 1024;
/** Wrapped bytes that are read for that, at most. */
const MAX_PEEKED_READS = 16;

/** zstd's window that a frame may ask for: 128 MiB, what its own program takes by default. Source: zstd(1), --memory. */
const MAX_ZSTD_WINDOW_LOG = 27;

/** Data, zeros left out, may grow to this times what it was wrapped in: disks do to 20 times, bombs to 1,000 and more. */
const MAX_GROWTH = 200;
/** Below this, growth does no harm. */
const HARMLESS_BYTES = 64 * 1024 * 1024;
/** An image holds hardly more than its disk: its tables, and snapshots. */
const MAX_IMAGE_SHARE = 2;

/** How bytes are packed: wrapped as a file, or as the member of a zip archive. */
export type Packing = Wrapping | "deflate";

/** What the bytes of a range are wrapped in. */
export async function findWrapping(range: Range): Promise<Wrapping | undefined> {
  return wrappingOf(await range.readCached(0, WRAPPING_MAGIC_BYTES));
}

/** How large a wrapped range says to be inside; undefined when it does not say. */
export function declaredInside(range: Range, wrapping: Wrapping): Promise<number | undefined> {
  return drive(declaredSize(wrapping, range.sizeBytes), () => Promise.resolve(range));
}

export interface Staged {
  readonly range: Range;
  /** SHA-256 of the bytes as they came, wrapped, in hex. */
  readonly digest: string;
  close(): Promise<void>;
}

export interface StageOptions {
  /** The folder of the temporary file. */
  readonly folder: string;
  readonly packing: Packing | undefined;
  /** What the bytes as they come must hash to. */
  readonly expected: Digest | undefined;
  /** What the bytes inside must come to, as a zip archive says. */
  readonly promised?: { readonly sizeBytes: number; readonly crc32: number };
  readonly signal?: AbortSignal | undefined;
}

/**
 * Copies what comes into a temporary file, inflated where it is wrapped. Zeros take no room there. Close what comes back.
 *
 * Throws ImageError on damaged bytes, another digest than expected, another size or CRC-32 than promised, and what grows beyond bounds: to over twice
 * the size of the disk that its own header declares, or else to over 200 times what it was wrapped in. DiskError (step "source") when the folder cannot hold it.
 */
export async function stage(name: string, chunks: AsyncIterable<Uint8Array>, options: StageOptions): Promise<Staged> {
  const { packing, expected, promised, signal } = options;
  const file = await ScratchFile.open(options.folder);
  try {
    const hash = new PassingHash(expected);
    const inflated = packing === undefined ? hash.watch(chunks) : inflate(packing, hash.watch(chunks));
    let limitBytes: number | undefined;
    let peeked = false;
    let checksum = 0;
    for await (const bytes of inflated) {
      signal?.throwIfAborted();
      if (promised) {
        checksum = crc32(bytes, checksum);
        if (file.sizeBytes + bytes.length > promised.sizeBytes)
          throw brokenPromise(name, `it holds more than the ${promised.sizeBytes} bytes`);
      }
      await file.append(bytes);
      if (!peeked && file.sizeBytes >= PEEKED_BYTES + READ_BYTES) {
        peeked = true;
        limitBytes = await imageLimit(file.peek(Number.MAX_SAFE_INTEGER));
      }
      if (limitBytes !== undefined && file.sizeBytes > limitBytes) {
        throw new ImageError(
          `it holds more than ${formatBytes(limitBytes)}, and its header declares less than half of that: it is damaged or crafted`,
        );
      }
      if (packing !== undefined && file.dataBytes > Math.max(HARMLESS_BYTES, MAX_GROWTH * hash.sizeBytes)) {
        throw new ImageError(`it inflates to more than ${MAX_GROWTH} times its size, as no disk does: it is damaged or crafted`);
      }
    }
    const digest = hash.finish(name);
    if (promised && file.sizeBytes !== promised.sizeBytes)
      throw brokenPromise(name, `it holds ${file.sizeBytes} bytes instead of the ${promised.sizeBytes}`);
    if (promised && checksum !== promised.crc32)
      throw brokenPromise(name, `its CRC-32 is ${hex(checksum)} instead of the ${hex(promised.crc32)}`);
    const range = await file.finish(name);
    return { range, digest, close: () => file.close() };
  } catch (error) {
    await file.close();
    throw error;
  }
}

function brokenPromise(name: string, words: string): ImageError {
  return new ImageError(`${quoted(name)} is damaged: ${words} that the archive promises`);
}

function hex(checksum: number): string {
  return checksum.toString(16).padStart(8, "0");
}

/** The most bytes that an image with this header may have; undefined when it declares no disk of a size of its own. */
async function imageLimit(start: Range): Promise<number | undefined> {
  try {
    const image = await drive(openImage({ sizeBytes: start.sizeBytes }), () => Promise.resolve(start));
    return image.format === "raw" ? undefined : MAX_IMAGE_SHARE * image.virtualSizeBytes + HARMLESS_BYTES;
  } catch (error) {
    // An archive, or a format whose header lies at its end.
    if (error instanceof ImageError) return undefined;
    throw error;
  }
}

/** The first few MiB of a range, or of what is wrapped in it. `isWhole` says that there is no more. */
export async function peekInside(
  range: Range,
  packing: Packing | undefined,
): Promise<{ readonly bytes: Buffer; readonly isWhole: boolean }> {
  const parts: Uint8Array[] = [];
  let length = 0;
  let isWhole = true;
  const start = first(range, MAX_PEEKED_READS * READ_BYTES);
  for await (const bytes of packing === undefined ? start : inflate(packing, start)) {
    parts.push(bytes);
    length += bytes.length;
    isWhole = length <= PEEKED_BYTES;
    if (!isWhole) break;
  }
  return { bytes: Buffer.concat(parts).subarray(0, PEEKED_BYTES), isWhole };
}

async function* first(range: Range, length: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < length;) {
    const bytes = await range.read(at, READ_BYTES);
    if (bytes.length === 0) return;
    yield bytes;
    at += bytes.length;
  }
}

/** All bytes of a range, forward. */
export async function* chunksOf(range: Range): AsyncGenerator<Uint8Array> {
  let at = 0;
  for (let bytes = await range.read(0, READ_BYTES); bytes.length > 0; bytes = await range.read(at, READ_BYTES)) {
    yield bytes;
    at += bytes.length;
  }
  if (!range.isForwardOnly && at !== range.sizeBytes)
    throw new ImageError(`${range.name} ends early, at ${at} of ${range.sizeBytes} bytes`);
}

/** Reads all of a range and compares its digest. Throws ImageError when it is another than `expected`. */
export async function digestOf(range: Range, expected: Digest, signal?: AbortSignal): Promise<void> {
  const hash = new PassingHash(expected);
  // oxlint-disable-next-line no-unused-vars -- only the digest is wanted
  for await (const _ of hash.watch(chunksOf(range))) signal?.throwIfAborted();
  hash.finish(range.name);
}

/** The digest of what goes by. */
class PassingHash {
  readonly #expected: Digest | undefined;
  readonly #sha256 = createHash("sha256");
  readonly #other: Hash | undefined;
  sizeBytes = 0;

  constructor(expected: Digest | undefined) {
    this.#expected = expected;
    if (expected && expected.algorithm !== "sha256") this.#other = createHash(expected.algorithm);
  }

  async *watch(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    for await (const bytes of chunks) {
      this.sizeBytes += bytes.length;
      this.#sha256.update(bytes);
      this.#other?.update(bytes);
      yield bytes;
    }
  }

  /** The SHA-256 in hex. Throws ImageError when another digest was expected. */
  finish(name: string): string {
    const digest = this.#sha256.digest("hex");
    const found = this.#other?.digest("hex") ?? digest;
    if (this.#expected && this.#expected.hex !== found) {
      throw new ImageError(`${name} is damaged: its ${this.#expected.algorithm} is ${found}, and ${this.#expected.hex} was promised`);
    }
    return digest;
  }
}

/** What is inside of the chunks. Throws ImageError when they are damaged, end early, or ask for too much memory; passes on what `chunks` throws. */
async function* inflate(packing: Packing, chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  let broken: { readonly error: unknown } | undefined;
  async function* source(): AsyncGenerator<Uint8Array> {
    try {
      yield* chunks;
    } catch (error) {
      broken = { error };
      throw error;
    }
  }
  try {
    yield* packing === "xz" ? inflateXz(source()) : inflateByZlib(packing, source());
  } catch (error) {
    if (broken) throw broken.error;
    if (error instanceof ImageError) throw error;
    throw new ImageError(`what is wrapped in ${packing} cannot be inflated: ${reasonOf(packing, error)}`);
  }
}

function reasonOf(packing: Packing, error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  if (packing !== "xz") return text;
  return XZ_REASONS[Number(/error code (\d+)$/.exec(text)?.[1])] ?? text;
}

/** What xz-decompress makes of the enum xz_ret of xz-embedded's xz.h. */
const XZ_REASONS: Readonly<Record<number, string>> = {
  3: "there is not enough memory for its dictionary",
  4: "its dictionary is larger than 64 MiB: compress it with xz -9 or less",
  5: "it is no xz file",
  6: "it uses a filter or check that is not read: compress it again without, with --check=crc64",
  7: "its data is damaged",
  8: "it is truncated, or has other bytes behind its end",
};

/** The library keeps the decoder's memory in one WebAssembly instance, and inflates one file of the process at a time. */
async function* inflateXz(chunks: AsyncGenerator<Uint8Array>): AsyncGenerator<Uint8Array> {
  const input = ReadableStream.from(chunks) as ReadableStream<Uint8Array>;
  yield* new xz.XzReadableStream(input) as unknown as AsyncIterable<Uint8Array>;
}

function openInflater(packing: Exclude<Packing, "xz">) {
  switch (packing) {
    case "gzip":
      return createGunzip({ chunkSize: READ_BYTES });
    case "deflate":
      return createInflateRaw({ chunkSize: READ_BYTES });
    case "zstd":
      return createZstdDecompress({ chunkSize: READ_BYTES, params: { [constants.ZSTD_d_windowLogMax]: MAX_ZSTD_WINDOW_LOG } });
  }
}

async function* inflateByZlib(packing: Exclude<Packing, "xz">, chunks: AsyncGenerator<Uint8Array>): AsyncGenerator<Uint8Array> {
  const inflater = openInflater(packing);
  const closed = new Promise<void>((resolve) => inflater.once("close", resolve));
  const feed = async (): Promise<void> => {
    // Behind the end of a frame node's zstd drops the rest of the chunk without a word (24.21, measured): no chunk may hold more than one.
    const splitter = packing === "zstd" ? new ZstdSplitter() : undefined;
    for await (const chunk of chunks) {
      for (const bytes of splitter?.split(chunk) ?? [chunk]) {
        if (inflater.destroyed) return;
        const written = new Promise<void>((resolve) => void inflater.write(bytes, () => resolve()));
        await Promise.race([written, closed]);
      }
    }
    inflater.end();
  };
  const fed = feed().catch((error: unknown) => {
    inflater.destroy(error instanceof Error ? error : new Error(String(error)));
  });
  try {
    yield* inflater as AsyncIterable<Uint8Array>;
  } finally {
    inflater.destroy();
    await fed;
    await chunks.return(undefined);
  }
}
