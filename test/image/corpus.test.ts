import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { openImage } from "../../provider/image/open.ts";
import { drive, fromBytes, readGuest } from "./drive.ts";
import { patched } from "./seeds.ts";
import {
  cowdSeed,
  descriptorText,
  QCOW2_CLUSTER,
  QCOW2_DATA,
  QCOW2_L1,
  QCOW2_L2,
  qcow2Seed,
  sparseVmdkSeed,
  streamVmdkSeed,
  VMDK_DATA,
  VMDK_DIRECTORY,
  VMDK_TABLE,
} from "./sparse-seeds.ts";

/** What a hostile image may cost before it is refused. */
const BUDGET = { asks: 64, bytes: 4 * 1024 * 1024 };
const MAX_MS = 1000;

interface Hostile {
  readonly name: string;
  readonly image: Uint8Array;
  readonly beside?: Readonly<Record<string, Uint8Array>>;
  readonly says: string;
}

const text = (createType: string, extents: readonly string[], more: readonly string[] = []): Buffer =>
  Buffer.from(descriptorText(createType, extents, more));
const qcow2 = (change: (bytes: Buffer) => void): Buffer => patched(qcow2Seed(), change);
const packed = (change: (bytes: Buffer) => void): Buffer => patched(qcow2Seed(true), change);
const sparse = (change: (bytes: Buffer) => void): Buffer => patched(sparseVmdkSeed(), change);
const stream = (change: (bytes: Buffer) => void): Buffer => patched(streamVmdkSeed(), change);
const features = (bits: bigint): Buffer => qcow2((bytes) => bytes.writeBigUInt64BE(bits, 72));
const l2Entry = (index: number, entry: bigint): Buffer => qcow2((bytes) => bytes.writeBigUInt64BE(entry, QCOW2_L2 + index * 8));
const FLAT = Buffer.alloc(512 * 8);

