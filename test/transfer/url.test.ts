import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { ConnectionError, DiskError } from "../../provider/errors.ts";
import type { WebSpec } from "../../provider/transfer/http.ts";
import { lookAhead, openSource, type OpenSource, type SourceOptions } from "../../provider/transfer/source.ts";
import { openDirectory } from "../bed/directory.ts";
import { guestOf, qemuImg, writeRaw } from "../image/qemu.ts";
import { makeCertificate, openWebServer, type ServedFile } from "./web-server.ts";

const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** All that an import reads: the tables first, then the file from its start to its end. */
async function drain(source: OpenSource): Promise<string> {
  await source.runs();
  const hash = createHash("sha256");
  const file = source.files[0]!;
  let at = 0;
  for (let part = await file.read(0, 4 * MIB); part.length > 0; part = await file.read(at, 4 * MIB)) {
    hash.update(part);
    at += part.length;
  }
  expect(at).toBe(file.sizeBytes);
  await source.assertUnchanged();
  return hash.digest("hex");
}

async function openBench(served: Omit<ServedFile, "bytes"> = {}) {
  await using stack = new AsyncDisposableStack();
  const directory = stack.use(await openDirectory("web")).path;
  const server = stack.use(await openWebServer());
  const raw = await writeRaw(join(directory, "disk.raw"), guestOf(12 * MIB, [{ offset: MIB, length: 9 * MIB, content: "noise" }]));
  const image = join(directory, "disk.qcow2");
  await qemuImg("convert", "-f", "raw", "-O", "qcow2", raw, image);
  const bytes = await readFile(image);
  server.files.set("/disk.qcow2", { bytes, ...served });
  const url = `${server.origin}/disk.qcow2`;
  const held = stack.move();
  return {
    directory,
    server,
    bytes,
    url,
    open: (spec: Partial<WebSpec> = {}, options: SourceOptions = {}) =>
      openSource({ url, ...spec }, { scratchFolder: directory, ...options }),
    lookAhead: (spec: Partial<WebSpec> = {}, options: SourceOptions = {}) =>
      lookAhead({ url, ...spec }, { scratchFolder: directory, ...options }),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

describe("a source on a web server", () => {
  it("is read once, by one request, after its header", async () => {
    await using bench = await openBench();
    await using source = await bench.open();
    expect(source.image).toMatchObject({ format: "qcow2", virtualSizeBytes: 12 * MIB });
    expect(source.path).toBe(bench.url);
    const asked = bench.server.log.length;
    expect(await drain(source)).toBe(sha256(bench.bytes));
    expect(bench.server.log.filter((line) => line.endsWith("bytes=0-"))).toHaveLength(1);
    expect(bench.server.log.length - asked).toBeLessThan(8);
  });

  it("goes on where the connection was cut, any number of times", async () => {
    await using bench = await openBench({ cuts: [5_000_000, 1_000_000, 1, 0, 2_000_000] });
    await using source = await bench.open();
    expect(await drain(source)).toBe(sha256(bench.bytes));
    expect(bench.server.log.filter((line) => /bytes=[1-9]\d*-$/.test(line)).length).toBeGreaterThanOrEqual(3);
  });

  it("is given up when nothing comes any more, as something that may be tried again", async () => {
    await using bench = await openBench({ cuts: Array.from({ length: 50 }, () => 0) });
    await using source = await bench.open();
    await expect(drain(source)).rejects.toThrow(ConnectionError);
  });

  it("is refused when it changed in the middle, by ETag or size", async () => {
    for (const change of [{ etag: '"second"' }, { bytes: Buffer.alloc(9 * MIB) }]) {
      await using bench = await openBench({ cuts: [5_000_000] });
      await using source = await bench.open();
      const file = source.files[0]!;
      await file.read(0, 4 * MIB);
      bench.server.files.set("/disk.qcow2", { bytes: bench.bytes, ...change });
      const rest = (async () => {
        await file.read(4 * MIB, 4 * MIB);
        await source.assertUnchanged();
      })();
      await expect(rest).rejects.toThrow(/disk\.qcow2 changed while it was read/);
    }
  });

  it("that names no state of itself is not gone on with after a cut", async () => {
    await using bench = await openBench({ etag: undefined, cuts: [5_000_000] });
    await using source = await bench.open();
    await expect(drain(source)).rejects.toThrow(/the server gives no way to go on from there: run up again/);
  });

  it("without ranges is staged, whether it tells its size or not", async () => {
    for (const sized of [true, false]) {
      await using bench = await openBench({ ranges: false, sized });
      const ahead = await bench.lookAhead();
      expect(ahead!.image).toMatchObject({ format: "qcow2", virtualSizeBytes: 12 * MIB });
      expect(ahead!.notes.join(" ")).toMatch(/the server gives no ranges.*a temporary copy/);
      await using source = await bench.open();
      expect(await drain(source)).toBe(sha256(bench.bytes));
    }
  });

  it("without ranges is refused when it is cut, or longer than its disk could be", async () => {
    await using cut = await openBench({ ranges: false, cuts: [400_000, 400_000, 400_000] });
    await expect(cut.open()).rejects.toThrow(ConnectionError);
    await using endless = await openBench();
    const answer: ServedFile["answer"] = (_request, response) => {
      response.writeHead(200);
      response.write(endless.bytes);
      const more = () => {
        while (!response.destroyed && response.write(Buffer.alloc(MIB, "endless")));
        if (!response.destroyed) response.once("drain", more);
      };
      more();
    };
    endless.server.files.set("/disk.qcow2", { bytes: endless.bytes, answer });
    await expect(endless.open()).rejects.toThrow(/it holds more than 88\.0 MiB, and its header declares less than half of that/);
  });

  it("is refused when the server answers with other bytes than asked for", async () => {
    await using bench = await openBench();
    const lies: readonly (readonly [string, string])[] = [
      ["bytes 5-9/100", "answers with a range"],
      ["bytes 0-99/*", "does not say its size"],
    ];
    for (const [range, reason] of lies) {
      const answer: ServedFile["answer"] = (_request, response) => {
        response.writeHead(206, { "content-range": range }).end(Buffer.alloc(100));
      };
      bench.server.files.set("/disk.qcow2", { bytes: bench.bytes, answer });
      await expect(bench.open()).rejects.toThrow(reason);
    }
    const short: ServedFile["answer"] = (_request, response) => {
      response.writeHead(206, { "content-range": `bytes 0-262143/${bench.bytes.length}`, "content-length": 262_144 });
      response.write(bench.bytes.subarray(0, 1000), () => setTimeout(() => response.destroy(), 20));
    };
    bench.server.files.set("/disk.qcow2", { bytes: bench.bytes, answer: short });
    await expect(bench.open()).rejects.toThrow(ConnectionError);
  });

  it("says what a status means", async () => {
    await using bench = await openBench();
    await expect(bench.open({ url: `${bench.server.origin}/none.qcow2` })).rejects.toThrow(
      /^there is nothing at .*none\.qcow2 \(HTTP 404\)$/,
    );
    const answer: ServedFile["answer"] = (request, response) => {
      response.writeHead(request.headers["authorization"] === "Bearer token-of-mine" ? 500 : 401).end();
    };
    bench.server.files.set("/locked", { bytes: bench.bytes, answer });
    const locked = { url: `${bench.server.origin}/locked?signature=secret` };
    const refusal = bench.open(locked);
    await expect(refusal).rejects.toThrow(/locked\?\.\.\. is refused without other rights \(HTTP 401\): give what it wants as `headers`/);
    await expect(refusal).rejects.toBeInstanceOf(DiskError);
    await expect(bench.open({ ...locked, headers: { authorization: "Bearer token-of-mine" } })).rejects.toThrow("answers HTTP 500");
    await expect(bench.open({ url: "http://127.0.0.1:9/disk" })).rejects.toThrow(
      /cannot read http:\/\/127\.0\.0\.1:9\/disk: .*ECONNREFUSED/,
    );
    await expect(bench.open({ url: "http://me:pass@127.0.0.1/x" })).rejects.toThrow(/^http:\/\/127\.0\.0\.1\/x holds a user or password/);
    await expect(bench.open({ url: "ftp://host/x" })).rejects.toThrow(/is of the kind ftp:/);
  });

  it("gives up a silent server", async () => {
    await using bench = await openBench();
    bench.server.files.set("/disk.qcow2", { bytes: bench.bytes, answer: () => {} });
    await expect(bench.open({}, { silenceMs: 200 })).rejects.toThrow(/nothing came for 0\.2 s/);
  });

  it("follows redirects, keeping its headers at its own origin", async () => {
    await using bench = await openBench();
    await using other = await openWebServer();
    other.files.set("/moved.qcow2", { bytes: bench.bytes });
    const to = (location: string): ServedFile => ({
      bytes: bench.bytes,
      answer: (_request, response) => response.writeHead(302, { location }).end(),
    });
    bench.server.files.set("/near", to("/disk.qcow2"));
    bench.server.files.set("/far", to(`${other.origin}/moved.qcow2`));
    const headers = { authorization: "Bearer token-of-mine" };
    await using near = await bench.open({ url: `${bench.server.origin}/near`, headers });
    expect(await drain(near)).toBe(sha256(bench.bytes));
    expect(bench.server.headers.get("/disk.qcow2")).toMatchObject(headers);
    await using far = await bench.open({ url: `${bench.server.origin}/far`, headers });
    expect(await drain(far)).toBe(sha256(bench.bytes));
    expect(other.headers.get("/moved.qcow2")).not.toHaveProperty("authorization");
  });

  it("follows no redirect to a file, in a circle, or with a password", async () => {
    await using bench = await openBench();
    const to = (location: string): ServedFile => ({
      bytes: bench.bytes,
      answer: (_request, response) => response.writeHead(301, { location }).end(),
    });
    const refused: readonly (readonly [string, RegExp])[] = [
      ["file:///etc/passwd", /redirects to file:.*which is of the kind file:/],
      ["/loop", /redirects more than 10 times/],
      ["http://a:b@127.0.0.1/x", /which holds a user or password/],
      ["http://[", /redirects to something that is no URL/],
    ];
    for (const [location, reason] of refused) {
      bench.server.files.set("/loop", to(location));
      await expect(bench.open({ url: `${bench.server.origin}/loop` })).rejects.toThrow(reason);
    }
  });

  it("over TLS must be vouched for by an authority that is trusted", async () => {
    await using bench = await openBench();
    const { caFile, ...tls } = await makeCertificate(bench.directory);
    await using secure = await openWebServer({ tls });
    secure.files.set("/disk.qcow2", { bytes: bench.bytes });
    secure.files.set("/plain", {
      bytes: bench.bytes,
      answer: (_request, response) => response.writeHead(302, { location: bench.url }).end(),
    });
    const url = `${secure.origin}/disk.qcow2`;
    await expect(bench.open({ url })).rejects.toThrow(/its certificate is not trusted .*name its authority's file as `caFile`/);
    await using source = await bench.open({ url, caFile });
    expect(await drain(source)).toBe(sha256(bench.bytes));
    await expect(bench.open({ url: `${secure.origin}/plain`, caFile })).rejects.toThrow(
      /redirects from https: to http:.*where nothing is proven/,
    );
    await expect(bench.open({ url, caFile: "/no/such.pem" })).rejects.toThrow(/cannot read the certificates in \/no\/such\.pem/);
  });

  it("finds its checksum in a list on a server", async () => {
    await using bench = await openBench();
    const list = (digest: string) =>
      Buffer.from(`-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n${"0".repeat(64)}  other.qcow2\n${digest} *disk.qcow2\n`);
    bench.server.files.set("/SHA256SUMS", { bytes: list(sha256(bench.bytes)) });
    const checksum = `${bench.server.origin}/SHA256SUMS`;
    await using source = await bench.open({}, { checksum });
    expect(source.files[0]!.expected).toEqual({ algorithm: "sha256", hex: sha256(bench.bytes) });
    expect(source.notes).toEqual([]);
    bench.server.files.set("/SHA256SUMS", { bytes: Buffer.from(`${"0".repeat(64)}  other.qcow2\n`) });
    await expect(bench.open({}, { checksum })).rejects.toThrow(/SHA256SUMS is of no use: it says nothing about disk\.qcow2/);
    await expect(bench.open({}, { checksum: `${checksum}.none` })).rejects.toThrow(/there is nothing at .*SHA256SUMS\.none/);
  });

  it("may be a flat VMDK, whose extent lies beside it, but nowhere else", async () => {
    await using bench = await openBench();
    await qemuImg(
      "convert",
      "-f",
      "qcow2",
      "-O",
      "vmdk",
      "-o",
      "subformat=monolithicFlat",
      join(bench.directory, "disk.qcow2"),
      join(bench.directory, "flat.vmdk"),
    );
    const url = `${bench.server.origin}/a/flat.vmdk`;
    bench.server.files.set("/a/flat.vmdk", { bytes: await readFile(join(bench.directory, "flat.vmdk")) });
    await expect(bench.open({ url })).rejects.toThrow(/flat-flat\.vmdk/);
    bench.server.files.set("/a/flat-flat.vmdk", { bytes: await readFile(join(bench.directory, "flat-flat.vmdk")) });
    await using source = await bench.open({ url });
    expect(source.files.map(({ name }) => name)).toEqual(["flat.vmdk", "flat-flat.vmdk"]);
  });
});
