import { createHash, randomBytes } from "node:crypto";
import { existsSync, statSync } from "node:fs";
import { appendFile, link, mkdir, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { ConnectionError } from "../../provider/errors.ts";
import { DISK_CHANGES, type DiskInputs, type DiskState, importedDisk } from "../../provider/resources/imported-disk.ts";
import { clearLeftovers, findLeftovers } from "../../provider/resources/leftovers.ts";
import type { Context } from "../../provider/resources/resource.ts";
import { ImportedDiskSchema } from "../../provider/resources/schema.ts";
import { UNKNOWN } from "../../provider/resources/unknown.ts";
import { WORK_FOLDER } from "../../provider/transfer/part-file.ts";
import { openDirectory } from "../bed/directory.ts";
import { type KvmHost, type Libvirtd, openKvmHost, openLibvirtd } from "../bed/libvirtd.ts";
import { guestByQemu, mixedGuest, qemuImg, writeRaw } from "../image/qemu.ts";
import { createOwnHosts } from "../host/setup.ts";

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** What the adapter gives to every call, and a folder with a source in it. */
async function openCaller(host: unknown) {
  const directory = await openDirectory("caller");
  const hosts = createOwnHosts();
  const lines: string[] = [];
  const stop = new AbortController();
  const context: Context = {
    config: (key) => (key === "virtlift:host" ? JSON.stringify(host) : undefined),
    log: (_level, text) => lines.push(text),
    signal: stop.signal,
    hosts,
  };
  const guest = mixedGuest();
  const file = await writeRaw(join(directory.path, "disk.raw"), guest);
  const declared = (name: string, more: object = {}) => ({ source: { file }, origin: `organization/project/stack/${name}`, ...more });
  return {
    context,
    lines,
    stop,
    guest,
    file,
    directory: directory.path,
    declared,
    check: (name: string, more: object = {}, olds?: DiskInputs) => importedDisk.check(context, olds, declared(name, more)),
    /** Checks and creates; the check must pass. */
    async create(name: string, more: object = {}): Promise<DiskState> {
      const { inputs, failures } = await importedDisk.check(context, undefined, declared(name, more));
      expect(failures).toEqual([]);
      return (await importedDisk.create(context, inputs)).state;
    },
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

type Caller = Awaited<ReturnType<typeof openCaller>>;

describe.skipIf(process.getuid!() !== 0)("an ImportedDisk", () => {
  let kvm: KvmHost;
  let libvirtd: Libvirtd;
  let ways: Record<"local" | "ssh", { readonly bed: Libvirtd; readonly host: unknown }>;

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

  for (const way of ["local", "ssh"] as const) {
    it(`lives its whole life on a host that is reached ${way === "ssh" ? "over SSH" : "by its socket"}`, async () => {
      const { bed, host } = ways[way];
      await using caller = await openCaller(host);
      const state = await caller.create("web root", { migrationRef: "wave-3" });
      expect(state).toMatchObject({
        diskId: expect.stringMatching(/^web-root-[0-9a-f]{8}$/),
        path: `${bed.poolPath}/${state.diskId}.qcow2`,
        virtualSizeBytes: caller.guest.length,
        sourceDigest: `sha256:${sha256(caller.guest)}`,
      });
      expect(await bed.virsh("vol-list", "default")).toContain(state.volumeName);
      expect(await bed.virsh("vol-dumpxml", "--pool", "default", state.volumeName)).toMatch(/<format type='qcow2'\/>/);
      expect(sha256(await guestByQemu(state.path, "qcow2", join(caller.directory, "back.raw")))).toBe(sha256(caller.guest));
      expect(await readdir(bed.poolPath)).toEqual([state.volumeName]);

      expect(await importedDisk.read(caller.context, state.diskId, state)).toMatchObject({ id: state.diskId, state });
      const again = await caller.check("web root", { migrationRef: "wave-4" }, state);
      expect(again.failures).toEqual([]);
      expect(await importedDisk.diff(caller.context, state.diskId, state, again.inputs)).toEqual({
        changes: [{ property: "migrationRef", effect: "live" }],
      });

      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(bed.poolPath)).toEqual([]);
      expect(await bed.virsh("vol-list", "default")).not.toContain(state.volumeName);
      expect(await importedDisk.read(caller.context, state.diskId, state)).toBeUndefined();
      await importedDisk.delete(caller.context, state.diskId, state);
    });
  }

  describe("by its socket", () => {
    const open = (): Promise<Caller> => openCaller(ways.local.host);

    it("is gone on refresh when its file was removed by hand, and an error when its pool is stopped", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      await libvirtd.virsh("pool-destroy", "default");
      await expect(importedDisk.read(caller.context, state.diskId, state)).rejects.toThrow(/not active/);
      await libvirtd.virsh("pool-start", "default");
      await rm(state.path);
      expect(await importedDisk.read(caller.context, state.diskId, state)).toBeUndefined();
      const restarted = { ...state, hostUuid: "6b0f3d0e-0000-4000-8000-000000000000" };
      expect(await importedDisk.read(caller.context, state.diskId, restarted)).toBeUndefined();
      const elsewhere = { ...restarted, hostName: "other" };
      await expect(importedDisk.read(caller.context, state.diskId, { ...restarted, hostName: undefined })).rejects.toThrow(
        /was made on \(UUID 6b0f3d0e-/,
      );
      for (const call of [
        importedDisk.read(caller.context, state.diskId, elsewhere),
        importedDisk.delete(caller.context, state.diskId, elsewhere),
      ])
        await expect(call).rejects.toThrow(
          /leads to another host here \(\S+, UUID [\da-f-]{36}\) than the one that web-[\da-f]+ was made on \(other, UUID 6b0f3d0e-/,
        );
    });

    it("is never taken for gone when the daemon does not answer", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      await using elsewhere = await openCaller({ uri: `qemu+unix:///system?socket=${caller.directory}/no-socket` });
      const moved = { ...state, host: { uri: `qemu+unix:///system?socket=${caller.directory}/no-socket` } };
      await expect(importedDisk.read(elsewhere.context, state.diskId, moved)).rejects.toBeInstanceOf(ConnectionError);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("refuses in check what would fail after the copy, and changes nothing", async () => {
      await using caller = await open();
      await writeFile(join(libvirtd.poolPath, "taken.qcow2"), "somebody's");
      const backed = join(caller.directory, "backed.qcow2");
      await qemuImg("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backed);
      const refusals: readonly (readonly [object, string, RegExp])[] = [
        [{ pool: "nowhere" }, "pool", /^pool: there is no pool nowhere on this machine: it has default \(virtlift\/pool\)$/],
        [{ name: "taken" }, "name", /^name: .*taken\.qcow2 exists on this machine and is not overwritten/],
        [{ source: { file: "/no/such.vmdk" } }, "source", /^source: there is no file \/no\/such\.vmdk \(virtlift\/source-missing\)$/],
        [{ source: { file: backed } }, "source", /^source: .*backing file/],
        [{ capacity: "1MiB" }, "capacity", /^capacity: 1.0 MiB is less than the source's 20.0 MiB/],
        [{ format: "raw", layout: "compressed" }, "layout", /^layout: a raw volume cannot be compressed/],
        [{ name: "../escape" }, "name", /^name: a disk's name is/],
        [{ capacity: "much" }, "capacity", /^capacity: "much" is no size/],
        [{ sauce: 1 }, "sauce", /^sauce: there is no such property: remove it, or mend its name \(virtlift\/argument\)$/],
        [{ source: { file: "a", ova: "b" } }, "source", /^source: source is exactly one of/],
        [{ checksum: "md5:0" }, "checksum", /^checksum: a checksum is/],
        [{ host: { uri: `qemu+unix:///system?socket=${caller.directory}/none` } }, "host", /^host: .*none/],
        [{ host: "http://kvm1" }, "host", /^host: /],
      ];
      for (const [more, property, reason] of refusals) {
        const { failures } = await caller.check("web", more);
        expect(failures).toEqual([{ property, reason: expect.stringMatching(reason) }]);
      }
      expect(await readdir(libvirtd.poolPath)).toEqual(["taken.qcow2"]);
      await rm(join(libvirtd.poolPath, "taken.qcow2"));
    });

    it("judges nothing that preview does not know yet", async () => {
      await using caller = await open();
      const { inputs, failures } = await caller.check("web", { source: { file: UNKNOWN } });
      expect(failures).toEqual([]);
      expect(inputs).toMatchObject({ diskId: UNKNOWN, path: UNKNOWN, declaration: UNKNOWN });
      const known = await caller.create("web");
      expect((await importedDisk.diff(caller.context, known.diskId, known, inputs)).changes.map((change) => change.effect)).not.toContain(
        "replace",
      );
      await importedDisk.delete(caller.context, known.diskId, known);
    });

    it("reads its source no more once it was imported", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      await rm(caller.file);
      const { inputs, failures } = await caller.check("web", {}, state);
      expect(failures).toEqual([]);
      expect((await importedDisk.diff(caller.context, state.diskId, state, inputs)).changes).toEqual([]);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("becomes a new file beside the old one when its declaration changes", async () => {
      await using caller = await open();
      const old = await caller.create("web");
      const { inputs, failures } = await caller.check("web", { capacity: "64MiB" }, old);
      expect(failures).toEqual([]);
      const { changes } = await importedDisk.diff(caller.context, old.diskId, old, inputs);
      expect(changes).toContainEqual({ property: "path", effect: "replace", why: expect.any(String) });
      expect(await caller.check("web", { capacity: "64MiB" })).toEqual({ inputs, failures: [] });
      const { state } = await importedDisk.create(caller.context, inputs);
      expect((await readdir(libvirtd.poolPath)).toSorted()).toEqual([old.volumeName, state.volumeName].toSorted());
      await importedDisk.delete(caller.context, old.diskId, old);
      expect(await readdir(libvirtd.poolPath)).toEqual([state.volumeName]);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("with a name of its own refuses another declaration until the name changes", async () => {
      await using caller = await open();
      const old = await caller.create("web", { name: "web-root" });
      const { failures } = await caller.check("web", { name: "web-root", capacity: "64MiB" }, old);
      expect(failures).toEqual([{ property: "name", reason: expect.stringContaining("give the changed disk another `name`") }]);
      expect((await caller.check("web", { name: "web-root-2", capacity: "64MiB" }, old)).failures).toEqual([]);
      await importedDisk.delete(caller.context, old.diskId, old);
    });

    it("is not replaced once it was written, unless the program says so", async () => {
      await using caller = await open();
      const old = await caller.create("web");
      await appendFile(old.path, "by the guest");
      const { failures } = await caller.check("web", { capacity: "64MiB" }, old);
      expect(failures).toEqual([
        { property: "capacity", reason: expect.stringMatching(/was written since its import.*replaceWritten: true/) },
      ]);
      expect((await caller.check("web", { capacity: "64MiB", replaceWritten: true }, old)).failures).toEqual([]);
      await importedDisk.delete(caller.context, old.diskId, old);
    });

    it("is taken as it is when an earlier run finished it and did not live to say so", async () => {
      await using caller = await open();
      for (const format of ["qcow2", "raw"]) {
        const first = await caller.create("web", { format });
        const second = await caller.create("web", { format });
        expect(second).toEqual(first);
        expect(caller.lines).toContainEqual(expect.stringContaining("was finished by an earlier run"));
        await importedDisk.delete(caller.context, second.diskId, second);
      }
      expect(await readdir(libvirtd.poolPath)).toEqual([]);
    });

    it("is not taken by another checkout of the same stack, unless that adopts it", async () => {
      await using caller = await open();
      const refused = async (format: "qcow2" | "raw"): Promise<DiskState> => {
        const { inputs } = await caller.check("web", { format });
        const { state } = await importedDisk.create(caller.context, inputs);
        vi.useFakeTimers({ toFake: ["Date"], now: Date.now() + 16 * 60 * 1000 });
        const { failures } = await caller.check("web", { format });
        const reason = `${state.path} exists on this machine and is not overwritten, since it was imported for a disk of this name that this stack's state does not know: take it over by \`source: { hostPath: "${state.path}", mode: "adopt" }\``;
        expect(failures).toEqual([{ property: "name", reason: expect.stringContaining(reason) }]);
        await expect(importedDisk.create(caller.context, inputs)).rejects.toThrow(reason);
        return state;
      };
      try {
        const raw = await refused("raw");
        await importedDisk.delete(caller.context, raw.diskId, raw);
        const { path, virtualSizeBytes } = await refused("qcow2");
        const adopted = await caller.create("web", { source: { hostPath: path, mode: "adopt" }, onDelete: "delete" });
        expect(adopted).toMatchObject({ path, virtualSizeBytes });
        await importedDisk.delete(caller.context, adopted.diskId, adopted);
      } finally {
        vi.useRealTimers();
      }
      expect(await readdir(libvirtd.poolPath)).toEqual([]);
    });

    it("is not deleted while a machine or another volume uses it", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      const domain = join(caller.directory, "domain.xml");
      const disk = `<disk type='file' device='disk'><source file='${state.path}'/><target dev='sda' bus='sata'/></disk>`;
      await writeFile(
        domain,
        `<domain type='qemu'><name>user</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os><devices>${disk}</devices></domain>`,
      );
      await libvirtd.virsh("define", domain);
      await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/is in use by user and is not deleted/);
      await libvirtd.virsh("undefine", "user");
      await libvirtd.virsh(
        "vol-create-as",
        "default",
        "overlay.qcow2",
        "64M",
        "--format",
        "qcow2",
        "--backing-vol",
        state.path,
        "--backing-vol-format",
        "qcow2",
      );
      await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/is in use by \S+overlay.qcow2/);
      await libvirtd.virsh("vol-delete", "--pool", "default", "overlay.qcow2");
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("is not deleted while a machine reaches it by another name, or by a file that is based on it", async () => {
      await using caller = await open();
      const { directory } = libvirtd;
      const [real, alias] = [join(directory, "real"), join(directory, "alias")];
      await mkdir(real, { mode: 0o711 });
      await symlink(real, alias);
      await libvirtd.virsh("pool-create-as", "linked", "dir", "--target", alias);
      const state = await caller.create("web", { pool: "linked" });
      const hops = ["first.qcow2", "second.qcow2"].map((name) => join(directory, name));
      await qemuImg("create", "-f", "qcow2", "-b", "real/" + state.volumeName, "-F", "qcow2", hops[0]!);
      await qemuImg("create", "-f", "qcow2", "-b", "first.qcow2", "-F", "qcow2", hops[1]!);
      const domain = join(caller.directory, "domain.xml");
      for (const path of [join(real, state.volumeName), hops[1]!]) {
        const disk = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${path}'/><target dev='sda' bus='sata'/></disk>`;
        const other = disk.replace(path, "/nowhere").replace("sda", "sdb");
        await writeFile(
          domain,
          `<domain type='qemu'><name>user</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os><devices>${other}${disk}</devices></domain>`,
        );
        await libvirtd.virsh("define", domain);
        await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/is in use by user and is not deleted/);
        await libvirtd.virsh("undefine", "user");
      }
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(real)).toEqual([]);
      await libvirtd.virsh("pool-destroy", "linked");
      await Promise.all(hops.map((path) => rm(path)));
    });

    it("is neither gone nor deleted when its pool leads to another folder", async () => {
      await using caller = await open();
      const folders = ["old", "new"].map((name) => join(libvirtd.directory, name));
      await Promise.all(folders.map((folder) => mkdir(folder, { mode: 0o711 })));
      await libvirtd.virsh("pool-create-as", "moving", "dir", "--target", folders[0]!);
      const state = await caller.create("web", { pool: "moving" });
      await libvirtd.virsh("pool-destroy", "moving");
      await libvirtd.virsh("pool-create-as", "moving", "dir", "--target", folders[1]!);
      const theirs = join(folders[1]!, state.volumeName);
      for (const content of [undefined, "somebody's"]) {
        if (content !== undefined) await writeFile(theirs, content);
        await expect(importedDisk.read(caller.context, state.diskId, state)).rejects.toThrow(/was imported when it lay elsewhere/);
        await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/was imported when it lay elsewhere/);
      }
      expect(await readFile(theirs, "utf8")).toBe("somebody's");
      expect(await readdir(folders[0]!)).toEqual([state.volumeName]);
      await libvirtd.virsh("pool-destroy", "moving");
    });

    it("is neither gone nor deleted when what its pool lies on is not mounted", async () => {
      await using caller = await openCaller(ways.ssh.host);
      const [store, folder] = ["store", "mounted"].map((name) => join(kvm.directory, name)) as [string, string];
      await Promise.all([store, folder].map((path) => mkdir(path, { mode: 0o711 })));
      await kvm.run("mount", "-t", "tmpfs", "-o", "mode=0711", "none", store);
      await kvm.run("mount", "--bind", store, folder);
      await kvm.virsh("pool-create-as", "mounted", "dir", "--target", folder);
      const state = await caller.create("web", { pool: "mounted" });
      await kvm.run("umount", folder);
      await expect(importedDisk.read(caller.context, state.diskId, state)).rejects.toThrow(/nothing is mounted there now/);
      await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/nothing is mounted there now/);
      await kvm.run("mount", "--bind", store, folder);
      expect(await importedDisk.read(caller.context, state.diskId, state)).toMatchObject({ state });
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await kvm.run("ls", "-A", store)).toBe("");
      await kvm.virsh("pool-destroy", "mounted");
      await kvm.run("umount", folder, store);
    });

    it("keeps what its import found through an update and a refresh", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      const { inputs } = await caller.check("web", { migrationRef: "wave-2" }, state);
      expect(await importedDisk.update(caller.context, state.diskId, state, inputs)).toEqual({ ...state, migrationRef: "wave-2" });
      const found = await importedDisk.read(caller.context, state.diskId, state);
      expect(found!.inputs).toEqual((await caller.check("web", {}, state)).inputs);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("is not taken by another stack of the same names once it was written", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      await appendFile(state.path, "by the guest of a colleague");
      const { inputs, failures } = await caller.check("web");
      expect(failures).toEqual([{ property: "name", reason: expect.stringMatching(/exists on this machine and is not overwritten/) }]);
      await expect(importedDisk.create(caller.context, inputs)).rejects.toThrow(/exists on this machine and is not overwritten/);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("lies beside one of another stack that declares the same", async () => {
      await using caller = await open();
      const one = await caller.create("web");
      const other = await caller.create("web", { origin: "organization/project/production/web" });
      expect(other.path).not.toBe(one.path);
      expect(other.declaration).toBe(one.declaration);
      for (const state of [one, other]) await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("lies in the folder of its pool, whatever that is called", async () => {
      await using caller = await open();
      const folder = join(libvirtd.directory, ` it's "odd" & <b> $(touch x) `);
      await mkdir(folder, { mode: 0o711 });
      const definition = join(caller.directory, "pool.xml");
      const target = folder.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
      await writeFile(definition, `<pool type='dir'><name>an odd pool</name><target><path>${target}</path></target></pool>`);
      await libvirtd.virsh("pool-create", definition);
      const state = await caller.create("web", { pool: "an odd pool", format: "raw" });
      expect(state.isUploaded).toBeUndefined();
      expect(await readdir(folder)).toContain(state.volumeName);
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(folder)).toEqual([]);
      await libvirtd.virsh("pool-destroy", "an odd pool");
    });

    it("has nothing beside it when the host lost its power right after the publication", async () => {
      await using caller = await open();
      for (const format of ["qcow2", "raw"]) {
        const state = await caller.create("web", { format });
        const work = join(libvirtd.poolPath, WORK_FOLDER);
        await mkdir(work, { recursive: true });
        await link(state.path, join(work, `${state.importId}.part`));
        await writeFile(join(work, `${state.importId}.journal`), "0 4096\n");
        const again = await caller.create("web", { format });
        expect(again).toEqual(state);
        expect(await readdir(libvirtd.poolPath)).toEqual(format === "raw" ? [WORK_FOLDER, state.volumeName] : [state.volumeName]);
        await importedDisk.delete(caller.context, again.diskId, again);
        expect(await readdir(libvirtd.poolPath)).toEqual([]);
      }
    });

    it("deletes only the file that it made", async () => {
      await using caller = await open();
      const state = await caller.create("web");
      await rm(state.path);
      await writeFile(state.path, "somebody's");
      await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/is not the disk that was imported there/);
      expect(await readFile(state.path, "utf8")).toBe("somebody's");
      await rm(state.path);
    });

    it("stays when it is to be retained", async () => {
      await using caller = await open();
      const state = await caller.create("web", { onDelete: "retain" });
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(libvirtd.poolPath)).toEqual([state.volumeName]);
      await rm(state.path);
    });

    it("leaves a part when it is interrupted, which is found, cleared, or gone on with", async () => {
      await using caller = await open();
      const noise = join(caller.directory, "noise.raw");
      await writeFile(noise, randomBytes(200 * 1024 * 1024));
      const { inputs } = await caller.check("web", { source: { file: noise } });
      const host = caller.context.hosts.open({ uri: libvirtd.uri });
      const interrupted = async () => {
        const stop = new AbortController();
        const creating = importedDisk.create({ ...caller.context, signal: stop.signal }, inputs);
        let isOver = false;
        creating.then(
          () => (isOver = true),
          () => (isOver = true),
        );
        const part = join(libvirtd.poolPath, WORK_FOLDER, `${inputs.importId}.part`);
        while (!isOver && (!existsSync(part) || statSync(part).size < 20 * 1024 * 1024)) await sleep(1);
        stop.abort(new Error("the engine is gone"));
        await expect(creating).rejects.toThrow("the engine is gone");
      };
      await interrupted();
      expect(await findLeftovers(host)).toEqual([expect.objectContaining({ id: inputs.importId, pool: "default", isWriting: false })]);
      expect(await clearLeftovers(host)).toHaveLength(1);
      expect(await readdir(libvirtd.poolPath)).toEqual([]);

      // Power lost between the publication and the removal of what the host had fetched.
      const work = join(libvirtd.poolPath, WORK_FOLDER);
      await mkdir(work);
      for (const name of ["lost.source", "lost.source.etag", "lost.log"]) await writeFile(join(work, name), Buffer.alloc(8192, 1));
      const lost = { id: "lost", path: join(work, "lost.source"), allocatedBytes: 16_384 };
      expect(await findLeftovers(host)).toMatchObject([lost]);
      expect(await clearLeftovers(host)).toMatchObject([lost]);
      expect(await readdir(libvirtd.poolPath)).toEqual([]);

      await interrupted();
      const { state } = await importedDisk.create(caller.context, inputs);
      expect(caller.lines).toContainEqual(expect.stringMatching(/MiB on the wire now, .* MiB resumed from an interrupted run \(/));
      expect(await readdir(libvirtd.poolPath)).toEqual([state.volumeName]);
      await importedDisk.delete(caller.context, state.diskId, state);
    });

    it("says how much room is missing", async () => {
      await using small = await openLibvirtd({ poolMiB: 32 });
      await using caller = await openCaller({ uri: small.uri });
      const noise = join(caller.directory, "noise.raw");
      await writeFile(noise, randomBytes(64 * 1024 * 1024));
      const { failures } = await caller.check("web", { source: { file: noise } });
      expect(failures).toEqual([{ property: "pool", reason: expect.stringMatching(/has .* MiB free and the disk takes up to 64.0 MiB/) }]);
    });
  });

  it("is refused over SSH to a user who may not write, and not with sudo", async () => {
    await kvm.addUser("migrator", { sudo: true });
    const host = { uri: kvm.sshUri("migrator"), identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile };
    {
      await using caller = await openCaller(host);
      const { failures } = await caller.check("web");
      expect(failures).toHaveLength(1);
      expect(failures[0]!.reason).toMatch(/migrator/);
    }
    await using caller = await openCaller({ ...host, sudo: true });
    const state = await caller.create("web");
    await importedDisk.delete(caller.context, state.diskId, state);
    expect(await readdir(kvm.poolPath)).toEqual([]);
  });
});

describe("an ImportedDisk's table of changes", () => {
  it("names every argument", () => {
    expect(Object.keys(DISK_CHANGES)).toEqual(expect.arrayContaining(Object.keys(ImportedDiskSchema.shape)));
  });
});
