import { execFile } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { appendFileSync } from "node:fs";
import { mkdir, open, readdir, readFile, stat, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";
import { DiskError } from "../../provider/errors.ts";
import { importDisk, type ImportOptions } from "../../provider/transfer/import.ts";
import { PathTaken } from "../../provider/transfer/part.ts";
import { WORK_FOLDER } from "../../provider/transfer/part-file.ts";
import { probe } from "../../provider/transfer/probe.ts";
import { openSource, type SourceSpec } from "../../provider/transfer/source.ts";
import { openDirectory } from "../bed/directory.ts";
import { guestByQemu, guestOf, mixedGuest, qemuImg, qemuIo, writeRaw } from "../image/qemu.ts";
import { createOwnHosts } from "../host/setup.ts";

const execute = promisify(execFile);

const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** A folder of sources, a folder that stands for a pool's, and this machine as host. */
async function openBench() {
  const directory = await openDirectory("import");
  const hosts = createOwnHosts();
  const host = hosts.open({ uri: "qemu:///system" });
  const pool = join(directory.path, "pool");
  await mkdir(pool);
  return {
    host,
    pool,
    path: (name: string) => join(directory.path, name),
    async run(spec: SourceSpec, options: Partial<ImportOptions> & { checksum?: string } = {}) {
      await using source = await openSource(spec, { checksum: options.checksum });
      return await importDisk(host, source, {
        id: "import",
        finalPath: join(pool, "disk"),
        format: "qcow2",
        layout: "sparse",
        capacityBytes: Math.ceil(source.image.virtualSizeBytes / 512) * 512,
        stamp: { importId: "import" },
        signal: new AbortController().signal,
        onProgress: () => {},
        ...options,
      });
    },
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

const SOURCES = {
  raw: [],
  qcow2: ["-O", "qcow2"],
  "qcow2 compressed": ["-O", "qcow2", "-c"],
  "qcow2 of 4 KiB clusters": ["-O", "qcow2", "-o", "cluster_size=4096"],
  "vmdk monolithicSparse": ["-O", "vmdk"],
  "vmdk streamOptimized": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
  "vmdk twoGbMaxExtentSparse": ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"],
  "vmdk monolithicFlat": ["-O", "vmdk", "-o", "subformat=monolithicFlat"],
  "vhd dynamic": ["-O", "vpc", "-o", "force_size=on"],
  vhdx: ["-O", "vhdx"],
  vdi: ["-O", "vdi"],
} as const;

const TARGETS = [
  ["qcow2", "sparse"],
  ["qcow2", "compressed"],
  ["qcow2", "full"],
  ["raw", "sparse"],
] as const;

describe("an import", () => {
  for (const [kind, convert] of Object.entries(SOURCES)) {
    it(`brings every byte of a ${kind} source into every layout`, async () => {
      await using bench = await openBench();
      const guest = mixedGuest();
      const raw = await writeRaw(bench.path("disk.raw"), guest);
      const file = convert.length === 0 ? raw : bench.path("disk.image");
      if (convert.length > 0) await qemuImg("convert", "-f", "raw", ...convert, raw, file);
      for (const [format, layout] of TARGETS) {
        const finalPath = join(bench.pool, `${format}-${layout}`);
        const result = await bench.run({ file }, { finalPath, format, layout, id: `${format}-${layout}`, verify: "content" });
        if (format === "qcow2") await qemuImg("check", "-f", "qcow2", finalPath);
        const found = await guestByQemu(finalPath, format, bench.path("back.raw"));
        expect(sha256(found.subarray(0, guest.length))).toBe(sha256(guest));
        expect(found.subarray(guest.length).every((byte) => byte === 0)).toBe(true);
        const bytes = await readFile(finalPath);
        expect(result.contentDigest).toBe(`sha256:${sha256(format === "raw" ? bytes : bytes.subarray(clusterOf(bytes)))}`);
        expect((await stat(finalPath)).blocks * 512).toBeLessThan(layout === "full" ? 24 * MIB : 5 * MIB);
      }
    });
  }

  it("tells the digest of the source file, of its sha256sum lines where there are several", async () => {
    await using bench = await openBench();
    const raw = await writeRaw(bench.path("disk.raw"), mixedGuest());
    const lineOf = async (name: string) => `${sha256(await readFile(bench.path(name)))}  ${name}\n`;
    const one = await bench.run({ file: raw }, { finalPath: join(bench.pool, "one") });
    expect(one.sourceDigest).toBe(`sha256:${sha256(await readFile(raw))}`);
    await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, bench.path("flat.vmdk"));
    const two = await bench.run({ file: bench.path("flat.vmdk") }, { finalPath: join(bench.pool, "two") });
    const lines = `${await lineOf("flat.vmdk")}${await lineOf("flat-flat.vmdk")}`;
    expect(two.sourceDigest).toBe(`sha256:${sha256(Buffer.from(lines))}`);
  });

  it("reads no large holes, and tells a digest of the data where nobody vouches for the file", async () => {
    await using bench = await openBench();
    const file = bench.path("holes.raw");
    const sizeBytes = 1100 * MIB;
    const blocks = [0, 5 * MIB, sizeBytes - 65_536].map((offset) => ({ offset, bytes: randomBytes(65_536) }));
    const [whole, data] = [createHash("sha256"), createHash("sha256")];
    const zeros = Buffer.alloc(MIB);
    let at = 0;
    {
      await using handle = await open(file, "w");
      for (const { offset, bytes } of blocks) {
        for (; at < offset; at += MIB) whole.update(zeros.subarray(0, Math.min(MIB, offset - at)));
        await handle.write(bytes, 0, bytes.length, offset);
        const place = Buffer.alloc(8);
        place.writeBigUInt64BE(BigInt(offset));
        whole.update(bytes);
        data.update(place).update(bytes);
        at = offset + bytes.length;
      }
    }
    let largestStepBytes = 0;
    let lastBytes = 0;
    const onProgress = (doneBytes: number) => {
      largestStepBytes = Math.max(largestStepBytes, doneBytes - lastBytes);
      lastBytes = doneBytes;
    };
    const { sourceDigest, sentBytes } = await bench.run({ file }, { onProgress });
    expect(await qemuImg("compare", "-f", "raw", "-F", "qcow2", file, join(bench.pool, "disk"))).toContain("identical");
    expect({ lastBytes, isPassed: largestStepBytes > 1000 * MIB }).toEqual({ lastBytes: sizeBytes, isPassed: true });
    expect(sentBytes).toBeLessThan(MIB);
    const dataDigest = `sha256-data:${data.digest("hex")}`;
    expect(sourceDigest).toBe(dataDigest);
    const checksum = `sha256:${whole.digest("hex")}`;
    const raw = { format: "raw", checksum, id: "raw", finalPath: join(bench.pool, "raw") } as const;
    expect(await bench.run({ file }, raw)).toMatchObject({ sourceDigest: checksum, contentDigest: dataDigest });
    expect(await qemuImg("compare", "-f", "raw", "-F", "raw", file, raw.finalPath)).toContain("identical");

    // A qcow2 that was written from its end: the order of its clusters is not that of its disk.
    const backwards = bench.path("backwards.qcow2");
    await qemuImg("create", "-q", "-f", "qcow2", backwards, String(sizeBytes));
    await qemuIo(backwards, "qcow2", "write -P 7 1000M 64k", "write -P 3 0 64k");
    const finalPath = join(bench.pool, "backwards");
    const { contentDigest } = await bench.run({ file: backwards }, { format: "raw", id: "backwards", finalPath });
    const digest = createHash("sha256").update(await readFile(finalPath));
    expect(contentDigest).toBe(`sha256:${digest.digest("hex")}`);
  });

  it("grows the disk to a larger capacity", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), mixedGuest());
    await bench.run({ file }, { capacityBytes: 64 * MIB });
    const { "virtual-size": size } = JSON.parse(await qemuImg("info", "--output=json", "-f", "qcow2", join(bench.pool, "disk"))) as Record<
      string,
      unknown
    >;
    expect(size).toBe(64 * MIB);
  });

  it("leaves its stamp where it can be read, and notices when the volume is written", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), mixedGuest());
    for (const format of ["qcow2", "raw"] as const) {
      const finalPath = join(bench.pool, format);
      await bench.run({ file }, { finalPath, format, id: format, stamp: { importId: format } });
      expect((await probe(bench.host, finalPath, format)).file).toMatchObject({ stamp: { importId: format }, untouched: true });
      appendFileSync(finalPath, "guest");
      expect((await probe(bench.host, finalPath, format)).file).toMatchObject({ stamp: { importId: format }, untouched: false });
    }
  });

  it("meets the promised checksum in any algorithm, or leaves nothing", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), mixedGuest());
    const digest = (algorithm: string, bytes: Uint8Array) => `${algorithm}:${createHash(algorithm).update(bytes).digest("hex")}`;
    const bytes = await readFile(file);
    for (const algorithm of ["sha1", "sha256", "sha512"]) {
      await bench.run({ file }, { id: algorithm, finalPath: join(bench.pool, algorithm), checksum: digest(algorithm, bytes) });
    }
    const wrong = bench.run({ file }, { checksum: digest("sha256", Buffer.from("other")) });
    await expect(wrong).rejects.toThrow(/disk\.raw is damaged: its sha256 is [0-9a-f]{64}, and [0-9a-f]{64} was promised/);
    expect((await readdir(bench.pool)).toSorted()).toEqual(["sha1", "sha256", "sha512"]);
  });

  it("refuses a source that is written while it is read, and leaves nothing", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), mixedGuest());
    let touched = false;
    const onProgress = () => {
      if (!touched) appendFileSync(file, "more");
      touched = true;
    };
    await expect(bench.run({ file }, { onProgress })).rejects.toThrow(/disk\.raw changed while it was read/);
    expect(await readdir(bench.pool)).toEqual([]);
  });

  it("refuses a source that is cut while it is read, and leaves nothing", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), guestOf(40 * MIB, [{ offset: 0, length: 40 * MIB, content: "noise" }]));
    const onProgress = () => void truncate(file, 10 * MIB);
    await expect(bench.run({ file }, { onProgress })).rejects.toThrow(/ends early/);
    expect(await readdir(bench.pool)).toEqual([]);
  });

  it("stops when it is aborted, keeps what it has, and goes on from there", async () => {
    await using bench = await openBench();
    const guest = guestOf(80 * MIB, [{ offset: 0, length: 80 * MIB, content: "noise" }]);
    const file = await writeRaw(bench.path("disk.raw"), guest);
    const stop = new AbortController();
    const onProgress = (done: number) => {
      if (done > 60 * MIB) stop.abort(new Error("the engine is gone"));
    };
    await expect(bench.run({ file }, { onProgress, signal: stop.signal })).rejects.toThrow("the engine is gone");
    expect(await readdir(bench.pool)).toEqual([WORK_FOLDER]);
    const { sentBytes, keptBytes } = await bench.run({ file });
    expect(keptBytes).toBeGreaterThanOrEqual(16 * MIB);
    expect(sentBytes + keptBytes).toBeLessThan(82 * MIB);
    expect(sha256(await guestByQemu(join(bench.pool, "disk"), "qcow2", bench.path("back.raw")))).toBe(sha256(guest));
    expect(await readdir(bench.pool)).toEqual(["disk"]);
  });

  it.skipIf(process.getuid!() !== 0)("says that the disk is full, and gives back the room that it took", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), guestOf(80 * MIB, [{ offset: 0, length: 80 * MIB, content: "noise" }]));
    await execute("mount", ["-t", "tmpfs", "-o", "size=40m", "tmpfs", bench.pool]);
    try {
      await expect(bench.run({ file })).rejects.toThrow(/^cannot write .*disk on this machine: .*No space left on device/);
      expect(await readdir(bench.pool)).toEqual([]);
    } finally {
      await execute("umount", ["-l", bench.pool]);
    }
  });

  it("never overwrites what is there", async () => {
    await using bench = await openBench();
    const file = await writeRaw(bench.path("disk.raw"), mixedGuest());
    await writeFile(join(bench.pool, "disk"), "somebody's");
    await expect(bench.run({ file })).rejects.toThrow(PathTaken);
    expect(await readFile(join(bench.pool, "disk"), "utf8")).toBe("somebody's");
    expect(await readdir(bench.pool)).toEqual(["disk"]);
  });

  it("says in one sentence what is wrong with a source before anything is written", async () => {
    await using bench = await openBench();
    const missing = bench.path("missing.vmdk");
    await expect(bench.run({ file: missing })).rejects.toThrow(`there is no file ${missing}`);
    await expect(bench.run({ file: bench.pool })).rejects.toThrow(`${bench.pool} is not a regular file`);
    const backed = bench.path("backed.qcow2");
    await qemuImg("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backed);
    const refusal = bench.run({ file: backed });
    await expect(refusal).rejects.toThrow(/backed\.qcow2: .*backing file/);
    await expect(refusal).rejects.toBeInstanceOf(DiskError);
    expect(await readdir(bench.pool)).toEqual([]);
  });
});

/** The cluster size in a qcow2's header, which is where its content begins. */
function clusterOf(header: Buffer): number {
  return 2 ** header.readUInt32BE(20);
}
