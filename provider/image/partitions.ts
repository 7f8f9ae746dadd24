/** The partition table at the start of a guest's disk, as far as it tells what firmware can start it. Knows no image format. */
import { crc32 } from "node:zlib";
import { latin1, viewOf } from "./bytes.ts";
import { guidAt, NIL_GUID } from "./guid.ts";

/** How much of the disk's start `readPartitions` wants: MBR, GPT header and 128 entries, with sectors of 512 or of 4096 bytes. */
export const PARTITION_TABLE_BYTES = 32 * 1024;

export interface Partition {
  /** MBR: two hex digits (`83`, `ef`). GPT: the type's GUID in lower case. */
  readonly type: string;
  /** In sectors of `PartitionTable.sectorBytes`. */
  readonly firstSector: number;
  readonly sectorCount: number;
}

export interface PartitionTable {
  readonly table: "mbr" | "gpt" | "none";
  /** 4096 only for a GPT that was written for such sectors: a machine that presents 512 does not find it. */
  readonly sectorBytes: 512 | 4096;
  /** In the table's order. Of an MBR the four primary entries; logical partitions are not followed. */
  readonly partitions: readonly Partition[];
  /** UEFI firmware finds a partition to start from. */
  readonly hasEfiSystemPartition: boolean;
  /** A GPT has the partition where GRUB keeps its BIOS stage. */
  readonly hasBiosBootPartition: boolean;
  /** The first sector holds code and is signed: BIOS firmware would run it. Without a table, a file system's boot sector counts too. */
  readonly hasBootCode: boolean;
}

/** UEFI specification 2.10, table 5.7 and section 5.2.2. */
const GPT_EFI_SYSTEM = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
const MBR_EFI_SYSTEM = "ef";
const MBR_GPT_PROTECTIVE = "ee";
/** GNU GRUB manual, "BIOS installation". */
const GPT_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649";

const MBR_CODE_BYTES = 440;
const MBR_ENTRIES_OFFSET = 446;
const GPT_HEADER_BYTES = 92;
const GPT_ENTRY_BYTES = 128;
const GPT_ENTRIES = 128;

/**
 * Reads the table from the first PARTITION_TABLE_BYTES of the disk, or all of a smaller one. Never throws: what is damaged is no table. A GPT
 * must match both its checksums, so one whose entries lie elsewhere or whose primary copy is damaged counts as none.
 */
export function readPartitions(start: Uint8Array): PartitionTable {
  const mbr = start.length >= 512 && viewOf(start).getUint16(510, true) === 0xaa55;
  const hasBootCode = mbr && start.subarray(0, MBR_CODE_BYTES).some((byte) => byte !== 0);
  for (const sectorBytes of [512, 4096] as const) {
    const partitions = gptPartitions(start, sectorBytes);
    if (partitions !== undefined) return describe("gpt", sectorBytes, partitions, hasBootCode);
  }
  const partitions = mbr ? mbrPartitions(start) : [];
  const isTable = partitions.some(({ type }) => type !== MBR_GPT_PROTECTIVE);
  return describe(isTable ? "mbr" : "none", 512, isTable ? partitions : [], hasBootCode);
}

function describe(
  table: "mbr" | "gpt" | "none",
  sectorBytes: 512 | 4096,
  partitions: readonly Partition[],
  hasBootCode: boolean,
): PartitionTable {
  const has = (type: string): boolean => partitions.some((partition) => partition.type === type);
  return {
    table,
    sectorBytes,
    partitions,
    hasEfiSystemPartition: has(table === "gpt" ? GPT_EFI_SYSTEM : MBR_EFI_SYSTEM),
    hasBiosBootPartition: has(GPT_BIOS_BOOT),
    hasBootCode,
  };
}

/**
 * Whether a partition's first sector is that of a FAT file system, which UEFI firmware starts from whatever type the table gives to the partition.
 * Source: Microsoft's FAT specification 1.03: the signature, and BS_FilSysType at 54 (FAT12, FAT16) or 82 (FAT32).
 */
export function isFat(sector: Uint8Array): boolean {
  if (sector.length < 512 || viewOf(sector).getUint16(510, true) !== 0xaa55) return false;
  return [54, 82].some((offset) => latin1(sector, offset, offset + 3) === "FAT");
}

/** undefined when there is no GPT that matches its checksums. */
function gptPartitions(start: Uint8Array, sectorBytes: number): readonly Partition[] | undefined {
  const header = start.subarray(sectorBytes, sectorBytes + GPT_HEADER_BYTES);
  if (header.length < GPT_HEADER_BYTES || latin1(header, 0, 8) !== "EFI PART") return undefined;
  const view = viewOf(header);
  const zeroed = Uint8Array.from(header).fill(0, 16, 20);
  const entryCount = view.getUint32(80, true);
  if (view.getUint32(12, true) !== GPT_HEADER_BYTES || view.getUint32(16, true) !== crc32(zeroed)) return undefined;
  if (view.getUint32(84, true) !== GPT_ENTRY_BYTES || entryCount > GPT_ENTRIES || view.getBigUint64(72, true) !== 2n) return undefined;
  const entries = start.subarray(2 * sectorBytes, 2 * sectorBytes + entryCount * GPT_ENTRY_BYTES);
  if (entries.length < entryCount * GPT_ENTRY_BYTES || view.getUint32(88, true) !== crc32(entries)) return undefined;
  const partitions: Partition[] = [];
  const entryView = viewOf(entries);
  for (let entry = 0; entry < entries.length; entry += GPT_ENTRY_BYTES) {
    const type = guidAt(entries, entry);
    if (type === NIL_GUID) continue;
    const [first, last] = [entryView.getBigUint64(entry + 32, true), entryView.getBigUint64(entry + 40, true)];
    partitions.push({ type, firstSector: Number(first), sectorCount: Number(last - first) + 1 });
  }
  return partitions;
}

/** The used primary entries; none when an entry's status is neither active (80) nor inactive (00), as in a file system's boot sector. */
function mbrPartitions(start: Uint8Array): readonly Partition[] {
  const view = viewOf(start);
  const partitions: Partition[] = [];
  for (let entry = MBR_ENTRIES_OFFSET; entry < 510; entry += 16) {
    const status = view.getUint8(entry);
    if (status !== 0x00 && status !== 0x80) return [];
    const type = view
      .getUint8(entry + 4)
      .toString(16)
      .padStart(2, "0");
    const sectorCount = view.getUint32(entry + 12, true);
    if (type !== "00" && sectorCount > 0) partitions.push({ type, firstSector: view.getUint32(entry + 8, true), sectorCount });
  }
  return partitions;
}
