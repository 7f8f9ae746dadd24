/** What a source tells about the disk and the guest on it: header, sizes, partition table, and the package that it came in. Only reads. */
import type { DiskImage, RunList } from "../../image/image.ts";
import type { Digest } from "../../image/manifest.ts";
import type { OvfPackage, PackagedDisk } from "../../image/ova.ts";
import { isFat, PARTITION_TABLE_BYTES, type PartitionTable, readPartitions } from "../../image/partitions.ts";
import { readGuest } from "../../transfer/guest-start.ts";
import type { OpenSource } from "../../transfer/source.ts";

/** What the bytes tell about the guest. */
export interface DiskOrigin {
  /** undefined when the start of the disk is damaged. */
  readonly partitions: PartitionTable | undefined;
  /** Whether one of its first partitions holds a FAT file system; undefined when nobody looked. */
  readonly holdsFat?: boolean | undefined;
  /** The machine that the disk was packed with, and which of its disks it is; undefined outside of a package. */
  readonly packed: { readonly package: OvfPackage; readonly disk: PackagedDisk } | undefined;
}

export interface SourceFacts extends DiskOrigin {
  /** The path as declared. */
  readonly path: string;
  readonly format: DiskImage["format"];
  readonly variant: string;
  readonly virtualSizeBytes: number;
  /** An upper bound of the guest's data in it: what is sent for a sparse volume. */
  readonly dataBytes: number;
  /** The size of all its files, as they lie there. */
  readonly fileBytes: number;
  /** What vouches for its bytes; undefined stands for those that nothing vouches for. */
  readonly digests: readonly (Digest | undefined)[];
  /** What the parsers noted, one sentence each. */
  readonly notes: readonly string[];
}

/** How many partitions are looked into. */
const MAX_PARTITIONS = 16;

/** Throws DiskError when the image's tables are refused, or a file cannot be read. */
export async function gatherSource(source: OpenSource): Promise<SourceFacts> {
  const { path, image, files, packed, isVouched, notes } = source;
  const runs = await source.runs();
  const allocatedBytes = files.reduce((sum, file) => sum + file.allocatedBytes, 0);
  const [start] = (await readGuest(source, runs, [{ offset: 0, length: Math.min(PARTITION_TABLE_BYTES, image.virtualSizeBytes) }])) ?? [];
  const partitions = start && readPartitions(start);
  return {
    path,
    format: image.format,
    variant: image.variant,
    virtualSizeBytes: image.virtualSizeBytes,
    // Plain data cannot be more than what the files occupy, holes left out.
    dataBytes: image.format === "raw" ? Math.min(runs.dataBytes, allocatedBytes) : runs.dataBytes,
    fileBytes: files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
    digests: isVouched ? files.flatMap(({ expected }) => expected ?? []) : [undefined],
    notes,
    partitions,
    holdsFat: partitions && (await holdsFat(source, runs, partitions)),
    packed,
  };
}

async function holdsFat(source: OpenSource, runs: RunList, { partitions, sectorBytes }: PartitionTable): Promise<boolean | undefined> {
  const ranges = partitions.slice(0, MAX_PARTITIONS).map(({ firstSector }) => ({ offset: firstSector * sectorBytes, length: 512 }));
  return (await readGuest(source, runs, ranges))?.some(isFat);
}
