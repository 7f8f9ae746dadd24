/** VMware's format: sparse, stream-optimized, flat and split. Source: VMware's Virtual Disk Format 5.0; QEMU block/vmdk.c for COWD. Numbers are little-endian. */
import { isPowerOfTwo, latin1, safeNumber, viewOf } from "./bytes.ts";
import type { DiskImage, RunList } from "./image.ts";
import { ImageError, type Parser, readExactly, readUpTo, sizeOf } from "./parser.ts";
import { MAX_IMAGE_FILES, RunListBuilder } from "./runs.ts";
import { readLowerTables } from "./tables.ts";
import { type CreateType, type DescriptorExtent, MAX_DESCRIPTOR_BYTES, parseDescriptor } from "./vmdk-descriptor.ts";

/** A hosted sparse extent: monolithicSparse, streamOptimized, a part of a split disk. */
export const SPARSE_MAGIC = "KDMV";
/** A sparse extent of ESXi before 6.5. */
export const COWD_MAGIC = "COWD";

const SECTOR_BYTES = 512;
const HEADER_BYTES = 512;

const MAX_VERSION = 3;
const HAS_NEWLINE_TEST = 1 << 0;
const HAS_ZERO_GRAINS = 1 << 2;
const IS_COMPRESSED = 1 << 16;
const HAS_MARKERS = 1 << 17;
/** Bit 1, the redundant tables, is known and not used: which copy is right cannot be told where they differ. */
const KNOWN_FLAGS = HAS_NEWLINE_TEST | (1 << 1) | HAS_ZERO_GRAINS | IS_COMPRESSED | HAS_MARKERS;
const DEFLATE = 1;

/** What stands in the header's bytes 73 to 76 unless a transfer took the file for text and changed its line ends. */
const NEWLINE_TEST = "\n \r\n";

/** In the header's place of the grain directory: it is in the footer. */
const DIRECTORY_IN_FOOTER = 0xffff_ffff_ffff_ffffn;
/** The footer's marker, the footer and the end-of-stream marker, each a sector: how a file with a footer ends. */
const FOOTER_BYTES = 3 * SECTOR_BYTES;
const FOOTER_MARKER = 3;

const TABLE_ENTRIES = 512;
const COWD_TABLE_ENTRIES = 4096;
const ENTRY_BYTES = 4;
/** A grain table entry, where the header allows it: the grain reads as zeros. */
const ZERO_GRAIN = 1;

/** 16 MiB of directory: 128 TiB in the usual grains of 64 KiB. */
const MAX_DIRECTORY_ENTRIES = 4 * 1024 * 1024;
const MAX_GRAIN_BYTES = 16 * 1024 * 1024;
const DIRECTORY_PIECE_BYTES = 1024 * 1024;

/** What a compressed grain may take, with its marker: QEMU reads no more either. Source: QEMU block/vmdk.c vmdk_read_extent. */
const MAX_GRAIN_EXPANSION = 2;

/** A piece of one file; `file` indexes the image's files. */
interface FlatExtent {
  readonly kind: "flat";
  readonly file: number;
  readonly lengthBytes: number;
  readonly fileOffset: number;
}

interface SparseExtent {
  readonly kind: "sparse";
  readonly file: number;
  readonly lengthBytes: number;
  readonly grainBytes: number;
  readonly tableEntries: number;
  /** In bytes. */
  readonly directoryOffset: number;
  readonly isCompressed: boolean;
  readonly hasZeroGrains: boolean;
  /** The sparse header says that it was in use when it was copied. */
  readonly isUnclean: boolean;
  /** Places of the file besides the tables that hold no grains. */
  readonly reserved: readonly { readonly offset: number; readonly lengthBytes: number }[];
}

type Extent = FlatExtent | SparseExtent;

interface ImageFile {
  readonly name: string;
  readonly sizeBytes: number;
}

/**
 * Reads the header or the descriptor, and the headers of the other files of a split disk. `sizeBytes` is the size of the image's own file.
 * The tables are read by `runs`. A streamOptimized file is read by its tables, at its top or its end; the grains' markers are not read.
 *
 * Throws ImageError on a parent, on extents that are elsewhere or devices, on kinds that are not read, on a missing footer or extents that are
 * shorter than declared, and on a header that is damaged or outside the bounds above.
 */
