/** Virtual PC and Hyper-V's first format, fixed and dynamic. Source: Microsoft's Virtual Hard Disk Image Format Specification 1.0. */
import { type BlockPlace, readBlocks } from "./blocks.ts";
import { isPowerOfTwo, isZero, latin1, roundUp, safeNumber, viewOf } from "./bytes.ts";
import type { DiskImage, RunList } from "./image.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";
import { RunListBuilder } from "./runs.ts";

const SECTOR_BYTES = 512;
const FOOTER_BYTES = 512;
const DYNAMIC_HEADER_BYTES = 1024;

/** At the start of the footer, which is the file's last sector and, in a dynamic image, the first one too. */
export const VHD_COOKIE = "conectix";
const DYNAMIC_COOKIE = "cxsparse";
const FOOTER_VERSION = 0x0001_0000;
const DYNAMIC_VERSION = 0x0001_0000;

const TYPE_FIXED = 2;
const TYPE_DYNAMIC = 3;
const TYPE_DIFFERENCING = 4;

/** 2040 GiB: the most that the format can address. Source: QEMU block/vpc.c VHD_MAX_SECTORS. */
const MAX_VIRTUAL_BYTES = 0xff00_0000 * SECTOR_BYTES;
/** The usual block is 2 MiB; a larger one than this is nothing that any tool writes. */
const MAX_BLOCK_BYTES = 256 * 1024 * 1024;
/** 64 MiB of table. With blocks of 2 MiB the largest disk needs a sixteenth of it. */
const MAX_BLOCKS = 1 << 24;
const UNALLOCATED = 0xffff_ffff;

interface Footer {
  /** Where the dynamic header lies; all ones in a fixed image, which has none. */
  readonly dataOffset: bigint;
  readonly currentSizeBytes: number;
  readonly type: number;
}

interface DynamicHeader {
  readonly tableOffset: number;
  readonly entryCount: number;
  readonly blockBytes: number;
}

/**
 * Reads the footer and, of a dynamic image, its copy and the dynamic header. `sizeBytes` is the file's size.
 *
 * The guest's size is the footer's current size. (qemu takes the CHS geometry instead for what Virtual PC and qemu itself wrote; qemu's own images
 * have both alike.) A dynamic image's sector bitmaps are not read: sectors never written are zeros in the file too, and qemu relies on that.
 *
 * Throws ImageError on a differencing image, and on anything damaged, truncated or outside the format's bounds.
 */
export function* parseVhd(sizeBytes: number): Parser<DiskImage> {
  if (sizeBytes < FOOTER_BYTES) throw new ImageError(`a VHD ends in a footer of ${FOOTER_BYTES} bytes, but the file has only ${sizeBytes}`);
  const footer = parseFooter(yield* readExactly("", sizeBytes - FOOTER_BYTES, FOOTER_BYTES, "the VHD footer"), "the VHD footer at the end");
  const { currentSizeBytes } = footer;
  if (currentSizeBytes === 0) throw new ImageError("the VHD footer says that the disk has 0 bytes");
  if (currentSizeBytes % SECTOR_BYTES !== 0)
    throw new ImageError(`the VHD footer gives the disk ${currentSizeBytes} bytes, which is no multiple of ${SECTOR_BYTES}`);
  if (currentSizeBytes > MAX_VIRTUAL_BYTES)
    throw new ImageError(`the VHD footer gives the disk ${currentSizeBytes} bytes, but a VHD holds at most ${MAX_VIRTUAL_BYTES}`);
  switch (footer.type) {
    case TYPE_FIXED:
      return fixedImage(sizeBytes, currentSizeBytes);
    case TYPE_DYNAMIC:
      return yield* parseDynamic(sizeBytes, footer);
    case TYPE_DIFFERENCING:
      throw new ImageError("the VHD is a differencing disk: its data lies partly in a parent; merge it into the parent first (Merge-VHD)");
    default:
      throw new ImageError(`the VHD footer gives disk type ${footer.type}; only fixed (2) and dynamic (3) disks are read`);
  }
}

function parseFooter(bytes: Uint8Array, what: string): Footer {
  const view = viewOf(bytes);
  if (latin1(bytes, 0, 8) !== VHD_COOKIE) throw new ImageError(`${what} is missing: the file is truncated, or is no VHD`);
  if (view.getUint32(64) !== checksumWithout(bytes, 64)) throw new ImageError(`${what} does not match its checksum: it is damaged`);
  const version = view.getUint32(12);
  if (version >>> 16 !== FOOTER_VERSION >>> 16) throw new ImageError(`${what} is of format version ${hex(version)}; only 1.x is known`);
  return {
    dataOffset: view.getBigUint64(16),
    currentSizeBytes: safeNumber(view.getBigUint64(48), "the VHD's size"),
    type: view.getUint32(60),
  };
}

/** The ones' complement of the sum of all bytes but the four of the checksum itself. */
function checksumWithout(bytes: Uint8Array, checksumOffset: number): number {
  let sum = 0;
  for (let index = 0; index < bytes.length; index++) if (index < checksumOffset || index >= checksumOffset + 4) sum += bytes[index]!;
  return ~sum >>> 0;
}

