import { statSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parseQcow2, readStamp } from "../../provider/image/qcow2.ts";
import { openDirectory } from "../bed/directory.ts";
import { drive, fromBytes, fromFile, readGuest } from "./drive.ts";
import { guestByQemu, mixedGuest, qemuImg, qemuIo, writeRaw } from "./qemu.ts";

const VARIANTS: readonly { readonly options: string; readonly compressed?: boolean; readonly granularity: number }[] = [
  { options: "compat=0.10", granularity: 65_536 },
  { options: "compat=1.1", granularity: 65_536 },
  { options: "compat=1.1,cluster_size=512", granularity: 512 },
  { options: "compat=1.1,cluster_size=4096", granularity: 4096 },
  { options: "compat=1.1,cluster_size=2M", granularity: 2 * 1024 * 1024 },
  { options: "compat=1.1,extended_l2=on", granularity: 2048 },
  { options: "compat=1.1,extended_l2=on,cluster_size=16k", granularity: 512 },
  { options: "compat=1.1,lazy_refcounts=on,refcount_bits=1", granularity: 65_536 },
  { options: "compat=0.10", compressed: true, granularity: 65_536 },
  { options: "compat=1.1", compressed: true, granularity: 65_536 },
  { options: "compat=1.1,compression_type=zstd", compressed: true, granularity: 65_536 },
  { options: "compat=1.1,cluster_size=512", compressed: true, granularity: 512 },
  { options: "compat=1.1,cluster_size=2M", compressed: true, granularity: 2 * 1024 * 1024 },
  { options: "compat=1.1,extended_l2=on,cluster_size=64k", compressed: true, granularity: 2048 },
  { options: "compat=1.1,preallocation=metadata", granularity: 65_536 },
  { options: "compat=1.1,preallocation=full", granularity: 65_536 },
];

test.each(VARIANTS)("reads what qemu reads: $options compressed=$compressed", async ({ options, compressed, granularity }) => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("convert", ...(compressed === true ? ["-c"] : []), "-f", "raw", "-O", "qcow2", "-o", options, raw, path);
  const source = fromFile(path);
  const image = drive(parseQcow2(statSync(path).size), source);
  expect(image).toMatchObject({ format: "qcow2", virtualSizeBytes: guest.length, granularityBytes: granularity, notes: [] });
  expect(readGuest(image, source).equals(guest)).toBe(true);
});

test("reads the current state of an image with internal snapshots, and says so", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("create", "-f", "qcow2", path, "10M");
  await qemuIo(path, "qcow2", "write -P 0x11 0 3M");
  await qemuImg("snapshot", "-c", "before", path);
  await qemuIo(path, "qcow2", "write -P 0x22 1M 1M", "write -z 2M 512k");
  await qemuImg("snapshot", "-c", "after", path);
  await qemuIo(path, "qcow2", "write -P 0x33 5M 64k");
  const source = fromFile(path);
  const image = drive(parseQcow2(source.size("")!), source);
  expect(image.notes).toEqual(["has 2 internal snapshots; the current state is imported, snapshots are left behind"]);
  expect(readGuest(image, source).equals(await guestByQemu(path, "qcow2", join(directory.path, "raw")))).toBe(true);
});

test("reads an image that grew, shrank, and had clusters zeroed and discarded", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("create", "-f", "qcow2", "-o", "extended_l2=on", path, "64M");
  await qemuIo(path, "qcow2", "write -P 0x11 0 8M", "write -P 0x22 60M 4M", "write -z 64k 2k", "discard 1M 128k", "write -z -u 2M 64k");
  await qemuImg("resize", "--shrink", "-f", "qcow2", path, "33M");
  await qemuImg("resize", "-f", "qcow2", path, "48M");
  await qemuIo(path, "qcow2", "write -P 0x33 47M 1000k");
  const source = fromFile(path);
  const image = drive(parseQcow2(source.size("")!), source);
  expect(readGuest(image, source).equals(await guestByQemu(path, "qcow2", join(directory.path, "raw")))).toBe(true);
});

test("reads a dirty image, and says that its last writer did not close it", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M");
  await qemuIo(path, "qcow2", "write -P 0x11 0 128k");
  const bytes = await readFile(path);
  bytes.writeBigUInt64BE(1n, 72);
  const image = drive(parseQcow2(bytes.length), fromBytes(bytes));
  expect(image.notes).toEqual(["was not closed by its last writer; only its reference counts can be out of date, and they are not used"]);
  expect(readGuest(image, fromBytes(bytes)).subarray(0, 131_072).equals(Buffer.alloc(131_072, 0x11))).toBe(true);
});

test("mentions dirty bitmaps, which stay behind", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("create", "-f", "qcow2", path, "1M");
  await qemuImg("bitmap", "--add", "-f", "qcow2", path, "backup");
  const source = fromFile(path);
  expect(drive(parseQcow2(source.size("")!), source).notes).toEqual(["has persistent dirty bitmaps, which are left behind"]);
});

test("refuses what qemu-img makes with a backing file or an external data file", async () => {
  await using directory = await openDirectory();
  const base = join(directory.path, "base.qcow2");
  const overlay = join(directory.path, "overlay.qcow2");
  const outside = join(directory.path, "outside.qcow2");
  await qemuImg("create", "-f", "qcow2", base, "1M");
  await qemuImg("create", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay);
  await qemuImg("create", "-f", "qcow2", "-o", `data_file=${directory.path}/data.raw`, outside, "1M");
  for (const [path, says] of [
    [overlay, "has a backing file"],
    [outside, "external data file"],
  ] as const) {
    const source = fromFile(path);
    expect(() => drive(parseQcow2(source.size("")!), source)).toThrow(says);
  }
});

test("finds no stamp in an image of another's making, and none where there is no qcow2", async () => {
  await using directory = await openDirectory();
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("create", "-f", "qcow2", path, "1M");
  expect(drive(readStamp(), fromFile(path))).toBeUndefined();
  await writeFile(path, Buffer.alloc(65_536));
  expect(drive(readStamp(), fromFile(path))).toBeUndefined();
  await writeFile(path, "");
  expect(drive(readStamp(), fromFile(path))).toBeUndefined();
});
