import { closeSync, openSync, writeSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { deflateRawSync } from "node:zlib";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { parseQcow2, readStamp } from "../../provider/image/qcow2.ts";
import { chooseClusterBytes, type GuestPiece, type Layout, Qcow2Writer, type Write } from "../../provider/image/qcow2-writer.ts";
import { openDirectory } from "../bed/directory.ts";
import { drive, fromFile, readGuest } from "./drive.ts";
import { mixedGuest, qemuImg, qemuIo, writeRaw } from "./qemu.ts";

const STAMP = new TextEncoder().encode('{"importId":"1"}');

/** Takes writes as a pipe would: each must begin where the last one ended. The header may go back. */
function openSink(path: string, start: number): { take(writes: Iterable<Write>): void; end: number } & Disposable {
  const descriptor = openSync(path, "w");
  return {
    end: start,
    take(writes) {
      for (const { offset, bytes } of writes) {
        if (offset !== 0) {
          expect(offset).toBe(this.end);
          this.end += bytes.length;
        }
        writeSync(descriptor, bytes, 0, bytes.length, offset);
      }
    },
    [Symbol.dispose]: () => closeSync(descriptor),
  };
}

interface Result {
  readonly path: string;
  readonly check: string;
}

/** Writes a guest's disk as a qcow2 by the pieces, and lets qemu check it and compare it. Gives what `qemu-img check` said. */
async function prove(
  directory: string,
  guest: Buffer,
  options: {
    readonly layout: Layout;
    readonly clusterBytes?: number;
    readonly pieces?: readonly GuestPiece[];
    readonly announce?: boolean;
  },
): Promise<Result> {
  const { layout, clusterBytes, announce } = options;
  const pieces = options.pieces ?? [{ virtualOffset: 0, lengthBytes: guest.length }];
  const writer = new Qcow2Writer({
    virtualSizeBytes: guest.length,
    layout,
    ...(clusterBytes === undefined ? {} : { clusterBytes }),
    ...(announce === true ? { pieces } : {}),
  });
  const path = join(directory, `${layout}-${clusterBytes}.qcow2`);
  using sink = openSink(path, writer.clusterBytes);
  for (const { virtualOffset, lengthBytes } of pieces) {
    for (let at = virtualOffset; at < virtualOffset + lengthBytes; at += writer.clusterBytes) {
      const bytes = guest.subarray(at, Math.min(at + writer.clusterBytes, virtualOffset + lengthBytes));
      const isWhole = bytes.length === writer.clusterBytes && at % writer.clusterBytes === 0;
      const packed = layout === "compressed" && isWhole && !bytes.equals(Buffer.alloc(bytes.length)) ? deflateRawSync(bytes) : undefined;
      sink.take(packed !== undefined && packed.length < bytes.length ? writer.writeCompressed(at, packed) : writer.write(at, bytes));
    }
  }
  const { writes, fileSizeBytes } = writer.finish();
  sink.take(writes);
  expect(sink.end).toBe(fileSizeBytes);
  sink.take([writer.header(STAMP)]);
  return { path, check: await qemuImg("check", "-f", "qcow2", path) };
}

const CLUSTERS = [512, 4096, 65_536, 2 * 1024 * 1024];
const LAYOUTS: readonly Layout[] = ["sparse", "compressed", "full"];

test.each(LAYOUTS.flatMap((layout) => CLUSTERS.map((clusterBytes) => ({ layout, clusterBytes }))))(
  "writes what qemu reads and finds clean: $layout with clusters of $clusterBytes",
  async ({ layout, clusterBytes }) => {
    await using directory = await openDirectory();
    const guest = mixedGuest();
    const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
    const { path, check } = await prove(directory.path, guest, { layout, clusterBytes });
    expect(check).toContain("No errors were found on the image.");
    expect(check).not.toContain("leaked");
    expect(check.includes("100.00% allocated")).toBe(layout === "full");
    expect(await qemuImg("compare", "-f", "raw", "-F", "qcow2", raw, path)).toContain("Images are identical.");
    const source = fromFile(path);
    const image = drive(parseQcow2(source.size("")!), source);
    expect(readGuest(image, source).equals(guest)).toBe(true);
    expect(Buffer.from(drive(readStamp(), source) ?? []).equals(STAMP)).toBe(true);
  },
);

const MIB = 1024 * 1024;

/** The disk in pieces of odd lengths, in an order that is neither the guest's nor random. */
function scattered(sizeBytes: number): readonly GuestPiece[] {
  const pieces: GuestPiece[] = [];
  for (let virtualOffset = 0; virtualOffset < sizeBytes;) {
    const lengthBytes = Math.min(sizeBytes - virtualOffset, 512 * (1 + ((pieces.length * 37) % 300)));
    pieces.push({ virtualOffset, lengthBytes });
    virtualOffset += lengthBytes;
  }
  return [3, 0, 4, 1, 6, 2, 5].flatMap((rest) => pieces.filter((_, index) => index % 7 === rest));
}

test.each(LAYOUTS.flatMap((layout) => [true, false].map((announce) => ({ layout, announce }))))(
  "takes pieces of clusters in any order: $layout, announced $announce",
  async ({ layout, announce }) => {
    await using directory = await openDirectory();
    const guest = mixedGuest();
    const pieces = scattered(guest.length);
    const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
    const { path, check } = await prove(directory.path, guest, { layout, pieces, announce });
    expect(check).toContain("No errors were found on the image.");
    expect(await qemuImg("compare", "-f", "raw", "-F", "qcow2", raw, path)).toContain("Images are identical.");
  },
);

test("gives the same bytes for the same calls", async () => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const pieces = scattered(guest.length);
  const [first, second] = [join(directory.path, "a"), join(directory.path, "b")];
  await Promise.all([mkdir(first), mkdir(second)]);
  const results = await Promise.all([
    prove(first, guest, { layout: "compressed", pieces }),
    prove(second, guest, { layout: "compressed", pieces }),
  ]);
  const [one, other] = await Promise.all(results.map((result) => readFile(result.path)));
  expect(one!.equals(other!)).toBe(true);
});

