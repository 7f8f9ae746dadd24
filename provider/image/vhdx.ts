/** Hyper-V's format. Source: Microsoft's [MS-VHDX] Virtual Hard Disk v2 (VHDX) File Format; section numbers below are its. */
import { Buffer } from "node:buffer";
import { type BlockPlace, readBlocks } from "./blocks.ts";
import { isPowerOfTwo, latin1, safeNumber, viewOf } from "./bytes.ts";
import { guidAt, NIL_GUID } from "./guid.ts";
import type { DiskImage } from "./image.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const TIB = MIB * MIB;

/** At the start of the file (2.2.1). */
export const VHDX_MAGIC = "vhdxfile";

/** The two headers (2.2.2) and the two region tables (2.2.3), each pair for safe updates. */
const HEADER_OFFSETS = [64 * KIB, 128 * KIB] as const;
const HEADER_BYTES = 4 * KIB;
const REGION_TABLE_OFFSETS = [192 * KIB, 256 * KIB] as const;
const REGION_TABLE_BYTES = 64 * KIB;
const METADATA_TABLE_BYTES = 64 * KIB;
/** Where the entries of each table begin, how long one is, and how many there may be: as many as fit 64 KiB. */
const REGION_ENTRIES_OFFSET = 16;
const METADATA_ENTRIES_OFFSET = 32;
const ENTRY_BYTES = 32;
const MAX_ENTRIES = 2047;

const REGION_BAT = "2dc27766-f623-4200-9d64-115e9bfd4a08";
const REGION_METADATA = "8b7ca206-4790-4b9a-b8fe-575f050f886e";

/** Metadata items (2.6.2) with the length of each. */
const ITEMS = {
  fileParameters: { guid: "caa16737-fa36-4d43-b3b6-33f0aa44e76b", length: 8 },
  virtualDiskSize: { guid: "2fa54224-cd1b-4876-b211-5dbed83bf4b8", length: 8 },
  logicalSectorSize: { guid: "8141bf1d-a96f-4709-ba47-f233a8faab5f", length: 4 },
} as const;
const ITEM_PARENT_LOCATOR = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c";
/** Required items that say nothing about where the data lies: page 83 data, and the physical sector size. */
const HARMLESS_ITEMS: ReadonlySet<string> = new Set(["beca12ab-b2e6-4523-93ef-c309e000c746", "cda348c7-445d-4471-9cc9-e9885251c556"]);

const MIN_BLOCK_BYTES = MIB;
const MAX_BLOCK_BYTES = 256 * MIB;
const MAX_VIRTUAL_BYTES = 64 * TIB;

/** Of a block allocation table entry (2.5.1): three bits of state, then the offset in the file from bit 20 on. */
const STATE_MASK = 7n;
const OFFSET_MASK = ~0xf_ffffn;
const FULLY_PRESENT = 6;
const PARTIALLY_PRESENT = 7;
/** Not present, undefined, zero, unmapped, and unmapped as drafts of the format wrote it (QEMU block/vhdx.h PAYLOAD_BLOCK_UNMAPPED_v095). */
const ZERO_STATES: ReadonlySet<number> = new Set([0, 1, 2, 3, 5]);

interface Region {
  readonly offset: number;
  readonly lengthBytes: number;
}

interface Metadata {
  readonly virtualSizeBytes: number;
  readonly blockBytes: number;
  readonly logicalSectorBytes: number;
  readonly isFixed: boolean;
}

/**
 * Reads headers, region table and metadata. `sizeBytes` is the file's size. Of each pair the valid one is taken, of the headers the newer.
 *
 * Throws ImageError when a log is waiting to be replayed, on a differencing image, on unknown required regions or items, and on anything damaged,
 * truncated or outside the format's bounds.
 */
