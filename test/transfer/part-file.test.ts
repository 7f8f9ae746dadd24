import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { link, mkdir, readdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { PathTaken } from "../../provider/transfer/part.ts";
import { FRAME_BYTES, openPartFile, type PartFile, WORK_FOLDER } from "../../provider/transfer/part-file.ts";
import { createThrottle } from "../../provider/transfer/throttle.ts";
import { openDirectory } from "../bed/directory.ts";
import { createOwnHosts } from "../host/setup.ts";

/** A folder that stands for a pool's, this machine as host, and the part of one import. Programs in `programs` hide the machine's. */
async function openPool(programs: Readonly<Record<string, string>> = {}) {
  const directory = await openDirectory("pool");
  const tools = await openDirectory("tools");
  for (const [name, script] of Object.entries(programs)) await writeFile(join(tools.path, name), script, { mode: 0o755 });
  const hosts = createOwnHosts({ ...process.env, PATH: `${tools.path}:${process.env["PATH"]}` });
  const host = hosts.open({ uri: "qemu:///system" });
  const finalPath = join(directory.path, "disk.raw");
  return {
    path: directory.path,
    finalPath,
    host,
    open: (id = "import", lockPatienceMs = 2000) =>
      openPartFile(host, { id, finalPath, signal: new AbortController().signal, lockPatienceMs }),
    /** As over a wire that takes so many bytes per second. */
    openFar: (bytesPerSecond: number) => {
      const far = { label: host.label, isLocal: false, stream: host.stream.bind(host) };
      return openPartFile(far, { id: "import", finalPath, signal: new AbortController().signal, throttle: createThrottle(bytesPerSecond) });
    },
    leftovers: async () => (await readdir(directory.path)).filter((name) => name !== "disk.raw"),
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await tools[Symbol.asyncDispose]();
      await directory[Symbol.asyncDispose]();
    },
  };
}

/** Frames of which each packs to a quarter. */
function compressible(frames: number): Buffer {
  const noise = randomBytes(FRAME_BYTES / 4);
  const bytes = Buffer.alloc(frames * FRAME_BYTES);
  for (let at = 0; at < bytes.length; at += FRAME_BYTES) noise.copy(bytes, at);
  return bytes;
}

