/** All guest data of a source, from its files to where it shall be, in one forward pass. */
import { createHash } from "node:crypto";
import { availableParallelism } from "node:os";
import { promisify } from "node:util";
import { deflateRaw } from "node:zlib";
import { isZero } from "../image/bytes.ts";
import type { Run } from "../image/image.ts";
import { deflateStreamOf, inflateRun } from "./decode.ts";
import { type FileDigest, ForwardReader } from "./forward-reader.ts";
import type { DataPlan } from "./holes.ts";
import type { OpenSource } from "./source.ts";

/** The most of a plain run that is written at once. */
const PIECE_BYTES = 1024 * 1024;

/** Clusters that are inflated or deflated at the same time, on libuv's threads: enough to keep each at work. */
const MAX_DECODING = Math.max(8, 2 * availableParallelism());

/** A stream that is smaller than its cluster by this factor may be one of zeros: those deflate by a thousand. */
const ZEROS_RATIO = 256;

/** Where guest data goes. Each call's promise resolves when the bytes are free again. */
export interface Target {
  write(virtualOffset: number, bytes: Uint8Array): Promise<void>;
  /** Clusters are deflated before they are written, each on its own. */
  readonly deflates: boolean;
  readonly clusterBytes: number;
  /** Takes a whole cluster as a raw deflate stream. */
  writeCompressed(virtualOffset: number, deflated: Uint8Array): Promise<void>;
  /** Whether `writeCompressed` may be given streams as others made them, with references of up to 32 KiB back. */
  takesForeignStreams(): Promise<boolean>;
}

export interface PumpOptions {
  readonly signal: AbortSignal;
  /** Called after every read of the source. */
  readonly onProgress: (doneBytes: number, totalBytes: number) => void;
}

/**
 * Moves all guest data, in the order in which the source's files hold it. Resolves with the digest of the source as `ImportResult.sourceDigest` says,
 * when every expected one was met. Throws ImageError when bytes are damaged, not what was promised, or missing.
 */
export async function pump(source: OpenSource, { runs, extents }: DataPlan, target: Target, options: PumpOptions): Promise<string> {
  const { files } = source;
  const totalBytes = files.reduce((sum, file) => sum + file.sizeBytes, 0);
  let doneBytes = 0;
  const onRead = (bytes: number): void => {
    options.signal.throwIfAborted();
    doneBytes += bytes;
    options.onProgress(doneBytes, totalBytes);
  };
  const digests: FileDigest[] = [];
  const list = runs[Symbol.iterator]();
  let next = list.next();
  for (const [index, file] of files.entries()) {
    await using reader = new ForwardReader(file, extents, onRead);
    await using pending = new Pending();
    for (; !next.done && next.value.file === index; next = list.next()) {
      const run = next.value;
      if (run.encoding === "plain") await movePlain(run, reader, target, pending);
      else await pending.add(recode(run, await reader.take(run.fileOffset, run.storedBytes), source, target));
    }
    await pending.drain();
    const digest = await reader.finish();
    digests.push(file.wrappedDigest === undefined ? digest : { kind: "sha256", hex: file.wrappedDigest });
  }
  const [only] = digests;
  if (only && digests.length === 1) return `${only.kind}:${only.hex}`;
  const lines = files.map((file, index) => `${digests[index]!.hex}  ${file.name}\n`);
  return `sha256:${createHash("sha256").update(lines.join("")).digest("hex")}`;
}

/** Writes something that is ready to be written. */
type Writing = () => Promise<void>;

/** What other threads are making ready: written in the order in which it came. */
class Pending implements AsyncDisposable {
  readonly #works: Promise<Writing>[] = [];