const QCOW2: readonly Hostile[] = [
  { name: "a backing file", image: qcow2((bytes) => bytes.writeBigUInt64BE(400n, 8)), says: "has a backing file" },
  {
    name: "a backing file whose name lies beyond the end",
    image: qcow2((bytes) => bytes.writeBigUInt64BE(1n << 63n, 8)),
    says: "has a backing file",
  },
  { name: "an external data file", image: features(4n), says: "external data file" },
  { name: "encryption", image: qcow2((bytes) => bytes.writeUInt32BE(2, 32)), says: "is encrypted" },
  { name: "the corrupt mark", image: features(2n), says: "marked corrupt" },
  {
    name: "an unknown incompatible feature",
    image: features(1n << 40n),
    says: "features that are not known here (incompatible bits 0x10000000000)",
  },
  {
    name: "an unknown compression type",
    image: qcow2((bytes) => (bytes.writeUInt32BE(112, 100), bytes.writeUInt8(7, 104))),
    says: "compression type 7",
  },
  {
    name: "a compression type without its feature bit",
    image: qcow2((bytes) => (bytes.writeUInt32BE(112, 100), bytes.writeUInt8(1, 104))),
    says: "contradict",
  },
  { name: "extended L2 entries in small clusters", image: features(16n), says: "extended L2 entries with clusters of 2^9" },
  { name: "version 1", image: qcow2((bytes) => bytes.writeUInt32BE(1, 4)), says: "qcow version 1" },
  { name: "version 4", image: qcow2((bytes) => bytes.writeUInt32BE(4, 4)), says: "qcow version 4" },
  { name: "clusters of 256 bytes", image: qcow2((bytes) => bytes.writeUInt32BE(8, 20)), says: "clusters of 2^8" },
  { name: "clusters of 2 GiB", image: qcow2((bytes) => bytes.writeUInt32BE(31, 20)), says: "clusters of 2^31" },
  { name: "a disk of 0 bytes", image: qcow2((bytes) => bytes.writeBigUInt64BE(0n, 24)), says: "has 0 bytes" },
  { name: "a disk of 2^63 bytes", image: qcow2((bytes) => bytes.writeBigUInt64BE(1n << 63n, 24)), says: "larger than any file or disk" },
  { name: "a disk of half a sector", image: qcow2((bytes) => bytes.writeBigUInt64BE(256n, 24)), says: "no multiple of 512" },
  {
    name: "a disk larger than its L1 table",
    image: qcow2((bytes) => bytes.writeBigUInt64BE(1n << 40n, 24)),
    says: "an L1 table of 1 entries",
  },
  {
    name: "an L1 table of 32 GiB",
    image: qcow2((bytes) => (bytes.writeBigUInt64BE(1n << 47n, 24), bytes.writeUInt32BE(0xffff_ffff, 36))),
    says: "an L1 table of 4294967295 entries",
  },
  {
    name: "an L1 table beyond the end",
    image: qcow2((bytes) => bytes.writeBigUInt64BE(1n << 40n, 40)),
    says: "the L1 table should lie at file offset 1099511627776",
  },
  { name: "an L1 table between clusters", image: qcow2((bytes) => bytes.writeBigUInt64BE(513n, 40)), says: "no cluster's start" },
  { name: "an L1 table in the header", image: qcow2((bytes) => bytes.writeBigUInt64BE(0n, 40)), says: "no cluster's start" },
  {
    name: "a refcount table beyond the end",
    image: qcow2((bytes) => bytes.writeUInt32BE(0xffff_ffff, 56)),
    says: "the refcount table should lie",
  },
  {
    name: "an L1 entry with reserved bits",
    image: qcow2((bytes) => bytes.writeUInt8(0x7f, QCOW2_L1)),
    says: "entry 0 of the L1 table is damaged",
  },
  {
    name: "an L2 table beyond the end",
    image: qcow2((bytes) => bytes.writeBigUInt64BE(1n << 50n, QCOW2_L1)),
    says: "an L2 table should lie",
  },
  {
    name: "an L2 table that is the L1 table",
    image: qcow2((bytes) => bytes.writeBigUInt64BE(BigInt(QCOW2_L1), QCOW2_L1)),
    says: "damaged",
  },
  {
    name: "one L2 table for two places",
    image: qcow2((bytes) => {
      bytes.writeBigUInt64BE(BigInt(2 * 64 * QCOW2_CLUSTER), 24);
      bytes.writeUInt32BE(2, 36);
      bytes.writeBigUInt64BE(BigInt(QCOW2_L2), QCOW2_L1 + 8);
    }),
    says: "an L2 table at file offset 1024 is used twice",
  },
  { name: "a cluster beyond the end", image: l2Entry(1, 1n << 40n), says: "should lie at file offset 1099511627776" },
  { name: "a cluster at 2^55", image: l2Entry(1, 1n << 55n), says: "truncated or damaged" },
  {
    name: "a cluster between clusters",
    image: qcow2((bytes) => (bytes.writeUInt32BE(10, 20), bytes.writeBigUInt64BE(1024n, 40))),
    says: "no cluster's start",
  },
  { name: "a cluster in the L2 table", image: l2Entry(1, BigInt(QCOW2_L2)), says: "where the image's own tables are" },
  { name: "a cluster used twice", image: l2Entry(1, BigInt(QCOW2_DATA)), says: "are used for guest offsets" },
  {
    name: "a cluster with reserved bits",
    image: l2Entry(1, (1n << 60n) | BigInt(QCOW2_DATA)),
    says: "the L2 entry of guest offset 512 is damaged",
  },
  {
    name: "a zero cluster in version 2",
    image: qcow2((bytes) => (bytes.writeUInt32BE(2, 4), bytes.writeBigUInt64BE(1n, QCOW2_L2 + 8))),
    says: "the L2 entry of guest offset 512 is damaged",
  },
  {
    name: "a compressed cluster beyond the end",
    image: packed((bytes) => bytes.writeBigUInt64BE((1n << 62n) | 9999n, QCOW2_L2)),
    says: "should lie at file offset 9999",
  },
  {
    name: "a compressed cluster used twice",
    image: packed((bytes) => bytes.writeBigUInt64BE((1n << 62n) | BigInt(QCOW2_DATA), QCOW2_L2 + 8)),
    says: "are used for guest offsets",
  },
  { name: "a header of 0 bytes", image: qcow2((bytes) => bytes.writeUInt32BE(0, 100)), says: "says that it is 0 bytes long" },
  {
    name: "a header longer than its cluster",
    image: qcow2((bytes) => bytes.writeUInt32BE(1024, 100)),
    says: "says that it is 1024 bytes long",
  },
  {
    name: "an extension of 4 GiB",
    image: qcow2((bytes) => (bytes.writeUInt32BE(1, 104), bytes.writeUInt32BE(0xffff_ffff, 108))),
    says: "runs out of the header's cluster",
  },
];

