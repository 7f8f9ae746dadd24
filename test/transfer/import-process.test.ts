import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, open, readdir, readFile, writeFile } from "node:fs/promises";
import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { ConnectionError, DiskError } from "../../provider/errors.ts";
import type * as importModule from "../../provider/transfer/import-process.ts";
import { importInProcess, type ImportSettings } from "../../provider/transfer/import-process.ts";
import type { SourceSpec } from "../../provider/transfer/source.ts";
import { createThrottle } from "../../provider/transfer/throttle.ts";
import { commandLine, descendants } from "../bed/daemon.ts";
import { openDirectory, type TemporaryDirectory } from "../bed/directory.ts";
import { openSshd, type Sshd } from "../bed/sshd.ts";

const MIB = 1024 * 1024;

describe.skipIf(process.getuid!() !== 0)("an import in a process of its own", () => {
  let sshd: Sshd;
  let directory: TemporaryDirectory;
  let noise: string;
  let digest: string;

  beforeAll(async () => {
    [sshd, directory] = await Promise.all([openSshd(), openDirectory("process")]);
    noise = join(directory.path, "noise.raw");
    const bytes = randomBytes(24 * MIB);
    digest = createHash("sha256").update(bytes).digest("hex");
    await writeFile(noise, bytes);
  });
  afterAll(async () => {
    await Promise.all([sshd, directory].map((each) => each[Symbol.asyncDispose]()));
  });

  async function run(
    name: string,
    settings: Partial<ImportSettings> = {},
    source: SourceSpec = { file: noise },
    { port = sshd.port, by = importInProcess } = {},
  ) {
    const pool = join(directory.path, name);
    await mkdir(pool, { recursive: true });
    return by(
      {
        host: {
          uri: `qemu+ssh://${sshd.user}@${sshd.address}:${port}/system`,
          identityFile: sshd.clientKey.path,
          knownHostsFile: sshd.knownHostsFile,
        },
        hosts: { environment: process.env, homeDirectory: homedir(), userName: userInfo().username, userId: process.getuid!() },
        source,
        sourceOptions: {},
        options: { id: name, finalPath: join(pool, "disk"), format: "raw", layout: "sparse", capacityBytes: 0, stamp: { importId: name } },
      },
      { signal: new AbortController().signal, onProgress: () => {}, ...settings },
    );
  }

  const importers = (): readonly number[] => descendants(process.pid).filter((pid) => commandLine(pid).includes("import-program"));

  it("gives what the import gives, tells how far it is, and is gone with its end", async () => {
    const told: number[] = [];
    const result = await run("plain", { onProgress: (doneBytes) => told.push(doneBytes) });
    expect(result).toMatchObject({ sourceDigest: `sha256:${digest}`, contentDigest: `sha256:${digest}`, virtualSizeBytes: 24 * MIB });
    expect(told.at(-1)).toBe(24 * MIB);
    expect(
      createHash("sha256")
        .update(await readFile(join(directory.path, "plain/disk")))
        .digest("hex"),
    ).toBe(digest);
    expect(importers()).toEqual([]);
  });

  it("takes less than 250 MB for a disk that is larger than that", async () => {
    const file = join(directory.path, "large.raw");
    {
      await using handle = await open(file, "w");
      // No two frames alike, and none that is only zeros.
      for (let at = 0; at < 384 * MIB; at += 4 * MIB) await handle.write(Buffer.alloc(4 * MIB, randomBytes(MIB)), 0, 4 * MIB, at);
    }
    // As users run it: the sources have a compiler in their memory.
    const built = (await import(new URL("../../dist/provider/transfer/import-process.js", import.meta.url).href)) as typeof importModule;
    const { usage } = await run("large", {}, { file }, { by: built.importInProcess });
    expect(usage.peakRssBytes).toBeLessThan(250e6);
  });

  it("throws the errors of the import as they are", async () => {
    await expect(run("missing", {}, { file: "/nonexistent/disk.raw" })).rejects.toThrow(DiskError);
    await expect(run("missing", {}, { file: "/nonexistent/disk.raw" })).rejects.toMatchObject({
      message: "there is no file /nonexistent/disk.raw",
      step: "source",
      path: "/nonexistent/disk.raw",
    });
    const refused = run("refused", {}, { file: noise }, { port: 1 });
    await expect(refused).rejects.toThrow(ConnectionError);
    await expect(refused).rejects.toMatchObject({ phase: "connect" });
    expect(importers()).toEqual([]);
  });

  it("keeps its caller's limit, ends when it is aborted, and goes on the next time", async () => {
    const abort = new AbortController();
    const reason = new Error("nobody wants it any more");
    const startedMs = performance.now();
    const running = run("aborted", { signal: abort.signal, throttle: createThrottle(8 * MIB) });
    running.catch(() => {});
    // It is noted there when the first frame has arrived.
    await expect
      .poll(() => existsSync(join(directory.path, "aborted/.virtlift/aborted.journal")), { timeout: 20_000, interval: 10 })
      .toBe(true);
    expect(performance.now() - startedMs).toBeGreaterThan(800);
    abort.abort(reason);
    await expect(running).rejects.toBe(reason);
    expect(importers()).toEqual([]);
    expect(existsSync(join(directory.path, "aborted/disk"))).toBe(false);
    expect(await readdir(join(directory.path, "aborted/.virtlift"))).toContain("aborted.part");
    const { keptBytes } = await run("aborted");
    expect(keptBytes).toBeGreaterThanOrEqual(8 * MIB);
  });
});
