/** QEMU's own format, versions 2 and 3, and the stamp that we leave in it. Source: QEMU docs/interop/qcow2 (the specification). All numbers are big-endian. */
import { latin1, safeNumber, viewOf } from "./bytes.ts";
import type { DiskImage, Encoding, RunList } from "./image.ts";
import { ImageError, type Parser, readExactly, readUpTo } from "./parser.ts";
import type { Write } from "./qcow2-writer.ts";
import { RunListBuilder } from "./runs.ts";
import { readLowerTables } from "./tables.ts";

/** The first four bytes; version 1 has the same ones. */
export const QCOW_MAGIC = "QFI\xfb";

/** Our header extension, "VIRT": JSON of where the disk came from. QEMU keeps unknown extensions when it rewrites a header. */
export const STAMP_EXTENSION = 0x5649_5254;
/** The names of feature bits, for error messages of programs that do not know them. */
export const FEATURE_NAMES_EXTENSION = 0x6803_f857;
const BITMAPS_EXTENSION = 0x2385_2875;

/** Type and length before an extension's bytes. */
export const EXTENSION_HEADER_BYTES = 8;

/** Length of the header of version 2, and where its extensions begin. */
const V2_HEADER_BYTES = 72;
/** The least length of the header of version 3. */
const V3_HEADER_BYTES = 104;

const MIN_CLUSTER_BITS = 9;
const MAX_CLUSTER_BITS = 21;
const SECTOR_BYTES = 512;

/** The most that QEMU reads, too: 32 MiB of L1 table. Source: QEMU block/qcow2.h QCOW_MAX_L1_SIZE. */
export const MAX_L1_BYTES = 32 * 1024 * 1024;
const L1_PIECE_BYTES = 1024 * 1024;

const DIRTY = 1n << 0n;
const CORRUPT = 1n << 1n;
const EXTERNAL_DATA_FILE = 1n << 2n;
const COMPRESSION_TYPE = 1n << 3n;
const EXTENDED_L2 = 1n << 4n;
const KNOWN_FEATURES = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/** The subclusters of a cluster with extended L2 entries, and the smallest cluster that has them. */
const SUBCLUSTERS = 32;
const MIN_EXTENDED_CLUSTER_BITS = 14;

/** Bits of the upper half of an L2 entry; the lower half's bit 0 says that the cluster reads as zeros. */
const COMPRESSED = 0x4000_0000;
const ZERO_BIT = 1;
/** Bits 9 to 55 are an offset, bits 62 and 63 flags, the others reserved. */
const OFFSET_HIGH = 0x00ff_ffff;
const RESERVED_HIGH = 0x3f00_0000;
const RESERVED_LOW = 0x1fe;

interface Header {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly virtualSizeBytes: number;
  readonly backingOffset: bigint;
  readonly cryptMethod: number;
  readonly l1Entries: number;
  readonly l1Offset: bigint;
  readonly refcountTableOffset: bigint;
  readonly refcountTableClusters: number;
  readonly snapshotCount: number;
  readonly features: bigint;
  readonly compression: "deflate" | "zstd";
  readonly extensions: readonly Extension[];
  /** Where the mark of their end lies, or would. */
  readonly extensionsEnd: number;
}

interface Extension {
  readonly type: number;
  readonly bytes: Uint8Array;
}

/**
 * Reads the header and its extensions. `sizeBytes` is the file's size. The tables are read by `runs`.
 *
 * The state that is imported is the current one; internal snapshots are mentioned in the notes and stay behind. A dirty image is read: dirty says
 * that reference counts are out of date, and reading does not use them.
 *
 * Throws ImageError on a backing file, an external data file, encryption, the corrupt mark, unknown incompatible features, and on a header that
 * is damaged or outside the format's bounds.
 */
