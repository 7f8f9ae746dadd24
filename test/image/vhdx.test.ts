import { execFileSync, spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { parseVhdx } from "../../provider/image/vhdx.ts";
import { convert, makeDisk, virtualSizeOf } from "./disks.ts";
import { drive, fromBytes, fromFile, readGuest } from "./drive.ts";
import { guestOf, patched, sealVhdx, VHDX_METADATA_OFFSET, VHDX_TABLE_OFFSET, vhdxSeed } from "./seeds.ts";

const KIB = 1024;
const MIB = 1024 * KIB;

const SEED = vhdxSeed();
const FIRST_HEADER = 64 * KIB;
const SECOND_HEADER = 128 * KIB;
const REGIONS = 192 * KIB;
const SECOND_REGIONS = 256 * KIB;
const ITEMS = VHDX_METADATA_OFFSET + 64 * KIB;

/** Parses and reads the tables; gives what the guest sees. */
function read(bytes: Buffer): Buffer {
  const source = fromBytes(bytes);
  const image = drive(parseVhdx(bytes.length), source);
  return readGuest(image, source);
}

test.each([
  { options: "subformat=dynamic,block_size=1M", variant: "dynamic" },
  { options: "subformat=dynamic,block_state_zero=off", variant: "dynamic" },
  { options: "subformat=fixed", variant: "fixed" },
])("reads what qemu-img writes with $options", ({ options, variant }) => {
  using disk = makeDisk(37 * MIB + 512 * 3);
  const path = convert(disk.raw, "vhdx", options);
  const source = fromFile(path);
  const image = drive(parseVhdx(source.size("") ?? 0), source);
  expect(image).toMatchObject({ format: "vhdx", variant, virtualSizeBytes: virtualSizeOf(path, "vhdx"), notes: [] });
  const original = readFileSync(disk.raw);
  const guest = readGuest(image, source);
  expect(guest.subarray(0, original.length).equals(original)).toBe(true);
  expect(guest.subarray(original.length).every((byte) => byte === 0)).toBe(true);
});

test("finds blocks behind the table's entries for sector bitmaps", () => {
  using disk = makeDisk(9 * 1024 * MIB);
  const path = convert(disk.raw, "vhdx", "subformat=dynamic,block_size=1M");
  const source = fromFile(path);
  const image = drive(parseVhdx(source.size("") ?? 0), source);
  const runs = [...drive(image.runs(), source)];
  const last = runs.reduce((latest, run) => (run.virtualOffset > latest.virtualOffset ? run : latest));
  expect(last.virtualOffset + last.lengthBytes).toBe(9 * 1024 * MIB);
  const end = source.read("", last.fileOffset + last.lengthBytes - 1536, 1536);
  const original = fromFile(disk.raw).read("", 9 * 1024 * MIB - 1536, 1536);
  expect(Buffer.compare(end, original)).toBe(0);
});

test("reads blocks in any order in the file, and every state without data as zeros", () => {
  const image = {
    virtualSizeBytes: 5 * MIB + 512,
    blocks: new Map([
      [5, 0x55],
      [0, 0x11],
    ]),
  };
  const bytes = patched(vhdxSeed(image), (copy) => {
    for (const [index, state] of [1n, 2n, 3n, 5n].entries()) copy.writeBigUInt64LE(state, VHDX_TABLE_OFFSET + 8 + index * 8);
  });
  expect(read(bytes).equals(guestOf(image, MIB))).toBe(true);
});

test("takes the header with the higher sequence number, and the valid one of a pair", () => {
  const pending = (copy: Buffer, offset: number): void => void copy.fill(9, offset + 48, offset + 64);
  expect(read(hostile((copy) => pending(copy, FIRST_HEADER)))).toHaveLength(5 * MIB + 512);
  expect(() => read(hostile((copy) => pending(copy, SECOND_HEADER)))).toThrow("was not closed cleanly");
  expect(read(patched(SEED, (copy) => copy.fill(1, FIRST_HEADER, FIRST_HEADER + 64)))).toHaveLength(5 * MIB + 512);
  expect(read(patched(SEED, (copy) => copy.fill(1, SECOND_HEADER, SECOND_HEADER + 64)))).toHaveLength(5 * MIB + 512);
  expect(read(patched(SEED, (copy) => copy.fill(1, REGIONS, REGIONS + 64)))).toHaveLength(5 * MIB + 512);
});

test("refuses a log that qemu too wants to replay, and reads the image after qemu-img check -r all did", () => {
  using disk = makeDisk(16 * MIB);
  const path = join(disk.folder, "log.vhdx");
  execFileSync("qemu-img", ["create", "-f", "vhdx", path, "64M"]);
  execFileSync("qemu-io", ["-f", "vhdx", "-c", "write -P 7 0 1M", path]);
  // qemu empties its log at once by forgetting the log's GUID, which its entry still holds.
  const bytes = readFileSync(path);
  const current = bytes.readBigUInt64LE(FIRST_HEADER + 8) > bytes.readBigUInt64LE(SECOND_HEADER + 8) ? FIRST_HEADER : SECOND_HEADER;
  bytes.copy(bytes, current + 48, MIB + 32, MIB + 48);
  writeFileSync(path, sealVhdx(bytes));
  expect(() => read(readFileSync(path))).toThrow("its log holds writes that are not in place yet");
  expect(spawnSync("qemu-img", ["info", "-f", "vhdx", path], { encoding: "utf8" }).stderr).toContain(
    "contains a log that needs to be replayed",
  );
  spawnSync("qemu-img", ["check", "-r", "all", "-f", "vhdx", path]);
  expect(
    read(readFileSync(path))
      .subarray(0, MIB)
      .every((byte) => byte === 7),
  ).toBe(true);
});

test("says that a disk has sectors of 4096 bytes", () => {
  const bytes = patched(vhdxSeed({ virtualSizeBytes: 5 * MIB, blocks: new Map() }), (copy) => copy.writeUInt32LE(4096, ITEMS + 32));
  expect(drive(parseVhdx(bytes.length), fromBytes(bytes)).notes).toEqual([
    "the disk has logical sectors of 4096 bytes: the machine must present it so, or the guest finds no partitions",
  ]);
});

const UNKNOWN = "42424242-4242-4242-4242-424242424242";

test.each<{ readonly name: string; readonly change: (copy: Buffer) => unknown; readonly sentence: string }>([
  {
    name: "a file that is no VHDX",
    change: (copy) => copy.fill(0, 0, 8),
    sentence: "the VHDX file identifier is missing: the file is no VHDX",
  },
  {
    name: "two damaged headers",
    change: (copy) => copy.fill(0, FIRST_HEADER, FIRST_HEADER + 4).fill(0, SECOND_HEADER, SECOND_HEADER + 4),
    sentence: "neither of the two VHDX headers matches its checksum: the image is damaged",
  },
  {
    name: "two headers of one age that differ",
    change: (copy) => copy.writeBigUInt64LE(8n, FIRST_HEADER + 8) && copy.writeUInt8(1, FIRST_HEADER + 16),
    sentence: "the two VHDX headers have the same sequence number but differ: the image is damaged",
  },
  {
    name: "another version",
    change: (copy) => copy.writeUInt16LE(2, SECOND_HEADER + 66),
    sentence: "the VHDX is of format version 2; only version 1 is read",
  },
  {
    name: "a log that waits to be replayed",
    change: (copy) => copy.writeUInt8(1, SECOND_HEADER + 63),
    sentence:
      "the VHDX was not closed cleanly: its log holds writes that are not in place yet; shut the machine down, or replay the log with qemu-img check -r all or by Mount-VHD and Dismount-VHD",
  },
  {
    name: "two damaged region tables",
    change: (copy) => copy.fill(0, REGIONS, REGIONS + 4).fill(0, SECOND_REGIONS, SECOND_REGIONS + 4),
    sentence: "neither of the two VHDX region tables matches its checksum: the image is damaged",
  },
  {
    name: "an endless region table",
    change: (copy) => copy.writeUInt32LE(0xffff_ffff, REGIONS + 8),
    sentence: "the VHDX region table claims 4294967295 entries; at most 2047 fit: it is damaged",
  },
  {
    name: "an unknown required region",
    change: (copy) => copy.fill(0x42, REGIONS + 16, REGIONS + 32),
    sentence: `the VHDX requires region ${UNKNOWN}, which is unknown`,
  },
  {
    name: "a region twice",
    change: (copy) => copy.copy(copy, REGIONS + 48, REGIONS + 16, REGIONS + 32),
    sentence: "the VHDX region table names region 2dc27766-f623-4200-9d64-115e9bfd4a08 twice: it is damaged or crafted",
  },
  {
    name: "a lost region",
    change: (copy) => copy.writeUInt32LE(1, REGIONS + 8),
    sentence: "the VHDX region table lacks the block table or the metadata: it is damaged",
  },
  {
    name: "a region in the headers",
    change: (copy) => copy.writeBigUInt64LE(0n, REGIONS + 16 + 16),
    sentence: "a VHDX region of 1048576 bytes should lie at offset 0, outside the file of 6291456 bytes: it is truncated or damaged",
  },
  {
    name: "a region beyond the end",
    change: (copy) => copy.writeUInt32LE(0xfff0_0000, REGIONS + 16 + 24),
    sentence:
      "a VHDX region of 4293918720 bytes should lie at offset 3145728, outside the file of 6291456 bytes: it is truncated or damaged",
  },
  {
    name: "no metadata",
    change: (copy) => copy.fill(0, VHDX_METADATA_OFFSET, VHDX_METADATA_OFFSET + 8),
    sentence: "the VHDX metadata table is missing: the image is damaged",
  },
  {
    name: "an endless metadata table",
    change: (copy) => copy.writeUInt16LE(0xffff, VHDX_METADATA_OFFSET + 10),
    sentence: "the VHDX metadata table claims 65535 entries; at most 2047 fit: it is damaged",
  },
  {
    name: "an unknown required item",
    change: (copy) => copy.fill(0x42, VHDX_METADATA_OFFSET + 64, VHDX_METADATA_OFFSET + 80),
    sentence: `the VHDX requires metadata item ${UNKNOWN}, which is unknown`,
  },
  {
    name: "an item twice",
    change: (copy) => copy.copy(copy, VHDX_METADATA_OFFSET + 64, VHDX_METADATA_OFFSET + 32, VHDX_METADATA_OFFSET + 48),
    sentence: "the VHDX metadata names item caa16737-fa36-4d43-b3b6-33f0aa44e76b twice: it is damaged or crafted",
  },
  {
    name: "an item outside the region",
    change: (copy) => copy.writeUInt32LE(MIB - 4, VHDX_METADATA_OFFSET + 32 + 16),
    sentence: "VHDX metadata item caa16737-fa36-4d43-b3b6-33f0aa44e76b lies outside the metadata region: the image is damaged",
  },
  {
    name: "an item of another length",
    change: (copy) => copy.writeUInt32LE(4, VHDX_METADATA_OFFSET + 64 + 20),
    sentence: "the VHDX metadata lacks the disk size, or has it in the wrong length: the image is damaged",
  },
  {
    name: "a differencing disk",
    change: (copy) => copy.writeUInt32LE(2, ITEMS + 4),
    sentence: "the VHDX is a differencing disk: its data lies partly in a parent; merge it into the parent first (Merge-VHD)",
  },
  ...[0, 512 * KIB, 3 * MIB, 512 * MIB].map((blockBytes) => ({
    name: `blocks of ${blockBytes} bytes`,
    change: (copy: Buffer) => copy.writeUInt32LE(blockBytes, ITEMS),
    sentence: `the VHDX's blocks have ${blockBytes} bytes; a power of two from 1 to 256 MiB is expected`,
  })),
  {
    name: "odd sectors",
    change: (copy) => copy.writeUInt32LE(520, ITEMS + 32),
    sentence: "the VHDX has logical sectors of 520 bytes; 512 or 4096 are expected",
  },
  ...[0n, 1000n, 1n << 47n].map((size) => ({
    name: `a size of ${size}`,
    change: (copy: Buffer) => copy.writeBigUInt64LE(size, ITEMS + 16),
    sentence: `the VHDX metadata gives the disk ${size} bytes; a multiple of its 512-byte sectors up to 64 TiB is expected`,
  })),
  {
    name: "a size of 2^63",
    change: (copy) => copy.writeBigUInt64LE(1n << 63n, ITEMS + 16),
    sentence: "the VHDX's size is 9223372036854775808: larger than any file or disk, so the header is damaged",
  },
  {
    name: "a table too short for the disk",
    change: (copy) => copy.writeBigUInt64LE(1n << 46n, ITEMS + 16),
    sentence: "the VHDX block table has 1048576 bytes, but the disk's 67108864 blocks need 537001976: it is damaged",
  },
  {
    name: "a block that lies partly in a parent",
    change: (copy) => copy.writeBigUInt64LE(7n, VHDX_TABLE_OFFSET + 8),
    sentence: "block 1 of the VHDX lies partly in a parent: differencing disks are not read",
  },
  {
    name: "a block of unknown state",
    change: (copy) => copy.writeBigUInt64LE(4n, VHDX_TABLE_OFFSET + 8),
    sentence: "block 1 of the VHDX has the unknown state 4: the image is damaged",
  },
  {
    name: "a block at the end of all numbers",
    change: (copy) => copy.writeBigUInt64LE(0xffff_ffff_fff0_0006n, VHDX_TABLE_OFFSET + 8),
    sentence: "the file offset of block 1 is 18446744073708503040: larger than any file or disk, so the header is damaged",
  },
  {
    name: "a block beyond the end",
    change: (copy) => copy.writeBigUInt64LE(0x60_0006n, VHDX_TABLE_OFFSET + 8),
    sentence:
      "block 1 should lie at file offset 6291456, outside the data of the file (1048576 to 6291456): the image is truncated or damaged",
  },
  {
    name: "a block in the headers",
    change: (copy) => copy.writeBigUInt64LE(6n, VHDX_TABLE_OFFSET + 8),
    sentence: "block 1 should lie at file offset 0, outside the data of the file (1048576 to 6291456): the image is truncated or damaged",
  },
  {
    name: "two blocks in one place",
    change: (copy) => copy.writeBigUInt64LE(0x40_0006n, VHDX_TABLE_OFFSET + 8),
    sentence: "the bytes at file offset 4194304 are used for guest offsets 1048576 and 3145728: the image's tables are damaged or crafted",
  },
])("refuses $name", ({ change, sentence }) => {
  expect(() => read(hostile(change))).toThrow(new ImageError(sentence));
});

test("refuses a disk that is cut at the boundary of any structure", () => {
  for (const length of [
    0,
    8,
    FIRST_HEADER,
    SECOND_HEADER,
    REGIONS,
    SECOND_REGIONS,
    MIB,
    VHDX_METADATA_OFFSET,
    ITEMS,
    VHDX_TABLE_OFFSET,
    4 * MIB,
    5 * MIB,
  ])
    for (const cut of [length, length + 1]) expect(() => read(SEED.subarray(0, cut))).toThrow(ImageError);
  expect(() => read(SEED.subarray(0, SEED.length - 1))).toThrow(ImageError);
});

/** The seed with a change, and checksums that fit again. */
function hostile(change: (copy: Buffer) => unknown): Buffer {
  return sealVhdx(patched(SEED, change));
}
