import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { inflateRawSync } from "node:zlib";
import { expect, test } from "vitest";
import type { DiskImage } from "../../provider/image/image.ts";
import { Qcow2Writer, type Write } from "../../provider/image/qcow2-writer.ts";
import { parseVmdk } from "../../provider/image/vmdk.ts";
import { openDirectory } from "../bed/directory.ts";
import { drive, fromBytes, fromFile, readGuest, readRun, type Source } from "./drive.ts";
import { guestByQemu, guestOf, mixedGuest, qemuImg, qemuIo, writeRaw } from "./qemu.ts";
import {
  cowdSeed,
  descriptorText,
  filledGuest,
  sparseVmdkSeed,
  streamVmdkSeed,
  VMDK_CAPACITY_SECTORS,
  VMDK_GRAIN,
  VMDK_SIZE,
} from "./sparse-seeds.ts";

const MIB = 1024 * 1024;

test.each([
  { variant: "monolithicSparse", files: 1, granularity: 65_536 },
  { variant: "streamOptimized", files: 1, granularity: 65_536 },
  { variant: "monolithicFlat", files: 2, granularity: 512 },
  { variant: "twoGbMaxExtentSparse", files: 2, granularity: 65_536 },
  { variant: "twoGbMaxExtentFlat", files: 2, granularity: 512 },
])("reads what qemu reads: $variant", async ({ variant, files, granularity }) => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
  const path = join(directory.path, "guest.vmdk");
  await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", `subformat=${variant}`, raw, path);
  const source = fromFile(path);
  const image = drive(parseVmdk(source.size("")!), source);
  expect(image).toMatchObject({ format: "vmdk", variant, granularityBytes: granularity, notes: [] });
  expect(image.files).toHaveLength(files);
  // qemu-img rounds the size up to whole grains where there are any.
  expect(readGuest(image, source).equals(await guestByQemu(path, "vmdk", join(directory.path, "by-qemu.raw")))).toBe(true);
});

/** What a run of the source says goes into a qcow2 of the sparse layout. */
async function writeQcow2(path: string, image: DiskImage, source: Source): Promise<void> {
  const runs = drive(image.runs(), source);
  const writer = new Qcow2Writer({ virtualSizeBytes: image.virtualSizeBytes, layout: "sparse", pieces: runs });
  const writes: Write[] = [];
  for (const run of runs) writes.push(...writer.write(run.virtualOffset, readRun(image, run, source)));
  const end = writer.finish();
  writes.push(...end.writes, writer.header(new Uint8Array(0)));
  const bytes = Buffer.alloc(end.fileSizeBytes);
  for (const write of writes) bytes.set(write.bytes, write.offset);
  await writeFile(path, bytes);
}

test.each(["twoGbMaxExtentSparse", "monolithicSparse", "streamOptimized"])(
  "reads a disk of several extents or tables, of 5 GiB: %s",
  async (variant) => {
    await using directory = await openDirectory();
    const path = join(directory.path, "large.vmdk");
    const sparse = join(directory.path, "large.raw");
    await qemuImg("create", "-f", "raw", sparse, "5G");
    await qemuIo(
      sparse,
      "raw",
      "write -P 0x11 0 1M",
      "write -P 0x22 2146000k 3M",
      "write -P 0x33 4300M 100k",
      "write -P 0x44 5242368k 512k",
    );
    await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", `subformat=${variant}`, sparse, path);
    const source = fromFile(path);
    const image = drive(parseVmdk(source.size("")!), source);
    const copy = join(directory.path, "copy.qcow2");
    await writeQcow2(copy, image, source);
    expect(await qemuImg("compare", "-f", "vmdk", "-F", "qcow2", path, copy)).toContain("Images are identical.");
    expect(await qemuImg("check", "-f", "qcow2", copy)).toContain("No errors were found on the image.");
  },
);

test("takes zeroed grains for zeros where the header allows them", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "zeroed.vmdk");
  await qemuImg("create", "-f", "vmdk", "-o", "subformat=monolithicSparse,zeroed_grain=on", path, "1M");
  await qemuIo(path, "vmdk", "write -P 0x11 0 256k", "write -z 64k 64k");
  const source = fromFile(path);
  const image = drive(parseVmdk(source.size("")!), source);
  expect(drive(image.runs(), source).dataBytes).toBe(3 * 65_536);
  expect(readGuest(image, source).equals(await guestByQemu(path, "vmdk", join(directory.path, "raw")))).toBe(true);
});