export function* parseQcow2(sizeBytes: number): Parser<DiskImage> {
  const header = yield* readHeader();
  refuseForeignParts(header);
  const { clusterBits, virtualSizeBytes, features, version } = header;
  if (virtualSizeBytes === 0) throw new ImageError("the qcow2 header says that the disk has 0 bytes");
  if (virtualSizeBytes % SECTOR_BYTES !== 0) {
    throw new ImageError(`the qcow2 header gives the disk ${virtualSizeBytes} bytes, which is no multiple of ${SECTOR_BYTES}`);
  }
  const hasSubclusters = (features & EXTENDED_L2) !== 0n;
  const entryBytes = hasSubclusters ? 16 : 8;
  const clusterBytes = 2 ** clusterBits;
  const tableEntries = clusterBytes / entryBytes;
  const neededL1Entries = Math.ceil(virtualSizeBytes / (clusterBytes * tableEntries));
  if (header.l1Entries < neededL1Entries || neededL1Entries * 8 > MAX_L1_BYTES) {
    throw new ImageError(
      `the qcow2 header gives the disk ${virtualSizeBytes} bytes, but an L1 table of ${header.l1Entries} entries, where ${neededL1Entries} are needed and at most ${MAX_L1_BYTES / 8} are read`,
    );
  }
  const l1Offset = tableOffset(header.l1Offset, clusterBytes, "the L1 table");
  const refcountOffset = tableOffset(header.refcountTableOffset, clusterBytes, "the refcount table");
  const files = [{ name: "", sizeBytes }];

  return {
    format: "qcow2",
    variant: `v${version}`,
    virtualSizeBytes,
    files,
    granularityBytes: hasSubclusters ? clusterBytes / SUBCLUSTERS : clusterBytes,
    notes: notesOf(header),
    *runs(): Parser<RunList> {
      const runs = new RunListBuilder({ files, virtualSizeBytes });
      runs.reserve(0, 0, clusterBytes, "the header's cluster");
      runs.reserve(0, l1Offset, neededL1Entries * 8, "the L1 table");
      runs.reserve(0, refcountOffset, header.refcountTableClusters * clusterBytes, "the refcount table");
      const offsets = yield* readL1(l1Offset, neededL1Entries, clusterBytes);
      for (const offset of offsets) if (offset !== 0) runs.reserve(0, offset, clusterBytes, "an L2 table");
      const addCluster = hasSubclusters ? addSubclusters : addWholeCluster;
      const visit = (index: number, table: DataView): void => {
        const base = index * tableEntries * clusterBytes;
        const count = Math.min(tableEntries, Math.ceil((virtualSizeBytes - base) / clusterBytes));
        for (let entry = 0; entry < count; entry++) {
          addCluster({ table, position: entry * entryBytes, virtualOffset: base + entry * clusterBytes, header, runs });
        }
      };
      yield* readLowerTables({ file: "", fileSizeBytes: sizeBytes, offsets, tableBytes: clusterBytes, what: "an L2 table", visit });
      return runs.finish();
    },
  };
}

/**
 * Reads the content of our stamp in the header of the image; undefined when the image carries none or is no qcow2 of version 2 or 3.
 * Throws ImageError when the header is a damaged one.
 */
export function* readStamp(): Parser<Uint8Array | undefined> {
  const start = yield* readUpTo("", 0, 8);
  if (start.length < 8 || latin1(start, 0, 4) !== QCOW_MAGIC || viewOf(start).getUint32(4) < 2) return undefined;
  const header = yield* readHeader();
  return header.extensions.find((extension) => extension.type === STAMP_EXTENSION)?.bytes;
}

/**
 * How to put a stamp into an image that another program wrote and that carries none: writes that are to be made in this order, each durable before the
 * next, so that the image is whole at any time. Throws ImageError as `parseQcow2` does on a header, on an image with a stamp, and when there is no room.
 */
export function* placeStamp(stamp: Uint8Array): Parser<readonly [Write, Write]> {
  const header = yield* readHeader();
  refuseForeignParts(header);
  if (header.extensions.some(({ type }) => type === STAMP_EXTENSION)) throw new ImageError("the qcow2 carries a stamp already");
  const body = new Uint8Array(Math.ceil(stamp.length / 8) * 8 + EXTENSION_HEADER_BYTES);
  body.set(stamp);
  const offset = header.extensionsEnd;
  if (offset + EXTENSION_HEADER_BYTES + body.length > 2 ** header.clusterBits)
    throw new ImageError(`a stamp of ${stamp.length} bytes does not fit the header's cluster of the qcow2`);
  const head = new Uint8Array(EXTENSION_HEADER_BYTES);
  viewOf(head).setUint32(0, STAMP_EXTENSION);
  viewOf(head).setUint32(4, stamp.length);
  // Behind the end of the extensions nobody reads; their head, which lies within a sector, makes them count.
  return [
    { offset: offset + EXTENSION_HEADER_BYTES, bytes: body },
    { offset, bytes: head },
  ];
}

