import { spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { existsSync, statSync } from "node:fs";
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { ConnectionError } from "../../provider/errors.ts";
import { importDisk, type ImportOptions, type ImportResult } from "../../provider/transfer/import.ts";
import { PathTaken } from "../../provider/transfer/part.ts";
import { WORK_FOLDER } from "../../provider/transfer/part-file.ts";
import { openSource, type OpenSource } from "../../provider/transfer/source.ts";
import type { ImportRequest } from "../../scripts/bench/import-once.ts";
import { commandLine, descendants } from "../bed/daemon.ts";
import { openDirectory, type TemporaryDirectory } from "../bed/directory.ts";
import { type KvmHost, openKvmHost } from "../bed/libvirtd.ts";
import { createOwnHosts } from "../host/setup.ts";

const MIB = 1024 * 1024;
const SIZE_BYTES = 128 * MIB;
/** So far the source was read when the stroke falls; four frames at least are confirmed then. */
const STRIKE_BYTES = 112 * MIB;

/** Keep-alives go out each 15 s, and the third one that is not answered ends a connection: ssh-connection.ts. */
const KEEPALIVE_MS = 4 * 15_000;

/** The same source, but the read that reaches `offset` waits for `strike`, once. */
function strikeAt(offset: number, source: OpenSource, strike: () => Promise<void>): OpenSource {
  let struck: Promise<void> | undefined;
  const files = source.files.map((file) => ({
    ...file,
    read: async (at: number, length: number) => {
      if (at >= offset) await (struck ??= strike());
      return file.read(at, length);
    },
  }));
  return { ...source, files, [Symbol.asyncDispose]: () => source[Symbol.asyncDispose]() };
}

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

describe.skipIf(process.getuid!() !== 0)("an import over SSH", () => {
  let kvm: KvmHost;
  let silent: KvmHost;
  let directory: TemporaryDirectory;
  let file: string;
  let digest: string;

  beforeAll(async () => {
    [kvm, silent, directory] = await Promise.all([openKvmHost(), openKvmHost({ name: "silent" }), openDirectory("interruptions")]);
    file = join(directory.path, "noise.raw");
    const noise = randomBytes(SIZE_BYTES);
    digest = sha256(noise);
    await writeFile(file, noise);
  }, 60_000);
  afterAll(async () => {
    await Promise.all([kvm, silent, directory].map((each) => each[Symbol.asyncDispose]()));
  });

  const specOf = (host: KvmHost) => ({
    uri: host.sshUri(),
    identityFile: host.sshd.clientKey.path,
    knownHostsFile: host.sshd.knownHostsFile,
  });

  /** Imports the noise as a raw volume, on connections of its own. `strike` happens on the way, and the source waits for it. */
  async function run(
    host: KvmHost,
    id: string,
    { strike = async () => {}, ...options }: Partial<ImportOptions> & { readonly strike?: () => Promise<void> } = {},
  ): Promise<ImportResult> {
    const hosts = createOwnHosts();
    try {
      await using source = await openSource({ file });
      return await importDisk(hosts.open(specOf(host)), strikeAt(STRIKE_BYTES, source, strike), {
        id,
        finalPath: join(host.poolPath, id),
        format: "raw",
        layout: "sparse",
        capacityBytes: SIZE_BYTES,
        stamp: { importId: id },
        signal: new AbortController().signal,
        onProgress: () => {},
        ...options,
      });
    } finally {
      await hosts.close();
    }
  }

  /** Runs the import again and expects it to go on where the last one ended. */
  async function expectToGoOn(host: KvmHost, id: string): Promise<void> {
    expect(existsSync(join(host.poolPath, id))).toBe(false);
    const { keptBytes, sentBytes } = await run(host, id);
    expect(keptBytes).toBeGreaterThanOrEqual(16 * MIB);
    expect(keptBytes + sentBytes).toBe(SIZE_BYTES);
    expect(sha256(await readFile(join(host.poolPath, id)))).toBe(digest);
    expect((await readdir(join(host.poolPath, WORK_FOLDER))).filter((name) => name.startsWith(id))).toEqual([`${id}.stamp`]);
  }

  it("goes on after every sshd process of its connection was killed", async () => {
    const strike = async (): Promise<void> => {
      for (const pid of descendants(kvm.sshd.daemon.pid)) {
        // The listener calls itself by its path, a session by its user.
        if (commandLine(pid).startsWith("sshd: root")) process.kill(pid, "SIGKILL");
      }
    };
    await expect(run(kvm, "sshd", { strike })).rejects.toBeInstanceOf(ConnectionError);
    await expectToGoOn(kvm, "sshd");
  });

  it("goes on after its own process was killed", async () => {
    const request: ImportRequest = {
      host: specOf(kvm),
      source: { file },
      finalPath: join(kvm.poolPath, "client"),
      format: "raw",
      layout: "sparse",
      verify: "digest",
      id: "client",
    };
    const program = join(import.meta.dirname, "../../scripts/bench/import-once.ts");
    const child = spawn(process.execPath, [program, JSON.stringify(request)], { stdio: "ignore" });
    const exited = once(child, "exit");
    const part = join(kvm.poolPath, WORK_FOLDER, "client.part");
    while (child.exitCode === null && (!existsSync(part) || statSync(part).size < 40 * MIB)) await sleep(1);
    child.kill("SIGKILL");
    expect(await exited).toEqual([null, "SIGKILL"]);
    await expectToGoOn(kvm, "client");
  });

  it("happens once when it is run twice at the same time", async () => {
    const results = await Promise.allSettled([run(kvm, "twice"), run(kvm, "twice")]);
    expect(results.map(({ status }) => status).toSorted()).toEqual(["fulfilled", "rejected"]);
    // The other one waits a while, and then finds the volume, or that it is still being written.
    expect(String(results.find((result) => result.status === "rejected")?.reason)).toMatch(/is not overwritten|another import is writing/);
    expect(sha256(await readFile(join(kvm.poolPath, "twice")))).toBe(digest);
  });

  it("of one name never overwrites the other when two come at the same time", async () => {
    const finalPath = join(kvm.poolPath, "shared");
    const results = await Promise.allSettled([run(kvm, "one", { finalPath }), run(kvm, "two", { finalPath })]);
    expect(results.map(({ status }) => status).toSorted()).toEqual(["fulfilled", "rejected"]);
    expect(results.find((result) => result.status === "rejected")?.reason).toBeInstanceOf(PathTaken);
    expect(sha256(await readFile(finalPath))).toBe(digest);
  });

  it("ends when the network falls silent, and goes on when it is back", { timeout: 3 * KEEPALIVE_MS }, async () => {
    const drop = (verb: string) => silent.run("iptables", verb, "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP");
    let struckMs = 0;
    const strike = async (): Promise<void> => {
      await drop("-I");
      struckMs = performance.now();
    };
    await expect(run(silent, "silence", { strike })).rejects.toBeInstanceOf(ConnectionError);
    expect(performance.now() - struckMs).toBeLessThan(KEEPALIVE_MS + 5000);
    await drop("-D");
    await expectToGoOn(silent, "silence");
  });

  it("goes on after its host lost its power and booted again", { timeout: 3 * KEEPALIVE_MS }, async () => {
    await expect(run(kvm, "power", { strike: () => kvm.cutPower() })).rejects.toBeInstanceOf(ConnectionError);
    await kvm.boot();
    await expectToGoOn(kvm, "power");
  });
});
