/** Writes a qcow2 strictly forward, its header last. Pure: guest data in, file pieces out. Source of the layout: QEMU docs/interop/qcow2. */
import { isPowerOfTwo, isZero, roundUp } from "./bytes.ts";
import { ClusterMap } from "./cluster-map.ts";
import { ImageError } from "./parser.ts";
import { EXTENSION_HEADER_BYTES, FEATURE_NAMES_EXTENSION, MAX_L1_BYTES, STAMP_EXTENSION } from "./qcow2.ts";

/** A piece of the file. */
export interface Write {
  readonly offset: number;
  readonly bytes: Uint8Array;
}

/** `sparse`: clusters that are all zeros are not stored. `compressed`: nor here, and compressed clusters pack back to back. `full`: every cluster is stored. */
export type Layout = "sparse" | "compressed" | "full";

/** A piece of the guest's disk, in bytes. */
export interface GuestPiece {
  readonly virtualOffset: number;
  readonly lengthBytes: number;
}

export interface Qcow2WriterOptions {
  /** A multiple of 512, more than 0. */
  readonly virtualSizeBytes: number;
  /** A power of two from 512 to 2 MiB. Default 65,536. */
  readonly clusterBytes?: number;
  readonly layout: Layout;
  /**
   * What will be written, in that order (joined or split at will). With it a cluster that the source fills only in part is finished when its last
   * piece came; without it such a cluster waits for `finish`, and MAX_HELD_BYTES are soon full. Iterated twice, by the constructor.
   */
  readonly pieces?: Iterable<GuestPiece>;
}

const DEFAULT_CLUSTER_BYTES = 65_536;

/** The most that clusters take in memory which wait for more of their pieces. */
const MAX_HELD_BYTES = 64 * 1024 * 1024;

const SECTOR_BYTES = 512;
const MIN_CLUSTER_BYTES = 512;
const MAX_CLUSTER_BYTES = 2 * 1024 * 1024;

/** As QEMU writes it: 104 bytes, the compression type and 7 of padding. */
const HEADER_BYTES = 112;
const REFCOUNT_BYTES = 2;
/** The logarithm of a refcount's bits. */
const REFCOUNT_ORDER = 4;
const WORD_BYTES = 8;

/** Upper halves of an L1 or L2 entry: bit 63, the cluster is used once; bit 62, it is compressed. */
const COPIED = 0x8000_0000;
const COMPRESSED = 0x4000_0000;

/** Deflate inflates to at most 1032 times its size. Source: zlib.net/zlib_tech.html, Maximum Compression Factor. */
const MAX_DEFLATE_RATIO = 1032;

const ZEROS = new Uint8Array(1024 * 1024);

/** Kind (0 incompatible, 1 compatible, 2 autoclear), bit, name. */
const FEATURE_NAMES: readonly (readonly [number, number, string])[] = [
  [0, 0, "dirty bit"],
  [0, 1, "corrupt bit"],
  [0, 2, "external data file"],
  [0, 3, "compression type"],
  [0, 4, "extended L2 entries"],
  [1, 0, "lazy refcounts"],
  [2, 0, "bitmaps"],
  [2, 1, "raw external data"],
];
const FEATURE_NAME_BYTES = 48;

/** A cluster of which not every piece has come. */
interface HeldCluster {
  readonly bytes: Uint8Array;
  /** One for each sector that came. */
  readonly sectors: Uint8Array;
  missingSectors: number;
}

/** Where the tables lie and how long the file is: known when the last data was written. */
interface Plan {
  readonly firstZeroCluster: number;
  readonly firstL2Cluster: number;
  readonly l1Cluster: number;
  readonly refcountTableCluster: number;
  readonly refcountTableClusters: number;
  readonly firstRefcountBlock: number;
  readonly refcountBlocks: number;
  readonly totalClusters: number;
}

/**
 * A version 3 image without lazy refcounts, refcounts of 16 bits.
 *
 * The writes that `write`, `writeCompressed` and `finish` give follow each other without a gap, the first at `clusterBytes`: cluster 0 stays zero,
 * and the file is no qcow2, until the write that `header` gives. Their `bytes` are views of what was passed in, which must not change until they are
 * written, or memory that is not used again. The output is a pure function of the calls.
 *
 * Memory: at most MAX_HELD_BYTES of guest data, 8 bytes for each stored cluster, and for `pieces` some 60 for each cluster that they fill in part.
 */
