import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { link, mkdir, readdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type DiskState, importedDisk } from "../../provider/resources/imported-disk.ts";
import type { Context } from "../../provider/resources/resource.ts";
import { probe } from "../../provider/transfer/probe.ts";
import { openDirectory } from "../bed/directory.ts";
import { type KvmHost, type Libvirtd, openKvmHost, openLibvirtd } from "../bed/libvirtd.ts";
import { guestByQemu, guestOf, mixedGuest, qemuImg, writeRaw } from "../image/qemu.ts";
import { openWebServer } from "../transfer/web-server.ts";
import { createOwnHosts } from "../host/setup.ts";

const execute = promisify(execFile);
const MIB = 1024 * 1024;
const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** What the adapter gives to every call, and a folder with a guest's disk in it. */
async function openCaller(host: object) {
  const directory = await openDirectory("caller");
  const scratch = join(directory.path, "scratch");
  await mkdir(scratch);
  const hosts = createOwnHosts();
  const lines: string[] = [];
  const context: Context = {
    config: (key) => (key === "virtlift:host" ? JSON.stringify(host) : key === "virtlift:scratch" ? scratch : undefined),
    log: (_level, text) => lines.push(text),
    signal: new AbortController().signal,
    hosts,
  };
  const guest = mixedGuest();
  const raw = await writeRaw(join(directory.path, "disk.raw"), guest);
  const check = (more: object) => importedDisk.check(context, undefined, { origin: "organization/project/stack/web", ...more });
  return {
    context,
    lines,
    guest,
    raw,
    directory: directory.path,
    host: hosts.open(host as never),
    check,
    async reason(more: object): Promise<string> {
      return (await check(more)).failures.map(({ reason }) => reason).join(" | ");
    },
    async create(more: object): Promise<DiskState> {
      const { inputs, failures } = await check(more);
      expect(failures).toEqual([]);
      return (await importedDisk.create(context, inputs)).state;
    },
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

const SHAPES = [
  { format: "qcow2", layout: "sparse" },
  { format: "qcow2", layout: "compressed" },
  { format: "qcow2", layout: "full" },
  { format: "raw", layout: "sparse" },
];

type Caller = Awaited<ReturnType<typeof openCaller>>;

/** What the volume's guest would see, by qemu. */
async function guestHash(caller: Caller, { path, format }: Pick<DiskState, "path" | "format">, lengthBytes: number): Promise<string> {
  return sha256((await guestByQemu(path, format, join(caller.directory, "back.raw"))).subarray(0, lengthBytes));
}

describe.skipIf(process.getuid!() !== 0)("an ImportedDisk", () => {
  let kvm: KvmHost;
  let libvirtd: Libvirtd;
  let ways: Record<"local" | "ssh", { readonly bed: Libvirtd; readonly host: object }>;

  beforeAll(async () => {
    [libvirtd, kvm] = await Promise.all([openLibvirtd(), openKvmHost()]);
    ways = {
      local: { bed: libvirtd, host: { uri: libvirtd.uri } },
      ssh: { bed: kvm, host: { uri: kvm.sshUri(), identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile } },
    };
  }, 60_000);
  afterAll(async () => {
    await Promise.all([libvirtd[Symbol.asyncDispose](), kvm[Symbol.asyncDispose]()]);
  });

  describe("from a web server", () => {
    it("arrives through this machine, with the digest of the file as it lies there and no secret kept", async () => {
      await using caller = await openCaller(ways.ssh.host);
      await using server = await openWebServer();
      const image = join(caller.directory, "disk.qcow2");
      await qemuImg("convert", "-f", "raw", "-O", "qcow2", caller.raw, image);
      const bytes = await readFile(image);
      server.files.set("/disk.qcow2", { bytes, cuts: [1_000_000] });
      server.files.set("/SHA256SUMS", { bytes: Buffer.from(`${sha256(bytes)}  disk.qcow2\n`) });
      const source = { url: `${server.origin}/disk.qcow2?signature=hidden`, headers: { authorization: "Bearer token-of-mine" } };
      const state = await caller.create({ source, checksum: `${server.origin}/SHA256SUMS` });
      expect(state.sourceDigest).toBe(`sha256:${sha256(bytes)}`);
      expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
      expect(server.headers.get("/disk.qcow2")).toMatchObject({ authorization: "Bearer token-of-mine" });
      expect(caller.lines.join("\n")).not.toMatch(/token-of-mine|hidden/);
      expect((await readFile(state.path)).subarray(0, 65_536).toString("latin1")).not.toMatch(/token-of-mine|hidden/);
      const again = await importedDisk.check(caller.context, state, {
        origin: state.origin,
        source: { ...source, headers: { authorization: "Bearer another" } },
        checksum: `${server.origin}/SHA256SUMS`,
      });
      const { changes } = await importedDisk.diff(caller.context, state.diskId, state, again.inputs);
      expect(changes).toEqual([{ property: "source", effect: "live" }]);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("arrives from what is wrapped or zipped, and says in preview that it will be staged", async () => {
      await using caller = await openCaller(ways.local.host);
      await using server = await openWebServer();
      await execute("xz", ["-k", "-1", caller.raw]);
      const bytes = await readFile(`${caller.raw}.xz`);
      server.files.set("/disk.raw.xz", { bytes });
      const state = await caller.create({ source: { url: `${server.origin}/disk.raw.xz` }, checksum: `sha256:${sha256(bytes)}` });
      expect(state.sourceDigest).toBe(`sha256:${sha256(bytes)}`);
      expect(caller.lines.join("\n")).toMatch(
        /it is wrapped in xz: a temporary copy of up to 20\.0 MiB lies in .*scratch during the import/,
      );
      expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
      await importedDisk.delete(caller.context, state.diskId, state);

      const vmdk = join(caller.directory, "disk.vmdk");
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", caller.raw, vmdk);
      await execute("zip", ["-q", "-j", `${vmdk}.zip`, vmdk]);
      server.files.set("/disk.zip", { bytes: await readFile(`${vmdk}.zip`) });
      for (const source of [{ file: `${vmdk}.zip` }, { url: `${server.origin}/disk.zip` }]) {
        const unpacked = await caller.create({ source, layout: "compressed" });
        expect(unpacked.sourceDigest).toBe(`sha256:${sha256(await readFile(vmdk))}`);
        await qemuImg("compare", "-f", "qcow2", "-F", "raw", unpacked.path, caller.raw);
        await importedDisk.delete(caller.context, unpacked.diskId, unpacked);
      }
      const onHost = { hostPath: `${vmdk}.zip` };
      expect(await caller.reason({ source: onHost })).toMatch(/disk\.vmdk\.zip on .* is wrapped, .*: unpack it there/);
      const fetched = { url: `${server.origin}/disk.zip`, fetch: "host" };
      expect(await caller.reason({ source: fetched })).toMatch(/disk\.zip is a zip archive, which is only taken apart on this machine/);
    });

    it("is refused in preview with a sentence of its own, and without secrets", async () => {
      await using caller = await openCaller(ways.local.host);
      await using server = await openWebServer();
      const headers = { authorization: "Bearer token-of-mine" };
      const refusals: readonly (readonly [object, RegExp])[] = [
        [
          { source: { url: `${server.origin}/none?signature=hidden`, headers } },
          /^source: there is nothing at .*\/none\?\.\.\. \(HTTP 404\)/,
        ],
        [{ source: { url: "http://127.0.0.1:9/x", headers } }, /^source: cannot read http:\/\/127\.0\.0\.1:9\/x: .*ECONNREFUSED/],
        [{ source: { url: "https://me:hidden@host/x" } }, /^source.*: https:\/\/host\/x holds a user or password/],
        [{ source: { url: "file:///etc/passwd" } }, /^source.*is of the kind file:/],
        [{ source: { url: "http://host/x", headers, file: "x" } }, /^source: source is exactly one of .*, got \{ url, headers, file \}/],
        [{ source: { file: caller.raw }, checksum: `${server.origin}/SUMS` }, /^source: there is nothing at .*\/SUMS/],
      ];
      for (const [more, reason] of refusals) {
        const said = await caller.reason(more);
        expect(said).toMatch(reason);
        expect(said).not.toMatch(/token-of-mine|hidden/);
      }
    });
  });

  for (const way of ["local", "ssh"] as const) {
    describe(`from the host itself, reached ${way === "ssh" ? "over SSH" : "by its socket"}`, () => {
      it("is copied from an image of any format into any volume, with nothing on the wire", async () => {
        const { bed, host } = ways[way];
        await using caller = await openCaller(host);
        const folder = join(bed.directory, "sources");
        await mkdir(folder, { recursive: true });
        const formats: Readonly<Record<string, readonly string[]>> = {
          "disk one.qcow2": ["qcow2"],
          "disk.vmdk": ["vmdk"],
          "flat.vmdk": ["vmdk", "-o", "subformat=monolithicFlat"],
          "disk,2.vhd": ["vpc", "-o", "force_size=on"],
          "disk.vhdx": ["vhdx"],
          "disk.img": ["raw"],
        };
        const names = way === "local" ? Object.keys(formats) : ["disk.vmdk", "disk one.qcow2"];
        for (const name of names) {
          const options = formats[name]!;
          const hostPath = join(folder, name);
          await qemuImg("convert", "-f", "raw", "-O", ...options, caller.raw, hostPath);
          const before = sha256(await readFile(hostPath));
          const extent = join(folder, "flat-flat.vmdk");
          const lines = async () => `${before}  flat.vmdk\n${sha256(await readFile(extent))}  flat-flat.vmdk\n`;
          const digest = name === "flat.vmdk" ? sha256(Buffer.from(await lines())) : before;
          const shapes = name === "disk.vmdk" ? SHAPES : SHAPES.slice(0, 1);
          for (const { format, layout } of shapes) {
            const state = await caller.create({ source: { hostPath }, format, layout, capacity: "32MiB" });
            if (format === "qcow2") await qemuImg("check", "-f", "qcow2", state.path);
            expect(state.virtualSizeBytes).toBe(32 * MIB);
            expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
            expect(state.sourceDigest).toBe(`sha256:${digest}`);
            expect((await probe(caller.host, state.path, state.importId)).file).toMatchObject({
              stamp: { importId: state.importId },
              untouched: true,
            });
            await importedDisk.delete(caller.context, state.diskId, state);
          }
          expect(sha256(await readFile(hostPath))).toBe(before);
        }
        expect(await readdir(bed.poolPath)).toEqual([]);
        expect(caller.lines.join("\n")).toMatch(/copied on .* itself in .*, nothing on the wire/);
        await rm(folder, { recursive: true });
      }, 60_000);

      it("is moved when it has the volume's format, and has one name afterwards", async () => {
        const { bed, host } = ways[way];
        await using caller = await openCaller(host);
        for (const format of ["qcow2", "raw"]) {
          const hostPath = join(bed.directory, `moved.${format}`);
          await qemuImg("convert", "-f", "raw", "-O", format, caller.raw, hostPath);
          const { ino } = await stat(hostPath);
          const state = await caller.create({ source: { hostPath, mode: "move" }, format });
          expect(await stat(state.path)).toMatchObject({ ino, nlink: 1 });
          await expect(stat(hostPath)).rejects.toThrow("ENOENT");
          expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
          expect((await probe(caller.host, state.path, state.importId)).file?.stamp).toMatchObject({ importId: state.importId });
          await importedDisk.delete(caller.context, state.diskId, state);
        }
        expect(await readdir(bed.poolPath)).toEqual([]);
      });

      it("is adopted where it lies, stays when it is destroyed, and may be adopted again", async () => {
        const { bed, host } = ways[way];
        await using caller = await openCaller(host);
        for (const format of ["qcow2", "raw"]) {
          const hostPath = join(bed.poolPath, `theirs.${format}`);
          await qemuImg("convert", "-f", "raw", "-O", format, caller.raw, hostPath);
          const before = await readFile(hostPath);
          const source = { hostPath, mode: "adopt" };
          const state = await caller.create({ source, format });
          expect(state).toMatchObject({ path: hostPath, diskId: "theirs", onDelete: "retain", sourceDigest: `sha256:${sha256(before)}` });
          if (format === "qcow2") await qemuImg("check", "-f", "qcow2", hostPath);
          expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
          expect((await probe(caller.host, hostPath, state.importId)).file).toMatchObject({
            stamp: { importId: state.importId },
            untouched: true,
          });
          expect(await caller.create({ source, format })).toEqual(state);
          await using stranger = await openCaller(host);
          const reasons = await stranger.reason({ origin: "organization/project/stack/other", source, format });
          expect(reasons).toMatch(/is the disk of organization\/project\/stack\/web: destroy that one with/);
          await importedDisk.delete(caller.context, state.diskId, state);
          expect(sha256((await readFile(hostPath)).subarray(65_536))).toBe(sha256(before.subarray(65_536)));
          expect(await readdir(bed.poolPath)).toEqual([`theirs.${format}`]);
          const again = await caller.create({ source, format, onDelete: "delete" });
          await importedDisk.delete(caller.context, again.diskId, again);
          expect(await readdir(bed.poolPath)).toEqual([]);
        }
      });

      it("is cloned from a volume, also of another pool", async () => {
        const { bed, host } = ways[way];
        await using caller = await openCaller(host);
        const other = join(bed.directory, "other");
        await mkdir(other);
        await bed.virsh("pool-create-as", "other", "dir", "--target", other);
        await qemuImg("convert", "-f", "raw", "-O", "qcow2", caller.raw, join(other, "template.qcow2"));
        await bed.virsh("pool-refresh", "other");
        const state = await caller.create({ source: { volume: "template.qcow2", pool: "other" }, provenance: "clone" });
        expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
        const twin = await caller.create({ source: { volume: state.volumeName }, name: "twin", format: "raw" });
        expect(await guestHash(caller, twin, caller.guest.length)).toBe(sha256(caller.guest));
        for (const disk of [state, twin]) await importedDisk.delete(caller.context, disk.diskId, disk);
        await bed.virsh("pool-destroy", "other");
        await rm(other, { recursive: true });
      });
    });
  }

  describe("fetched by the host", () => {
    /** This machine's end of the link to the host. */
    const ownAddress = () => kvm.address.replace(/\d+$/, (last) => String(Number(last) - 1));

    async function openServed() {
      await using stack = new AsyncDisposableStack();
      const caller = stack.use(await openCaller(ways.ssh.host));
      const server = stack.use(await openWebServer({ address: ownAddress() }));
      const image = join(caller.directory, "disk.vmdk");
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", caller.raw, image);
      const bytes = await readFile(image);
      server.files.set("/disk.vmdk", { bytes });
      const held = stack.move();
      return { caller, server, bytes, url: `${server.origin}/disk.vmdk`, [Symbol.asyncDispose]: () => held.disposeAsync() };
    }

    it("arrives without passing this machine, goes on after cuts, and leaves no secret and no copy behind", async () => {
      await using served = await openServed();
      const { caller, server, bytes, url } = served;
      server.files.set("/disk.vmdk", { bytes, cuts: [1_000_000, 700_000] });
      const headers = { "x-token": 'a "quoted" \\ token-of-mine' };
      const watched = (async () => {
        const seen: string[] = [];
        for (let round = 0; round < 60; round++) {
          seen.push(await kvm.run("ps", "-eo", "args"));
          if (server.log.length > 3) break;
        }
        return seen.join("\n");
      })();
      const source = { url: `${url}?signature=hidden`, headers, fetch: "host" };
      const state = await caller.create({ source, checksum: `sha1:${createHash("sha1").update(bytes).digest("hex")}` });
      expect(await watched).not.toMatch(/token-of-mine|hidden/);
      expect(state.sourceDigest).toBe(`sha256:${sha256(bytes)}`);
      expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
      expect(server.headers.get("/disk.vmdk")).toMatchObject(headers);
      expect(server.log.filter((line) => /bytes=[1-9]\d*-$/.test(line))).not.toEqual([]);
      expect(caller.lines.join("\n")).toMatch(/fetched by root@.* itself, nothing to send/);
      expect(caller.lines.join("\n")).not.toMatch(/token-of-mine|hidden/);
      expect(await readdir(kvm.poolPath)).toEqual([state.volumeName]);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("keeps what came when the server gives up, and begins anew when the file is another one by then", async () => {
      await using served = await openServed();
      const { caller, server, bytes, url } = served;
      const source = { url, fetch: "host" };
      const { inputs, failures } = await caller.check({ source });
      expect(failures).toEqual([]);
      server.files.set("/disk.vmdk", { bytes, cuts: [1_000_000, 0, 0, 0, 0] });
      await expect(importedDisk.create(caller.context, inputs)).rejects.toThrow(/root@.* cannot fetch http:.*disk\.vmdk: curl: \(18\)/);
      expect((await stat(join(kvm.poolPath, ".virtlift", `${inputs.importId}.source`))).size).toBe(1_000_000);
      const other = Buffer.from(bytes);
      other.fill("text of another state", 3_000_000, 3_010_000);
      server.files.set("/disk.vmdk", { bytes: other, etag: '"second"' });
      const { state } = await importedDisk.create(caller.context, inputs);
      expect(state.sourceDigest).toBe(`sha256:${sha256(other)}`);
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(kvm.poolPath)).toEqual([]);
    });

    it("follows redirects without headers, and is refused in preview when it would fail", async () => {
      await using served = await openServed();
      const { caller, server, bytes, url } = served;
      const { origin } = server;
      server.files.set("/moved", { bytes, answer: (_request, response) => response.writeHead(302, { location: url }).end("moved") });
      server.files.set("/file", {
        bytes,
        answer: (_request, response) => response.writeHead(302, { location: "file:///etc/passwd" }).end(),
      });
      server.files.set("/locked", { bytes, answer: (_request, response) => response.writeHead(401).end("locked") });
      server.files.set("/disk.gz", { bytes: Buffer.from("1f8b0800000000000003030000000000000000", "hex") });
      const vast = { "content-range": `bytes 0-262143/${2 ** 49}` };
      server.files.set("/vast", { bytes, answer: (_request, response) => response.writeHead(206, vast).end(bytes.subarray(0, 262_144)) });
      const state = await caller.create({ source: { url: `${origin}/moved`, fetch: "host" } });
      expect(await guestHash(caller, state, caller.guest.length)).toBe(sha256(caller.guest));
      await importedDisk.delete(caller.context, state.diskId, state);
      const refusals: readonly (readonly [object, RegExp])[] = [
        [{ url: `${origin}/none` }, /^source: root@.* cannot fetch http.*\/none: there is nothing \(HTTP 404\)/],
        [{ url: `${origin}/locked` }, /cannot fetch .*: it is refused without other rights \(HTTP 401\)/],
        [{ url: `${origin}/moved`, headers: { "x-token": "x" } }, /the server redirects, and headers are sent to no other address/],
        [{ url: `${origin}/file` }, /cannot fetch .*: curl: \(1\)/],
        [{ url: `${origin}/disk.gz` }, /is wrapped in gzip, which is only taken apart on this machine/],
        [{ url: `http://${ownAddress()}:9/x` }, /cannot fetch .*: curl: \(7\)/],
        // What is fetched lies beside the volume that is made of it.
        [{ url: `${origin}/vast` }, /^pool: .* free and the disk takes up to 512 TiB: make room/],
      ];
      for (const [source, reason] of refusals) expect(await caller.reason({ source: { ...source, fetch: "host" } })).toMatch(reason);
      expect(await readdir(kvm.poolPath)).toEqual([]);
    });
  });

  describe("from the host itself", () => {
    it("stops what the host does when it is stopped, and is taken up again by the next run", async () => {
      const { bed, host } = ways.ssh;
      await using caller = await openCaller(host);
      const hostPath = join(bed.directory, "large.qcow2");
      const noise = await writeRaw(
        join(caller.directory, "noise.raw"),
        guestOf(300 * MIB, [{ offset: 0, length: 280 * MIB, content: "noise" }]),
      );
      await qemuImg("convert", "-f", "raw", "-O", "qcow2", noise, hostPath);
      const { inputs } = await caller.check({ source: { hostPath }, layout: "compressed" });
      const stop = new AbortController();
      const importing = importedDisk.create({ ...caller.context, signal: stop.signal }, inputs);
      // At the start of a line: the receiver's own text has the words too.
      const converting = async () => /^qemu-img convert/m.test(await bed.run("ps", "-eo", "args"));
      await expect.poll(converting, { timeout: 10_000 }).toBe(true);
      stop.abort(new Error("the engine is gone"));
      await expect(importing).rejects.toThrow("the engine is gone");
      await expect.poll(converting, { timeout: 10_000 }).toBe(false);
      expect(await readdir(bed.poolPath)).toEqual([".virtlift"]);
      const { state } = await importedDisk.create(caller.context, { ...inputs });
      expect(sha256((await guestByQemu(state.path, "qcow2", join(caller.directory, "back.raw"))).subarray(0, 280 * MIB))).toBe(
        sha256((await readFile(noise)).subarray(0, 280 * MIB)),
      );
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(bed.poolPath)).toEqual([]);
      await rm(hostPath);
    });

    it("is refused in preview when it could not be taken, and nothing changes", async () => {
      const { bed, host } = ways.local;
      await using caller = await openCaller(host);
      const at = (name: string) => join(bed.directory, name);
      await qemuImg("convert", "-f", "raw", "-O", "qcow2", caller.raw, at("disk.qcow2"));
      await link(at("disk.qcow2"), at("second-name.qcow2"));
      await qemuImg("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", at("backed.qcow2"));
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", caller.raw, at("linked.vmdk"));
      await rm(at("linked-flat.vmdk"));
      await symlink("/etc/passwd", at("linked-flat.vmdk"));
      await writeFile(at("disk.qcow2.gz"), Buffer.from("1f8b0800000000000003030000000000000000", "hex"));
      const refusals: readonly (readonly [object, RegExp])[] = [
        [{ source: { hostPath: at("none") } }, /^source: there is no file .*none on this machine/],
        [{ source: { hostPath: bed.directory } }, /is neither a file nor a block device/],
        [{ source: { hostPath: "relative" } }, /a path on the host is absolute/],
        [{ source: { hostPath: at("backed.qcow2") } }, /has a backing file/],
        [{ source: { hostPath: at("linked.vmdk") } }, /linked-flat\.vmdk on this machine is a symbolic link/],
        [{ source: { hostPath: at("disk.qcow2.gz") } }, /is wrapped, which is only taken off on the machine that runs Pulumi/],
        [{ source: { hostPath: at("disk.qcow2"), mode: "move" } }, /has 2 names \(hard links\)/],
        [{ source: { hostPath: at("disk.qcow2"), mode: "move" }, format: "raw" }, /is qcow2 and the volume is to be raw: copy it/],
        [{ source: { hostPath: "/dev/shm/elsewhere.qcow2", mode: "move" } }, /does not lie on the file system of/],
        [{ source: { hostPath: at("disk.qcow2"), mode: "adopt" } }, /does not lie in .*images, the folder of the pool default/],
        [{ source: { volume: "none" } }, /^source: there is no volume none in the pool default/],
        [{ source: { volume: "none", pool: "nowhere" } }, /^source: there is no volume none in the pool nowhere/],
      ];
      await qemuImg("create", "-f", "qcow2", "/dev/shm/elsewhere.qcow2", "1M");
      try {
        for (const [more, reason] of refusals) expect(await caller.reason(more)).toMatch(reason);
      } finally {
        await rm("/dev/shm/elsewhere.qcow2");
      }
      expect(await readdir(bed.poolPath)).toEqual([]);
      expect(await readdir(dirname(bed.poolPath))).toContain("disk.qcow2");
    });

    it("is not copied while a running machine writes it, nor moved away from one that is only defined", async () => {
      const { bed, host } = ways.local;
      await using caller = await openCaller(host);
      const hostPath = join(bed.directory, "used.qcow2");
      await qemuImg("convert", "-f", "raw", "-O", "qcow2", caller.raw, hostPath);
      const domain = join(caller.directory, "domain.xml");
      const disk = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${hostPath}'/><target dev='sda' bus='sata'/></disk>`;
      await writeFile(
        domain,
        `<domain type='qemu'><name>user</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os><devices>${disk}</devices></domain>`,
      );
      await bed.virsh("define", domain);
      expect(await caller.reason({ source: { hostPath } })).toBe("");
      expect(await caller.reason({ source: { hostPath, mode: "move" } })).toMatch(
        /the machine user on this machine uses .*: undefine it first, or copy/,
      );
      await bed.virsh("start", "user", "--paused");
      expect(await caller.reason({ source: { hostPath } })).toMatch(
        /the machine user on this machine uses .*: stop it first, or its copy is torn/,
      );
      await bed.virsh("destroy", "user");
      await bed.virsh("undefine", "user");
      await rm(hostPath);
    });

    it("leaves nothing when its checksum is another, or the conversion fails", async () => {
      const { bed, host } = ways.local;
      await using caller = await openCaller(host);
      const hostPath = join(bed.directory, "wrong.vmdk");
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", caller.raw, hostPath);
      const { inputs } = await caller.check({ source: { hostPath }, checksum: `sha512:${"0".repeat(128)}` });
      await expect(importedDisk.create(caller.context, inputs)).rejects.toThrow(
        /wrong\.vmdk on this machine is damaged: its sha512 is [0-9a-f]{128}/,
      );
      expect(await readdir(bed.poolPath)).toEqual([]);
      const right = `sha512:${createHash("sha512")
        .update(await readFile(hostPath))
        .digest("hex")}`;
      const state = await caller.create({ source: { hostPath }, checksum: right });
      await importedDisk.delete(caller.context, state.diskId, state);
      await rm(hostPath);
    });

    it("is proved against the host's own reading when the content is to be verified", async () => {
      const { bed, host } = ways.local;
      await using caller = await openCaller(host);
      const hostPath = join(bed.directory, "proved.vmdk");
      const noise = await writeRaw(
        join(caller.directory, "noise.raw"),
        guestOf(8 * MIB, [{ offset: MIB, length: 2 * MIB, content: "noise" }]),
      );
      await qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", noise, hostPath);
      const state = await caller.create({ source: { hostPath }, verify: "content" });
      expect(state.verified).toBe("content");
      await importedDisk.delete(caller.context, state.diskId, state);
      await rm(hostPath);
    });
  });
});
