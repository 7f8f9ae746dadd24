/** What a disk image is, whatever its format: a header that was understood, and a map from the file's bytes to the guest's. */
import type { Parser } from "./parser.ts";

/** The formats that have a reader. The names are qemu-img's, but for `vhd`, which qemu calls vpc. */
export type ImageFormat = "raw" | "qcow2" | "vmdk" | "vhd" | "vhdx" | "vdi";

/** How the bytes of a run are stored. `grain` is a VMDK grain marker (u64 LBA, u32 size) with a zlib stream behind it. */
export type Encoding = "plain" | "grain" | "deflate" | "zstd";

/**
 * A piece of the guest's disk and where its bytes lie.
 *
 * `file` indexes `DiskImage.files`. A plain run has `storedBytes === lengthBytes` and may be of any length. Any other run is one cluster or grain:
 * `lengthBytes` is what it inflates to, `storedBytes` an upper bound of what it occupies (what follows the stream inside is to be ignored). Only the
 * run that ends at the disk's end may inflate to more than `lengthBytes`: the rest, behind the disk, is to be ignored.
 * What no run covers reads as zeros.
 */
export interface Run {
  readonly file: number;
  readonly fileOffset: number;
  readonly storedBytes: number;
  readonly virtualOffset: number;
  readonly lengthBytes: number;
  readonly encoding: Encoding;
}

/** An image whose header was read and found good. */
export interface DiskImage {
  readonly format: ImageFormat;
  /** The kind within the format, in the format's own words: `streamOptimized`, `monolithicSparse`, `v3`, `dynamic`. */
  readonly variant: string;
  readonly virtualSizeBytes: number;
  /** The files that hold the bytes, the image itself first (name ""), the others plain basenames beside it. Sizes as found. */
  readonly files: readonly { readonly name: string; readonly sizeBytes: number }[];
  /** Every run starts and ends at a multiple of this in the guest's disk, but for the disk's end. A power of two, at least 512. */
  readonly granularityBytes: number;
  /** What the user should know, one sentence each: "has 2 internal snapshots; the current state is imported". */
  readonly notes: readonly string[];
  /**
   * Reads the tables. The runs come back sorted by file and by offset in it, neighbours joined, none overlapping another by more than the
   * shared sector of two compressed clusters. Throws ImageError on tables that point outside, overlap or repeat.
   */
  readonly runs: () => Parser<RunList>;
}

/** All runs of an image, compactly: a disk of terabytes has millions. */
export interface RunList extends Iterable<Run> {
  readonly count: number;
  /** Bytes of guest data that the runs cover. */
  readonly dataBytes: number;
  /** The same runs, sorted by their offset in the guest's disk. */
  inGuestOrder(): Iterable<Run>;
}