test("is no disk until the header is written", async () => {
  await using directory = await openDirectory();
  const writer = new Qcow2Writer({ virtualSizeBytes: MIB, layout: "sparse" });
  const writes = [...writer.write(0, Buffer.alloc(65_536, 1))];
  const { writes: last, fileSizeBytes } = writer.finish();
  const bytes = Buffer.alloc(fileSizeBytes);
  for (const write of [...writes, ...last]) bytes.set(write.bytes, write.offset);
  const path = join(directory.path, "part");
  await writeFile(path, bytes);
  expect(bytes.subarray(0, 65_536).equals(Buffer.alloc(65_536))).toBe(true);
  expect(JSON.parse(await qemuImg("info", "--output=json", path))).toMatchObject({ format: "raw" });
  const header = writer.header(STAMP);
  bytes.set(header.bytes, header.offset);
  await writeFile(path, bytes);
  expect(JSON.parse(await qemuImg("info", "--output=json", path))).toMatchObject({ format: "qcow2", "virtual-size": MIB });
});

test("leaves a stamp that survives a guest's writes, resize, snapshots and amend", async () => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const { path } = await prove(directory.path, guest, { layout: "compressed" });
  await qemuIo(path, "qcow2", "write -P 0x77 0 5M", "discard 9M 1M");
  await qemuImg("resize", "-f", "qcow2", path, "64M");
  await qemuImg("snapshot", "-c", "later", path);
  await qemuImg("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path);
  expect(await qemuImg("check", "-f", "qcow2", path)).toContain("No errors were found on the image.");
  expect(Buffer.from(drive(readStamp(), fromFile(path)) ?? []).equals(STAMP)).toBe(true);
});

test("stores nothing of an empty disk of 8 TiB but its tables, and of a full one the size it says", () => {
  const sparse = new Qcow2Writer({ virtualSizeBytes: 8 * 2 ** 40, layout: "sparse" });
  expect(sparse.finish().fileSizeBytes).toBeLessThan(MIB);
  const full = new Qcow2Writer({ virtualSizeBytes: 8 * 2 ** 40, layout: "full" });
  expect(full.finish().fileSizeBytes).toBeGreaterThan(8 * 2 ** 40);
});

test("takes a header's room for the stamp, and refuses one that does not fit", () => {
  const finished = (clusterBytes: number): Qcow2Writer => {
    const writer = new Qcow2Writer({ virtualSizeBytes: MIB, clusterBytes, layout: "sparse" });
    writer.finish();
    return writer;
  };
  expect(finished(65_536).header(new Uint8Array(16 * 1024)).bytes.length).toBeLessThan(17 * 1024);
  expect(finished(4096).header(new Uint8Array(1024)).offset).toBe(0);
  expect(finished(512).header(new Uint8Array(384)).bytes.length).toBe(512);
  expect(() => finished(512).header(new Uint8Array(385))).toThrow("a stamp of 385 bytes does not fit");
});

