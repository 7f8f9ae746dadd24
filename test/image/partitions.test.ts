import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { isFat, PARTITION_TABLE_BYTES, readPartitions } from "../../provider/image/partitions.ts";
import { fromFile } from "./drive.ts";
import { patched } from "./seeds.ts";

const MIB = 1024 * 1024;

/** The start of a disk of 64 MiB that a command has written to; `command` gets the path last. */
function startAfter(command: readonly [string, ...string[]], input = ""): Buffer {
  const folder = mkdtempSync(join(tmpdir(), "virtlift-partitions-"));
  try {
    const path = join(folder, "disk.raw");
    writeFileSync(path, "");
    truncateSync(path, 64 * MIB);
    execFileSync(command[0], [...command.slice(1), path], { input, stdio: ["pipe", "ignore", "ignore"] });
    return Buffer.from(fromFile(path).read("", 0, PARTITION_TABLE_BYTES));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const GPT = startAfter(["sfdisk"], "label: gpt\nsize=1MiB, type=21686148-6449-6E6F-744E-656564454649\nsize=16MiB, type=U\ntype=L\n");

test("reads sfdisk's MBR with an active partition", () => {
  const start = startAfter(["sfdisk"], "label: dos\nstart=2048, size=32768, type=c, bootable\ntype=83\n");
  expect(readPartitions(start)).toEqual({
    table: "mbr",
    sectorBytes: 512,
    partitions: [
      { type: "0c", firstSector: 2048, sectorCount: 32_768 },
      { type: "83", firstSector: 34_816, sectorCount: 96_256 },
    ],
    hasEfiSystemPartition: false,
    hasBiosBootPartition: false,
    hasBootCode: false,
  });
});

test("finds the EFI system partition of an MBR, and boot code", () => {
  const start = startAfter(["sfdisk"], "label: dos\ntype=ef\n");
  expect(readPartitions(patched(start, (copy) => copy.fill(0xfa, 0, 4)))).toMatchObject({
    table: "mbr",
    hasEfiSystemPartition: true,
    hasBootCode: true,
  });
});

test("reads sfdisk's GPT with both boot partitions", () => {
  expect(readPartitions(GPT)).toMatchObject({
    table: "gpt",
    sectorBytes: 512,
    partitions: [{ firstSector: 2048, sectorCount: 2048 }, { firstSector: 4096, sectorCount: 32_768 }, { firstSector: 36_864 }],
    hasEfiSystemPartition: true,
    hasBiosBootPartition: true,
    hasBootCode: false,
  });
});

test("reads a GPT for sectors of 4096 bytes", () => {
  const start = Buffer.alloc(PARTITION_TABLE_BYTES);
  GPT.copy(start, 0, 0, 512);
  GPT.copy(start, 4096, 512, 1024);
  GPT.copy(start, 8192, 1024, 1024 + 128 * 128);
  expect(readPartitions(start)).toMatchObject({ table: "gpt", sectorBytes: 4096, hasEfiSystemPartition: true });
});

test("takes a file system on the bare disk for no table", () => {
  expect(readPartitions(startAfter(["mkfs.vfat"]))).toMatchObject({ table: "none", partitions: [], hasBootCode: true });
});

test.each([
  ["a damaged header", (copy: Buffer) => copy.writeUInt8(1, 512 + 40)],
  ["a damaged entry", (copy: Buffer) => copy.writeUInt8(1, 1024 + 60)],
] as const)("takes a GPT with %s for no table", (_, damage) => {
  expect(readPartitions(patched(GPT, (copy) => void damage(copy)))).toMatchObject({
    table: "none",
    partitions: [],
    hasEfiSystemPartition: false,
  });
});

test("takes a disk of zeros, a short disk and no disk for no table", () => {
  for (const start of [Buffer.alloc(PARTITION_TABLE_BYTES), Buffer.alloc(512), Buffer.alloc(0)])
    expect(readPartitions(start)).toMatchObject({ table: "none", hasBootCode: false });
});

test("never throws on any cut of a table", () => {
  for (let length = 0; length < 20_000; length += 37)
    expect(["none", "mbr", "gpt"]).toContain(readPartitions(GPT.subarray(0, length)).table);
});

test("knows a FAT file system by its first sector, and no other", () => {
  const inside = (command: readonly [string, ...string[]]) => startAfter(command).subarray(0, 512);
  for (const bits of ["12", "16", "32"]) expect(isFat(inside(["mkfs.vfat", "-F", bits]))).toBe(true);
  expect(isFat(inside(["mkfs.ext4", "-q", "-F"]))).toBe(false);
  expect(isFat(GPT.subarray(0, 512))).toBe(false);
  expect(isFat(Buffer.alloc(20))).toBe(false);
});