export function* parseVhdx(sizeBytes: number): Parser<DiskImage> {
  const magic = yield* readExactly("", 0, 8, "the VHDX file identifier");
  if (latin1(magic) !== VHDX_MAGIC) throw new ImageError("the VHDX file identifier is missing: the file is no VHDX");
  yield* checkHeader();
  const { bat, metadata: metadataRegion } = yield* readRegions(sizeBytes);
  const metadata = yield* readMetadata(metadataRegion);
  const { virtualSizeBytes, blockBytes } = metadata;

  // After every `chunkRatio` entries of blocks comes one of a sector bitmap, which only differencing images use (2.5).
  const chunkRatio = (2 ** 23 * metadata.logicalSectorBytes) / blockBytes;
  const blockCount = Math.ceil(virtualSizeBytes / blockBytes);
  const entryCount = blockCount + Math.floor((blockCount - 1) / chunkRatio);
  if (entryCount * 8 > bat.lengthBytes) {
    throw new ImageError(
      `the VHDX block table has ${bat.lengthBytes} bytes, but the disk's ${blockCount} blocks need ${entryCount * 8}: it is damaged`,
    );
  }
  const locate = (view: DataView, offset: number, index: number): BlockPlace | undefined => {
    if (index % (chunkRatio + 1) === chunkRatio) return undefined;
    const block = index - Math.floor(index / (chunkRatio + 1));
    const entry = view.getBigUint64(offset, true);
    const state = Number(entry & STATE_MASK);
    if (ZERO_STATES.has(state)) return undefined;
    if (state === PARTIALLY_PRESENT)
      throw new ImageError(`block ${block} of the VHDX lies partly in a parent: differencing disks are not read`);
    if (state !== FULLY_PRESENT) throw new ImageError(`block ${block} of the VHDX has the unknown state ${state}: the image is damaged`);
    return { block, fileOffset: safeNumber(entry & OFFSET_MASK, `the file offset of block ${block}`) };
  };
  return {
    format: "vhdx",
    variant: metadata.isFixed ? "fixed" : "dynamic",
    virtualSizeBytes,
    files: [{ name: "", sizeBytes }],
    granularityBytes: blockBytes,
    notes:
      metadata.logicalSectorBytes === 512
        ? []
        : [
            `the disk has logical sectors of ${metadata.logicalSectorBytes} bytes: the machine must present it so, or the guest finds no partitions`,
          ],
    runs: () =>
      readBlocks({
        sizeBytes,
        virtualSizeBytes,
        blockBytes,
        offset: bat.offset,
        entryCount,
        entryBytes: 8,
        data: { start: MIB, end: sizeBytes },
        locate,
      }),
  };
}

/** Finds the current header: valid, and with the higher sequence number. It must have nothing in its log. */
function* checkHeader(): Parser<void> {
  const headers: Uint8Array[] = [];
  for (const offset of HEADER_OFFSETS) {
    const bytes = yield* readExactly("", offset, HEADER_BYTES, "the VHDX header");
    if (latin1(bytes, 0, 4) === "head" && hasCrc32c(bytes)) headers.push(bytes);
  }
  const sequence = (bytes: Uint8Array): bigint => viewOf(bytes).getBigUint64(8, true);
  const [first, second] = headers;
  if (first === undefined) throw new ImageError("neither of the two VHDX headers matches its checksum: the image is damaged");
  if (second !== undefined && sequence(first) === sequence(second) && Buffer.compare(first, second) !== 0)
    throw new ImageError("the two VHDX headers have the same sequence number but differ: the image is damaged");
  const header = second !== undefined && sequence(second) > sequence(first) ? second : first;
  const version = viewOf(header).getUint16(66, true);
  if (version !== 1) throw new ImageError(`the VHDX is of format version ${version}; only version 1 is read`);
  if (guidAt(header, 48) !== NIL_GUID) {
    throw new ImageError(
      "the VHDX was not closed cleanly: its log holds writes that are not in place yet; shut the machine down, or replay the log with qemu-img check -r all or by Mount-VHD and Dismount-VHD",
    );
  }
}

function* readRegions(sizeBytes: number): Parser<{ readonly bat: Region; readonly metadata: Region }> {
  for (const offset of REGION_TABLE_OFFSETS) {
    const bytes = yield* readExactly("", offset, REGION_TABLE_BYTES, "the VHDX region table");
    if (latin1(bytes, 0, 4) === "regi" && hasCrc32c(bytes)) return parseRegions(bytes, sizeBytes);
  }
  throw new ImageError("neither of the two VHDX region tables matches its checksum: the image is damaged");
}

function parseRegions(bytes: Uint8Array, sizeBytes: number): { readonly bat: Region; readonly metadata: Region } {
  const view = viewOf(bytes);
  const found = new Map<string, Region>();
  for (let entry = REGION_ENTRIES_OFFSET, left = checkedCount(view.getUint32(8, true), "region"); left > 0; left--, entry += ENTRY_BYTES) {
    const guid = guidAt(bytes, entry);
    if (guid !== REGION_BAT && guid !== REGION_METADATA) {
      if ((view.getUint32(entry + 28, true) & 1) !== 0) throw new ImageError(`the VHDX requires region ${guid}, which is unknown`);
      continue;
    }
    const offset = safeNumber(view.getBigUint64(entry + 16, true), "the offset of a VHDX region");
    const lengthBytes = view.getUint32(entry + 24, true);
    if (offset < MIB || offset % MIB !== 0 || offset + lengthBytes > sizeBytes) {
      throw new ImageError(
        `a VHDX region of ${lengthBytes} bytes should lie at offset ${offset}, outside the file of ${sizeBytes} bytes: it is truncated or damaged`,
      );
    }
    if (found.has(guid)) throw new ImageError(`the VHDX region table names region ${guid} twice: it is damaged or crafted`);
    found.set(guid, { offset, lengthBytes });
  }
  const bat = found.get(REGION_BAT);
  const metadata = found.get(REGION_METADATA);
  if (bat === undefined || metadata === undefined)
    throw new ImageError("the VHDX region table lacks the block table or the metadata: it is damaged");
  return { bat, metadata };
}