export function* parseVmdk(sizeBytes: number): Parser<DiskImage> {
  const start = yield* readUpTo("", 0, HEADER_BYTES);
  const magic = latin1(start, 0, 4);
  if (magic === COWD_MAGIC)
    throw new ImageError("the file is one extent of an ESXi disk: name its descriptor, the small .vmdk beside it, instead");
  return magic === SPARSE_MAGIC ? yield* parseSingleFile(sizeBytes) : yield* parseDescribedFiles(sizeBytes);
}

function* parseSingleFile(sizeBytes: number): Parser<DiskImage> {
  const files = [{ name: "", sizeBytes }];
  const header = yield* readSparseHeader(files, 0);
  const { descriptorOffset, descriptorBytes, extent } = header;
  if (descriptorOffset === 0)
    throw new ImageError("the file is one extent of a split disk: name its descriptor, the small .vmdk beside it, instead");
  if (descriptorBytes > MAX_DESCRIPTOR_BYTES)
    throw new ImageError(`the VMDK's descriptor has ${descriptorBytes} bytes; at most ${MAX_DESCRIPTOR_BYTES} are read`);
  const descriptor = parseDescriptor(yield* readExactly("", descriptorOffset, descriptorBytes, "the VMDK's descriptor"));
  const [described, another] = descriptor.extents;
  if (described?.type !== "SPARSE" || another !== undefined)
    throw new ImageError("the VMDK's own descriptor names other extents than the file itself");
  if (described.lengthBytes !== extent.lengthBytes) {
    throw new ImageError(
      `the VMDK's header gives the disk ${extent.lengthBytes} bytes, its descriptor ${described.lengthBytes}: it is damaged, or one of them lies`,
    );
  }
  return imageOf(descriptor.createType, files, [extent]);
}

function* parseDescribedFiles(sizeBytes: number): Parser<DiskImage> {
  if (sizeBytes > MAX_DESCRIPTOR_BYTES)
    throw new ImageError(`the VMDK's descriptor has ${sizeBytes} bytes; at most ${MAX_DESCRIPTOR_BYTES} are read`);
  const descriptor = parseDescriptor(yield* readExactly("", 0, sizeBytes, "the VMDK's descriptor"));
  const files: ImageFile[] = [{ name: "", sizeBytes }];
  const indexes = new Map<string, number>();
  const extents: Extent[] = [];
  for (const described of descriptor.extents) {
    let file = indexes.get(described.file);
    if (file === undefined) {
      const fileSizeBytes = yield* sizeOf(described.file);
      if (fileSizeBytes === undefined) throw new ImageError(`the VMDK's extent ${described.file} is not beside the descriptor`);
      if (files.length === MAX_IMAGE_FILES) throw new ImageError(`the VMDK consists of more than ${MAX_IMAGE_FILES} files`);
      file = files.push({ name: described.file, sizeBytes: fileSizeBytes }) - 1;
      indexes.set(described.file, file);
    } else if (described.type !== "FLAT" && described.type !== "VMFS") {
      throw new ImageError(`the VMDK's descriptor names the extent ${described.file} twice`);
    }
    extents.push(yield* readExtent(described, files, file));
  }
  return imageOf(descriptor.createType, files, extents);
}

function* readExtent(described: DescriptorExtent, files: readonly ImageFile[], file: number): Parser<Extent> {
  const { name, sizeBytes } = files[file]!;
  const { type, lengthBytes, fileOffset } = described;
  if (type === "FLAT" || type === "VMFS") {
    if (fileOffset + lengthBytes > sizeBytes) {
      throw new ImageError(
        `the VMDK's extent ${name} should hold ${lengthBytes} bytes from ${fileOffset} on, but ends at ${sizeBytes}: it is truncated`,
      );
    }
    return { kind: "flat", file, lengthBytes, fileOffset };
  }
  const extent = type === "SPARSE" ? (yield* readSparseHeader(files, file)).extent : yield* readCowdHeader(files, file);
  if (extent.lengthBytes !== lengthBytes) {
    throw new ImageError(
      `the header of the VMDK's extent ${name} gives it ${extent.lengthBytes} bytes, the descriptor ${lengthBytes}: one of them is damaged`,
    );
  }
  // A grain's marker counts from its extent's start, a run from the disk's.
  if (extent.isCompressed) throw new ImageError(`the VMDK's extent ${name} is compressed, which is not read in a disk of several files`);
  return extent;
}

