import { execFile } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { mkdir, readdir, readFile, rename, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { expect, it } from "vitest";
import { lookAhead, openSource, type OpenSource, type SourceOptions, type SourceSpec } from "../../provider/transfer/source.ts";
import { openDirectory } from "../bed/directory.ts";
import { guestOf, qemuImg, writeRaw } from "../image/qemu.ts";
import { ovaSeed, ovfSeed } from "../image/seeds.ts";
import { ZIP_END_BYTES, zipSeed } from "../image/zip-seeds.ts";
import { openWebServer } from "./web-server.ts";

const execute = promisify(execFile);
const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** A folder for images and another for temporary copies. */
async function openBench() {
  const directory = await openDirectory("zipped");
  const path = (name: string) => join(directory.path, name);
  const scratchFolder = path("scratch");
  await mkdir(scratchFolder);
  const guest = guestOf(12 * MIB, [{ offset: MIB, length: 5 * MIB, content: "noise" }]);
  const raw = await writeRaw(path("disk.raw"), guest);
  return {
    path,
    scratchFolder,
    raw,
    async convert(name: string, format: string, ...options: readonly string[]): Promise<string> {
      await qemuImg("convert", "-f", "raw", "-O", format, ...options, raw, path(name));
      return path(name);
    },
    async zip(name: string, ...rest: readonly string[]): Promise<string> {
      await execute("zip", ["-q", path(name), ...rest], { cwd: directory.path });
      return path(name);
    },
    open: (spec: SourceSpec, options: SourceOptions = {}) => openSource(spec, { scratchFolder, ...options }),
    lookAhead: (spec: SourceSpec, options: SourceOptions = {}) => lookAhead(spec, { scratchFolder, ...options }),
    async [Symbol.asyncDispose]() {
      expect(await readdir(scratchFolder)).toEqual([]);
      await directory[Symbol.asyncDispose]();
    },
  };
}

/** All bytes that an import would read, of each file. */
async function bytesOf({ files }: OpenSource): Promise<readonly string[]> {
  const digests: string[] = [];
  for (const file of files) {
    const hash = createHash("sha256");
    let at = 0;
    for (let part = await file.read(0, MIB); part.length > 0; part = await file.read(at, MIB)) {
      hash.update(part);
      at += part.length;
    }
    digests.push(hash.digest("hex"));
  }
  return digests;
}

it("reads an image of any format in a zip archive, deflated or stored, as if it were not packed", async () => {
  await using bench = await openBench();
  const images = {
    raw: bench.raw,
    qcow2: await bench.convert("disk.qcow2", "qcow2"),
    vmdk: await bench.convert("disk.vmdk", "vmdk", "-o", "subformat=streamOptimized"),
    vhd: await bench.convert("disk.vhd", "vpc", "-o", "subformat=dynamic,force_size"),
    vhdx: await bench.convert("disk.vhdx", "vhdx"),
    vdi: await bench.convert("disk.vdi", "vdi"),
  };
  const levels = ["-1", "-0"];
  for (const [index, [format, image]] of Object.entries(images).entries()) {
    for (const level of format === "raw" ? levels : [levels[index % 2]!]) {
      const file = await bench.zip(`${format}${level}.zip`, level, basename(image));
      const outlook = (await bench.lookAhead({ file }))!;
      // A VHD is told by its last bytes, which only the import reads.
      expect(outlook.image?.virtualSizeBytes).toBe(format === "vhd" ? undefined : 12 * MIB);
      expect(outlook.notes.join()).toMatch(/it is packed in a zip archive: a temporary copy of up to .* lies in .*scratch/);
      await using source = await bench.open({ file });
      expect(source.image).toMatchObject({ format, virtualSizeBytes: 12 * MIB });
      expect(await bytesOf(source)).toEqual([sha256(await readFile(image))]);
      expect((await source.runs()).dataBytes).toBeGreaterThanOrEqual(5 * MIB);
    }
  }
});

it("reads a VMDK in several files, an OVA, and an OVF with its disk out of a zip archive", async () => {
  await using bench = await openBench();
  await bench.convert("flat.vmdk", "vmdk", "-o", "subformat=monolithicFlat");
  const flat = await bench.zip("flat.zip", "flat.vmdk", "flat-flat.vmdk");
  expect((await bench.lookAhead({ file: flat }))!.image).toMatchObject({ variant: "monolithicFlat", virtualSizeBytes: 12 * MIB });
  await using parts = await bench.open({ file: flat });
  expect(parts.files.map(({ name }) => name)).toEqual(["flat.vmdk", "flat-flat.vmdk"]);
  expect((await bytesOf(parts))[1]).toBe(sha256(await readFile(bench.raw)));

  await writeFile(bench.path("web.ova"), ovaSeed());
  const ova = await bench.zip("ova.zip", "web.ova");
  expect((await bench.lookAhead({ file: ova }))!.image).toBeUndefined();
  await using packed = await bench.open({ ova, disk: 0 });
  expect(packed).toMatchObject({ image: { format: "vhd" }, packed: { disk: { index: 0 } }, isVouched: true });

  await mkdir(bench.path("vm"));
  await rename(await bench.convert("web.vmdk", "vmdk", "-o", "subformat=streamOptimized"), bench.path("vm/web.vmdk"));
  const disk = await readFile(bench.path("vm/web.vmdk"));
  const ovf = ovfSeed("web.vmdk", disk.length);
  await writeFile(bench.path("vm/web.ovf"), ovf);
  await writeFile(bench.path("vm/web.mf"), `SHA256(web.ovf)= ${sha256(Buffer.from(ovf))}\nSHA256(web.vmdk)= ${sha256(disk)}\n`);
  const folder = await bench.zip("vm.zip", "-r", "vm");
  const outlook = (await bench.lookAhead({ file: folder }))!;
  expect(outlook.image).toMatchObject({ variant: "streamOptimized" });
  expect(outlook.expected?.hex).toBe(sha256(disk));
  await using machine = await bench.open({ file: folder });
  expect(machine).toMatchObject({
    image: { variant: "streamOptimized" },
    packed: { disk: { place: { name: "web.vmdk" } } },
    isVouched: true,
  });
  expect(await bytesOf(machine)).toEqual([sha256(disk)]);
});

it("takes the disk that is named among several, and else says their names", async () => {
  await using bench = await openBench();
  await bench.convert("one.qcow2", "qcow2");
  await bench.convert("two.vdi", "vdi");
  const path = await bench.zip("both.zip", "-1", "one.qcow2", "two.vdi");
  const refusal = '2 disks: declare it as { ova, disk } or { url, disk } and say which one (0: "one.qcow2", 1: "two.vdi")';
  await expect(bench.lookAhead({ file: path })).rejects.toThrow(refusal);
  await expect(bench.open({ file: path })).rejects.toThrow(refusal);
  await using source = await bench.open({ ova: path, disk: "two.vdi" });
  expect(source.image.format).toBe("vdi");
});

it("reads of an archive on a web server only what it needs, or all where there are no ranges or a checksum is promised", async () => {
  await using bench = await openBench();
  await using server = await openWebServer();
  const digest = sha256(await readFile(await bench.convert("disk.qcow2", "qcow2")));
  await writeFile(bench.path("other.bin"), randomBytes(4 * MIB));
  const bytes = await readFile(await bench.zip("disk.zip", "-1", "other.bin", "disk.qcow2"));
  server.files.set("/ranged.zip", { bytes });
  server.files.set("/plain.zip", { bytes, ranges: false });
  const checksum = `sha256:${sha256(bytes)}`;
  for (const [name, options] of [
    ["ranged", {}],
    ["ranged", { checksum }],
    ["plain", {}],
  ] as const) {
    const url = `${server.origin}/${name}.zip`;
    const outlook = (await bench.lookAhead({ url }, options))!;
    expect(outlook.image?.format).toBe(name === "ranged" && !("checksum" in options) ? "qcow2" : undefined);
    await using source = await bench.open({ url }, options);
    expect(await bytesOf(source)).toEqual([digest]);
    expect(source.files[0]!.wrappedDigest).toBeUndefined();
    expect(source.isVouched).toBe("checksum" in options);
  }
  expect(server.log.filter((line) => line.startsWith("GET /ranged.zip bytes=0-")).length).toBeGreaterThan(0);
  await expect(bench.open({ url: `${server.origin}/ranged.zip` }, { checksum: `sha256:${"0".repeat(64)}` })).rejects.toThrow(
    /ranged\.zip is damaged/,
  );
});

it("compares the checksum that is promised with the archive's own", async () => {
  await using bench = await openBench();
  const file = await bench.zip("disk.zip", "-1", "disk.raw");
  await using source = await bench.open({ file }, { checksum: `sha256:${sha256(await readFile(file))}` });
  expect(source.isVouched).toBe(true);
  await expect(bench.open({ file }, { checksum: `sha256:${"0".repeat(64)}` })).rejects.toThrow(/disk\.zip is damaged: its sha256/);
});

it("refuses a member that is damaged, lies about itself, or grows as no disk does, and leaves nothing", async () => {
  await using bench = await openBench();
  const data = randomBytes(MIB);
  const refusal = async (bytes: Buffer): Promise<unknown> => {
    await writeFile(bench.path("bad.zip"), bytes);
    try {
      await using _read = await bench.open({ file: bench.path("bad.zip") });
      return "was read";
    } catch (error) {
      return String(error);
    }
  };
  for (const isDeflated of [true, false]) {
    const whole = zipSeed([{ name: "disk.raw", data, isDeflated }]);
    const entry = whole.readUInt32LE(whole.length - ZIP_END_BYTES + 16);
    const changed = (change: (bytes: Buffer) => void): Buffer => {
      const copy = Buffer.from(whole);
      change(copy);
      return copy;
    };
    expect(await refusal(whole)).toBe("was read");
    expect(await refusal(changed((bytes) => bytes.writeUInt8(bytes[entry + 16]! ^ 1, entry + 16)))).toMatch(
      /"disk\.raw" is damaged: its CRC-32 is [0-9a-f]{8} instead of the [0-9a-f]{8} that the archive promises/,
    );
    expect(await refusal(changed((bytes) => bytes.writeUInt8(bytes[MIB >> 1]! ^ 1, MIB >> 1)))).toMatch(/CRC-32|cannot be inflated/);
    if (!isDeflated) continue;
    expect(await refusal(changed((bytes) => bytes.writeUInt32LE(MIB - 512, entry + 24)))).toMatch(/it holds more than the 1048064 bytes/);
    expect(await refusal(changed((bytes) => bytes.writeUInt32LE(MIB + 512, entry + 24)))).toMatch(
      /it holds 1048576 bytes instead of the 1049088/,
    );
    expect(await refusal(changed((bytes) => bytes.writeUInt32LE(MIB >> 1, entry + 20)))).toMatch(/cannot be inflated/);
  }
  const bomb = zipSeed([{ name: "disk.raw", data: Buffer.alloc(90 * MIB, "bomb"), isDeflated: true }]);
  expect(await refusal(bomb)).toMatch(/inflates to more than 200 times its size/);
});