test("reads a stream with footer and markers as qemu reads it", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "stream.vmdk");
  await writeFile(path, streamVmdkSeed());
  const source = fromFile(path);
  const image = drive(parseVmdk(source.size("")!), source);
  const runs = [...drive(image.runs(), source)];
  expect(runs.map((run) => run.encoding)).toEqual(["grain", "grain", "grain"]);
  // Each bound ends where the next grain, or the grain table, begins.
  expect(runs.map((run) => run.storedBytes)).toEqual([512, 512, 1024]);
  const guest = readGuest(image, source);
  expect(guest.equals(filledGuest(VMDK_SIZE, VMDK_GRAIN))).toBe(true);
  expect((await guestByQemu(path, "vmdk", join(directory.path, "raw"))).equals(guest)).toBe(true);
});

test("reads a COWD extent by its descriptor as qemu reads it", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "cowd.vmdk");
  await writeFile(path, descriptorText("vmfsSparse", [`RW ${VMDK_CAPACITY_SECTORS} VMFSSPARSE "cowd-delta.vmdk"`]));
  await writeFile(join(directory.path, "cowd-delta.vmdk"), cowdSeed());
  const source = fromFile(path);
  const image = drive(parseVmdk(source.size("")!), source);
  expect(readGuest(image, source).equals(filledGuest(VMDK_SIZE, VMDK_GRAIN))).toBe(true);
  expect(readGuest(image, source).equals(await guestByQemu(path, "vmdk", join(directory.path, "raw")))).toBe(true);
});

test("reads the descriptor of a datastore and its flat extents at their offsets", () => {
  const flat = guestOf(2 * MIB, [{ offset: 0, length: 2 * MIB, content: "noise" }]);
  const text = descriptorText("vmfs", ['RW 2048 VMFS "web-flat.vmdk"', 'RW 1024 FLAT "web-flat.vmdk" 3072']).replaceAll("\n", "\r\n");
  const source = fromBytes(Buffer.from(text), { "web-flat.vmdk": flat });
  const image = drive(parseVmdk(text.length), source);
  expect(image).toMatchObject({
    variant: "vmfs",
    virtualSizeBytes: 1.5 * MIB,
    files: [{ name: "" }, { name: "web-flat.vmdk", sizeBytes: 2 * MIB }],
  });
  expect(readGuest(image, source).equals(Buffer.concat([flat.subarray(0, MIB), flat.subarray(1.5 * MIB)]))).toBe(true);
});

test("gives runs that begin within a grain where a split disk's extents do", () => {
  const extents = ['RW 41 SPARSE "a.vmdk"', 'RW 41 SPARSE "b.vmdk"'];
  const text = descriptorText("twoGbMaxExtentSparse", extents);
  const source = fromBytes(Buffer.from(text), { "a.vmdk": sparseVmdkSeed(""), "b.vmdk": sparseVmdkSeed("") });
  const image = drive(parseVmdk(text.length), source);
  expect(image.granularityBytes).toBe(512);
  const half = filledGuest(VMDK_SIZE, VMDK_GRAIN);
  expect(readGuest(image, source).equals(Buffer.concat([half, half]))).toBe(true);
});

test("a grain without zlib's header and trailer is a compressed cluster of a qcow2", async () => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
  const vmdk = join(directory.path, "guest.vmdk");
  await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk);
  const source = fromFile(vmdk);
  const image = drive(parseVmdk(source.size("")!), source);
  const runs = drive(image.runs(), source);
  const writer = new Qcow2Writer({ virtualSizeBytes: image.virtualSizeBytes, layout: "compressed", pieces: runs });
  const writes: Write[] = [];
  for (const run of runs) {
    const stored = Buffer.from(source.read("", run.fileOffset, run.storedBytes));
    const zlib = stored.subarray(12, 12 + stored.readUInt32LE(8));
    const deflated = zlib.subarray(2, -4);
    const isWhole = inflateRawSync(deflated).length === writer.clusterBytes;
    writes.push(
      ...(isWhole ? writer.writeCompressed(run.virtualOffset, deflated) : writer.write(run.virtualOffset, readRun(image, run, source))),
    );
  }
  const { writes: last, fileSizeBytes } = writer.finish();
  const bytes = Buffer.alloc(fileSizeBytes);
  for (const write of [...writes, ...last, writer.header(new Uint8Array(0))]) bytes.set(write.bytes, write.offset);
  const path = join(directory.path, "guest.qcow2");
  await writeFile(path, bytes);
  expect(fileSizeBytes).toBeLessThan(source.size("")! + 6 * writer.clusterBytes);
  expect(await qemuImg("check", "-f", "qcow2", path)).toMatch(/No errors were found[^]*compressed clusters/);
  expect(await qemuImg("compare", "-f", "vmdk", "-F", "qcow2", vmdk, path)).toContain("Images are identical.");
});
