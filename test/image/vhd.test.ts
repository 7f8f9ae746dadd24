import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { parseVhd } from "../../provider/image/vhd.ts";
import { convert, makeDisk, virtualSizeOf } from "./disks.ts";
import { drive, fromBytes, fromFile, readGuest } from "./drive.ts";
import { dynamicVhdSeed, fixedVhdSeed, guestOf, patched, sealVhd, VHD_BLOCK_BYTES } from "./seeds.ts";

const MIB = 1024 * 1024;

/** Parses and reads the tables; gives what the guest sees. */
function read(bytes: Buffer): Buffer {
  const source = fromBytes(bytes);
  const image = drive(parseVhd(bytes.length), source);
  return readGuest(image, source);
}

test.each([
  { options: "subformat=fixed", variant: "fixed", keepsSize: false },
  { options: "subformat=fixed,force_size=on", variant: "fixed", keepsSize: true },
  { options: "subformat=dynamic", variant: "dynamic", keepsSize: false },
  { options: "subformat=dynamic,force_size=on", variant: "dynamic", keepsSize: true },
])("reads what qemu-img writes with $options", ({ options, variant, keepsSize }) => {
  using disk = makeDisk(37 * MIB + 512 * 3);
  const path = convert(disk.raw, "vpc", options);
  const source = fromFile(path);
  const image = drive(parseVhd(source.size("") ?? 0), source);
  expect(image).toMatchObject({ format: "vhd", variant, virtualSizeBytes: virtualSizeOf(path, "vpc") });
  const original = readFileSync(disk.raw);
  const guest = readGuest(image, source);
  expect(guest.length === original.length).toBe(keepsSize);
  expect(guest.subarray(0, original.length).equals(original)).toBe(true);
  expect(guest.subarray(original.length).every((byte) => byte === 0)).toBe(true);
});

test("reads a fixed disk as one run before the footer", () => {
  const bytes = fixedVhdSeed(8192, 0x5a);
  expect(read(bytes).equals(Buffer.alloc(8192, 0x5a))).toBe(true);
});

test("reads blocks in any order in the file, and what is not allocated as zeros", () => {
  const image = {
    virtualSizeBytes: 5 * VHD_BLOCK_BYTES + 512,
    blocks: new Map([
      [5, 0x55],
      [1, 0x11],
      [2, 0x22],
    ]),
  };
  expect(read(dynamicVhdSeed(image)).equals(guestOf(image, VHD_BLOCK_BYTES))).toBe(true);
});

