/** The pipeline of an import: a source's files in one forward pass, through the format's map, into a volume on a host. */
import { createHash, type Hash, randomUUID } from "node:crypto";
import { promisify } from "node:util";
import { inflate, inflateRaw, deflateRaw, zstdDecompress } from "node:zlib";
import { DiskError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { ImageError } from "../image/parser.ts";
import type { Run, RunList } from "../image/image.ts";
import { chooseClusterBytes, type Layout, Qcow2Writer, type Write } from "../image/qcow2-writer.ts";
import { zstdFrameLength } from "../image/zstd.ts";
import { openPartFile } from "./part-file.ts";
import type { Part } from "./part.ts";
import type { OpenSource, SourceFile } from "./source.ts";
import { openUpload } from "./upload.ts";

const READ_BYTES = 4 * 1024 * 1024;

/** Clusters that are inflated or deflated at the same time, on libuv's threads. */
const MAX_DECODING = 64;

/** A VMDK grain's marker: u64 LBA, u32 size of the zlib stream behind it. Source: VMware's Virtual Disk Format 5.0. */
const GRAIN_MARKER_BYTES = 12;

/** The largest cluster that any format compresses: qcow2's. */
const MAX_CLUSTER_BYTES = 2 * 1024 * 1024;

/** What zeros of a raw volume are left out in. */
const RAW_BLOCK_BYTES = 64 * 1024;
const ZEROS = Buffer.alloc(RAW_BLOCK_BYTES);

export interface ImportOptions {
  readonly id: string;
  readonly finalPath: string;
  readonly format: "qcow2" | "raw";
  readonly layout: Layout;
  /** At least the source's virtual size. */
  readonly capacityBytes: number;
  /** What is kept in the volume (qcow2) or beside it (raw), given what is known at the end. Plain JSON, at most 8 KiB. */
  readonly stamp: (digests: { readonly sourceDigest: string; readonly contentDigest: string; readonly importedAt: number }) => object;
  readonly signal: AbortSignal;
  /** Write a volume of this pool through libvirt's upload stream. Default: a part file, written by a program on the host. */
  readonly upload?: { readonly pool: string; readonly isBlock: boolean; readonly patienceMs?: number } | undefined;
  /** Called after every read of the source. */
  readonly onProgress: (doneBytes: number, totalBytes: number) => void;
}

export interface ImportResult {
  /** `sha256:<hex>` of the source file; of its `sha256sum` lines where an image has several. */
  readonly sourceDigest: string;
  /** `sha256:<hex>` of the volume's file as published: a raw one whole, a qcow2 from its second cluster on, which is all but its header. */
  readonly contentDigest: string;
  readonly allocatedBytes: number;
  readonly sentBytes: number;
  /** Bytes that an interrupted earlier run had brought over. */
  readonly keptBytes: number;
  /** Seconds since 1970: the volume's modification time, as long as nobody writes to it. */
  readonly importedAt: number;
  /** As libvirt prints it, where the modification time could not be set. */
  readonly modifiedAt: string | undefined;
}

/**
 * Imports a source as a volume file. Throws PathTaken when the path exists, DiskError when bytes are wrong or the host cannot take them.
 * After a cut (client, wire or host) the part stays and the next run goes on with it; after any other failure it is removed.
 */
export async function importDisk(host: Host, source: OpenSource, options: ImportOptions): Promise<ImportResult> {
  const { upload } = options;
  const writer = randomUUID();
  const open = (): Promise<Part> =>
    upload === undefined ? openPartFile(host, options) : openUpload(host, { ...options, ...upload, writer });
  const part = await open();
  try {
    return await fill(part, source, options);
  } catch (error) {
    options.signal.throwIfAborted();
    const failure =
      error instanceof ImageError
        ? new DiskError(`${source.path}: ${error.message}`, { step: "source", path: source.path, cause: error })
        : error;
    // A part that can never become this disk, or that fills the host's file system, helps nobody.
    if (failure instanceof DiskError) await discard(part, open);
    throw failure;
  } finally {
    await part[Symbol.asyncDispose]();
  }
}

/** Removes a part whose other end may have hung up. What cannot be removed stays in the work folder and is found by the next run. */
async function discard(part: Part, open: () => Promise<Part>): Promise<void> {
  await part[Symbol.asyncDispose]();
  try {
    await using again = await open();
    await again.discard();
  } catch {
    // The failure that led here is the one to tell.
  }
}

async function fill(part: Part, source: OpenSource, options: ImportOptions): Promise<ImportResult> {
  await part.resume();
  const runs = await source.runs();
  const target = options.format === "qcow2" ? qcow2Target(part, source.image.granularityBytes, runs, options) : rawTarget(part, options);
  const sourceDigest = await pump(source, runs, target, options);
  const contentDigest = await target.finish();
  await source.assertUnchanged();
  const importedAt = Math.floor(Date.now() / 1000);
  await target.seal(Buffer.from(JSON.stringify(options.stamp({ sourceDigest, contentDigest, importedAt }))));
  const { allocatedBytes, modifiedAt } = await part.publish(importedAt);
  return { sourceDigest, contentDigest, allocatedBytes, sentBytes: part.sentBytes, keptBytes: part.keptBytes, importedAt, modifiedAt };
}

/** Where guest data goes. */
interface Target {
  write(virtualOffset: number, bytes: Uint8Array): Promise<void>;
  /** Clusters are deflated before they are written, each on its own. */
  readonly deflates: boolean;
  readonly clusterBytes: number;
  writeCompressed(virtualOffset: number, deflated: Uint8Array): Promise<void>;
  /** Everything but the seal is on the host, durable and confirmed. Resolves with the content digest. */
  finish(): Promise<string>;
  /** Makes a disk of it. */
  seal(stamp: Uint8Array): Promise<void>;
}

function qcow2Target(part: Part, granularityBytes: number, runs: RunList, options: ImportOptions): Target {
  const clusterBytes = chooseClusterBytes(runs, granularityBytes);
  const writer = new Qcow2Writer({ virtualSizeBytes: options.capacityBytes, clusterBytes, layout: options.layout, pieces: runs });
  const hash = createHash("sha256");
  let end = clusterBytes;
  const send = async (writes: Iterable<Write>) => {
    for (const { offset, bytes } of writes) {
      if (offset !== end) throw new Error(`the qcow2 writer left a gap at ${end}`);
      hash.update(bytes);
      end += bytes.length;
      await part.write(offset, bytes);
    }
  };
  return {
    deflates: options.layout === "compressed",
    clusterBytes,
    write: (virtualOffset, bytes) => send(writer.write(virtualOffset, bytes)),
    writeCompressed: (virtualOffset, deflated) => send(writer.writeCompressed(virtualOffset, deflated)),
    finish: async () => {
      const { writes } = writer.finish();
      await send(writes);
      await part.settle();
      return `sha256:${hash.digest("hex")}`;
    },
    seal: async (stamp) => {
      const header = writer.header(stamp);
      await part.write(header.offset, header.bytes);
      await part.settle();
    },
  };
}

function rawTarget(part: Part, options: ImportOptions): Target {
  return {
    deflates: false,
    clusterBytes: RAW_BLOCK_BYTES,
    write: async (virtualOffset, bytes) => {
      for (let at = 0; at < bytes.length; at += RAW_BLOCK_BYTES) {
        const block = bytes.subarray(at, at + RAW_BLOCK_BYTES);
        if (!isZero(block)) await part.write(virtualOffset + at, block);
      }
    },
    writeCompressed: () => {
      throw new Error("a raw volume has no compressed clusters");
    },
    finish: async () => {
      await part.settle();
      await (options.layout === "full" ? part.allocate(options.capacityBytes) : part.setSize(options.capacityBytes));
      await part.settle();
      return `sha256:${await part.digest(0)}`;
    },
    seal: (stamp) => part.stamp(stamp),
  };
}

/** Moves all guest data, in the order in which the source's files hold it. Resolves with the source's digest when every expected one was met. */
async function pump(source: OpenSource, runs: RunList, target: Target, options: ImportOptions): Promise<string> {
  const totalBytes = source.files.reduce((sum, file) => sum + file.sizeBytes, 0);
  let doneBytes = 0;
  const readers = source.files.map(
    (file) =>
      new ForwardReader(file, (bytes) => {
        options.signal.throwIfAborted();
        doneBytes += bytes;
        options.onProgress(doneBytes, totalBytes);
      }),
  );
  const decoding: Promise<() => Promise<void>>[] = [];
  const next = async () => (await decoding.shift()!)();
  try {
    for (const run of runs) {
      const reader = readers[run.file]!;
      if (run.encoding !== "plain") {
        const decoded = decode(run, await reader.slice(run.fileOffset, run.storedBytes), source.image.virtualSizeBytes, target);
        // Awaited in its turn; until then its failure must not be a stray one.
        decoded.catch(() => {});
        decoding.push(decoded);
        if (decoding.length >= MAX_DECODING) await next();
        continue;
      }
      // Whole clusters, so that those of the compressed layout are not torn apart.
      for (let at = 0; at < run.lengthBytes;) {
        const length = Math.min(READ_BYTES - ((run.virtualOffset + at) % target.clusterBytes), run.lengthBytes - at);
        const bytes = await reader.slice(run.fileOffset + at, length);
        if (bytes.length < length) throw endsEarly(source.files[run.file]!, run.fileOffset + at + bytes.length);
        while (decoding.length > 0) await next();
        await encode(run.virtualOffset + at, bytes, target);
        at += length;
      }
    }
    while (decoding.length > 0) await next();
  } finally {
    await Promise.allSettled(decoding);
  }
  const digests = await Promise.all(readers.map((reader) => reader.finish()));
  if (digests.length === 1) return `sha256:${digests[0]}`;
  const lines = source.files.map((file, index) => `${digests[index]}  ${file.name}\n`);
  return `sha256:${createHash("sha256").update(lines.join("")).digest("hex")}`;
}

function endsEarly(file: SourceFile, offset: number): ImageError {
  return new ImageError(`${file.name} ends early, at ${offset} of ${file.sizeBytes} bytes`);
}

const inflateAsync = promisify<Uint8Array, { maxOutputLength: number }, Buffer>(inflate);
const inflateRawAsync = promisify<Uint8Array, { maxOutputLength: number }, Buffer>(inflateRaw);
const zstdAsync = promisify<Uint8Array, { maxOutputLength: number }, Buffer>(zstdDecompress);
const deflateRawAsync = promisify<Uint8Array, { level: number; windowBits: number }, Buffer>(deflateRaw);

/** Starts inflating a cluster or grain; what it resolves with writes it. Throws ImageError when it is damaged. */
async function decode(run: Run, stored: Uint8Array, virtualSizeBytes: number, target: Target): Promise<() => Promise<void>> {
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
  return () => encode(run.virtualOffset, bytes.subarray(0, run.lengthBytes), target);
}

async function inflated(run: Run, stored: Uint8Array, maxOutputLength: number): Promise<Buffer> {
  const limit = { maxOutputLength };
  switch (run.encoding) {
    case "grain": {
      const marker = new DataView(stored.buffer, stored.byteOffset, stored.byteLength);
      if (stored.length < GRAIN_MARKER_BYTES || Number(marker.getBigUint64(0, true)) * 512 !== run.virtualOffset) {
        throw new ImageError(`the grain at ${run.fileOffset} is not the one that the grain table names`);
      }
      const end = GRAIN_MARKER_BYTES + marker.getUint32(8, true);
      if (end > stored.length) throw new ImageError(`the grain at ${run.fileOffset} is longer than the room before the next`);
      return inflateAsync(stored.subarray(GRAIN_MARKER_BYTES, end), limit);
    }
    case "deflate":
      return inflateRawAsync(stored, limit);
    case "zstd":
      return zstdAsync(stored.subarray(0, zstdFrameLength(stored)), limit);
    case "plain":
      throw new Error("a plain run is not inflated");
  }
}

async function encode(virtualOffset: number, bytes: Uint8Array, target: Target): Promise<void> {
  if (!target.deflates) return target.write(virtualOffset, bytes);
  const { clusterBytes } = target;
  const deflated: Promise<{ readonly at: number; readonly plain: Uint8Array; readonly packed?: Buffer }>[] = [];
  for (let at = 0; at < bytes.length; at += clusterBytes) {
    const plain = bytes.subarray(at, at + clusterBytes);
    const whole = plain.length === clusterBytes && (virtualOffset + at) % clusterBytes === 0 && !isZero(plain);
    // QEMU inflates with a window of 4 KiB: deflate with no more. Source: block/qcow2-threads.c.
    deflated.push(
      whole
        ? deflateRawAsync(plain, { level: 1, windowBits: 12 }).then((packed) => ({ at, plain, packed }))
        : Promise.resolve({ at, plain }),
    );
  }
  for (const { at, plain, packed } of await Promise.all(deflated)) {
    if (packed && packed.length < clusterBytes) await target.writeCompressed(virtualOffset + at, packed);
    else await target.write(virtualOffset + at, plain);
  }
}

function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const block = bytes.subarray(at, at + ZEROS.length);
    if (!ZEROS.subarray(0, block.length).equals(block)) return false;
  }
  return true;
}