const VMDK: readonly Hostile[] = [
  {
    name: "an absolute path",
    image: text("monolithicFlat", ['RW 8 FLAT "/etc/passwd" 0']),
    says: "only a plain name of a file beside the descriptor",
  },
  { name: "a path upwards", image: text("monolithicFlat", ['RW 8 FLAT "../secret" 0']), says: "only a plain name" },
  { name: "the folder above", image: text("monolithicFlat", ['RW 8 FLAT ".." 0']), says: "only a plain name" },
  { name: "a path in a folder", image: text("vmfs", ['RW 8 VMFS "folder/disk-flat.vmdk"']), says: "only a plain name" },
  { name: "a Windows path", image: text("vmfs", ['RW 8 VMFS "C:\\\\disk-flat.vmdk"']), says: "only a plain name" },
  {
    name: "a path in a sparse disk's descriptor",
    image: sparseVmdkSeed(descriptorText("monolithicSparse", ['RW 41 SPARSE "/etc/passwd"'])),
    says: "only a plain name",
  },
  { name: "an extent without a name", image: text("monolithicFlat", ["RW 8 FLAT"]), says: '"no file"' },
  { name: "an extent of zeros", image: text("monolithicFlat", ["RW 8 ZERO"]), says: 'of type "ZERO"' },
  { name: "a raw device", image: text("vmfsRawDeviceMap", ['RW 8 VMFSRDM "disk-rdm.vmdk"']), says: 'of type "vmfsRawDeviceMap"' },
  { name: "a raw device in a disk of another type", image: text("vmfs", ['RW 8 VMFSRDM "disk-rdm.vmdk"']), says: 'of type "VMFSRDM"' },
  { name: "a device", image: text("fullDevice", ['RW 8 FLAT "/dev/sda" 0']), says: 'of type "fullDevice"' },
  { name: "an seSparse disk", image: text("seSparse", ['RW 8 SESPARSE "disk-sesparse.vmdk"']), says: "seSparse" },
  { name: "an extent that must not be read", image: text("monolithicFlat", ['NOACCESS 8 FLAT "a.vmdk" 0']), says: "must not be read" },
  { name: "an extent of 0 sectors", image: text("monolithicFlat", ['RW 0 FLAT "a.vmdk" 0']), says: "0 sectors" },
  {
    name: "an extent of 10^15 - 1 sectors",
    image: text("monolithicFlat", ['RW 999999999999999 FLAT "a.vmdk" 0']),
    says: "larger than any file",
  },
  {
    name: "an extent of more digits than a number has",
    image: text("monolithicFlat", [`RW ${"9".repeat(40)} FLAT "a.vmdk" 0`]),
    says: "means nothing",
  },
  {
    name: "an extent line with more behind it",
    image: text("monolithicFlat", ['RW 8 FLAT "a.vmdk" 0 "/etc/passwd"']),
    says: "means nothing",
  },
  { name: "no extent", image: text("monolithicFlat", []), says: "names no extent" },
  { name: "a missing extent", image: text("monolithicFlat", ['RW 8 FLAT "a.vmdk" 0']), says: "a.vmdk is not beside the descriptor" },
  {
    name: "a truncated flat extent",
    image: text("monolithicFlat", ['RW 9 FLAT "a.vmdk" 0']),
    beside: { "a.vmdk": FLAT },
    says: "ends at 4096: it is truncated",
  },
  {
    name: "an offset beyond a flat extent",
    image: text("monolithicFlat", ['RW 1 FLAT "a.vmdk" 8']),
    beside: { "a.vmdk": FLAT },
    says: "it is truncated",
  },
  {
    name: "a flat extent used twice",
    image: text("twoGbMaxExtentFlat", ['RW 8 FLAT "a.vmdk" 0', 'RW 8 FLAT "a.vmdk" 0']),
    beside: { "a.vmdk": FLAT },
    says: "are used for guest offsets",
  },
  {
    name: "a parent",
    image: Buffer.from(descriptorText("vmfs", ['RW 8 VMFS "a.vmdk"']).replace("ffffffff", "0badcafe")),
    says: "is a delta on a parent disk",
  },
  {
    name: "a sparse extent named twice",
    image: text("twoGbMaxExtentSparse", ['RW 41 SPARSE "a.vmdk"', 'RW 41 SPARSE "a.vmdk"']),
    beside: { "a.vmdk": sparseVmdkSeed("") },
    says: "names the extent a.vmdk twice",
  },
  {
    name: "a parent's file",
    image: text("vmfs", ['RW 8 VMFS "a.vmdk"'], ['parentFileNameHint="/etc/passwd"']),
    says: "is a delta on a parent disk",
  },
  { name: "two createTypes", image: text("vmfs", ['RW 8 VMFS "a.vmdk"'], ['createType="monolithicFlat"']), says: '"createType" twice' },
  {
    name: "a line of nonsense",
    image: text("vmfs", ['RW 8 VMFS "a.vmdk"'], ["\u0007 nonsense"]),
    says: "line 6 of the VMDK's descriptor means nothing",
  },
  { name: "a descriptor without end", image: Buffer.alloc(3 * 1024 * 1024, "# Disk DescriptorFile\n"), says: "at most 2097152 are read" },
  { name: "a disk of 0 sectors", image: sparse((bytes) => bytes.writeBigUInt64LE(0n, 12)), says: "has 0 bytes" },
  { name: "a disk of 2^63 sectors", image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 63n, 12)), says: "larger than any file or disk" },
  {
    name: "a disk of 2^40 sectors",
    image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 40n, 12)),
    says: "a grain directory of 268435456 entries",
  },
  {
    name: "a capacity that is not the descriptor's",
    image: sparse((bytes) => bytes.writeBigUInt64LE(42n, 12)),
    says: "its descriptor 20992",
  },
  { name: "grains of 0 bytes", image: sparse((bytes) => bytes.writeBigUInt64LE(0n, 20)), says: "grains of 0 bytes" },
  { name: "grains of 3 sectors", image: sparse((bytes) => bytes.writeBigUInt64LE(3n, 20)), says: "grains of 1536 bytes" },
  { name: "grains of 32 MiB", image: sparse((bytes) => bytes.writeBigUInt64LE(65_536n, 20)), says: "grains of 33554432 bytes" },
  {
    name: "grain tables of 2^31 entries",
    image: sparse((bytes) => bytes.writeUInt32LE(1 << 30, 44)),
    says: "grain tables of 1073741824 entries",
  },
  { name: "version 4", image: sparse((bytes) => bytes.writeUInt32LE(4, 4)), says: "of version 4" },
  {
    name: "an unknown flag",
    image: sparse((bytes) => bytes.writeUInt32LE(0x100_0001, 8)),
    says: "flags that are not known here (0x1000001)",
  },
  { name: "a transfer as text", image: sparse((bytes) => bytes.write("\r\n \r", 73, "latin1")), says: "transferred as text" },
  {
    name: "a grain directory beyond the end",
    image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 32n, 56)),
    says: "grain directory should lie",
  },
  {
    name: "a grain directory in the header",
    image: sparse((bytes) => bytes.writeBigUInt64LE(0n, 56)),
    says: "grain directory should lie at file offset 0",
  },
  {
    name: "grains that begin beyond the end",
    image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 30n, 64)),
    says: "grains begin at 549755813888, but the file ends at",
  },
  { name: "a descriptor beyond the end", image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 40n, 28)), says: "descriptor ends early" },
  { name: "a descriptor of 2^40 bytes", image: sparse((bytes) => bytes.writeBigUInt64LE(1n << 31n, 36)), says: "at most 2097152 are read" },
  {
    name: "a grain table beyond the end",
    image: sparse((bytes) => bytes.writeUInt32LE(0xffff_ffff, VMDK_DIRECTORY)),
    says: "a grain table should lie",
  },
  { name: "a grain table in the directory", image: sparse((bytes) => bytes.writeUInt32LE(21, VMDK_DIRECTORY)), says: "tables overlap" },
  { name: "a grain beyond the end", image: sparse((bytes) => bytes.writeUInt32LE(0xffff_ffff, VMDK_TABLE)), says: "truncated or damaged" },
  {
    name: "a grain in the grain table",
    image: sparse((bytes) => bytes.writeUInt32LE(22, VMDK_TABLE)),
    says: "where the image's own tables are",
  },
  { name: "a grain in the header", image: sparse((bytes) => bytes.writeUInt32LE(1, VMDK_TABLE)), says: "where the image's own tables are" },
  {
    name: "a grain used twice",
    image: sparse((bytes) => bytes.writeUInt32LE(VMDK_DATA / 512, VMDK_TABLE + 4)),
    says: "are used for guest offsets",
  },
  {
    name: "grains that overlap",
    image: sparse((bytes) => bytes.writeUInt32LE(VMDK_DATA / 512 + 1, VMDK_TABLE + 4)),
    says: "are used for guest offsets",
  },
  { name: "an extent of a split disk", image: sparseVmdkSeed(""), says: "name its descriptor" },
  { name: "an extent of an ESXi disk", image: cowdSeed(), says: "name its descriptor" },
  {
    name: "a split disk's extent that lies about its size",
    image: text("twoGbMaxExtentSparse", ['RW 42 SPARSE "a.vmdk"']),
    beside: { "a.vmdk": sparseVmdkSeed("") },
    says: "one of them is damaged",
  },
  {
    name: "a compressed extent in a split disk",
    image: text("twoGbMaxExtentSparse", ['RW 41 SPARSE "a.vmdk"']),
    beside: { "a.vmdk": streamVmdkSeed() },
    says: "is compressed",
  },
  {
    name: "an extent that is no sparse one",
    image: text("twoGbMaxExtentSparse", ['RW 8 SPARSE "a.vmdk"']),
    beside: { "a.vmdk": FLAT },
    says: "has no sparse header",
  },
  { name: "a stream without footer", image: streamVmdkSeed().subarray(0, -1024), says: "does not end in the footer" },
  {
    name: "a stream whose footer contradicts its header",
    image: stream((bytes) => bytes.writeBigUInt64LE(99n, bytes.length - 1024 + 12)),
    says: "contradict each other",
  },
  {
    name: "a stream with its footer's directory nowhere",
    image: stream((bytes) => bytes.fill(0xff, bytes.length - 1024 + 56, bytes.length - 1024 + 64)),
    says: "larger than any file",
  },
  { name: "an unknown compression", image: stream((bytes) => bytes.writeUInt16LE(9, bytes.length - 1024 + 77)), says: "algorithm 9" },
  {
    name: "compression without markers",
    image: stream((bytes) => bytes.writeUInt32LE(0x1_0001, bytes.length - 1024 + 8)),
    says: "without markers",
  },
];