const HOSTILE: readonly { readonly name: string; readonly bytes: Buffer; readonly sentence: string }[] = [
  { name: "an empty file", bytes: Buffer.alloc(0), sentence: "a VHD ends in a footer of 512 bytes, but the file has only 0" },
  { name: "no footer", bytes: Buffer.alloc(4096), sentence: "the VHD footer at the end is missing: the file is truncated, or is no VHD" },
  {
    name: "a damaged footer",
    bytes: patched(fixedVhdSeed(), (copy) => copy.writeUInt8(1, 8192 + 100)),
    sentence: "the VHD footer at the end does not match its checksum: it is damaged",
  },
  {
    name: "another version",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeUInt32BE(0x0002_0000, 8192 + 12)),
    sentence: "the VHD footer at the end is of format version 0x00020000; only 1.x is known",
  },
  {
    name: "a fixed disk larger than its file",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeBigUInt64BE(8704n, 8192 + 48)),
    sentence: "the VHD footer gives the fixed disk 8704 bytes, but only 8192 lie before it: the file is truncated or damaged",
  },
  {
    name: "a size of 0",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeBigUInt64BE(0n, 8192 + 48)),
    sentence: "the VHD footer says that the disk has 0 bytes",
  },
  {
    name: "a size of 2^63",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeBigUInt64BE(1n << 63n, 8192 + 48)),
    sentence: "the VHD's size is 9223372036854775808: larger than any file or disk, so the header is damaged",
  },
  {
    name: "a size beyond the format",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeBigUInt64BE(1n << 45n, 8192 + 48)),
    sentence: "the VHD footer gives the disk 35184372088832 bytes, but a VHD holds at most 2190433320960",
  },
  {
    name: "half a sector",
    bytes: hostile(fixedVhdSeed(), (copy) => copy.writeBigUInt64BE(8000n, 8192 + 48)),
    sentence: "the VHD footer gives the disk 8000 bytes, which is no multiple of 512",
  },
  {
    name: "a differencing disk",
    bytes: footers((footer) => footer.writeUInt32BE(4, 60)),
    sentence: "the VHD is a differencing disk: its data lies partly in a parent; merge it into the parent first (Merge-VHD)",
  },
  {
    name: "an unknown type",
    bytes: footers((footer) => footer.writeUInt32BE(6, 60)),
    sentence: "the VHD footer gives disk type 6; only fixed (2) and dynamic (3) disks are read",
  },
  {
    name: "a dynamic disk without its copy of the footer",
    bytes: patched(dynamicVhdSeed(), (copy) => copy.fill(0, 0, 512)),
    sentence: "the copy of the VHD footer at the start is missing: the file is truncated, or is no VHD",
  },
  {
    name: "two footers that differ",
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.writeBigUInt64BE(BigInt(VHD_BLOCK_BYTES), 48)),
    sentence: "the VHD footer and its copy at the start contradict each other: the file is damaged, or two files were mixed",
  },
  {
    name: "a dynamic header outside the file",
    bytes: footers((footer) => footer.writeBigUInt64BE(1n << 40n, 16)),
    sentence: "the VHD's dynamic header should lie at offset 1099511627776, outside the file of 134656 bytes",
  },
  {
    name: "a dynamic header at no offset",
    bytes: footers((footer) => footer.fill(0xff, 16, 24)),
    sentence: "the VHD's dynamic header should lie at offset 18446744073709551615, outside the file of 134656 bytes",
  },
  {
    name: "no dynamic header",
    bytes: footers((footer) => footer.writeBigUInt64BE(1024n, 16)),
    sentence: "the VHD's dynamic header is missing at offset 1024",
  },
  {
    name: "a damaged dynamic header",
    bytes: patched(dynamicVhdSeed(), (copy) => copy.writeUInt8(1, 512 + 900)),
    sentence: "the VHD's dynamic header does not match its checksum: it is damaged",
  },
  {
    name: "an unknown dynamic header",
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(0x0003_0000, 512 + 24)),
    sentence: "the VHD's dynamic header is of version 0x00030000; only 1.x is known",
  },
  {
    name: "a parent in the dynamic header",
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.fill(7, 512 + 40, 512 + 56)),
    sentence: "the VHD names a parent: its data lies partly in another file; merge it first (Merge-VHD)",
  },
  ...[0, 100_000, 256, 0x8000_0000].map((blockBytes) => ({
    name: `blocks of ${blockBytes} bytes`,
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(blockBytes, 512 + 32)),
    sentence: `the VHD's blocks have ${blockBytes} bytes; a power of two from 512 to 268435456 is expected`,
  })),
  {
    name: "a table too short for the disk",
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(5, 512 + 28)),
    sentence: "the VHD's 6 blocks of 65536 bytes are more than its table's 5 entries or than the 16777216 that are read",
  },
  {
    name: "a disk of 2040 GiB in blocks of one sector",
    bytes: hostile(
      footers((footer) => footer.writeBigUInt64BE(2_190_433_320_960n, 48)),
      (copy) => {
        copy.writeUInt32BE(512, 512 + 32);
        copy.writeUInt32BE(0xffff_ffff, 512 + 28);
      },
    ),
    sentence: "the VHD's 4278190080 blocks of 512 bytes are more than its table's 4294967295 entries or than the 16777216 that are read",
  },
  {
    name: "a table outside the file",
    bytes: hostile(dynamicVhdSeed(), (copy) => copy.writeBigUInt64BE(134_144n, 512 + 16)),
    sentence: "the VHD's block table should end at 134168, but the file has only 134656 bytes: it is truncated or damaged",
  },
  {
    name: "a block in the header",
    bytes: patched(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(0, 1536)),
    sentence: "block 0 should lie at file offset 512, outside the data of the file (1536 to 134144): the image is truncated or damaged",
  },
  {
    name: "a block beyond the end",
    bytes: patched(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(0xffff_fffe, 1536)),
    sentence:
      "block 0 should lie at file offset 2199023255040, outside the data of the file (1536 to 134144): the image is truncated or damaged",
  },
  {
    name: "two blocks in one place",
    bytes: patched(dynamicVhdSeed(), (copy) => copy.writeUInt32BE(copy.readUInt32BE(1536), 1536 + 12)),
    sentence: "the bytes at file offset 68608 are used for guest offsets 0 and 196608: the image's tables are damaged or crafted",
  },
  {
    name: "more blocks than the file holds",
    bytes: patched(dynamicVhdSeed(), (copy) => {
      for (let block = 0; block < 5; block++) copy.writeUInt32BE(4, 1536 + block * 4);
    }),
    sentence: "the image's block table names more blocks than the file can hold: it is damaged or crafted",
  },
];

test.each(HOSTILE)("refuses $name", ({ bytes, sentence }) => {
  expect(() => read(bytes)).toThrow(new ImageError(sentence));
});

test.each([
  ["fixed", fixedVhdSeed()],
  ["dynamic", dynamicVhdSeed()],
] as const)("refuses a %s disk that is cut at any sector", (_, bytes) => {
  for (let length = 0; length < bytes.length; length += 512) expect(() => read(bytes.subarray(0, length))).toThrow(ImageError);
});

/** The bytes with a change, and checksums that fit again. */
function hostile(bytes: Buffer, change: (copy: Buffer) => void): Buffer {
  return sealVhd(patched(bytes, change));
}

/** A dynamic disk with the same change in its footer and the footer's copy. */
function footers(change: (footer: Buffer) => void): Buffer {
  return hostile(dynamicVhdSeed(), (copy) => {
    change(copy.subarray(0, 512));
    change(copy.subarray(copy.length - 512));
  });
}