function fixedImage(sizeBytes: number, virtualSizeBytes: number): DiskImage {
  if (virtualSizeBytes > sizeBytes - FOOTER_BYTES) {
    throw new ImageError(
      `the VHD footer gives the fixed disk ${virtualSizeBytes} bytes, but only ${sizeBytes - FOOTER_BYTES} lie before it: the file is truncated or damaged`,
    );
  }
  // oxlint-disable-next-line require-yield -- a fixed disk has no table to ask for
  function* runs(): Parser<RunList> {
    const builder = new RunListBuilder({ files: [{ sizeBytes }], virtualSizeBytes });
    builder.add({
      file: 0,
      fileOffset: 0,
      storedBytes: virtualSizeBytes,
      virtualOffset: 0,
      lengthBytes: virtualSizeBytes,
      encoding: "plain",
    });
    return builder.finish();
  }
  return {
    format: "vhd",
    variant: "fixed",
    virtualSizeBytes,
    files: [{ name: "", sizeBytes }],
    granularityBytes: SECTOR_BYTES,
    notes: [],
    runs,
  };
}

function* parseDynamic(sizeBytes: number, footer: Footer): Parser<DiskImage> {
  const copy = parseFooter(
    yield* readExactly("", 0, FOOTER_BYTES, "the copy of the VHD footer"),
    "the copy of the VHD footer at the start",
  );
  if (copy.currentSizeBytes !== footer.currentSizeBytes || copy.type !== footer.type || copy.dataOffset !== footer.dataOffset) {
    throw new ImageError("the VHD footer and its copy at the start contradict each other: the file is damaged, or two files were mixed");
  }
  const virtualSizeBytes = footer.currentSizeBytes;
  const header = yield* readDynamicHeader(sizeBytes, footer.dataOffset);
  const blockCount = Math.ceil(virtualSizeBytes / header.blockBytes);
  if (blockCount > header.entryCount || blockCount > MAX_BLOCKS) {
    throw new ImageError(
      `the VHD's ${blockCount} blocks of ${header.blockBytes} bytes are more than its table's ${header.entryCount} entries or than the ${MAX_BLOCKS} that are read`,
    );
  }
  const tableEnd = header.tableOffset + blockCount * 4;
  if (tableEnd > sizeBytes - FOOTER_BYTES) {
    throw new ImageError(
      `the VHD's block table should end at ${tableEnd}, but the file has only ${sizeBytes} bytes: it is truncated or damaged`,
    );
  }
  // Each block is led by a bitmap of its sectors, which fills whole sectors itself.
  const bitmapBytes = roundUp(header.blockBytes / SECTOR_BYTES / 8, SECTOR_BYTES);
  const locate = (view: DataView, offset: number, block: number): BlockPlace | undefined => {
    const sector = view.getUint32(offset);
    return sector === UNALLOCATED ? undefined : { block, fileOffset: sector * SECTOR_BYTES + bitmapBytes };
  };
  return {
    format: "vhd",
    variant: "dynamic",
    virtualSizeBytes,
    files: [{ name: "", sizeBytes }],
    granularityBytes: header.blockBytes,
    notes: [],
    runs: () =>
      readBlocks({
        sizeBytes,
        virtualSizeBytes,
        blockBytes: header.blockBytes,
        offset: header.tableOffset,
        entryCount: blockCount,
        entryBytes: 4,
        data: { start: FOOTER_BYTES + DYNAMIC_HEADER_BYTES, end: sizeBytes - FOOTER_BYTES },
        locate,
      }),
  };
}

function* readDynamicHeader(sizeBytes: number, dataOffset: bigint): Parser<DynamicHeader> {
  const offset = Number(dataOffset);
  if (offset < FOOTER_BYTES || offset + DYNAMIC_HEADER_BYTES > sizeBytes - FOOTER_BYTES)
    throw new ImageError(`the VHD's dynamic header should lie at offset ${dataOffset}, outside the file of ${sizeBytes} bytes`);
  const bytes = yield* readExactly("", offset, DYNAMIC_HEADER_BYTES, "the VHD's dynamic header");
  const view = viewOf(bytes);
  if (latin1(bytes, 0, 8) !== DYNAMIC_COOKIE) throw new ImageError(`the VHD's dynamic header is missing at offset ${offset}`);
  if (view.getUint32(36) !== checksumWithout(bytes, 36))
    throw new ImageError("the VHD's dynamic header does not match its checksum: it is damaged");
  const version = view.getUint32(24);
  if (version >>> 16 !== DYNAMIC_VERSION >>> 16)
    throw new ImageError(`the VHD's dynamic header is of version ${hex(version)}; only 1.x is known`);
  if (!isZero(bytes.subarray(40, 56)))
    throw new ImageError("the VHD names a parent: its data lies partly in another file; merge it first (Merge-VHD)");
  const blockBytes = view.getUint32(32);
  if (!isPowerOfTwo(blockBytes) || blockBytes < SECTOR_BYTES || blockBytes > MAX_BLOCK_BYTES)
    throw new ImageError(
      `the VHD's blocks have ${blockBytes} bytes; a power of two from ${SECTOR_BYTES} to ${MAX_BLOCK_BYTES} is expected`,
    );
  return { tableOffset: safeNumber(view.getBigUint64(16), "the VHD's block table offset"), entryCount: view.getUint32(28), blockBytes };
}

function hex(value: number): string {
  return `0x${value.toString(16).padStart(8, "0")}`;
}