interface SparseHeader {
  readonly extent: SparseExtent;
  /** In bytes; 0: the file has no descriptor in it. */
  readonly descriptorOffset: number;
  readonly descriptorBytes: number;
}

function* readSparseHeader(files: readonly ImageFile[], file: number): Parser<SparseHeader> {
  const { name, sizeBytes } = files[file]!;
  const what = name === "" ? "the VMDK" : `the VMDK's extent ${name}`;
  const first = yield* readExactly(name, 0, HEADER_BYTES, `${what}'s header`);
  const isFooted = viewOf(first).getBigUint64(56, true) === DIRECTORY_IN_FOOTER;
  const header = isFooted ? yield* readFooter(name, sizeBytes, first) : first;
  const view = viewOf(header);
  const u64 = (offset: number, field: string): number => safeNumber(view.getBigUint64(offset, true) * 512n, `the ${field} of ${what}`);
  if (latin1(header, 0, 4) !== SPARSE_MAGIC) throw new ImageError(`${what} has no sparse header: it is damaged`);
  const version = view.getUint32(4, true);
  const flags = view.getUint32(8, true);
  if (version < 1 || version > MAX_VERSION) throw new ImageError(`${what} is of version ${version}; 1 to ${MAX_VERSION} are read`);
  if ((flags & HAS_NEWLINE_TEST) !== 0 && latin1(header, 73, 77) !== NEWLINE_TEST) {
    throw new ImageError(`${what}'s line ends were changed: it was transferred as text and is damaged; transfer it again, in binary mode`);
  }
  if ((flags & ~KNOWN_FLAGS) !== 0) throw new ImageError(`${what} has flags that are not known here (0x${(flags >>> 0).toString(16)})`);
  const isCompressed = (flags & IS_COMPRESSED) !== 0;
  if (isCompressed && (flags & HAS_MARKERS) === 0)
    throw new ImageError(`${what} has compressed grains without markers, which are not read`);
  const algorithm = view.getUint16(77, true);
  if (isCompressed && algorithm !== DEFLATE)
    throw new ImageError(`${what} is compressed by algorithm ${algorithm}; only deflate (1) is read`);
  const tableEntries = view.getUint32(44, true);
  if (tableEntries !== TABLE_ENTRIES)
    throw new ImageError(`${what} has grain tables of ${tableEntries} entries; ${TABLE_ENTRIES} are expected`);
  const overheadBytes = u64(64, "overhead");
  if (overheadBytes > sizeBytes) {
    throw new ImageError(
      `${what}'s header says that grains begin at ${overheadBytes}, but the file ends at ${sizeBytes}: it is truncated or damaged`,
    );
  }
  const descriptorOffset = u64(28, "descriptor's offset");
  const descriptorBytes = u64(36, "descriptor's size");
  const reserved = [{ offset: 0, lengthBytes: HEADER_BYTES }];
  if (descriptorOffset !== 0) reserved.push({ offset: descriptorOffset, lengthBytes: descriptorBytes });
  if (isFooted) reserved.push({ offset: sizeBytes - FOOTER_BYTES, lengthBytes: FOOTER_BYTES });
  const extent = checkedExtent(what, sizeBytes, {
    kind: "sparse",
    file,
    lengthBytes: u64(12, "capacity"),
    grainBytes: u64(20, "grain size"),
    tableEntries,
    directoryOffset: u64(56, "grain directory's offset"),
    isCompressed,
    hasZeroGrains: (flags & HAS_ZERO_GRAINS) !== 0,
    isUnclean: header[72] !== 0,
    reserved,
  });
  return { extent, descriptorOffset, descriptorBytes };
}

