/** The pipeline of an import: a source's files in one forward pass, through the format's map, into a volume on a host. */
import { randomUUID } from "node:crypto";
import { DiskError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { ImageError } from "../image/parser.ts";
import { isZero, roundUp } from "../image/bytes.ts";
import type { ImageFormat, RunList } from "../image/image.ts";
import { chooseClusterBytes, type Layout, Qcow2Writer, type Write } from "../image/qcow2-writer.ts";
import { readsFarReferences } from "./canary.ts";
import { verifyContent } from "./content.ts";
import { HashThread } from "./hash-thread.ts";
import { DATA_BLOCK_BYTES, DataHash, MIN_HOLES_BYTES, planData } from "./holes.ts";
import { openPartFile } from "./part-file.ts";
import type { Part } from "./part.ts";
import { pump, type PumpOptions, type Target } from "./pump.ts";
import type { OpenSource } from "./source.ts";
import type { Throttle } from "./throttle.ts";
import { openUpload } from "./upload.ts";

const SECTOR_BYTES = 512;

/** Formats whose images may hold compressed clusters. */
const COMPRESSING: ReadonlySet<ImageFormat> = new Set(["qcow2", "vmdk"]);

export interface ImportOptions extends PumpOptions {
  readonly id: string;
  readonly finalPath: string;
  readonly format: "qcow2" | "raw";
  readonly layout: Layout;
  /** At least the source's virtual size. */
  readonly capacityBytes: number;
  /**
   * What is kept in the volume (qcow2) or beside it (raw), to which the result's digests, `virtualSizeBytes`, `verified` and `importedAt` are added. Plain JSON,
   * at most 8 KiB.
   */
  readonly stamp: object;
  /** `content`: besides, what the host's own qemu-img reads from the finished volume is compared with the source. Default `digest`. */
  readonly verify?: "digest" | "content";
  /** What leaves waits for it. Default: nothing. */
  readonly throttle?: Throttle | undefined;
  /** Write a volume of this pool through libvirt's upload stream. Default: a part file, written by a program on the host. */
  readonly upload?: { readonly pool: string; readonly isBlock: boolean; readonly patienceMs?: number } | undefined;
}

export interface ImportResult {
  /** What its guest sees. */
  readonly virtualSizeBytes: number;
  /**
   * `sha256:<hex>` of the source file; of its `sha256sum` lines where an image has several. Of a file with over 1 GiB of holes that nobody vouches for
   * `sha256-data:<hex>`: the SHA-256 of its blocks of 64 KiB that are not all zeros, in their order, each behind its offset as 64 bits, big-endian.
   */
  readonly sourceDigest: string;
  /**
   * `sha256:<hex>` of the volume's file as published: a raw one whole, a qcow2 from its second cluster on, which is all but its header. Of a raw one with
   * over 1 GiB of holes `sha256-data:<hex>` as above, where its source gives it in its own order.
   */
  readonly contentDigest: string;
  readonly allocatedBytes: number;
  readonly sentBytes: number;
  /** Bytes that an interrupted earlier run had brought over. */
  readonly keptBytes: number;
  /** Seconds since 1970: tells the volume's modification time as long as nobody writes to it, see `isUntouched`. */
  readonly importedAt: number;
}

/**
 * Imports a source as a volume file. Throws PathTaken when the path exists, DiskError when bytes are wrong or the host cannot take them.
 * After a cut (client, wire or host) the part stays and the next run goes on with it; after any other failure it is removed.
 */
export async function importDisk(host: Host, source: OpenSource, options: ImportOptions): Promise<ImportResult> {
  const { upload, signal } = options;
  const writer = randomUUID();
  const hashesAll = options.format === "qcow2";
  // Asked early, the answer is there when the first cluster needs it; whoever asks then hears of a failure.
  if (mayTakeStreams(options) && COMPRESSING.has(source.image.format)) readsFarReferences(host).catch(() => {});
  const open = (): Promise<Part> =>
    upload === undefined ? openPartFile(host, { ...options, hashesAll }) : openUpload(host, { ...options, ...upload, writer, hashesAll });
  return intoPart({ open, path: source.path, signal }, (part) => fill(host, part, source, options));
}

/** Opens a part, lets `work` make a volume of it, and deals with what its failure leaves as `importDisk` says. `path` is the source's. */
export async function intoPart<P extends Part>(
  way: { readonly open: () => Promise<P>; readonly path: string; readonly signal: AbortSignal },
  work: (part: P) => Promise<ImportResult>,
): Promise<ImportResult> {
  const { open, path, signal } = way;
  const part = await open();
  try {
    return await work(part);
  } catch (error) {
    signal.throwIfAborted();
    const failure =
      error instanceof ImageError ? new DiskError(`${path}: ${error.message}`, { step: "source", path, cause: error }) : error;
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

async function fill(host: Host, part: Part, source: OpenSource, options: ImportOptions): Promise<ImportResult> {
  if (options.verify === "content" && part.readGuest === undefined) {
    const message = `the content of ${options.finalPath} cannot be verified on ${host.label}, where no program of ours may run: drop \`verify: "content"\``;
    throw new DiskError(message, { step: "verify", path: options.finalPath });
  }
  await part.resume();
  const plan = await planData(source);
  const { runs } = plan;
  const target =
    options.format === "qcow2" ? qcow2Target(host, part, source.image.granularityBytes, runs, options) : rawTarget(part, runs, options);
  await using _ended = target;
  const sourceDigest = await pump(source, plan, target, options);
  const contentDigest = await target.finish();
  await source.assertUnchanged();
  const importedAt = await part.closingTime();
  await target.seal(stampOf(options, { sourceDigest, contentDigest, importedAt }));
  if (options.verify === "content" && part.readGuest) {
    const { capacityBytes, signal, finalPath: path, format } = options;
    await verifyContent(await part.readGuest(format), source, runs, { capacityBytes, signal, path, place: host.label });
    await source.assertUnchanged();
  }
  const { allocatedBytes } = await part.publish(importedAt);
  const { sentBytes, keptBytes } = part;
  return { virtualSizeBytes: options.capacityBytes, sourceDigest, contentDigest, allocatedBytes, sentBytes, keptBytes, importedAt };
}

/** What the guest of a source's volume sees: whole sectors, and `leastBytes` where the source has fewer. */
export function capacityOf({ image }: OpenSource, leastBytes: number): number {
  return Math.max(leastBytes, roundUp(image.virtualSizeBytes, SECTOR_BYTES));
}

/** The bytes of a stamp, given what is known at the end. */
export function stampOf(
  { stamp, capacityBytes, verify = "digest" }: ImportOptions,
  ends: Pick<ImportResult, "sourceDigest" | "contentDigest" | "importedAt">,
): Buffer {
  return Buffer.from(JSON.stringify({ ...stamp, virtualSizeBytes: capacityBytes, verified: verify, ...ends }));
}

/** Whom libvirt's stream serves has no shell to ask qemu-img with. */
function mayTakeStreams({ format, layout, upload }: ImportOptions): boolean {
  return format === "qcow2" && layout === "compressed" && upload === undefined;
}

/** Where guest data goes, and how it ends. */
interface VolumeTarget extends Target, AsyncDisposable {
  /** Everything but the seal is on the host, durable and confirmed. Resolves with the content digest. */
  finish(): Promise<string>;
  /** Makes a disk of it. */
  seal(stamp: Uint8Array): Promise<void>;
}

function qcow2Target(host: Host, part: Part, granularityBytes: number, runs: RunList, options: ImportOptions): VolumeTarget {
  const clusterBytes = chooseClusterBytes(runs, granularityBytes);
  const writer = new Qcow2Writer({ virtualSizeBytes: options.capacityBytes, clusterBytes, layout: options.layout, pieces: runs });
  let end = clusterBytes;
  const send = async (writes: Iterable<Write>) => {
    for (const { offset, bytes } of writes) {
      if (offset !== end) throw new Error(`the qcow2 writer left a gap at ${end}`);
      end += bytes.length;
      await part.write(offset, bytes);
    }
  };
  return {
    deflates: options.layout === "compressed",
    clusterBytes,
    write: (virtualOffset, bytes) => send(writer.write(virtualOffset, bytes)),
    writeCompressed: (virtualOffset, deflated) => send(writer.writeCompressed(virtualOffset, deflated)),
    takesForeignStreams: async () => mayTakeStreams(options) && readsFarReferences(host),
    finish: async () => {
      const { writes } = writer.finish();
      await send(writes);
      await part.settle();
      return `sha256:${await part.writtenDigest()}`;
    },
    seal: async (stamp) => {
      const header = writer.header(stamp);
      await part.write(header.offset, header.bytes);
      await part.settle();
    },
    [Symbol.asyncDispose]: async () => {},
  };
}

function rawTarget(part: Part, runs: RunList, options: ImportOptions): VolumeTarget {
  const { capacityBytes } = options;
  // To hash holes takes the host as long as to hash data.
  const hash = capacityBytes - runs.dataBytes < MIN_HOLES_BYTES ? undefined : new HashThread("sha256");
  let data = hash && new DataHash(hash);
  let end = 0;
  return {
    deflates: false,
    clusterBytes: DATA_BLOCK_BYTES,
    write: async (virtualOffset, bytes) => {
      const writeEnd = virtualOffset + bytes.length;
      const isWhole = virtualOffset % DATA_BLOCK_BYTES === 0 && (writeEnd % DATA_BLOCK_BYTES === 0 || writeEnd === capacityBytes);
      // Only the file itself can be hashed in its order then.
      if (!isWhole || virtualOffset < end) data = undefined;
      end = writeEnd;
      for (let at = 0; at < bytes.length; at += DATA_BLOCK_BYTES) {
        const block = bytes.subarray(at, at + DATA_BLOCK_BYTES);
        if (isZero(block)) continue;
        await data?.update(virtualOffset + at, block);
        await part.write(virtualOffset + at, block);
      }
    },
    writeCompressed: () => {
      throw new Error("a raw volume has no compressed clusters");
    },
    takesForeignStreams: async () => false,
    finish: async () => {
      await part.settle();
      await (options.layout === "full" ? part.allocate(capacityBytes) : part.setSize(capacityBytes));
      await part.settle();
      const [digest] = (data && (await hash?.digest())) ?? [];
      return digest === undefined ? `sha256:${await part.digest(0)}` : `sha256-data:${digest}`;
    },
    seal: (stamp) => part.stamp(stamp),
    [Symbol.asyncDispose]: async () => hash?.[Symbol.asyncDispose](),
  };
}