const OTHERS: readonly Hostile[] = [
  { name: "an empty file", image: Buffer.alloc(0), says: "the file is empty" },
  { name: "a cut raw file", image: Buffer.alloc(1000), says: "no multiple of 512" },
  { name: "gzip", image: Buffer.from("\x1f\x8b\x08", "latin1"), says: "compressed with gzip" },
  { name: "xz", image: Buffer.from("\xfd7zXZ\0", "latin1"), says: "compressed with xz" },
  { name: "zstd", image: Buffer.from("\x28\xb5\x2f\xfd", "latin1"), says: "compressed with zstd" },
  { name: "zip", image: Buffer.from("PK\x03\x04", "latin1"), says: "a zip archive" },
  { name: "QED", image: Buffer.from("QED\0", "latin1"), says: "a QED image" },
  { name: "Parallels", image: Buffer.from("WithoutFreeSpace", "latin1"), says: "a Parallels image" },
  { name: "an seSparse extent", image: Buffer.from("bebafeca00000000", "hex"), says: "seSparse" },
  { name: "tar", image: patched(Buffer.alloc(1024), (bytes) => bytes.write("ustar", 257)), says: "a tar archive" },
  { name: "DMG", image: patched(Buffer.alloc(1024), (bytes) => bytes.write("koly", 512)), says: "a macOS disk image" },
  { name: "an OVF", image: Buffer.from('<?xml version="1.0"?><Envelope/>'), says: "is XML" },
];