export class Qcow2Writer {
  readonly clusterBytes: number;
  readonly #virtualSizeBytes: number;
  readonly #layout: Layout;
  readonly #clusterCount: number;
  readonly #l1Entries: number;
  readonly #map = new ClusterMap();
  readonly #held = new Map<number, HeldCluster>();
  /** Of clusters that `pieces` fill in part, the sectors that will come. */
  readonly #expectedSectors: ReadonlyMap<number, number> | undefined;
  /** Refcounts of host clusters that hold compressed ones, by blocks of refcounts; all others have 1. */
  readonly #packedRefcounts = new Map<number, Uint16Array>();
  /** The end of what was given out. */
  #end: number;
  #plan: Plan | undefined;

  /** Throws ImageError when the disk is too large for its clusters, or when `pieces` would need more than MAX_HELD_BYTES. */
  constructor(options: Qcow2WriterOptions) {
    const { virtualSizeBytes, layout, clusterBytes = DEFAULT_CLUSTER_BYTES } = options;
    if (!isPowerOfTwo(clusterBytes) || clusterBytes < MIN_CLUSTER_BYTES || clusterBytes > MAX_CLUSTER_BYTES) {
      throw new RangeError(`a qcow2 cannot have clusters of ${clusterBytes} bytes`);
    }
    if (!Number.isSafeInteger(virtualSizeBytes) || virtualSizeBytes <= 0 || virtualSizeBytes % SECTOR_BYTES !== 0) {
      throw new ImageError(`a qcow2 cannot hold a disk of ${virtualSizeBytes} bytes: a multiple of ${SECTOR_BYTES} is needed`);
    }
    this.clusterBytes = clusterBytes;
    this.#virtualSizeBytes = virtualSizeBytes;
    this.#layout = layout;
    this.#clusterCount = Math.ceil(virtualSizeBytes / clusterBytes);
    this.#l1Entries = Math.ceil(this.#clusterCount / (clusterBytes / WORD_BYTES));
    if (this.#l1Entries * WORD_BYTES > MAX_L1_BYTES) {
      throw new ImageError(`a disk of ${virtualSizeBytes} bytes is too large for a qcow2 with clusters of ${clusterBytes} bytes`);
    }
    if (options.pieces !== undefined) {
      const { expectedSectors, peakBytes } = planPieces(options.pieces, clusterBytes);
      if (peakBytes > MAX_HELD_BYTES) throw heldTooMuch(clusterBytes);
      this.#expectedSectors = expectedSectors;
    }
    this.#end = clusterBytes;
  }

  /**
   * Takes a piece of the guest's disk; offset and length are multiples of 512, and no sector comes twice. A cluster of which only a part came is
   * held until the rest comes; the rest of the disk is zeros.
   *
   * Throws ImageError when a sector comes twice, lies beyond the disk, or when more than MAX_HELD_BYTES would be held.
   */
  write(virtualOffset: number, bytes: Uint8Array): Write[] {
    this.#refuseBadPlace(virtualOffset, bytes.length);
    const writes: Write[] = [];
    for (let done = 0; done < bytes.length;) {
      const start = virtualOffset + done;
      const cluster = Math.floor(start / this.clusterBytes);
      const length = Math.min(bytes.length - done, (cluster + 1) * this.clusterBytes - start);
      const piece = bytes.subarray(done, done + length);
      if (length === this.clusterBytes) this.#store(cluster, piece, writes);
      else this.#hold(cluster, start % this.clusterBytes, piece, writes);
      done += length;
    }
    return joined(writes);
  }