/**
 * The write that takes our stamp out again; undefined when there is none, others lie behind it, or the image is no qcow2. Throws ImageError when the
 * header is a damaged one.
 */
export function* removeStampFrom(): Parser<Write | undefined> {
  const start = yield* readUpTo("", 0, 4);
  if (latin1(start) !== QCOW_MAGIC) return undefined;
  const { extensions, extensionsEnd } = yield* readHeader();
  const last = extensions.at(-1);
  if (last?.type !== STAMP_EXTENSION) return undefined;
  const lengthBytes = EXTENSION_HEADER_BYTES + Math.ceil(last.bytes.length / 8) * 8;
  return { offset: extensionsEnd - lengthBytes, bytes: new Uint8Array(EXTENSION_HEADER_BYTES) };
}

function* readHeader(): Parser<Header> {
  const start = yield* readExactly("", 0, V2_HEADER_BYTES, "the qcow2 header");
  const view = viewOf(start);
  if (latin1(start, 0, 4) !== QCOW_MAGIC) throw new ImageError("the qcow2 magic is missing: the file is no qcow2");
  const version = view.getUint32(4);
  if (version !== 2 && version !== 3)
    throw new ImageError(`the image is of qcow version ${version}; only 2 and 3 are read (qemu-img convert makes one)`);
  const clusterBits = view.getUint32(20);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw new ImageError(
      `the qcow2 header says clusters of 2^${clusterBits} bytes; 2^${MIN_CLUSTER_BITS} to 2^${MAX_CLUSTER_BITS} are possible`,
    );
  }
  const more = version === 3 ? viewOf(yield* readExactly("", 0, V3_HEADER_BYTES, "the qcow2 header")) : undefined;
  const features = more?.getBigUint64(72) ?? 0n;
  const headerBytes = more?.getUint32(100) ?? V2_HEADER_BYTES;
  const clusterBytes = 2 ** clusterBits;
  if (more !== undefined && (headerBytes < V3_HEADER_BYTES || headerBytes % 8 !== 0 || headerBytes > clusterBytes)) {
    throw new ImageError(`the qcow2 header says that it is ${headerBytes} bytes long; ${V3_HEADER_BYTES} to ${clusterBytes} are possible`);
  }
  const cluster = yield* readUpTo("", 0, clusterBytes);
  if (cluster.length < headerBytes)
    throw new ImageError(`the qcow2 header ends early: ${headerBytes} bytes expected, ${cluster.length} found`);
  const backingOffset = view.getBigUint64(8);
  const nameStart = backingOffset === 0n || backingOffset > BigInt(cluster.length) ? cluster.length : Number(backingOffset);
  return {
    version,
    clusterBits,
    virtualSizeBytes: safeNumber(view.getBigUint64(24), "the disk's size in the qcow2 header"),
    backingOffset,
    cryptMethod: view.getUint32(32),
    l1Entries: view.getUint32(36),
    l1Offset: view.getBigUint64(40),
    refcountTableOffset: view.getBigUint64(48),
    refcountTableClusters: view.getUint32(56),
    snapshotCount: view.getUint32(60),
    features,
    compression: compressionOf(features, headerBytes > V3_HEADER_BYTES ? cluster[V3_HEADER_BYTES]! : 0),
    ...parseExtensions(cluster.subarray(0, nameStart), headerBytes),
  };
}

function compressionOf(features: bigint, type: number): "deflate" | "zstd" {
  if (type > 1) throw new ImageError(`the qcow2 header names compression type ${type}; only deflate (0) and zstd (1) are read`);
  if ((type !== 0) !== ((features & COMPRESSION_TYPE) !== 0n)) {
    throw new ImageError("the qcow2 header's compression type and its feature bit contradict each other: it is damaged");
  }
  return type === 1 ? "zstd" : "deflate";
}