function* readMetadata(region: Region): Parser<Metadata> {
  const table = yield* readExactly("", region.offset, METADATA_TABLE_BYTES, "the VHDX metadata table");
  if (latin1(table, 0, 8) !== "metadata") throw new ImageError("the VHDX metadata table is missing: the image is damaged");
  const entries = parseMetadataTable(table, region);
  function* item({ guid, length }: { readonly guid: string; readonly length: number }, name: string): Parser<DataView> {
    const entry = entries.get(guid);
    if (entry?.lengthBytes !== length)
      throw new ImageError(`the VHDX metadata lacks the ${name}, or has it in the wrong length: the image is damaged`);
    return viewOf(yield* readExactly("", region.offset + entry.offset, length, `the VHDX ${name}`));
  }
  const parameters = yield* item(ITEMS.fileParameters, "file parameters");
  const blockBytes = parameters.getUint32(0, true);
  const flags = parameters.getUint32(4, true);
  const virtualSizeBytes = safeNumber((yield* item(ITEMS.virtualDiskSize, "disk size")).getBigUint64(0, true), "the VHDX's size");
  const logicalSectorBytes = (yield* item(ITEMS.logicalSectorSize, "logical sector size")).getUint32(0, true);
  if ((flags & 2) !== 0 || entries.has(ITEM_PARENT_LOCATOR))
    throw new ImageError("the VHDX is a differencing disk: its data lies partly in a parent; merge it into the parent first (Merge-VHD)");
  if (!isPowerOfTwo(blockBytes) || blockBytes < MIN_BLOCK_BYTES || blockBytes > MAX_BLOCK_BYTES)
    throw new ImageError(`the VHDX's blocks have ${blockBytes} bytes; a power of two from 1 to 256 MiB is expected`);
  if (logicalSectorBytes !== 512 && logicalSectorBytes !== 4096)
    throw new ImageError(`the VHDX has logical sectors of ${logicalSectorBytes} bytes; 512 or 4096 are expected`);
  if (virtualSizeBytes === 0 || virtualSizeBytes > MAX_VIRTUAL_BYTES || virtualSizeBytes % logicalSectorBytes !== 0) {
    throw new ImageError(
      `the VHDX metadata gives the disk ${virtualSizeBytes} bytes; a multiple of its ${logicalSectorBytes}-byte sectors up to 64 TiB is expected`,
    );
  }
  return { virtualSizeBytes, blockBytes, logicalSectorBytes, isFixed: (flags & 1) !== 0 };
}

/** The entries by GUID; offsets count from the region's start. Items of users are left out. Throws ImageError on an unknown one that is required. */
function parseMetadataTable(table: Uint8Array, region: Region): ReadonlyMap<string, Region> {
  const view = viewOf(table);
  const known: ReadonlySet<string> = new Set([...Object.values(ITEMS).map(({ guid }) => guid), ITEM_PARENT_LOCATOR, ...HARMLESS_ITEMS]);
  const entries = new Map<string, Region>();
  for (
    let entry = METADATA_ENTRIES_OFFSET, left = checkedCount(view.getUint16(10, true), "metadata");
    left > 0;
    left--, entry += ENTRY_BYTES
  ) {
    const guid = guidAt(table, entry);
    const flags = view.getUint32(entry + 24, true);
    const isUser = (flags & 1) !== 0;
    const isRequired = (flags & 4) !== 0;
    if (isUser || !known.has(guid)) {
      if (isRequired) throw new ImageError(`the VHDX requires metadata item ${guid}, which is unknown`);
      continue;
    }
    const offset = view.getUint32(entry + 16, true);
    const lengthBytes = view.getUint32(entry + 20, true);
    if (lengthBytes > 0 && (offset < METADATA_TABLE_BYTES || offset + lengthBytes > region.lengthBytes))
      throw new ImageError(`VHDX metadata item ${guid} lies outside the metadata region: the image is damaged`);
    if (entries.has(guid)) throw new ImageError(`the VHDX metadata names item ${guid} twice: it is damaged or crafted`);
    entries.set(guid, { offset, lengthBytes });
  }
  return entries;
}

function checkedCount(count: number, table: string): number {
  if (count > MAX_ENTRIES)
    throw new ImageError(`the VHDX ${table} table claims ${count} entries; at most ${MAX_ENTRIES} fit: it is damaged`);
  return count;
}

/** Whether the CRC-32C at offset 4 is that of all bytes, with those four taken as zeros. */
function hasCrc32c(bytes: Uint8Array): boolean {
  const zeroed = Uint8Array.from(bytes);
  zeroed.fill(0, 4, 8);
  return viewOf(bytes).getUint32(4, true) === crc32c(zeroed);
}

/** The reflected Castagnoli polynomial. Source: RFC 3720, appendix B.4. */
const CRC32C_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = (value & 1) === 1 ? (value >>> 1) ^ 0x82f6_3b78 : value >>> 1;
  return value;
});

function crc32c(bytes: Uint8Array): number {
  let crc = 0xffff_ffff;
  for (const byte of bytes) crc = CRC32C_TABLE[(crc ^ byte) & 0xff]! ^ (crc >>> 8);
  return ~crc >>> 0;
}