  /**
   * Takes a whole cluster as a raw deflate stream (RFC 1951) that inflates to `clusterBytes`; `virtualOffset` is a cluster's start. The cluster that
   * crosses the disk's end must inflate to a whole one too. Streams pack back to back; what they inflate to is not checked.
   *
   * Throws ImageError when the cluster came before, lies beyond the disk, or when the stream is too long or too short for any cluster.
   */
  writeCompressed(virtualOffset: number, deflated: Uint8Array): Write[] {
    const { clusterBytes } = this;
    const cluster = virtualOffset / clusterBytes;
    if (!Number.isInteger(cluster)) throw new RangeError(`no cluster of ${clusterBytes} bytes begins at guest offset ${virtualOffset}`);
    this.#refuseBadPlace(virtualOffset, SECTOR_BYTES);
    this.#refuseRepeat(cluster);
    const offset = this.#end;
    const end = offset + deflated.length;
    const moreSectors = Math.ceil(end / SECTOR_BYTES) - Math.floor(offset / SECTOR_BYTES) - 1;
    const sectorBits = Math.log2(clusterBytes) - 8;
    if (deflated.length * MAX_DEFLATE_RATIO < clusterBytes || moreSectors >= 2 ** sectorBits) {
      throw new ImageError(
        `the compressed data of guest offset ${virtualOffset} has ${deflated.length} bytes, which cannot be a cluster of ${clusterBytes}`,
      );
    }
    const highBits = 62 - sectorBits - 32;
    this.#map.set(cluster, (COMPRESSED | (moreSectors << highBits) | Math.floor(offset / 2 ** 32)) >>> 0, offset % 2 ** 32);
    for (let host = Math.floor(offset / clusterBytes); host * clusterBytes < end; host++) this.#countPacked(host);
    this.#end = end;
    return [{ offset, bytes: deflated }];
  }

