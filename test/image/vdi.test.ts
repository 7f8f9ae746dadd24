import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { parseVdi } from "../../provider/image/vdi.ts";
import { convert, makeDisk, virtualSizeOf } from "./disks.ts";
import { drive, fromBytes, fromFile, readGuest } from "./drive.ts";
import { guestOf, patched, VDI_BLOCK_BYTES, vdiSeed } from "./seeds.ts";

const MIB = 1024 * 1024;

/** Parses and reads the tables; gives what the guest sees. */
function read(bytes: Buffer): Buffer {
  const source = fromBytes(bytes);
  const image = drive(parseVdi(bytes.length), source);
  return readGuest(image, source);
}

test.each([
  { options: "static=off", variant: "dynamic" },
  { options: "static=on", variant: "static" },
])("reads what qemu-img writes with $options", ({ options, variant }) => {
  using disk = makeDisk(37 * MIB + 512 * 3);
  const path = convert(disk.raw, "vdi", options);
  const source = fromFile(path);
  const image = drive(parseVdi(source.size("") ?? 0), source);
  expect(image).toMatchObject({ format: "vdi", variant, virtualSizeBytes: virtualSizeOf(path, "vdi") });
  expect(readGuest(image, source).equals(readFileSync(disk.raw))).toBe(true);
});

test("reads blocks in any order in the file, and unallocated and discarded ones as zeros", () => {
  const image = {
    virtualSizeBytes: 5 * VDI_BLOCK_BYTES + 512,
    blocks: new Map([
      [5, 0x55],
      [1, 0x11],
      [2, 0x22],
    ]),
  };
  const bytes = patched(vdiSeed(image), (copy) => copy.writeUInt32LE(0xffff_fffe, 512 + 12));
  expect(read(bytes).equals(guestOf(image, VDI_BLOCK_BYTES))).toBe(true);
});

const DIFFERENCING = "the VDI is a differencing disk: its data lies partly in a parent; merge the snapshots first (VBoxManage clonemedium)";
const PARENT = "the VDI names a parent: its data lies partly in another file; merge the snapshots first (VBoxManage clonemedium)";

test.each([
  {
    name: "a file that is no VDI",
    change: (copy: Buffer) => copy.fill(0, 64, 68),
    sentence: "the VDI signature is missing: the file is no VDI",
  },
  {
    name: "another version",
    change: (copy: Buffer) => copy.writeUInt32LE(0x0001_0002, 68),
    sentence: "the VDI is of format version 1.2; only 1.1 is read",
  },
  { name: "an undo disk", change: (copy: Buffer) => copy.writeUInt32LE(3, 76), sentence: DIFFERENCING },
  { name: "a differencing disk", change: (copy: Buffer) => copy.writeUInt32LE(4, 76), sentence: DIFFERENCING },
  {
    name: "an unknown type",
    change: (copy: Buffer) => copy.writeUInt32LE(9, 76),
    sentence: "the VDI is of type 9; only dynamic (1) and static (2) disks are read",
  },
  { name: "a linked disk", change: (copy: Buffer) => copy.writeUInt8(1, 424), sentence: PARENT },
  { name: "a disk with a parent", change: (copy: Buffer) => copy.writeUInt8(1, 455), sentence: PARENT },
  {
    name: "other sectors",
    change: (copy: Buffer) => copy.writeUInt32LE(4096, 360),
    sentence: "the VDI has sectors of 4096 bytes; only 512 are read",
  },
  {
    name: "a size of 0",
    change: (copy: Buffer) => copy.writeBigUInt64LE(0n, 368),
    sentence: "the VDI header says that the disk has 0 bytes",
  },
  {
    name: "a size of 2^63",
    change: (copy: Buffer) => copy.writeBigUInt64LE(1n << 63n, 368),
    sentence: "the VDI's size is 9223372036854775808: larger than any file or disk, so the header is damaged",
  },
  {
    name: "half a sector",
    change: (copy: Buffer) => copy.writeBigUInt64LE(20_000n, 368),
    sentence: "the VDI header gives the disk 20000 bytes, which is no multiple of 512",
  },
  ...[0, 512, 5000, 0x8000_0000].map((blockBytes) => ({
    name: `blocks of ${blockBytes} bytes`,
    change: (copy: Buffer) => copy.writeUInt32LE(blockBytes, 376),
    sentence: `the VDI's blocks have ${blockBytes} bytes; a power of two from 4096 to 268435456 is expected`,
  })),
  {
    name: "blocks with more than data",
    change: (copy: Buffer) => copy.writeUInt32LE(512, 380),
    sentence: "the VDI keeps 512 extra bytes with each block, which is not supported",
  },
  {
    name: "more blocks than the disk has",
    change: (copy: Buffer) => copy.writeUInt32LE(7, 384),
    sentence: "the VDI header names 7 blocks of 4096 bytes for a disk of 20992 bytes: it is damaged",
  },
  {
    name: "an endless map",
    change: (copy: Buffer) => {
      copy.writeBigUInt64LE(0xffff_ffffn * 4096n, 368);
      copy.writeUInt32LE(0xffff_ffff, 384);
    },
    sentence: "the VDI has 4294967295 blocks; at most 67108864 are read",
  },
  {
    name: "a map that reaches into the data",
    change: (copy: Buffer) => copy.writeUInt32LE(1004, 340),
    sentence: "the VDI's block map (1004 to 1028) and data (from 1024) do not fit the file of 9216 bytes: it is truncated or damaged",
  },
  {
    name: "a map in the header",
    change: (copy: Buffer) => copy.writeUInt32LE(0, 340),
    sentence: "the VDI's block map (0 to 24) and data (from 1024) do not fit the file of 9216 bytes: it is truncated or damaged",
  },
  {
    name: "a block beyond the end",
    change: (copy: Buffer) => copy.writeUInt32LE(0xffff_fffd, 512),
    sentence:
      "block 0 should lie at file offset 17592186033152, outside the data of the file (1024 to 9216): the image is truncated or damaged",
  },
  {
    name: "two blocks in one place",
    change: (copy: Buffer) => copy.writeUInt32LE(0, 512),
    sentence: "the bytes at file offset 1024 are used for guest offsets 0 and 12288: the image's tables are damaged or crafted",
  },
  {
    name: "more blocks than the file holds",
    change: (copy: Buffer) => copy.fill(0, 512, 512 + 24),
    sentence: "the image's block table names more blocks than the file can hold: it is damaged or crafted",
  },
])("refuses $name", ({ change, sentence }) => {
  expect(() => read(patched(vdiSeed(), change))).toThrow(new ImageError(sentence));
});

test("refuses a disk that is cut at any sector", () => {
  const bytes = vdiSeed();
  for (let length = 0; length < bytes.length; length += 512) expect(() => read(bytes.subarray(0, length))).toThrow(ImageError);
});
