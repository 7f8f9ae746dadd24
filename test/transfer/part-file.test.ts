import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, stat, symlink, writeFile } from "node:fs/promises";
import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createHosts } from "../../provider/host/open.ts";
import { PathTaken } from "../../provider/transfer/part.ts";
import { FRAME_BYTES, openPartFile, WORK_FOLDER } from "../../provider/transfer/part-file.ts";
import { createThrottle } from "../../provider/transfer/throttle.ts";
import { openDirectory } from "../bed/directory.ts";

/** A folder that stands for a pool's, this machine as host, and the part of one import. */
async function openPool() {
  const directory = await openDirectory("pool");
  const hosts = createHosts({
    environment: process.env,
    homeDirectory: homedir(),
    userName: userInfo().username,
    userId: process.getuid!(),
  });
  const host = hosts.open({ uri: "qemu:///system" });
  const finalPath = join(directory.path, "disk.raw");
  return {
    path: directory.path,
    finalPath,
    host,
    open: (id = "import", lockPatienceMs = 2000) =>
      openPartFile(host, { id, finalPath, signal: new AbortController().signal, lockPatienceMs }),
    leftovers: async () => (await readdir(directory.path)).filter((name) => name !== "disk.raw"),
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

describe("a part file", () => {
  it("becomes the volume, with every byte in its place and nothing left beside it", async () => {
    await using pool = await openPool();
    const bytes = randomBytes(2 * FRAME_BYTES + 12345);
    await using part = await pool.open();
    await part.resume();
    await part.write(65536, bytes.subarray(65536));
    await part.settle();
    await part.write(0, bytes.subarray(0, 65536));
    await part.settle();
    expect(await part.digest(0)).toBe(sha256(bytes));
    expect(existsSync(pool.finalPath)).toBe(false);
    await part.publish(1_700_000_000);
    expect(sha256(await readFile(pool.finalPath))).toBe(sha256(bytes));
    const { mtimeMs, mode, nlink } = await stat(pool.finalPath);
    expect({ mtimeMs, mode: mode & 0o777, nlink }).toEqual({ mtimeMs: 1_700_000_000_000, mode: 0o600, nlink: 1 });
    expect(await pool.leftovers()).toEqual([]);
  });

  it("keeps nothing of an earlier run that this one does not write", async () => {
    for (const [earlier, sizeBytes] of [
      [randomBytes(2 * FRAME_BYTES), 2 * FRAME_BYTES + 4096],
      [randomBytes(2 * FRAME_BYTES), FRAME_BYTES],
      [randomBytes(4096), 2 * FRAME_BYTES],
    ] as const) {
      await using pool = await openPool();
      {
        await using part = await pool.open();
        await part.resume();
        await part.write(4096, earlier);
        await part.settle();
      }
      const expected = Buffer.alloc(sizeBytes);
      randomBytes(4096).copy(expected, 1024 * 1024);
      await using part = await pool.open();
      await part.resume();
      await part.write(1024 * 1024, expected.subarray(1024 * 1024, 1024 * 1024 + 4096));
      await part.settle();
      await part.setSize(sizeBytes);
      expect(await part.digest(0)).toBe(sha256(expected));
      await part.publish(1);
      expect(sha256(await readFile(pool.finalPath))).toBe(sha256(expected));
    }
  });

  it("ends where this run ends, when an earlier one went further", async () => {
    await using pool = await openPool();
    {
      await using part = await pool.open();
      await part.write(0, randomBytes(FRAME_BYTES + 4096));
      await part.settle();
    }
    await using part = await pool.open();
    await part.resume();
    await part.write(0, randomBytes(4096));
    await part.settle();
    await part.publish(1);
    expect((await stat(pool.finalPath)).size).toBe(4096);
  });

  it("begins whatever other imports begin and end beside it", async () => {
    await using directory = await openDirectory("crowd");
    await using pool = await openPool();
    const imports = Array.from({ length: 8 }, async (_, lane) => {
      for (let turn = 0; turn < 5; turn++) {
        const finalPath = join(directory.path, `${lane}-${turn}`);
        await using part = await openPartFile(pool.host, { id: `${lane}-${turn}`, finalPath, signal: new AbortController().signal });
        await part.publish(1);
      }
    });
    await Promise.all(imports);
    expect(await readdir(directory.path)).toHaveLength(8 * 5);
  }, 20_000);

  it("leaves holes where nothing was written", async () => {
    await using pool = await openPool();
    await using part = await pool.open();
    await part.write(0, randomBytes(4096));
    await part.write(512 * 1024 * 1024, randomBytes(4096));
    await part.settle();
    await part.setSize(1024 * 1024 * 1024);
    await part.settle();
    const { allocatedBytes } = await part.publish(1);
    expect(allocatedBytes).toBeLessThan(1024 * 1024);
    expect((await stat(pool.finalPath)).size).toBe(1024 * 1024 * 1024);
  });

  it("goes on where a killed run ended, and sends again what the host holds wrongly", async () => {
    await using pool = await openPool();
    const bytes = randomBytes(4 * FRAME_BYTES);
    {
      await using part = await pool.open();
      await part.write(0, bytes.subarray(0, 3 * FRAME_BYTES));
      await part.settle();
      await part.write(3 * FRAME_BYTES, bytes.subarray(3 * FRAME_BYTES, 3 * FRAME_BYTES + 4096));
    }
    expect(await pool.leftovers()).toEqual([WORK_FOLDER]);
    const partPath = join(pool.path, WORK_FOLDER, "import.part");
    const held = await readFile(partPath);
    held[FRAME_BYTES + 77]! ^= 1;
    await writeFile(partPath, held);

    await using part = await pool.open();
    expect(await part.resume()).toEqual({ frames: 3 });
    await part.write(0, bytes);
    await part.settle();
    expect({ kept: part.keptBytes, sent: part.sentBytes }).toEqual({ kept: 2 * FRAME_BYTES, sent: 2 * FRAME_BYTES });
    await part.publish(1);
    expect(sha256(await readFile(pool.finalPath))).toBe(sha256(bytes));
  });

  it("is refused when the path exists, and touches neither file nor folder", async () => {
    await using pool = await openPool();
    await writeFile(pool.finalPath, "somebody's");
    await expect(pool.open()).rejects.toThrow(PathTaken);
    expect(await readFile(pool.finalPath, "utf8")).toBe("somebody's");
    expect(await pool.leftovers()).toEqual([]);
  });

  it("is refused when the path is a link that leads nowhere", async () => {
    await using pool = await openPool();
    await symlink(join(pool.path, "nowhere"), pool.finalPath);
    await expect(pool.open()).rejects.toThrow(PathTaken);
  });

  it("never overwrites a file that appeared while it was written, and removes itself", async () => {
    await using pool = await openPool();
    await using part = await pool.open();
    await part.write(0, randomBytes(4096));
    await part.settle();
    await writeFile(pool.finalPath, "somebody's");
    await expect(part.publish(1)).rejects.toThrow(`${pool.finalPath} exists on this machine and is not overwritten`);
    expect(await readFile(pool.finalPath, "utf8")).toBe("somebody's");
    expect(await pool.leftovers()).toEqual([]);
  });

  it("stops at once when it is told to while it waits for its share of the bandwidth, and goes on later", async () => {
    await using pool = await openPool();
    const stop = new AbortController();
    const options = { id: "import", finalPath: pool.finalPath };
    const bytes = randomBytes(FRAME_BYTES + 4096);
    {
      await using part = await openPartFile(pool.host, { ...options, signal: stop.signal, throttle: createThrottle(1024) });
      await part.write(0, bytes);
      const settling = part.settle();
      stop.abort(new Error("the engine is gone"));
      await expect(settling).rejects.toThrow();
    }
    await using part = await pool.open();
    await part.resume();
    await part.write(0, bytes);
    await part.settle();
    expect(await part.digest(0)).toBe(sha256(bytes));
  });

  it("has one writer at a time", async () => {
    await using pool = await openPool();
    const first = await pool.open();
    await expect(pool.open("import", 0)).rejects.toThrow("another import is writing");
    const second = pool.open("import", 5000);
    await first[Symbol.asyncDispose]();
    await using part = await second;
    await part.discard();
    expect(await pool.leftovers()).toEqual([]);
  });

  it("lets two imports to one path write, and one of them publish", async () => {
    await using pool = await openPool();
    await using one = await pool.open("one");
    await using two = await pool.open("two");
    await one.write(0, Buffer.from("one"));
    await two.write(0, Buffer.from("two"));
    await Promise.all([one.settle(), two.settle()]);
    const results = await Promise.allSettled([one.publish(1), two.publish(1)]);
    expect(results.map((result) => result.status).toSorted()).toEqual(["fulfilled", "rejected"]);
    expect(await readFile(pool.finalPath, "utf8")).toBe(results[0]!.status === "fulfilled" ? "one" : "two");
    expect(await pool.leftovers()).toEqual([]);
  });

  it("refuses a work folder that is a link", async () => {
    await using pool = await openPool();
    await mkdir(join(pool.path, "elsewhere"));
    await symlink(join(pool.path, "elsewhere"), join(pool.path, WORK_FOLDER));
    await expect(pool.open()).rejects.toThrow("is a symbolic link");
    expect(await readdir(join(pool.path, "elsewhere"))).toEqual([]);
  });

  it("keeps a stamp that is bound to the file", async () => {
    await using pool = await openPool();
    await using part = await pool.open();
    await part.write(0, Buffer.from("bytes"));
    await part.settle();
    await part.stamp(Buffer.from('{"importId":"import"}'));
    await part.publish(1);
    const stamp = await readFile(join(pool.path, WORK_FOLDER, "import.stamp"), "utf8");
    expect(stamp).toBe(`${(await stat(pool.finalPath)).ino}\n{"importId":"import"}`);
  });
});