/** Reads a file once from start to end, hashing it, and hands out ranges whose offsets never go back. */
class ForwardReader {
  readonly #file: SourceFile;
  readonly #onRead: (bytes: number) => void;
  readonly #hash = createHash("sha256");
  readonly #expectedHash: Hash | undefined;
  #window: Buffer = Buffer.alloc(0);
  #windowOffset = 0;
  #next: Promise<Buffer> | undefined;

  constructor(file: SourceFile, onRead: (bytes: number) => void) {
    this.#file = file;
    this.#onRead = onRead;
    if (file.expected && file.expected.algorithm !== "sha256") this.#expectedHash = createHash(file.expected.algorithm);
  }

  /** At most `length` bytes at `offset`, fewer only at the file's end. Valid until the next call. `offset` is never before the last one's. */
  async slice(offset: number, length: number): Promise<Buffer> {
    while (this.#end < offset + length) {
      const more = await this.#read();
      if (more.length === 0) break;
      const kept = this.#window.subarray(Math.min(this.#window.length, offset - this.#windowOffset));
      this.#windowOffset += this.#window.length - kept.length;
      this.#window = kept.length === 0 ? more : Buffer.concat([kept, more]);
    }
    const start = offset - this.#windowOffset;
    return this.#window.subarray(start, start + length);
  }

