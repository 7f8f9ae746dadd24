import { execFile } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { mkdir, readdir, readFile, truncate, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { DiskError } from "../../provider/errors.ts";
import { lookAhead, openSource, type OpenSource, type SourceOptions, type SourceSpec } from "../../provider/transfer/source.ts";
import { openDirectory } from "../bed/directory.ts";
import { guestOf, mixedGuest, qemuImg, writeRaw } from "../image/qemu.ts";
import { openWebServer } from "./web-server.ts";

const execute = promisify(execFile);
const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

const PROGRAMS = { gz: ["gzip", "-k"], xz: ["xz", "-k", "-1"], zst: ["zstd", "-q"] } as const;

/** A folder for images and another for temporary copies. */
async function openBench() {
  const directory = await openDirectory("wrapped");
  const scratchFolder = join(directory.path, "scratch");
  await mkdir(scratchFolder);
  return {
    path: (name: string) => join(directory.path, name),
    scratchFolder,
    async wrap(file: string, kind: keyof typeof PROGRAMS, ...options: readonly string[]): Promise<string> {
      const [program, ...rest] = PROGRAMS[kind];
      await execute(program, [...rest, ...options, file]);
      return `${file}.${kind}`;
    },
    open: (spec: SourceSpec, options: SourceOptions = {}) => openSource(spec, { scratchFolder, ...options }),
    lookAhead: (spec: SourceSpec, options: SourceOptions = {}) => lookAhead(spec, { scratchFolder, ...options }),
    [Symbol.asyncDispose]: () => directory[Symbol.asyncDispose](),
  };
}

/** All bytes that an import would read. */
async function bytesOf({ files: [file] }: OpenSource): Promise<Buffer> {
  const parts: Buffer[] = [];
  let at = 0;
  for (let part = await file!.read(0, MIB); part.length > 0; part = await file!.read(at, MIB)) {
    parts.push(part);
    at += part.length;
  }
  return Buffer.concat(parts);
}

describe("a wrapped image", () => {
  for (const kind of ["gz", "xz", "zst"] as const) {
    it(`is read as if it were not wrapped in ${kind}, whatever its format, and leaves no file behind`, async () => {
      await using bench = await openBench();
      const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
      const images = { raw, qcow2: bench.path("disk.qcow2"), vmdk: bench.path("disk.vmdk"), vhdx: bench.path("disk.vhdx") };
      await qemuImg("convert", "-f", "raw", "-O", "qcow2", raw, images.qcow2);
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, images.vmdk);
      await qemuImg("convert", "-f", "raw", "-O", "vhdx", raw, images.vhdx);
      for (const [format, image] of Object.entries(images)) {
        const file = await bench.wrap(image, kind);
        await using source = await bench.open({ file });
        expect(source.image.format).toBe(format);
        expect(sha256(await bytesOf(source))).toBe(sha256(await readFile(image)));
        expect(source.files[0]!.wrappedDigest).toBe(sha256(await readFile(file)));
        expect((await source.runs()).dataBytes).toBeGreaterThan(0);
        expect(await readdir(bench.scratchFolder)).toEqual([]);
      }
    });
  }

  it("tells its size in preview where its header or its wrapping does, without reading it whole", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), guestOf(12 * MIB, [{ offset: 0, length: 8 * MIB, content: "noise" }]));
    const qcow2 = bench.path("disk.qcow2");
    await qemuImg("convert", "-f", "raw", "-O", "qcow2", raw, qcow2);
    const size = async (file: string) => (await bench.lookAhead({ file }))!.image?.virtualSizeBytes;
    expect(await size(await bench.wrap(qcow2, "gz"))).toBe(12 * MIB);
    expect(await size(await bench.wrap(raw, "zst"))).toBe(12 * MIB);
    expect(await size(await bench.wrap(qcow2, "xz"))).toBe(12 * MIB);
    expect(await size(await bench.wrap(raw, "gz"))).toBeUndefined();
    const { notes } = (await bench.lookAhead({ file: `${raw}.zst` }))!;
    expect(notes).toContainEqual(
      `it is wrapped in zstd: a temporary copy of up to 12.0 MiB lies in ${bench.scratchFolder} during the import`,
    );
    expect(await bench.lookAhead({ file: raw })).toBeUndefined();
  });

  it("may be several frames, streams or members one after the other, wherever a read ends", async () => {
    await using bench = await openBench();
    const parts = [randomBytes(MIB - 7), randomBytes(3), Buffer.alloc(MIB), randomBytes(2 * MIB + 4)];
    const whole = sha256(Buffer.concat(parts));
    const skippable = Buffer.from("502a4d18040000006a756e6b", "hex");
    const wrapped = { gz: parts.map((part) => gzipSync(part)), zst: [...parts.map((part) => zstdCompressSync(part)), skippable] };
    for (const [kind, pieces] of Object.entries(wrapped)) {
      const file = bench.path(`many.${kind}`);
      await writeFile(file, Buffer.concat(pieces));
      await using source = await bench.open({ file });
      expect(sha256(await bytesOf(source))).toBe(whole);
    }
    const file = bench.path("many.xz");
    const streams = [];
    for (const [index, part] of parts.entries()) {
      await writeFile(bench.path(`part${index}`), part);
      streams.push(await readFile(await bench.wrap(bench.path(`part${index}`), "xz")));
    }
    await writeFile(file, Buffer.concat(streams));
    await using source = await bench.open({ file });
    expect(sha256(await bytesOf(source))).toBe(whole);
  });

  it("must have the checksum that is promised, which is that of the wrapped file", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    const file = await bench.wrap(raw, "gz");
    await using source = await bench.open({ file }, { checksum: `sha256:${sha256(await readFile(file))}` });
    expect(source.notes).toEqual([]);
    const wrong = `sha256:${sha256(await readFile(raw))}`;
    await expect(bench.open({ file }, { checksum: wrong })).rejects.toThrow(/disk\.raw\.gz is damaged: its sha256 is [0-9a-f]{64}, and/);
  });

  it("is refused when it is cut or damaged anywhere", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), guestOf(2 * MIB, [{ offset: 0, length: MIB, content: "noise" }]));
    for (const kind of ["gz", "xz", "zst"] as const) {
      const file = await bench.wrap(raw, kind);
      const bytes = await readFile(file);
      for (const kept of [10, bytes.length >> 1, bytes.length - 1]) {
        await truncate(file, kept);
        await expect(bench.open({ file })).rejects.toThrow(/cannot be inflated/);
      }
      const flipped = Buffer.from(bytes);
      flipped[bytes.length >> 1]! ^= 0x10;
      await writeFile(file, flipped);
      // A bit of stored noise is noise as well: only a checksum tells.
      await expect(bench.open({ file })).rejects.toThrow(/cannot be inflated/);
    }
    expect(await readdir(bench.scratchFolder)).toEqual([]);
  });

  it("is refused when it grows as no disk does, in bounded room", async () => {
    await using bench = await openBench();
    const bomb = bench.path("bomb");
    await writeFile(bomb, Buffer.alloc(90 * MIB, "bomb"));
    for (const kind of ["gz", "xz", "zst"] as const) {
      const file = await bench.wrap(bomb, kind);
      await expect(bench.open({ file })).rejects.toThrow(/inflates to more than 200 times its size/);
    }
  });

  it("is refused when more is inside than its own header declares", async () => {
    await using bench = await openBench();
    const image = bench.path("small.qcow2");
    await qemuImg("create", "-f", "qcow2", image, "1M");
    await writeFile(bench.path("long.qcow2"), Buffer.concat([await readFile(image), randomBytes(70 * MIB)]));
    const file = await bench.wrap(bench.path("long.qcow2"), "gz", "-1");
    await expect(bench.open({ file })).rejects.toThrow(/it holds more than 66\.0 MiB, and its header declares less than half of that/);
  });

  it("is refused when it asks for more memory than a disk's compressor does", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    await execute("xz", ["-k", "--lzma2=dict=256MiB", raw]);
    await expect(bench.open({ file: `${raw}.xz` })).rejects.toThrow(/its dictionary is larger than 64 MiB/);
    const greedy = zstdCompressSync(Buffer.from("x"));
    // A window of 2^41 bytes, without the single-segment flag. Source: RFC 8878, section 3.1.1.1.2.
    const frame = Buffer.concat([greedy.subarray(0, 4), Buffer.from([0x00, 31 << 3]), Buffer.from([0x01, 0x00, 0x00])]);
    await writeFile(bench.path("greedy.zst"), frame);
    await expect(bench.open({ file: bench.path("greedy.zst") })).rejects.toThrow(/what is wrapped in zstd cannot be inflated/);
  });

  it.skipIf(process.getuid!() !== 0)("says where there is no room for its copy, and gives the room back", async () => {
    await using bench = await openBench();
    await execute("mount", ["-t", "tmpfs", "-o", "size=4m", "tmpfs", bench.scratchFolder]);
    try {
      const raw = await writeRaw(bench.path("disk.raw"), guestOf(9 * MIB, [{ offset: 0, length: 9 * MIB, content: "noise" }]));
      const file = await bench.wrap(raw, "gz");
      const refusal = bench.open({ file });
      await expect(refusal).rejects.toThrow(/scratch has no room for a temporary copy of the source .*virtlift:scratch/);
      await expect(refusal).rejects.toBeInstanceOf(DiskError);
      const { stdout } = await execute("df", ["--output=used", "-k", bench.scratchFolder]);
      expect(Number(stdout.split("\n")[1])).toBeLessThan(64);
    } finally {
      await execute("umount", ["-l", bench.scratchFolder]);
    }
  });
});