/** `cluster` ends where the extensions must have ended: at the backing file's name or the cluster's end. */
function parseExtensions(cluster: Uint8Array, start: number): Pick<Header, "extensions" | "extensionsEnd"> {
  const view = viewOf(cluster);
  const extensions: Extension[] = [];
  let offset = start;
  while (offset + 8 <= cluster.length) {
    const type = view.getUint32(offset);
    const length = view.getUint32(offset + 4);
    if (type === 0) break;
    if (offset + 8 + length > cluster.length) {
      throw new ImageError(
        `the qcow2 header extension 0x${type.toString(16)} (${length} bytes) runs out of the header's cluster: the header is damaged`,
      );
    }
    extensions.push({ type, bytes: cluster.subarray(offset + 8, offset + 8 + length) });
    offset += 8 + Math.ceil(length / 8) * 8;
  }
  return { extensions, extensionsEnd: offset };
}

function refuseForeignParts(header: Header): void {
  const { features } = header;
  if (header.backingOffset !== 0n) {
    throw new ImageError(
      "the qcow2 has a backing file, so part of its data is elsewhere: flatten it first (qemu-img convert, or virsh blockpull)",
    );
  }
  if ((features & EXTERNAL_DATA_FILE) !== 0n) {
    throw new ImageError("the qcow2 keeps its data in an external data file: convert it first (qemu-img convert)");
  }
  if (header.cryptMethod !== 0) throw new ImageError("the qcow2 is encrypted: decrypt it first (qemu-img convert)");
  if ((features & CORRUPT) !== 0n) throw new ImageError("the qcow2 is marked corrupt: repair it first (qemu-img check -r all)");
  const unknown = features & ~KNOWN_FEATURES;
  if (unknown !== 0n)
    throw new ImageError(`the qcow2 needs features that are not known here (incompatible bits 0x${unknown.toString(16)})`);
  if ((features & EXTENDED_L2) !== 0n && header.clusterBits < MIN_EXTENDED_CLUSTER_BITS) {
    throw new ImageError(
      `the qcow2 has extended L2 entries with clusters of 2^${header.clusterBits} bytes; they need 2^${MIN_EXTENDED_CLUSTER_BITS} at least`,
    );
  }
}

function notesOf(header: Header): readonly string[] {
  const notes: string[] = [];
  const count = header.snapshotCount;
  if (count > 0)
    notes.push(`has ${count} internal ${count === 1 ? "snapshot" : "snapshots"}; the current state is imported, snapshots are left behind`);
  if ((header.features & DIRTY) !== 0n) {
    notes.push("was not closed by its last writer; only its reference counts can be out of date, and they are not used");
  }
  if (header.extensions.some((extension) => extension.type === BITMAPS_EXTENSION))
    notes.push("has persistent dirty bitmaps, which are left behind");
  return notes;
}

function tableOffset(value: bigint, clusterBytes: number, what: string): number {
  const offset = safeNumber(value, `the offset of ${what}`);
  if (offset === 0 || offset % clusterBytes !== 0) {
    throw new ImageError(`${what} of the qcow2 should lie at file offset ${offset}, which is no cluster's start: the header is damaged`);
  }
  return offset;
}

/** The offsets of the L2 tables, 0 where there is none. Entries for what lies beyond the disk's end are not read. */
function* readL1(l1Offset: number, entries: number, clusterBytes: number): Parser<Float64Array> {
  const offsets = new Float64Array(entries);
  for (let done = 0; done < entries * 8; done += L1_PIECE_BYTES) {
    const length = Math.min(L1_PIECE_BYTES, entries * 8 - done);
    const view = viewOf(yield* readExactly("", l1Offset + done, length, "the L1 table"));
    for (let position = 0; position < length; position += 8) {
      const high = view.getUint32(position);
      const low = view.getUint32(position + 4);
      const offset = (high & OFFSET_HIGH) * 2 ** 32 + low;
      if ((high & 0x7f00_0000) !== 0 || offset % clusterBytes !== 0) {
        throw new ImageError(
          `entry ${(done + position) / 8} of the L1 table is damaged: it points to no cluster's start or has reserved bits set`,
        );
      }
      offsets[(done + position) / 8] = offset;
    }
  }
  return offsets;
}

