/** VirtualBox's own format, version 1.1. Source: VirtualBox src/VBox/Storage/VDICore.h; QEMU block/vdi.c. */
import { type BlockPlace, readBlocks } from "./blocks.ts";
import { isPowerOfTwo, isZero, safeNumber, viewOf } from "./bytes.ts";
import type { DiskImage } from "./image.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";

const SECTOR_BYTES = 512;
const HEADER_BYTES = 512;

/** A little-endian u32 at VDI_SIGNATURE_OFFSET, behind 64 bytes of text that name the program. */
export const VDI_SIGNATURE = 0xbeda_107f;
export const VDI_SIGNATURE_OFFSET = 64;
const VERSION = 0x0001_0001;

const TYPE_DYNAMIC = 1;
const TYPE_STATIC = 2;
const TYPE_UNDO = 3;
const TYPE_DIFFERENCING = 4;

/** VirtualBox and qemu write blocks of 1 MiB. */
const MIN_BLOCK_BYTES = 4096;
const MAX_BLOCK_BYTES = 256 * 1024 * 1024;
/** 256 MiB of map: a disk of 64 TiB in blocks of 1 MiB. */
const MAX_BLOCKS = 1 << 26;

/** An entry for a block never written, and one for a block that the guest discarded: both read as zeros. */
const UNALLOCATED = 0xffff_ffff;
const DISCARDED = 0xffff_fffe;

/**
 * Reads the header. `sizeBytes` is the file's size.
 *
 * Throws ImageError on a differencing or undo image, and on anything damaged, truncated or outside the bounds above.
 */
export function* parseVdi(sizeBytes: number): Parser<DiskImage> {
  const header = yield* readExactly("", 0, HEADER_BYTES, "the VDI header");
  const view = viewOf(header);
  const u32 = (offset: number): number => view.getUint32(offset, true);
  if (u32(VDI_SIGNATURE_OFFSET) !== VDI_SIGNATURE) throw new ImageError("the VDI signature is missing: the file is no VDI");
  if (u32(68) !== VERSION) throw new ImageError(`the VDI is of format version ${u32(68) >>> 16}.${u32(68) & 0xffff}; only 1.1 is read`);
  const variant = variantOf(u32(76));
  if (!isZero(header.subarray(424, 440)) || !isZero(header.subarray(440, 456)))
    throw new ImageError(
      "the VDI names a parent: its data lies partly in another file; merge the snapshots first (VBoxManage clonemedium)",
    );
  if (u32(360) !== SECTOR_BYTES) throw new ImageError(`the VDI has sectors of ${u32(360)} bytes; only ${SECTOR_BYTES} are read`);

  const virtualSizeBytes = safeNumber(view.getBigUint64(368, true), "the VDI's size");
  const blockBytes = u32(376);
  const blockCount = u32(384);
  if (virtualSizeBytes === 0) throw new ImageError("the VDI header says that the disk has 0 bytes");
  if (virtualSizeBytes % SECTOR_BYTES !== 0)
    throw new ImageError(`the VDI header gives the disk ${virtualSizeBytes} bytes, which is no multiple of ${SECTOR_BYTES}`);
  if (!isPowerOfTwo(blockBytes) || blockBytes < MIN_BLOCK_BYTES || blockBytes > MAX_BLOCK_BYTES)
    throw new ImageError(
      `the VDI's blocks have ${blockBytes} bytes; a power of two from ${MIN_BLOCK_BYTES} to ${MAX_BLOCK_BYTES} is expected`,
    );
  if (u32(380) !== 0) throw new ImageError(`the VDI keeps ${u32(380)} extra bytes with each block, which is not supported`);
  if (blockCount !== Math.ceil(virtualSizeBytes / blockBytes))
    throw new ImageError(
      `the VDI header names ${blockCount} blocks of ${blockBytes} bytes for a disk of ${virtualSizeBytes} bytes: it is damaged`,
    );
  if (blockCount > MAX_BLOCKS) throw new ImageError(`the VDI has ${blockCount} blocks; at most ${MAX_BLOCKS} are read`);

  const mapOffset = u32(340);
  const dataOffset = u32(344);
  const mapEnd = mapOffset + blockCount * 4;
  if (mapOffset < HEADER_BYTES || mapEnd > dataOffset || dataOffset > sizeBytes) {
    throw new ImageError(
      `the VDI's block map (${mapOffset} to ${mapEnd}) and data (from ${dataOffset}) do not fit the file of ${sizeBytes} bytes: it is truncated or damaged`,
    );
  }
  const locate = (entries: DataView, offset: number, block: number): BlockPlace | undefined => {
    const position = entries.getUint32(offset, true);
    return position === UNALLOCATED || position === DISCARDED ? undefined : { block, fileOffset: dataOffset + position * blockBytes };
  };
  return {
    format: "vdi",
    variant,
    virtualSizeBytes,
    files: [{ name: "", sizeBytes }],
    granularityBytes: blockBytes,
    notes: [],
    runs: () =>
      readBlocks({
        sizeBytes,
        virtualSizeBytes,
        blockBytes,
        offset: mapOffset,
        entryCount: blockCount,
        entryBytes: 4,
        data: { start: dataOffset, end: sizeBytes },
        locate,
      }),
  };
}

function variantOf(type: number): string {
  switch (type) {
    case TYPE_DYNAMIC:
      return "dynamic";
    case TYPE_STATIC:
      return "static";
    case TYPE_UNDO:
    case TYPE_DIFFERENCING:
      throw new ImageError(
        "the VDI is a differencing disk: its data lies partly in a parent; merge the snapshots first (VBoxManage clonemedium)",
      );
    default:
      throw new ImageError(`the VDI is of type ${type}; only dynamic (1) and static (2) disks are read`);
  }
}