describe("an OVA", () => {
  async function writeOva(bench: Awaited<ReturnType<typeof openBench>>, disk: string, more = ""): Promise<string> {
    const name = basename(disk);
    const ovf = `<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
      xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
      <References><File ovf:id="f" ovf:href="${name}" ${more}/></References>
      <DiskSection><Info/><Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="20973056"/></DiskSection>
      <VirtualSystem ovf:id="web"><Info/><VirtualHardwareSection><Info/>
        <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>5</rasd:ResourceType><rasd:Address>0</rasd:Address></Item>
        <Item><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType><rasd:Parent>1</rasd:Parent>
          <rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d</rasd:HostResource></Item>
      </VirtualHardwareSection></VirtualSystem></Envelope>`;
    await writeFile(bench.path("web.ovf"), ovf);
    const manifest = [bench.path("web.ovf"), disk].map(async (file) => `SHA256(${basename(file)})= ${sha256(await readFile(file))}\n`);
    await writeFile(bench.path("web.mf"), (await Promise.all(manifest)).join(""));
    await execute("tar", ["-C", bench.path("."), "--format=ustar", "-cf", bench.path("web.ova"), "web.ovf", "web.mf", name]);
    return bench.path("web.ova");
  }

  it("may be wrapped as a whole", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, bench.path("disk.vmdk"));
    const ova = await writeOva(bench, bench.path("disk.vmdk"));
    for (const kind of ["gz", "xz", "zst"] as const) {
      const wrapped = await bench.wrap(ova, kind);
      expect((await bench.lookAhead({ ova: wrapped }))!.image).toBeUndefined();
      await using source = await bench.open({ ova: wrapped }, { checksum: `sha256:${sha256(await readFile(wrapped))}` });
      expect(source.image.variant).toBe("streamOptimized");
      expect(sha256(await bytesOf(source))).toBe(sha256(await readFile(bench.path("disk.vmdk"))));
    }
  });

  it("may hold a disk that OVF calls compressed, whose digest in the manifest is that of the compressed file", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    const wrapped = await bench.wrap(raw, "gz");
    const ova = await writeOva(bench, wrapped, 'ovf:compression="gzip"');
    expect((await bench.lookAhead({ ova }))!.notes.join(" ")).toMatch(/it is wrapped in gzip/);
    await using source = await bench.open({ ova });
    expect(sha256(await bytesOf(source))).toBe(sha256(await readFile(raw)));
    expect(source.notes).not.toContainEqual(expect.stringMatching(/no checksum vouches/));
    const bytes = await readFile(ova);
    // The time in gzip's header: nothing but the digest shows the change.
    bytes[bytes.indexOf(await readFile(wrapped)) + 4]! ^= 1;
    await writeFile(ova, bytes);
    await expect(bench.open({ ova })).rejects.toThrow(/disk\.raw\.gz is damaged: its sha256/);
  });

  it("is read through a web server by its member alone, or whole where its checksum is promised", async () => {
    await using bench = await openBench();
    await using server = await openWebServer();
    const noise = await writeRaw(bench.path("disk.raw"), guestOf(12 * MIB, [{ offset: 0, length: 9 * MIB, content: "noise" }]));
    await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", noise, bench.path("disk.vmdk"));
    const bytes = await readFile(await writeOva(bench, bench.path("disk.vmdk")));
    server.files.set("/web.ova", { bytes });
    const url = `${server.origin}/web.ova`;
    for (const options of [{}, { checksum: `sha256:${sha256(bytes)}` }]) {
      expect((await bench.lookAhead({ url }, options)) !== undefined).toBe("checksum" in options);
      await using source = await bench.open({ url }, options);
      expect(source.packed?.disk.place?.name).toBe("disk.vmdk");
      expect(sha256(await bytesOf(source))).toBe(sha256(await readFile(bench.path("disk.vmdk"))));
    }
    await expect(bench.open({ url }, { checksum: `sha256:${"0".repeat(64)}` })).rejects.toThrow(/web\.ova is damaged/);
  });

  it("must itself have the checksum that is promised", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, bench.path("disk.vmdk"));
    const ova = await writeOva(bench, bench.path("disk.vmdk"));
    await using source = await bench.open({ ova }, { checksum: `sha256:${sha256(await readFile(ova))}` });
    expect(source.image.format).toBe("vmdk");
    await expect(bench.open({ ova }, { checksum: `sha256:${"0".repeat(64)}` })).rejects.toThrow(/web\.ova is damaged/);
  });
});
