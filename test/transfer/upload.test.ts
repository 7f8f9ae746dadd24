import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { readdir, readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { ConnectionError } from "../../provider/errors.ts";
import type { Host } from "../../provider/host/hosts.ts";
import { importDisk, type ImportOptions } from "../../provider/transfer/import.ts";
import { PathTaken } from "../../provider/transfer/part.ts";
import { openSource } from "../../provider/transfer/source.ts";
import { createThrottle } from "../../provider/transfer/throttle.ts";
import { openUpload, type UploadOptions } from "../../provider/transfer/upload.ts";
import { lookAtVolume } from "../../provider/transfer/volume.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openDirectory } from "../bed/directory.ts";
import { type Libvirtd, openLibvirtd } from "../bed/libvirtd.ts";
import { guestByQemu, guestOf, mixedGuest, qemuImg, writeRaw } from "../image/qemu.ts";
import { createOwnHosts } from "../host/setup.ts";

const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");
const noise = (sizeBytes: number) => guestOf(sizeBytes, [{ offset: 0, length: sizeBytes, content: "noise" }]);

/** A pool of a private daemon, a folder for sources, and a host that is spoken to by libvirt alone. */
async function openBench(libvirtd: Libvirtd, pool = "default", poolPath = libvirtd.poolPath) {
  const directory = await openDirectory("upload");
  const hosts = createOwnHosts();
  const host: Host = hosts.open({ uri: libvirtd.uri });
  const inPool = (name: string) => join(poolPath, name);
  return {
    host,
    path: (name: string) => join(directory.path, name),
    inPool,
    look: async (name: string) => lookAtVolume(await host.libvirt(), pool, name),
    open: (name: string, options: Partial<UploadOptions> = {}) =>
      openUpload(host, {
        id: "import",
        pool,
        finalPath: inPool(name),
        isBlock: pool !== "default",
        capacityBytes: MIB,
        writer: "one",
        signal: new AbortController().signal,
        patienceMs: 1000,
        ...options,
      }),
    async run(file: string, name: string, options: Partial<ImportOptions> = {}) {
      await using source = await openSource({ file }, { checksum: undefined });
      return await importDisk(host, source, {
        id: name,
        finalPath: inPool(name),
        format: "qcow2",
        layout: "sparse",
        capacityBytes: Math.ceil(source.image.virtualSizeBytes / 512) * 512,
        stamp: { importId: name },
        signal: new AbortController().signal,
        upload: { pool, isBlock: pool !== "default", patienceMs: 1000 },
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

describe.skipIf(process.getuid!() !== 0)("an upload", () => {
  let libvirtd: Libvirtd;
  beforeAll(async () => {
    libvirtd = await openLibvirtd();
  }, 30_000);
  afterAll(async () => libvirtd[Symbol.asyncDispose]());

  for (const [format, layout] of [
    ["qcow2", "sparse"],
    ["qcow2", "compressed"],
    ["qcow2", "full"],
    ["raw", "sparse"],
    ["raw", "full"],
  ] as const) {
    it(`brings every byte into a ${format} volume that is ${layout}`, async () => {
      await using bench = await openBench(libvirtd);
      const guest = mixedGuest();
      const raw = await writeRaw(bench.path("disk.raw"), guest);
      const vmdk = bench.path("disk.vmdk");
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk);
      for (const [index, file] of [raw, vmdk].entries()) {
        const name = `${format}-${layout}-${index}`;
        const result = await bench.run(file, name, { format, layout });
        const finalPath = bench.inPool(name);
        if (format === "qcow2") await qemuImg("check", "-f", "qcow2", finalPath);
        const found = await guestByQemu(finalPath, format, bench.path("back.raw"));
        expect(sha256(found.subarray(0, guest.length))).toBe(sha256(guest));
        const bytes = await readFile(finalPath);
        expect(result.contentDigest).toBe(`sha256:${sha256(format === "raw" ? bytes : bytes.subarray(2 ** bytes.readUInt32BE(20)))}`);
        const { blocks, mode } = await stat(finalPath);
        expect(blocks * 512 > 20 * MIB).toBe(layout === "full");
        expect(result.allocatedBytes).toBe(blocks * 512);
        expect(mode & 0o777).toBe(0o600);
        expect(await bench.look(name)).toMatchObject({
          mark: undefined,
          modifiedAt: expect.stringMatching(/^[0-9]+[.][0-9]{9}$/),
          stamp: format === "qcow2" ? { importId: name } : undefined,
        });
      }
    });
  }

  it("is marked as unfinished and passes for no disk until its last write", async () => {
    await using bench = await openBench(libvirtd);
    await using part = await bench.open("marked");
    await part.write(64 * 1024, randomBytes(MIB));
    await part.write(0, Buffer.from("QFI\xfb", "latin1"));
    await part.settle();
    expect(await bench.look("marked")).toMatchObject({ mark: { importId: "import", writer: "one" }, stamp: undefined });
    expect(await qemuImg("info", bench.inPool("marked"))).toContain("file format: raw");
    await part.publish();
    expect((await bench.look("marked"))?.mark).toBeUndefined();
    expect((await readFile(bench.inPool("marked"))).subarray(0, 4).toString("latin1")).toBe("QFI\xfb");
  });

  it("never overwrites a volume, nor a file that libvirt has not seen", async () => {
    await using bench = await openBench(libvirtd);
    for (const name of ["known", "unseen"]) {
      await writeFile(bench.inPool(name), "somebody's");
      if (name === "known") await libvirtd.virsh("pool-refresh", "default");
      await expect(bench.open(name)).rejects.toThrow(PathTaken);
      expect(await readFile(bench.inPool(name), "utf8")).toBe("somebody's");
    }
  });

  it("stops when it is aborted, and goes on behind what arrived", async () => {
    await using bench = await openBench(libvirtd);
    const guest = noise(80 * MIB);
    const file = await writeRaw(bench.path("disk.raw"), guest);
    const stop = new AbortController();
    const onProgress = (done: number) => {
      if (done > 60 * MIB) stop.abort(new Error("the engine is gone"));
    };
    await expect(bench.run(file, "aborted", { onProgress, signal: stop.signal })).rejects.toThrow("the engine is gone");
    expect((await bench.look("aborted"))?.mark?.importId).toBe("aborted");
    const { sentBytes, keptBytes } = await bench.run(file, "aborted");
    expect(keptBytes).toBeGreaterThanOrEqual(16 * MIB);
    expect(sentBytes + keptBytes).toBeLessThan(82 * MIB);
    expect(sha256(await guestByQemu(bench.inPool("aborted"), "qcow2", bench.path("back.raw")))).toBe(sha256(guest));
  });

  it("stops at once when it is aborted while it waits for its share of the bandwidth", async () => {
    await using bench = await openBench(libvirtd);
    const stop = new AbortController();
    await using part = await bench.open("slow", { signal: stop.signal, throttle: createThrottle(1024) });
    await part.write(0, randomBytes(MIB));
    const settling = part.settle();
    stop.abort(new Error("the engine is gone"));
    await expect(settling).rejects.toThrow("the engine is gone");
  });

  it("goes on after its process was killed in its middle", async () => {
    await using bench = await openBench(libvirtd);
    const guest = noise(80 * MIB);
    const file = await writeRaw(bench.path("disk.raw"), guest);
    const module = (path: string) => JSON.stringify(join(import.meta.dirname, "../../provider", path));
    const program = `
      import { createHosts } from ${module("host/open.ts")};
      import { openUpload } from ${module("transfer/upload.ts")};
      import { readFile } from "node:fs/promises";
      const hosts = createHosts({ environment: {}, homeDirectory: "/", userName: "root", userId: 0 });
      const options = { id: "killed", pool: "default", finalPath: ${JSON.stringify(bench.inPool("killed"))}, isBlock: false };
      const part = await openUpload(hosts.open({ uri: ${JSON.stringify(libvirtd.uri)} }), {
        ...options, capacityBytes: 0, writer: "child", signal: new AbortController().signal,
      });
      await part.write(0, (await readFile(${JSON.stringify(file)})).subarray(0, 70 << 20));
      process.kill(process.pid, "SIGKILL");
    `;
    await expect(runCommand([process.execPath, "--input-type=module", "--eval", program])).rejects.toThrow(/SIGKILL/);
    expect((await bench.look("killed"))?.mark).toEqual({ importId: "killed", writer: "child" });
    const { keptBytes } = await bench.run(file, "killed", { format: "raw" });
    expect(keptBytes).toBeGreaterThanOrEqual(40 * MIB);
    expect(sha256(await readFile(bench.inPool("killed")))).toBe(sha256(guest));
  });

  it("goes on after libvirtd was killed in its middle", async () => {
    await using bench = await openBench(libvirtd);
    const guest = noise(80 * MIB);
    const file = await writeRaw(bench.path("disk.raw"), guest);
    let killed: Promise<void> | undefined;
    const onProgress = (done: number) => {
      if (done > 40 * MIB) killed ??= libvirtd.killDaemon();
    };
    await expect(bench.run(file, "daemon", { format: "raw", onProgress })).rejects.toThrow(ConnectionError);
    await killed;
    const { keptBytes } = await bench.run(file, "daemon", { format: "raw" });
    expect(keptBytes).toBeGreaterThan(0);
    expect(sha256(await readFile(bench.inPool("daemon")))).toBe(sha256(guest));
  });

  it("keeps nothing of another version of its source", async () => {
    await using bench = await openBench(libvirtd);
    const file = await writeRaw(bench.path("disk.raw"), noise(50 * MIB));
    for (const format of ["raw", "qcow2"] as const) {
      await writeRaw(file, noise(50 * MIB));
      const stop = new AbortController();
      const onProgress = (done: number) => {
        if (done >= 50 * MIB) stop.abort(new Error("cut"));
      };
      await expect(bench.run(file, `changed-${format}`, { format, onProgress, signal: stop.signal })).rejects.toThrow("cut");
      const later = mixedGuest();
      await writeRaw(file, later);
      await bench.run(file, `changed-${format}`, { format });
      const found = await guestByQemu(bench.inPool(`changed-${format}`), format, bench.path("back.raw"));
      expect(sha256(found)).toBe(sha256(later));
      expect((await stat(bench.inPool(`changed-${format}`))).size).toBeLessThan(22 * MIB);
    }
  });

  it("refuses a second writer while the first one writes, and hands over when that is silent", async () => {
    await using bench = await openBench(libvirtd);
    await using first = await bench.open("shared", { writer: "first" });
    let isWriting = true;
    const writing = (async () => {
      for (let at = 1; isWriting; at++) {
        await first.write(at * MIB, randomBytes(MIB));
        await first.settle();
      }
    })();
    await expect(bench.open("shared", { writer: "second" })).rejects.toThrow(/^another import is writing/);
    await expect(bench.open("shared", { id: "other", writer: "second" })).rejects.toThrow(PathTaken);
    isWriting = false;
    await writing;
    await using second = await bench.open("shared", { writer: "second" });
    await expect(first.publish()).rejects.toThrow(/^another import has taken over/);
    await expect(first.discard()).rejects.toThrow(/^another import has taken over/);
    await second.discard();
    expect(existsSync(bench.inPool("shared"))).toBe(false);
  });

  it("takes up a volume that was created and not yet marked", async () => {
    await using bench = await openBench(libvirtd);
    await using first = await bench.open("unmarked");
    const { sizeBytes } = (await bench.look("unmarked"))!;
    await first.discard();
    await runCommand(["truncate", "-s", String(sizeBytes), bench.inPool("unmarked")]);
    await using again = await bench.open("unmarked");
    await again.discard();
    await runCommand(["truncate", "-s", String(sizeBytes + 2), bench.inPool("unmarked")]);
    await expect(bench.open("unmarked")).rejects.toThrow(PathTaken);
  });

  it("says that its pool is gone, and goes on when it is back", async () => {
    await using bench = await openBench(libvirtd);
    const guest = noise(40 * MIB);
    const file = await writeRaw(bench.path("disk.raw"), guest);
    let stopped: Promise<string> | undefined;
    const onProgress = (done: number) => {
      if (done > 20 * MIB) stopped ??= libvirtd.virsh("pool-destroy", "default");
    };
    await expect(bench.run(file, "pool", { onProgress })).rejects.toThrow(/cannot write .*pool: .*not active/);
    await stopped;
    await libvirtd.virsh("pool-start", "default");
    await bench.run(file, "pool");
    expect(sha256(await guestByQemu(bench.inPool("pool"), "qcow2", bench.path("back.raw")))).toBe(sha256(guest));
  });

  it("says that the pool is full, and gives back the room that it took", async () => {
    await using small = await openLibvirtd({ poolMiB: 40 });
    await using bench = await openBench(small);
    const file = await writeRaw(bench.path("disk.raw"), noise(80 * MIB));
    for (const format of ["qcow2", "raw"] as const) {
      await expect(bench.run(file, "full", { format })).rejects.toThrow(/cannot write .*full: .*No space left on device/);
      expect(await readdir(small.poolPath)).toEqual([]);
    }
  });

  it("writes a partition of a disk pool, zeros what was there before, and the first sector last", async () => {
    await using disk = await openDiskPool(libvirtd);
    await using bench = await openBench(libvirtd, "disk", "/dev");
    await runCommand(["dd", "if=/dev/urandom", `of=${disk.device}`, "bs=1M", "count=60", "seek=1", "conv=notrunc", "status=none"]);
    const guest = mixedGuest();
    const file = await writeRaw(bench.path("disk.raw"), guest);
    const name = `${disk.name}p1`;
    const stop = new AbortController();
    const onProgress = (done: number) => {
      if (done >= 20 * MIB) stop.abort(new Error("cut"));
    };
    await expect(bench.run(file, name, { format: "raw", onProgress, signal: stop.signal })).rejects.toThrow("cut");
    expect(await bench.look(name)).toMatchObject({ isBlock: true, mark: { importId: name } });
    const result = await bench.run(file, name, { format: "raw" });
    const bytes = await readFile(`/dev/${name}`);
    expect(sha256(bytes.subarray(0, guest.length))).toBe(sha256(guest));
    expect(bytes.subarray(guest.length).every((byte) => byte === 0)).toBe(true);
    expect(result.contentDigest).toBe(`sha256:${sha256(bytes)}`);
    await expect(bench.run(file, name, { id: "other", format: "raw" })).rejects.toThrow(PathTaken);
  });
});

/** A running pool `disk` on a loop device of 128 MiB with an empty GPT. The daemon gets the devices that the kernel makes. */
async function openDiskPool(libvirtd: Libvirtd) {
  await using stack = new AsyncDisposableStack();
  const directory = stack.use(await openDirectory("loop"));
  const file = join(directory.path, "disk.img");
  await runCommand(["truncate", "-s", "128M", file]);
  const device = (await runCommand(["losetup", "--find", "--show", "--partscan", file])).stdout.trim();
  stack.defer(async () => void (await runCommand(["losetup", "--detach", device])));
  await libvirtd.run("mount", "-t", "devtmpfs", "devtmpfs", "/dev");
  stack.defer(async () => void (await libvirtd.run("umount", "/dev")));
  await libvirtd.virsh("pool-define-as", "disk", "disk", "--source-dev", device, "--source-format", "gpt", "--target", "/dev");
  stack.defer(async () => void (await libvirtd.virsh("pool-undefine", "disk")));
  await libvirtd.virsh("pool-build", "disk", "--overwrite");
  await libvirtd.virsh("pool-start", "disk");
  stack.defer(async () => void (await libvirtd.virsh("pool-destroy", "disk")));
  const held = stack.move();
  return { device, name: device.slice("/dev/".length), [Symbol.asyncDispose]: () => held.disposeAsync() };
}