test("refuses a sector that comes twice, whole, in part, or compressed", () => {
  const writer = new Qcow2Writer({ virtualSizeBytes: MIB, layout: "compressed" });
  const noise = Buffer.alloc(65_536, "x");
  writer.write(0, noise);
  expect(() => writer.write(0, noise)).toThrow("the source gives guest offset 0 twice");
  expect(() => writer.write(512, noise.subarray(0, 512))).toThrow("guest offset 0 twice");
  expect(() => writer.writeCompressed(0, deflateRawSync(noise))).toThrow("guest offset 0 twice");
  writer.write(65_536 + 1024, noise.subarray(0, 1024));
  expect(() => writer.write(65_536 + 1536, noise.subarray(0, 1024))).toThrow("guest offset 67072 twice");
  expect(() => writer.writeCompressed(65_536, deflateRawSync(noise))).toThrow("guest offset 65536 twice");
});

test("refuses data behind the disk's end, and compressed data that can be no cluster", () => {
  const writer = new Qcow2Writer({ virtualSizeBytes: MIB, layout: "compressed" });
  expect(() => writer.write(MIB, Buffer.alloc(512))).toThrow("but the disk has only 1048576 bytes");
  expect(() => writer.write(MIB - 512, Buffer.alloc(1024))).toThrow(ImageError);
  expect(() => writer.writeCompressed(0, new Uint8Array(10))).toThrow("has 10 bytes, which cannot be a cluster of 65536");
  expect(() => writer.writeCompressed(0, new Uint8Array(200_000))).toThrow("cannot be a cluster");
  expect(() => writer.write(100, Buffer.alloc(512))).toThrow(RangeError);
  expect(() => new Qcow2Writer({ virtualSizeBytes: 1000, layout: "sparse" })).toThrow("a disk of 1000 bytes");
  expect(() => new Qcow2Writer({ virtualSizeBytes: 2 ** 40, clusterBytes: 512, layout: "sparse" })).toThrow(
    "too large for a qcow2 with clusters of 512",
  );
});

/** Pieces of 4 KiB at a stride: each cluster of 64 KiB gets its 16 pieces in 16 rounds over the disk. */
function interleaved(clusters: number): readonly GuestPiece[] {
  const length = clusters * 16;
  return Array.from({ length }, (_, index) => {
    return { virtualOffset: (index % clusters) * 65_536 + Math.floor(index / clusters) * 4096, lengthBytes: 4096 };
  });
}

test("refuses pieces so scattered that too much would be held, before any is written where they are announced", () => {
  const virtualSizeBytes = 2000 * 65_536;
  expect(() => new Qcow2Writer({ virtualSizeBytes, layout: "sparse", pieces: interleaved(2000) })).toThrow("smaller clusters are needed");
  const writer = new Qcow2Writer({ virtualSizeBytes, layout: "sparse" });
  const writeAll = (): void => {
    for (const { virtualOffset, lengthBytes } of interleaved(2000)) writer.write(virtualOffset, Buffer.alloc(lengthBytes, 1));
  };
  expect(writeAll).toThrow("smaller clusters are needed");
});

test("refuses to finish while announced pieces of a cluster are missing", () => {
  const pieces = [{ virtualOffset: 0, lengthBytes: 4096 }];
  const writer = new Qcow2Writer({ virtualSizeBytes: MIB, layout: "sparse", pieces });
  writer.write(0, Buffer.alloc(2048, 1));
  expect(() => writer.finish()).toThrow("did not give all data of the cluster at guest offset 0");
  expect(writer.write(2048, Buffer.alloc(2048, 1))).toHaveLength(1);
  expect(writer.finish().fileSizeBytes).toBe(6 * 65_536);
});

test("chooses clusters of 64 KiB unless the pieces lie too far apart for them", () => {
  expect(chooseClusterBytes(interleaved(500), 4096)).toBe(65_536);
  expect(chooseClusterBytes(interleaved(2000), 4096)).toBe(4096);
  expect(chooseClusterBytes(interleaved(2000), 2 * MIB)).toBe(65_536);
  expect(chooseClusterBytes([{ virtualOffset: 0, lengthBytes: 2 ** 40 + 512 }], 512)).toBe(65_536);
});