  /**
   * Ends the data: what is still held, then the tables. To be called once; the writes are made while they are iterated, once. `fileSizeBytes` is
   * where they end. Throws ImageError when a cluster still lacks pieces that were announced.
   */
  finish(): { readonly writes: Iterable<Write>; readonly fileSizeBytes: number } {
    if (this.#plan !== undefined) throw new Error("the qcow2 writer is finished already");
    const [lacking] = this.#held.keys();
    if (this.#expectedSectors !== undefined && lacking !== undefined) {
      throw new ImageError(
        `the source did not give all data of the cluster at guest offset ${lacking * this.clusterBytes} that its tables promise`,
      );
    }
    const last: Write[] = [];
    for (const [cluster, held] of [...this.#held].sort(([a], [b]) => a - b)) this.#store(cluster, held.bytes, last);
    this.#held.clear();
    this.#align(last);
    const plan = this.#makePlan();
    this.#plan = plan;
    return { writes: this.#tables(last, plan), fileSizeBytes: plan.totalClusters * this.clusterBytes };
  }

  /**
   * The header with our stamp in it, the write that makes a disk of the file: a few hundred bytes at offset 0. After `finish`; may be called again.
   * Throws ImageError when the stamp does not fit the first cluster: 1 KiB does from clusters of 4 KiB on, 16 KiB with the default ones.
   */
  header(stamp: Uint8Array): Write {
    if (this.#plan === undefined) throw new Error("the qcow2 writer is not finished yet");
    const stampBytes = EXTENSION_HEADER_BYTES + roundUp(stamp.length, 8);
    const namesBytes = EXTENSION_HEADER_BYTES + FEATURE_NAMES.length * FEATURE_NAME_BYTES;
    const leastBytes = HEADER_BYTES + stampBytes + EXTENSION_HEADER_BYTES;
    if (leastBytes > this.clusterBytes) {
      throw new ImageError(`a stamp of ${stamp.length} bytes does not fit a qcow2 header in a cluster of ${this.clusterBytes} bytes`);
    }
    const hasNames = leastBytes + namesBytes <= this.clusterBytes;
    const bytes = new Uint8Array(leastBytes + (hasNames ? namesBytes : 0));
    this.#fillHeader(new DataView(bytes.buffer), this.#plan);
    let offset = HEADER_BYTES;
    if (hasNames) {
      putExtension(bytes, offset, FEATURE_NAMES_EXTENSION, featureNames());
      offset += namesBytes;
    }
    putExtension(bytes, offset, STAMP_EXTENSION, stamp);
    return { offset: 0, bytes };
  }

  #refuseBadPlace(virtualOffset: number, lengthBytes: number): void {
    if (this.#plan !== undefined) throw new Error("the qcow2 writer is finished already");
    if (virtualOffset % SECTOR_BYTES !== 0 || lengthBytes % SECTOR_BYTES !== 0 || virtualOffset < 0) {
      throw new RangeError(`${lengthBytes} bytes at guest offset ${virtualOffset} are no whole sectors`);
    }
    if (virtualOffset + lengthBytes > this.#virtualSizeBytes) {
      throw new ImageError(
        `there is data up to guest offset ${virtualOffset + lengthBytes}, but the disk has only ${this.#virtualSizeBytes} bytes`,
      );
    }
  }

  #refuseRepeat(cluster: number): void {
    if (this.#map.has(cluster) || this.#held.has(cluster)) throw repeated(cluster * this.clusterBytes);
  }

  /** Puts a whole cluster at the file's end, unless it is zeros that need no place. */
  #store(cluster: number, bytes: Uint8Array, writes: Write[]): void {
    if (this.#map.has(cluster)) throw repeated(cluster * this.clusterBytes);
    if (this.#layout !== "full" && isZero(bytes)) return;
    this.#align(writes);
    this.#map.set(cluster, (COPIED | Math.floor(this.#end / 2 ** 32)) >>> 0, this.#end % 2 ** 32);
    writes.push({ offset: this.#end, bytes });
    this.#end += this.clusterBytes;
  }

  #hold(cluster: number, start: number, piece: Uint8Array, writes: Write[]): void {
    let held = this.#held.get(cluster);
    if (held === undefined) {
      if (this.#map.has(cluster)) throw repeated(cluster * this.clusterBytes);
      if ((this.#held.size + 1) * this.clusterBytes > MAX_HELD_BYTES) throw heldTooMuch(this.clusterBytes);
      const wholeSectors = Math.min(this.clusterBytes, this.#virtualSizeBytes - cluster * this.clusterBytes) / SECTOR_BYTES;
      const missingSectors = this.#expectedSectors?.get(cluster) ?? wholeSectors;
      held = { bytes: new Uint8Array(this.clusterBytes), sectors: new Uint8Array(this.clusterBytes / SECTOR_BYTES), missingSectors };
      this.#held.set(cluster, held);
    }
    const [first, end] = [start / SECTOR_BYTES, (start + piece.length) / SECTOR_BYTES];
    if (held.sectors.subarray(first, end).includes(1)) throw repeated(cluster * this.clusterBytes + start);
    held.sectors.fill(1, first, end);
    held.bytes.set(piece, start);
    held.missingSectors -= end - first;
    if (held.missingSectors > 0) return;
    this.#held.delete(cluster);
    this.#store(cluster, held.bytes, writes);
  }

  /** Fills up to the next cluster's start: compressed clusters end anywhere. */
  #align(writes: Write[]): void {
    const end = roundUp(this.#end, this.clusterBytes);
    if (end > this.#end) writes.push({ offset: this.#end, bytes: zeros(end - this.#end) });
    this.#end = end;
  }

  #countPacked(host: number): void {
    const blockEntries = this.clusterBytes / REFCOUNT_BYTES;
    const key = Math.floor(host / blockEntries);
    let counts = this.#packedRefcounts.get(key);
    if (counts === undefined) {
      counts = new Uint16Array(blockEntries);
      this.#packedRefcounts.set(key, counts);
    }
    counts[host % blockEntries]!++;
  }

  #makePlan(): Plan {
    const { clusterBytes } = this;
    const tableEntries = clusterBytes / WORD_BYTES;
    const firstZeroCluster = this.#end / clusterBytes;
    const firstL2Cluster = firstZeroCluster + (this.#layout === "full" ? this.#clusterCount - this.#map.count : 0);
    let l1Cluster = firstL2Cluster;
    for (let table = 0; table < this.#l1Entries; table++) if (this.#hasTable(table)) l1Cluster++;
    const refcountTableCluster = l1Cluster + Math.ceil(this.#l1Entries / tableEntries);
    // The refcounts count their own clusters too: more blocks until they suffice.
    let refcountBlocks = 0;
    let refcountTableClusters = 0;
    let totalClusters = refcountTableCluster;
    for (let needed = 1; needed > refcountBlocks; needed = Math.ceil(totalClusters / (clusterBytes / REFCOUNT_BYTES))) {
      refcountBlocks = needed;
      refcountTableClusters = Math.ceil(refcountBlocks / tableEntries);
      totalClusters = refcountTableCluster + refcountTableClusters + refcountBlocks;
    }
    const firstRefcountBlock = refcountTableCluster + refcountTableClusters;
    return {
      firstZeroCluster,
      firstL2Cluster,
      l1Cluster,
      refcountTableCluster,
      refcountTableClusters,
      firstRefcountBlock,
      refcountBlocks,
      totalClusters,
    };
  }

  #hasTable(table: number): boolean {
    const tableEntries = this.clusterBytes / WORD_BYTES;
    return this.#layout === "full" || this.#map.hasAny(table * tableEntries, tableEntries);
  }

  *#tables(last: readonly Write[], plan: Plan): Generator<Write, void> {
    yield* last;
    const { clusterBytes } = this;
    const writer = new ClusterSequence(plan.firstZeroCluster * clusterBytes);
    yield* writer.zeros((plan.firstL2Cluster - plan.firstZeroCluster) * clusterBytes);
    const l1 = new DataView(new ArrayBuffer(roundUp(this.#l1Entries * WORD_BYTES, clusterBytes)));
    let zeroCluster = plan.firstZeroCluster;
    for (let table = 0; table < this.#l1Entries; table++) {
      if (!this.#hasTable(table)) continue;
      putEntry(l1, table, writer.offset);
      const tableEntries = clusterBytes / WORD_BYTES;
      const words = this.#map.copy(table * tableEntries, tableEntries);
      if (this.#layout === "full") zeroCluster += this.#fillTable(new DataView(words.buffer), table * tableEntries, zeroCluster);
      yield writer.next(words);
    }
    yield writer.next(new Uint8Array(l1.buffer));
    yield writer.next(this.#refcountTable(plan));
    for (let block = 0; block < plan.refcountBlocks; block++) yield writer.next(this.#refcountBlock(block, plan.totalClusters));
  }

  /** Gives the clusters of a table that have no place one among the zeros, from host cluster `zeroCluster` on; returns how many that were. */
  #fillTable(words: DataView, firstCluster: number, zeroCluster: number): number {
    const count = Math.min(words.byteLength / WORD_BYTES, this.#clusterCount - firstCluster);
    let placed = 0;
    for (let entry = 0; entry < count; entry++) {
      if (words.getUint32(entry * WORD_BYTES) === 0) putEntry(words, entry, (zeroCluster + placed++) * this.clusterBytes);
    }
    return placed;
  }

  #refcountTable(plan: Plan): Uint8Array {
    const table = new DataView(new ArrayBuffer(plan.refcountTableClusters * this.clusterBytes));
    for (let block = 0; block < plan.refcountBlocks; block++) {
      table.setBigUint64(block * WORD_BYTES, BigInt((plan.firstRefcountBlock + block) * this.clusterBytes));
    }
    return new Uint8Array(table.buffer);
  }

  #refcountBlock(block: number, totalClusters: number): Uint8Array {
    const blockEntries = this.clusterBytes / REFCOUNT_BYTES;
    const packed = this.#packedRefcounts.get(block);
    const counts = new DataView(new ArrayBuffer(this.clusterBytes));
    const used = Math.min(blockEntries, totalClusters - block * blockEntries);
    for (let entry = 0; entry < used; entry++) counts.setUint16(entry * REFCOUNT_BYTES, packed?.[entry] || 1);
    return new Uint8Array(counts.buffer);
  }

  #fillHeader(header: DataView, plan: Plan): void {
    const { clusterBytes } = this;
    header.setUint32(0, 0x5146_49fb);
    header.setUint32(4, 3);
    header.setUint32(20, Math.log2(clusterBytes));
    header.setBigUint64(24, BigInt(this.#virtualSizeBytes));
    header.setUint32(36, this.#l1Entries);
    header.setBigUint64(40, BigInt(plan.l1Cluster * clusterBytes));
    header.setBigUint64(48, BigInt(plan.refcountTableCluster * clusterBytes));
    header.setUint32(56, plan.refcountTableClusters);
    header.setUint32(96, REFCOUNT_ORDER);
    header.setUint32(100, HEADER_BYTES);
  }
}

/**
 * The clusters for a qcow2 of these pieces, written in this order: the default ones, or clusters of the source's own granularity where its pieces
 * of a default one lie so far apart that MAX_HELD_BYTES would not do. Iterates twice.
 */
export function chooseClusterBytes(pieces: Iterable<GuestPiece>, granularityBytes: number): number {
  if (granularityBytes >= DEFAULT_CLUSTER_BYTES) return DEFAULT_CLUSTER_BYTES;
  return planPieces(pieces, DEFAULT_CLUSTER_BYTES).peakBytes <= MAX_HELD_BYTES
    ? DEFAULT_CLUSTER_BYTES
    : Math.max(MIN_CLUSTER_BYTES, granularityBytes);
}

/** Gives pieces their places one behind the other. */
class ClusterSequence {
  #offset: number;

  constructor(offset: number) {
    this.#offset = offset;
  }

  get offset(): number {
    return this.#offset;
  }

  next(bytes: Uint8Array): Write {
    const offset = this.#offset;
    this.#offset += bytes.length;
    return { offset, bytes };
  }

  *zeros(lengthBytes: number): Generator<Write, void> {
    for (let left = lengthBytes; left > 0; left -= ZEROS.length) yield this.next(zeros(Math.min(left, ZEROS.length)));
  }
}

/** Which clusters the pieces fill in part and with how many sectors, and how many bytes of clusters must be held at most when they come in this order. */
function planPieces(
  pieces: Iterable<GuestPiece>,
  clusterBytes: number,
): { readonly expectedSectors: ReadonlyMap<number, number>; readonly peakBytes: number } {
  const expectedSectors = new Map<number, number>();
  for (const part of partsOf(pieces, clusterBytes)) {
    expectedSectors.set(part.cluster, (expectedSectors.get(part.cluster) ?? 0) + part.sectors);
  }
  const missingSectors = new Map<number, number>();
  let peak = 0;
  for (const part of partsOf(pieces, clusterBytes)) {
    const missing = (missingSectors.get(part.cluster) ?? expectedSectors.get(part.cluster)!) - part.sectors;
    missingSectors.set(part.cluster, missing);
    peak = Math.max(peak, missingSectors.size);
    if (missing === 0) missingSectors.delete(part.cluster);
  }
  return { expectedSectors, peakBytes: peak * clusterBytes };
}

/** The first and last clusters of the pieces where they are not whole. */
function* partsOf(
  pieces: Iterable<GuestPiece>,
  clusterBytes: number,
): Generator<{ readonly cluster: number; readonly sectors: number }, void> {
  for (const { virtualOffset, lengthBytes } of pieces) {
    const end = virtualOffset + lengthBytes;
    const first = Math.floor(virtualOffset / clusterBytes);
    const last = Math.floor(end / clusterBytes);
    const headEnd = Math.min(end, (first + 1) * clusterBytes);
    const isWholeHead = virtualOffset === first * clusterBytes && headEnd === (first + 1) * clusterBytes;
    if (!isWholeHead) yield { cluster: first, sectors: (headEnd - virtualOffset) / SECTOR_BYTES };
    if (last > first && end > last * clusterBytes) yield { cluster: last, sectors: (end - last * clusterBytes) / SECTOR_BYTES };
  }
}

/** Neighbours in one buffer become one write. */
function joined(writes: readonly Write[]): Write[] {
  const result: Write[] = [];
  for (const write of writes) {
    const last = result.at(-1);
    const continues =
      last !== undefined &&
      last.bytes.buffer === write.bytes.buffer &&
      last.bytes.byteOffset + last.bytes.length === write.bytes.byteOffset &&
      last.offset + last.bytes.length === write.offset;
    if (!continues) {
      result.push(write);
      continue;
    }
    const bytes = new Uint8Array(last.bytes.buffer, last.bytes.byteOffset, last.bytes.length + write.bytes.length);
    result[result.length - 1] = { offset: last.offset, bytes };
  }
  return result;
}

function zeros(lengthBytes: number): Uint8Array {
  return lengthBytes <= ZEROS.length ? ZEROS.subarray(0, lengthBytes) : new Uint8Array(lengthBytes);
}

function putEntry(table: DataView, index: number, offset: number): void {
  table.setUint32(index * WORD_BYTES, (COPIED | Math.floor(offset / 2 ** 32)) >>> 0);
  table.setUint32(index * WORD_BYTES + 4, offset % 2 ** 32);
}

function putExtension(header: Uint8Array, offset: number, type: number, content: Uint8Array): void {
  const view = new DataView(header.buffer);
  view.setUint32(offset, type);
  view.setUint32(offset + 4, content.length);
  header.set(content, offset + EXTENSION_HEADER_BYTES);
}

function featureNames(): Uint8Array {
  const table = new Uint8Array(FEATURE_NAMES.length * FEATURE_NAME_BYTES);
  for (const [index, [kind, bit, name]] of FEATURE_NAMES.entries()) {
    table.set([kind, bit, ...new TextEncoder().encode(name)], index * FEATURE_NAME_BYTES);
  }
  return table;
}

function repeated(virtualOffset: number): ImageError {
  return new ImageError(`the source gives guest offset ${virtualOffset} twice`);
}

function heldTooMuch(clusterBytes: number): ImageError {
  return new ImageError(
    `the source's pieces lie so scattered that more than ${MAX_HELD_BYTES / 2 ** 20} MiB of clusters of ${clusterBytes} bytes would wait in memory: smaller clusters are needed`,
  );
}