interface ClusterEntry {
  readonly table: DataView;
  /** Of the entry, in bytes. */
  readonly position: number;
  readonly virtualOffset: number;
  readonly header: Header;
  readonly runs: RunListBuilder;
}

function addWholeCluster(entry: ClusterEntry): void {
  const { table, position, virtualOffset, header, runs } = entry;
  const high = table.getUint32(position);
  const low = table.getUint32(position + 4);
  if ((high | low) === 0) return;
  if ((high & COMPRESSED) !== 0) return addCompressed(entry, high, low);
  const isZero = (low & ZERO_BIT) !== 0;
  if (isZero && header.version === 2) throw damagedEntry(virtualOffset);
  const fileOffset = clusterOffset(entry, high, low - (low & ZERO_BIT));
  if (isZero || fileOffset === 0) return;
  const lengthBytes = 2 ** header.clusterBits;
  runs.add({ file: 0, fileOffset, storedBytes: lengthBytes, virtualOffset, lengthBytes, encoding: "plain" });
}

/** An extended entry: the usual one, then a word whose lower half says which of the 32 subclusters hold data, the upper half which read as zeros. */
function addSubclusters(entry: ClusterEntry): void {
  const { table, position, virtualOffset, header, runs } = entry;
  const high = table.getUint32(position);
  const low = table.getUint32(position + 4);
  const zeros = table.getUint32(position + 8);
  const allocated = table.getUint32(position + 12);
  if ((high & COMPRESSED) !== 0) {
    if ((zeros | allocated) !== 0) throw damagedEntry(virtualOffset);
    return addCompressed(entry, high, low);
  }
  if ((low & ZERO_BIT) !== 0) throw damagedEntry(virtualOffset);
  const clusterStart = clusterOffset(entry, high, low);
  if ((zeros & allocated) !== 0 || (allocated !== 0 && clusterStart === 0)) throw damagedEntry(virtualOffset);
  const lengthBytes = 2 ** header.clusterBits / SUBCLUSTERS;
  for (let subcluster = 0; subcluster < SUBCLUSTERS; subcluster++) {
    if ((allocated & (1 << subcluster)) === 0) continue;
    const start = virtualOffset + subcluster * lengthBytes;
    if (start >= header.virtualSizeBytes) break;
    runs.add({
      file: 0,
      fileOffset: clusterStart + subcluster * lengthBytes,
      storedBytes: lengthBytes,
      virtualOffset: start,
      lengthBytes,
      encoding: "plain",
    });
  }
}

/** Compressed: the byte offset in the lowest 62 - (cluster bits - 8) bits, then how many more sectors of 512 bytes than one the data touches. */
function addCompressed({ virtualOffset, header, runs }: ClusterEntry, high: number, low: number): void {
  const highBits = 62 - (header.clusterBits - 8) - 32;
  const fileOffset = (high & (2 ** highBits - 1)) * 2 ** 32 + low;
  const sectors = ((high & (COMPRESSED - 1)) >>> highBits) + 1;
  const encoding: Encoding = header.compression;
  const storedBytes = sectors * SECTOR_BYTES - (fileOffset % SECTOR_BYTES);
  runs.add({ file: 0, fileOffset, storedBytes, virtualOffset, lengthBytes: 2 ** header.clusterBits, encoding });
}

function clusterOffset({ virtualOffset, header }: ClusterEntry, high: number, low: number): number {
  const offset = (high & OFFSET_HIGH) * 2 ** 32 + low;
  if ((high & RESERVED_HIGH) !== 0 || (low & RESERVED_LOW) !== 0 || offset % 2 ** header.clusterBits !== 0)
    throw damagedEntry(virtualOffset);
  return offset;
}

function damagedEntry(virtualOffset: number): ImageError {
  return new ImageError(
    `the L2 entry of guest offset ${virtualOffset} is damaged: it points to no cluster's start or has reserved or contradictory bits`,
  );
}