/** A zstd that does its work while it is tried with little, and then something else. */
function zstdThat(does: string): string {
  return `#!/bin/sh
file=$(mktemp)
trap 'rm -f -- "$file"' EXIT
cat >"$file"
set -- "$(command -p -v zstd)" "$@"
[ "$(stat -c %s -- "$file")" -lt 1000 ] || { ${does}; }
"$@" <"$file"
`;
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

  it("comes packed over a wire that is slower than packing", async () => {
    await using pool = await openPool();
    const noise = randomBytes(FRAME_BYTES / 4);
    const bytes = Buffer.alloc(12 * FRAME_BYTES + 12345);
    for (let at = 0; at < bytes.length; at += FRAME_BYTES) noise.copy(bytes, at);
    await using part = await pool.openFar(32_000_000);
    await part.resume();
    await part.write(0, bytes);
    await part.settle();
    // Some frames go plain first: what packing brings has to be found out.
    expect(part.sentBytes).toBeLessThan(0.75 * bytes.length);
    expect(part.sentBytes).toBeGreaterThan(0.25 * bytes.length);
    await part.publish(1);
    expect(sha256(await readFile(pool.finalPath))).toBe(sha256(bytes));
  });

  it("comes plain where the host's zstd does not work", async () => {
    await using pool = await openPool({ zstd: "#!/bin/sh\nexit 127\n" });
    const bytes = compressible(10);
    await using part = await pool.openFar(100_000_000);
    await part.resume();
    await part.write(0, bytes);
    await part.settle();
    expect(part.sentBytes).toBe(bytes.length);
  });

  it.each([
    [
      "fails with a word",
      "echo 'zstd: out of memory' >&2; exit 1",
      /: zstd failed there: zstd: out of memory; what was brought over is kept/,
    ],
    ["fails without one", "exit 127", /: zstd failed there; what was brought over is kept/],
    ["is killed", "kill -9 $$", /: zstd failed there: .*; what was brought over is kept/],
    ["stops short", "exit 0", /does not hold the bytes that were sent/],
  ])("takes no byte of a frame for a command when a zstd that worked %s", async (_, failure, message) => {
    await using pool = await openPool({ zstd: zstdThat(failure) });
    await using part = await pool.openFar(32_000_000);
    await part.resume();
    await expect(part.write(0, compressible(16)).then(() => part.settle())).rejects.toThrow(message);
  });

  it("holds what was sent and no more when zstd warns, or gives more", async () => {
    await using pool = await openPool({
      zstd: zstdThat('echo "a warning" >&2; "$@" <"$file"; head -c 20000 /dev/zero | tr "\\0" X; exit 0'),
    });
    await using part = await pool.openFar(32_000_000);
    await part.resume();
    const bytes = compressible(10);
    const expected = Buffer.alloc(2 * bytes.length);
    for (let at = 0; at < bytes.length; at += FRAME_BYTES) {
      const frame = bytes.subarray(at, at + FRAME_BYTES);
      // With a hole behind each.
      frame.copy(expected, 2 * at);
      await part.write(2 * at, frame);
    }
    await part.settle();
    await part.setSize(expected.length);
    expect(part.sentBytes).toBeLessThan(0.8 * bytes.length);
    expect(await part.digest(0)).toBe(sha256(expected));
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

  it("goes on with what a journal still tells that lost some of its bytes", async () => {
    const bytes = randomBytes(8192);
    for (const [journal, frames] of [
      ["\0".repeat(4096), 0],
      [`0 4096\n${"\0".repeat(100)}`, 1],
      [`${"\0".repeat(100)}\n0 4096\n4096 `, 1],
      [`0 4096\n\xff 1\n1 0\n-1 5\n${"9".repeat(30)} 1\n`, 1],
    ] as const) {
      await using pool = await openPool();
      const write = async (part: PartFile) => {
        for (const offset of [0, 4096]) {
          await part.write(offset, bytes.subarray(offset, offset + 4096));
          await part.settle();
        }
      };
      {
        await using part = await pool.open();
        await write(part);
      }
      await writeFile(join(pool.path, WORK_FOLDER, "import.journal"), journal, "latin1");
      await using part = await pool.open();
      expect(await part.resume()).toEqual({ frames });
      await write(part);
      expect(part.keptBytes).toBe(frames * 4096);
      await part.publish(1);
      expect(sha256(await readFile(pool.finalPath))).toBe(sha256(bytes));
    }
  });

  it("says that it cannot be read, in place of the hash of what could be", async () => {
    await using pool = await openPool();
    await using part = await pool.open();
    await part.write(0, randomBytes(4096));
    await part.settle();
    const path = join(pool.path, WORK_FOLDER, "import.part");
    await rm(path);
    await mkdir(path);
    await expect(part.digest(0)).rejects.toThrow(/import\.part cannot be hashed: dd: error reading .*: Is a directory$/);
  });

  it("says that the host's qemu-img did not tell all that it read", async () => {
    const broken = '#!/bin/sh\ncase $1 in convert) exec cp "$6" "$7" ;; esac\necho head; echo 0 4096; echo "no memory" >&2; exit 1\n';
    await using pool = await openPool({ "qemu-img": broken });
    await using part = await pool.open();
    await part.write(0, randomBytes(8192));
    await part.settle();
    await expect(part.readGuest("raw")).rejects.toThrow(`cannot write ${pool.finalPath} on this machine: no memory`);
  });

  it("is written anew where its name leads to a file elsewhere, which stays as it is", async () => {
    for (const lead of [symlink, link]) {
      await using pool = await openPool();
      const theirs = join(pool.path, "theirs");
      await writeFile(theirs, "somebody's");
      await mkdir(join(pool.path, WORK_FOLDER));
      for (const kind of ["part", "journal", "stamp", "lock"]) await lead(theirs, join(pool.path, WORK_FOLDER, `import.${kind}`));
      await using part = await pool.open();
      await part.resume();
      await part.write(0, Buffer.from("bytes"));
      await part.settle();
      await part.stamp(Buffer.from("{}"));
      await part.publish(1);
      expect(await readFile(theirs, "utf8")).toBe("somebody's");
      expect(await readFile(pool.finalPath, "utf8")).toBe("bytes");
    }
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
      await expect(settling).rejects.toBeInstanceOf(Error);
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
