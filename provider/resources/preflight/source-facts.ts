/** What a source tells about the disk and the guest on it: header, sizes, partition table, and the package that it came in. Only reads. */
import type { DiskImage, RunList } from "../../image/image.ts";
import type { Digest } from "../../image/manifest.ts";
import type { PackagedDisk } from "../../image/ova.ts";
import type { OvfNic, OvfSystem } from "../../image/ovf.ts";
import { isFat, PARTITION_TABLE_BYTES, type PartitionTable, readPartitions } from "../../image/partitions.ts";
import { readGuest } from "../../transfer/guest-start.ts";
import type { OpenSource } from "../../transfer/source.ts";
import type { MachinePackage } from "../machine-description.ts";

/** What a disk tells about the guest on it, as far as the rules about its machine ask. Plain JSON: it is kept with the disk, whose source is read once. */
export interface GuestTraits {
  /** undefined when the start of the disk is damaged, or was not read. */
  readonly partitions?: PartitionTable | undefined;
  /** Whether one of its first partitions holds a FAT file system; undefined when nobody looked. */
  readonly holdsFat?: boolean | undefined;
  /** Of the machine that the disk was packed with, and of the disk in it; undefined outside of a package. */
  readonly packed?:
    | {
        readonly package: { readonly system: Pick<OvfSystem, "firmware" | "guest"> & { readonly nics: readonly Pick<OvfNic, "model">[] } };
        readonly disk: Pick<PackagedDisk, "controller">;
      }
    | undefined;
}

export interface SourceFacts extends GuestTraits {
  readonly partitions: PartitionTable | undefined;
  /** The machine that the disk was packed with, and which of its disks it is; undefined outside of a package. */
  readonly packed: { readonly package: MachinePackage; readonly disk: PackagedDisk } | undefined;
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

/** What is kept of the facts; undefined when they tell nothing of the guest. */
export function traitsOf({ partitions, holdsFat: isFatThere, packed }: SourceFacts): GuestTraits | undefined {
  if (partitions === undefined && packed === undefined) return undefined;
  return {
    partitions: partitions && { ...partitions, partitions: partitions.partitions.slice(0, MAX_PARTITIONS) },
    holdsFat: isFatThere,
    packed: packed && keptOf(packed),
  };
}

function keptOf({ package: { system }, disk: { controller } }: NonNullable<SourceFacts["packed"]>): GuestTraits["packed"] {
  const { firmware, guest, nics } = system;
  return { package: { system: { firmware, guest, nics: nics.map(({ model }) => ({ model })) } }, disk: { controller } };
}

async function holdsFat(source: OpenSource, runs: RunList, { partitions, sectorBytes }: PartitionTable): Promise<boolean | undefined> {
  const ranges = partitions.slice(0, MAX_PARTITIONS).map(({ firstSector }) => ({ offset: firstSector * sectorBytes, length: 512 }));
  return (await readGuest(source, runs, ranges))?.some(isFat);
}