/** The header's copy at the end, which knows where the directory is. */
function* readFooter(name: string, sizeBytes: number, header: Uint8Array): Parser<Uint8Array> {
  const missing = new ImageError("the VMDK does not end in the footer that its header announces: it is truncated");
  if (sizeBytes < HEADER_BYTES + FOOTER_BYTES) throw missing;
  const end = yield* readExactly(name, sizeBytes - FOOTER_BYTES, FOOTER_BYTES, "the VMDK's footer");
  const view = viewOf(end);
  const footer = end.subarray(SECTOR_BYTES, 2 * SECTOR_BYTES);
  const isFooter = view.getUint32(8, true) === 0 && view.getUint32(12, true) === FOOTER_MARKER && latin1(footer, 0, 4) === SPARSE_MAGIC;
  const isEnd = view.getBigUint64(2 * SECTOR_BYTES, true) === 0n && view.getBigUint64(2 * SECTOR_BYTES + 8, true) === 0n;
  if (!isFooter || !isEnd) throw missing;
  // Capacity and grain size.
  if (latin1(footer, 12, 28) !== latin1(header, 12, 28))
    throw new ImageError("the VMDK's header and footer contradict each other: it is damaged");
  return footer;
}

function* readCowdHeader(files: readonly ImageFile[], file: number): Parser<SparseExtent> {
  const { name, sizeBytes } = files[file]!;
  const what = `the VMDK's extent ${name}`;
  const header = yield* readExactly(name, 0, HEADER_BYTES, `${what}'s header`);
  const view = viewOf(header);
  if (latin1(header, 0, 4) !== COWD_MAGIC) throw new ImageError(`${what} has no COWD header: it is damaged`);
  const version = view.getUint32(4, true);
  if (version !== 1) throw new ImageError(`${what} is of version ${version}; only 1 is read`);
  return checkedExtent(what, sizeBytes, {
    kind: "sparse",
    file,
    lengthBytes: view.getUint32(12, true) * SECTOR_BYTES,
    grainBytes: view.getUint32(16, true) * SECTOR_BYTES,
    tableEntries: COWD_TABLE_ENTRIES,
    directoryOffset: view.getUint32(20, true) * SECTOR_BYTES,
    isCompressed: false,
    hasZeroGrains: false,
    isUnclean: false,
    reserved: [{ offset: 0, lengthBytes: HEADER_BYTES }],
  });
}

/** Throws ImageError when the numbers of a sparse header are none that any tool writes, or the directory is outside the file. */
function checkedExtent(what: string, sizeBytes: number, extent: SparseExtent): SparseExtent {
  const { lengthBytes, grainBytes, directoryOffset } = extent;
  if (lengthBytes === 0) throw new ImageError(`${what}'s header says that it has 0 bytes`);
  if (!isPowerOfTwo(grainBytes) || grainBytes > MAX_GRAIN_BYTES) {
    throw new ImageError(
      `${what} has grains of ${grainBytes} bytes; a power of two from ${SECTOR_BYTES} to ${MAX_GRAIN_BYTES} is expected`,
    );
  }
  const entries = directoryEntries(extent);
  if (entries > MAX_DIRECTORY_ENTRIES) {
    throw new ImageError(
      `${what} would need a grain directory of ${entries} entries for its ${lengthBytes} bytes; at most ${MAX_DIRECTORY_ENTRIES} are read`,
    );
  }
  if (directoryOffset === 0 || directoryOffset + entries * ENTRY_BYTES > sizeBytes) {
    throw new ImageError(
      `${what}'s grain directory should lie at file offset ${directoryOffset}, but the file ends at ${sizeBytes}: it is truncated or damaged`,
    );
  }
  return extent;
}

function directoryEntries({ lengthBytes, grainBytes, tableEntries }: SparseExtent): number {
  return Math.ceil(lengthBytes / (grainBytes * tableEntries));
}