function refusal(hostile: Hostile): string {
  const source = fromBytes(hostile.image, hostile.beside);
  const start = performance.now();
  try {
    const image = drive(openImage({ sizeBytes: hostile.image.length }), source, BUDGET);
    drive(image.runs(), source, BUDGET);
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    return performance.now() - start < MAX_MS ? error.message : "took too long";
  }
  return "was read";
}

test.each([
  ...QCOW2.map((hostile) => ({ ...hostile, format: "qcow2" })),
  ...VMDK.map((hostile) => ({ ...hostile, format: "VMDK" })),
  ...OTHERS.map((hostile) => ({ ...hostile, format: "file" })),
])("refuses a $format with $name", (hostile) => {
  const sentence = refusal(hostile);
  expect(sentence).toContain(hostile.says);
  expect(sentence).not.toMatch(/\n|was read|took too long/);
});

const WHOLE: readonly { readonly name: string; readonly image: Buffer }[] = [
  { name: "qcow2", image: qcow2Seed() },
  { name: "compressed qcow2", image: qcow2Seed(true) },
  { name: "monolithicSparse", image: sparseVmdkSeed() },
  { name: "streamOptimized", image: streamVmdkSeed() },
];

test.each(WHOLE)("a $name that is cut anywhere is refused, or still whole", ({ image: whole }) => {
  const guest = readGuest(drive(openImage({ sizeBytes: whole.length }), fromBytes(whole)), fromBytes(whole));
  for (let length = 1; length < whole.length; length += length < 512 ? 1 : 37) {
    const source = fromBytes(whole.subarray(0, length));
    let read: Buffer | undefined;
    try {
      const image = drive(openImage({ sizeBytes: length }), source, BUDGET);
      if (image.format !== "raw") read = readGuest(image, source);
    } catch {
      // Refused by a sentence, or by zlib where a compressed cluster was cut.
    }
    expect(read === undefined || read.equals(guest), `cut at ${length}`).toBe(true);
  }
});

test("an image that is declared as another format is refused", () => {
  const source = fromBytes(qcow2Seed());
  expect(() => drive(openImage({ sizeBytes: source.size("")!, format: "vmdk" }), source)).toThrow(
    "declared as vmdk, but its bytes are not: they are qcow2",
  );
  expect(() => drive(openImage({ sizeBytes: 4096, format: "vhd" }), fromBytes(Buffer.alloc(4096)))).toThrow(
    "they carry the magic of no known format",
  );
});

test("a declared raw image is taken as it is, whatever its guest wrote into the first sector", () => {
  const image = drive(openImage({ sizeBytes: 4096, format: "raw" }), fromBytes(qcow2((bytes) => bytes.writeBigUInt64BE(400n, 8))), {
    asks: 0,
    bytes: 0,
  });
  expect(image).toMatchObject({ format: "raw", virtualSizeBytes: 4096 });
});