  /** Waits, and writes, while there is too much. */
  async add(work: Promise<Writing>): Promise<void> {
    // Awaited in its turn; until then its failure must not be a stray one.
    work.catch(() => {});
    this.#works.push(work);
    while (this.#works.length >= MAX_DECODING) await this.#writeNext();
  }

  async drain(): Promise<void> {
    while (this.#works.length > 0) await this.#writeNext();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.allSettled(this.#works);
  }

  async #writeNext(): Promise<void> {
    const work = this.#works.shift();
    await (
      await work
    )?.();
  }
}

/** In pieces that end where clusters end, so that those of the compressed layout are not torn apart. */
async function movePlain(run: Run, reader: ForwardReader, target: Target, pending: Pending): Promise<void> {
  const { clusterBytes } = target;
  for (let at = 0; at < run.lengthBytes;) {
    const offset = run.virtualOffset + at;
    const left = run.lengthBytes - at;
    const least = Math.min(clusterBytes - (offset % clusterBytes), left);
    const most = target.deflates ? least : Math.min(PIECE_BYTES - (offset % clusterBytes), left);
    const found = await reader.take(run.fileOffset + at, least, most);
    if (found.length < least) throw reader.endsEarly();
    const bytes = found.length === left ? found : found.subarray(0, found.length - ((offset + found.length) % clusterBytes));
    if (target.deflates) {
      await pending.add(deflated(offset, bytes, target));
    } else {
      await pending.drain();
      await target.write(offset, bytes);
    }
    at += bytes.length;
  }
}

/** Makes a compressed run ready: as it is where the target can take it so, else inflated, and deflated again for one that deflates. */
async function recode(run: Run, stored: Buffer, source: OpenSource, target: Target): Promise<Writing> {
  const { virtualOffset } = run;
  const foreign = await foreignStream(run, stored, target);
  // A promised digest proves every byte; without one a damaged stream shows only when it is inflated.
  const isProved = source.files[run.file]?.expected !== undefined;
  if (foreign && isProved && foreign.length * ZEROS_RATIO > run.lengthBytes) return () => target.writeCompressed(virtualOffset, foreign);
  const bytes = await inflateRun(run, stored, source.image.virtualSizeBytes);
  if (!target.deflates) return () => target.write(virtualOffset, bytes);
  if (foreign && !isZero(bytes)) return () => target.writeCompressed(virtualOffset, foreign);
  return deflated(virtualOffset, bytes, target);
}

/** The run's own deflate stream, if it makes one of the target's clusters. */
async function foreignStream(run: Run, stored: Buffer, target: Target): Promise<Uint8Array | undefined> {
  const { clusterBytes } = target;
  const isCluster = run.lengthBytes === clusterBytes && run.virtualOffset % clusterBytes === 0;
  if (!target.deflates || !isCluster || !(await target.takesForeignStreams())) return undefined;
  const stream = deflateStreamOf(run, stored);
  return stream && stream.length < clusterBytes ? stream : undefined;
}

const deflateRawAsync = promisify<Uint8Array, { level: number; windowBits: number; chunkSize: number }, Buffer>(deflateRaw);

/** Guest data for a target that deflates, piece by piece of a cluster; what does not shrink, or is no whole cluster, stays as it is. */
async function deflated(virtualOffset: number, bytes: Uint8Array, target: Target): Promise<Writing> {
  const { clusterBytes } = target;
  const clusters: { readonly offset: number; readonly plain: Uint8Array; readonly packed: Promise<Buffer> | undefined }[] = [];
  for (let at = 0; at < bytes.length;) {
    const offset = virtualOffset + at;
    const plain = bytes.subarray(at, at + clusterBytes - (offset % clusterBytes));
    const isCluster = plain.length === clusterBytes && !isZero(plain);
    // QEMU inflates with a window of 4 KiB: deflate with no more. Source: block/qcow2-threads.c.
    const packed = isCluster ? deflateRawAsync(plain, { level: 1, windowBits: 12, chunkSize: clusterBytes }) : undefined;
    clusters.push({ offset, plain, packed });
    at += plain.length;
  }
  const ready = await Promise.all(clusters.map(async ({ packed, ...cluster }) => ({ ...cluster, packed: await packed })));
  return async () => {
    for (const { offset, plain, packed } of ready) {
      if (packed && packed.length < clusterBytes) await target.writeCompressed(offset, packed);
      else await target.write(offset, plain);
    }
  };
}