function imageOf(createType: CreateType, files: readonly ImageFile[], extents: readonly Extent[]): DiskImage {
  const virtualSizeBytes = extents.reduce((sum, extent) => sum + extent.lengthBytes, 0);
  if (!Number.isSafeInteger(virtualSizeBytes)) throw new ImageError("the VMDK's extents together are larger than any disk");
  const isUnclean = extents.some((extent) => extent.kind === "sparse" && extent.isUnclean);
  return {
    format: "vmdk",
    variant: createType,
    virtualSizeBytes,
    files,
    granularityBytes: granularityOf(extents),
    notes: isUnclean ? ["was not closed by its last writer: its newest writes may be missing"] : [],
    *runs(): Parser<RunList> {
      const runs = new RunListBuilder({ files, virtualSizeBytes });
      let virtualOffset = 0;
      for (const extent of extents) {
        const { file, lengthBytes } = extent;
        if (extent.kind === "sparse") yield* addGrains(runs, extent, files[file]!, virtualOffset);
        else runs.add({ file, fileOffset: extent.fileOffset, storedBytes: lengthBytes, virtualOffset, lengthBytes, encoding: "plain" });
        virtualOffset += lengthBytes;
      }
      return runs.finish();
    },
  };
}

/** The grain, or less where an extent begins within what would be one. */
function granularityOf(extents: readonly Extent[]): number {
  const grains = extents.map((extent) => (extent.kind === "sparse" ? extent.grainBytes : SECTOR_BYTES));
  let granularity = Math.min(...grains);
  let start = 0;
  for (const { lengthBytes } of extents) {
    while (start % granularity !== 0) granularity /= 2;
    start += lengthBytes;
  }
  return granularity;
}

function* addGrains(runs: RunListBuilder, extent: SparseExtent, { name, sizeBytes }: ImageFile, virtualStart: number): Parser<void> {
  const { file, lengthBytes, grainBytes, tableEntries, isCompressed, hasZeroGrains } = extent;
  for (const place of extent.reserved) runs.reserve(file, place.offset, place.lengthBytes, "the VMDK's header or descriptor");
  const tableBytes = tableEntries * ENTRY_BYTES;
  const tables = yield* readDirectory(extent, name);
  runs.reserve(file, extent.directoryOffset, tables.length * ENTRY_BYTES, "the grain directory");
  for (const offset of tables) if (offset !== 0) runs.reserve(file, offset, tableBytes, "a grain table");
  const visit = (index: number, table: DataView): void => {
    const base = index * tableEntries * grainBytes;
    const count = Math.min(tableEntries, Math.ceil((lengthBytes - base) / grainBytes));
    for (let entry = 0; entry < count; entry++) {
      const sector = table.getUint32(entry * ENTRY_BYTES, true);
      if (sector === 0 || (hasZeroGrains && sector === ZERO_GRAIN)) continue;
      const offset = base + entry * grainBytes;
      const length = Math.min(grainBytes, lengthBytes - offset);
      runs.add({
        file,
        fileOffset: sector * SECTOR_BYTES,
        storedBytes: isCompressed ? grainBytes * MAX_GRAIN_EXPANSION : length,
        virtualOffset: virtualStart + offset,
        lengthBytes: length,
        encoding: isCompressed ? "grain" : "plain",
      });
    }
  };
  yield* readLowerTables({ file: name, fileSizeBytes: sizeBytes, offsets: tables, tableBytes, what: "a grain table", visit });
}

/** The offsets of the grain tables in bytes, 0 where there is none. */
function* readDirectory(extent: SparseExtent, name: string): Parser<Float64Array> {
  const tables = new Float64Array(directoryEntries(extent));
  const directoryBytes = tables.length * ENTRY_BYTES;
  for (let done = 0; done < directoryBytes; done += DIRECTORY_PIECE_BYTES) {
    const length = Math.min(DIRECTORY_PIECE_BYTES, directoryBytes - done);
    const view = viewOf(yield* readExactly(name, extent.directoryOffset + done, length, "the grain directory"));
    for (let position = 0; position < length; position += ENTRY_BYTES) {
      tables[(done + position) / ENTRY_BYTES] = view.getUint32(position, true) * SECTOR_BYTES;
    }
  }
  return tables;
}