  /** Reads what is left and compares the digest. Resolves with the SHA-256 in hex; throws ImageError when another was expected. */
  async finish(): Promise<string> {
    for (;;) {
      const more = await this.#read();
      if (more.length === 0) break;
      this.#windowOffset = this.#end;
      this.#window = more;
    }
    if (this.#end !== this.#file.sizeBytes) throw endsEarly(this.#file, this.#end);
    const digest = this.#hash.digest("hex");
    const { expected } = this.#file;
    const found = this.#expectedHash ? this.#expectedHash.digest("hex") : digest;
    if (expected && expected.hex !== found) {
      throw new ImageError(`${this.#file.name} is damaged: its ${expected.algorithm} is ${found}, and ${expected.hex} was promised`);
    }
    return digest;
  }

  get #end(): number {
    return this.#windowOffset + this.#window.length;
  }

  async #read(): Promise<Buffer> {
    const bytes = await (this.#next ?? this.#file.read(this.#end, READ_BYTES));
    const end = this.#end + bytes.length;
    // The next block is read while this one is worked on.
    this.#next = bytes.length === 0 ? undefined : this.#file.read(end, READ_BYTES);
    this.#next?.catch(() => {});
    this.#hash.update(bytes);
    this.#expectedHash?.update(bytes);
    this.#onRead(bytes.length);
    return bytes;
  }
}
