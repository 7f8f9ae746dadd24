import { createHash } from "node:crypto";
import { appendFileSync } from "node:fs";
import { appendFile, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type DiskInputs, type DiskState, importedDisk } from "../../provider/resources/imported-disk.ts";
import { clearLeftovers, findLeftovers } from "../../provider/resources/leftovers.ts";
import type { Context } from "../../provider/resources/resource.ts";
import { virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { openUpload } from "../../provider/transfer/upload.ts";
import { encodeMark } from "../../provider/transfer/volume.ts";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { parseGuestReport } from "../../scripts/guest/report.ts";
import { openDirectory } from "../bed/directory.ts";
import { type KvmHost, type Libvirtd, openKvmHost, openLibvirtd } from "../bed/libvirtd.ts";
import { openDiskPool, openFsPool } from "../bed/pools.ts";
import { guestByQemu, mixedGuest, writeRaw } from "../image/qemu.ts";
import { createOwnHosts } from "../host/setup.ts";

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** What the adapter gives to every call, with a source to import. */
async function openCaller(host: object) {
  const directory = await openDirectory("caller");
  const hosts = createOwnHosts();
  const lines: string[] = [];
  const context: Context = {
    config: (key) => (key === "virtlift:host" ? JSON.stringify(host) : undefined),
    log: (_level, text) => lines.push(text),
    signal: new AbortController().signal,
    hosts,
  };
  const guest = mixedGuest();
  const file = await writeRaw(join(directory.path, "disk.raw"), guest);
  const check = (name: string, more: object = {}, olds?: DiskInputs) =>
    importedDisk.check(context, olds, { source: { file }, origin: `organization/project/stack/${name}`, ...more });
  return {
    context,
    lines,
    /** The preview's line about the way. */
    wayTold: () => lines.find((line) => line.includes("libvirt's upload stream, since ")),
    guest,
    check,
    path: (name: string) => join(directory.path, name),
    /** Checks and creates; the check must pass. */
    async create(name: string, more: object = {}): Promise<DiskState> {
      const { inputs, failures } = await check(name, more);
      expect(failures).toEqual([]);
      return (await importedDisk.create(context, inputs)).state;
    },
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

function loginTo(kvm: KvmHost, user: string) {
  return { uri: kvm.sshUri(user), identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile };
}

describe.skipIf(process.getuid!() !== 0)("an ImportedDisk goes through libvirt's upload stream", () => {
  let kvm: KvmHost;
  let forced: KvmHost;
  let libvirtd: Libvirtd;
  beforeAll(async () => {
    [kvm, forced, libvirtd] = await Promise.all([
      openKvmHost(),
      openKvmHost({ name: "kvm2", sshdConfig: ["ForceCommand virt-ssh-helper qemu:///system", "AllowStreamLocalForwarding no"] }),
      openLibvirtd(),
    ]);
    await kvm.run("chgrp", "libvirt", "/run/libvirt/libvirt-sock");
    for (const name of ["manager", "forwarder"]) {
      await kvm.addUser(name);
      await kvm.run("usermod", "--append", "--groups", "libvirt", name);
    }
    await kvm.run("usermod", "--shell", "/usr/sbin/nologin", "forwarder");
  }, 60_000);
  afterAll(async () => {
    await Promise.all([kvm, forced, libvirtd].map((each) => each[Symbol.asyncDispose]()));
  });

  const ways = {
    "for a user who may use libvirt and not the pool's folder": () => ({
      bed: kvm,
      host: loginTo(kvm, "manager"),
      reason: /manager may not write to .*images on manager@/,
    }),
    "for a user without a shell, by a forwarded socket": () => ({
      bed: kvm,
      host: loginTo(kvm, "forwarder"),
      reason: /no commands can be run on forwarder@/,
    }),
    "where each login is forced to run virt-ssh-helper": () => ({
      bed: forced,
      host: loginTo(forced, "root"),
      reason: /no commands can be run on root@/,
    }),
  };
  for (const [way, open] of Object.entries(ways)) {
    it(`${way}, and lives its whole life`, async () => {
      const { bed, host, reason } = open();
      await using caller = await openCaller(host);
      const state = await caller.create("web", { migrationRef: "wave-3" });
      expect(caller.wayTold()).toMatch(reason);
      expect(state).toMatchObject({ path: `${bed.poolPath}/${state.volumeName}`, isUploaded: true });
      expect(await bed.virsh("vol-dumpxml", "--pool", "default", state.volumeName)).toMatch(/<format type='qcow2'\/>/);
      expect(sha256(await guestByQemu(state.path, "qcow2", caller.path("back.raw")))).toBe(sha256(caller.guest));
      expect(await readdir(bed.poolPath)).toEqual([state.volumeName]);
      expect((await caller.check("copy", { source: { volume: state.volumeName } })).failures).toMatchObject([
        { property: "source", reason: expect.stringMatching(/and would be copied there by a program, but .*: bring it here/) },
      ]);

      expect(await importedDisk.read(caller.context, state.diskId, state)).toMatchObject({ id: state.diskId, state });
      expect(
        (await importedDisk.create(caller.context, (await caller.check("web", { migrationRef: "wave-3" })).inputs)).state,
      ).toMatchObject({
        contentDigest: state.contentDigest,
      });
      expect(caller.lines.at(-1)).toContain("was finished by an earlier run");

      expect((await caller.check("web", { layout: "full" }, state)).failures).toEqual([]);
      await new Promise((resolve) => setTimeout(resolve, 2500));
      await appendFile(state.path, "guest");
      expect((await caller.check("web", { layout: "full" }, state)).failures).toMatchObject([
        { property: "layout", reason: expect.stringContaining("was written since its import") },
      ]);

      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await readdir(bed.poolPath)).toEqual([]);
      expect(await importedDisk.read(caller.context, state.diskId, state)).toBeUndefined();
      await importedDisk.delete(caller.context, state.diskId, state);
    });
  }

  it("as raw, is known by its state alone, and is never replaced without consent", async () => {
    await using caller = await openCaller(loginTo(kvm, "manager"));
    const state = await caller.create("plain", { format: "raw", name: "plain" });
    expect(caller.wayTold()).toContain("a raw volume then carries no stamp");
    expect(sha256(await readFile(state.path))).toBe(sha256(caller.guest));
    expect((await caller.check("plain", { format: "raw", name: "other", layout: "full" }, state)).failures).toMatchObject([
      { reason: expect.stringContaining("was written since its import") },
    ]);
    expect((await caller.check("stranger", { format: "raw", name: "plain" })).failures).toMatchObject([
      { property: "name", reason: expect.stringContaining("exists on") },
    ]);
    // Another file of that name: of another size, or of the same size and older than the import.
    const refusal = /is not the disk that was imported there and is not deleted/;
    const sizeBytes = caller.guest.length;
    await kvm.run("mv", state.path, `${state.path}.own`);
    for (const make of [`truncate -s ${sizeBytes + 512}`, `truncate -s ${sizeBytes}`]) {
      await kvm.run("sh", "-c", `${make} ${state.path}; touch -d 2020-01-01 ${state.path}`);
      await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(refusal);
      await kvm.run("rm", state.path);
    }
    await kvm.run("truncate", "-s", String(sizeBytes + 512), state.path);
    await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(refusal);
    await kvm.run("mv", `${state.path}.own`, state.path);
    // What its guest wrote makes no other disk of it; nor does a state of before that was written down.
    await kvm.run("sh", "-c", `echo guest | dd of=${state.path} conv=notrunc status=none`);
    const { uploadedAt, ...older } = state;
    expect(uploadedAt).toBeGreaterThan(1.7e9);
    await importedDisk.delete(caller.context, state.diskId, older);
    expect(await readdir(kvm.poolPath)).toEqual([]);
  });

  it("is not deleted when its volume is another one by now", async () => {
    await using caller = await openCaller(loginTo(kvm, "manager"));
    const state = await caller.create("web", { name: "swapped" });
    await kvm.run("sh", "-c", `echo somebody > ${state.path}`);
    await expect(importedDisk.delete(caller.context, state.diskId, state)).rejects.toThrow(/is not the disk that was imported there/);
    await kvm.run("rm", state.path);
  });

  it("leaves a volume when it is interrupted, which is found and cleared, and no other", async () => {
    await using caller = await openCaller(loginTo(forced, "root"));
    const host = caller.context.hosts.open(loginTo(forced, "root"));
    const signal = new AbortController().signal;
    const options = { pool: "default", isBlock: false, capacityBytes: 1024 * 1024, writer: "one", signal };
    for (const id of ["left", "written"]) {
      await using part = await openUpload(host, { ...options, id, finalPath: join(forced.poolPath, `${id}.raw`) });
      await part.write(65_536, Buffer.alloc(65_536, id));
      await part.settle();
    }
    // What a guest writes into its own disk makes nothing of ours out of it.
    const mark = Buffer.concat([encodeMark({ importId: "forged", writer: "guest" }), Buffer.alloc(1024)]);
    for (const name of ["guest.raw", "base.raw", "other.raw"])
      await writeFile(join(forced.poolPath, name), name === "other.raw" ? "other" : mark);
    await forced.run(
      "qemu-img",
      "create",
      "-q",
      "-f",
      "qcow2",
      "-b",
      join(forced.poolPath, "base.raw"),
      "-F",
      "raw",
      join(forced.poolPath, "top.qcow2"),
    );
    const xml = `<domain type="qemu"><name>guest</name><memory unit="MiB">64</memory><os><type>hvm</type></os><devices>
      <disk type="file"><source file="${forced.poolPath}/guest.raw"/><target dev="sda" bus="sata"/></disk></devices></domain>`;
    await writeFile(join(forced.directory, "guest.xml"), xml);
    await forced.virsh("define", join(forced.directory, "guest.xml"));
    const writing = setInterval(() => appendFileSync(join(forced.poolPath, "written.raw"), "more"), 20);
    try {
      const left = { id: "left", pool: "default", path: join(forced.poolPath, "left.raw"), isWriting: false };
      const found = await findLeftovers(host, 200);
      expect(found).toMatchObject([left, { id: "written", isWriting: true }]);
      expect(found[0]!.allocatedBytes).toBeGreaterThan(65_536);
      expect(Math.abs(found[0]!.modifiedSeconds! - Date.now() / 1000)).toBeLessThan(600);
      expect(await clearLeftovers(host, 200)).toMatchObject([left]);
    } finally {
      clearInterval(writing);
    }
    expect(await clearLeftovers(host, 200)).toMatchObject([{ id: "written" }]);
    expect(await findLeftovers(host, 0)).toEqual([]);
    const kept = (await readdir(forced.poolPath)).toSorted();
    expect(kept).toEqual(["base.raw", "guest.raw", "other.raw", "top.qcow2"]);
    await forced.virsh("undefine", "guest");
    for (const name of kept) await rm(join(forced.poolPath, name));
  });

  it("is left over only where no machine has it, by whatever name", async () => {
    await using caller = await openCaller({ uri: libvirtd.uri });
    const host = caller.context.hosts.open({ uri: libvirtd.uri });
    const finalPath = join(libvirtd.poolPath, "guest.raw");
    await writeFile(finalPath, Buffer.concat([encodeMark({ importId: "guest", writer: "one" }), Buffer.alloc(65_536)]));
    const name = caller.path("by-another-name");
    await symlink(finalPath, name);
    const xml = `<domain type="qemu"><name>linked</name><memory>1024</memory><os><type arch="x86_64">hvm</type></os><devices>
      <disk type="file"><source file="${name}"/><target dev="sda" bus="sata"/></disk></devices></domain>`;
    await writeFile(caller.path("linked.xml"), xml);
    await libvirtd.virsh("define", caller.path("linked.xml"));
    expect(await findLeftovers(host, 0)).toEqual([]);
    expect(await clearLeftovers(host, 0)).toEqual([]);
    await libvirtd.virsh("undefine", "linked");
    expect(await clearLeftovers(host, 0)).toMatchObject([{ id: "guest", path: finalPath }]);
    expect(await readdir(libvirtd.poolPath)).toEqual([]);
  });

  it("is refused in preview when it is too large for its pool", async () => {
    await using caller = await openCaller(loginTo(kvm, "manager"));
    const { failures } = await caller.check("web", { layout: "full", capacity: "900TiB" });
    expect(failures).toMatchObject([{ property: "pool", reason: expect.stringMatching(/ free and the disk takes up to 900 TiB/) }]);
  });

  it("where the host lacks what the receiver needs", async () => {
    await using caller = await openCaller(loginTo(kvm, "root"));
    await kvm.run("mount", "--bind", "/dev/null", "/usr/bin/flock");
    try {
      const state = await caller.create("tools");
      expect(caller.wayTold()).toMatch(/since root@\S+ lacks flock;/);
      for (const [source, reason] of [
        [{ hostPath: state.path }, /lies on root@\S+ and would be copied there by a program, but root@\S+ lacks flock: bring it here/],
        [{ volume: state.volumeName }, /lies on root@\S+ and would be copied there by a program/],
        [{ url: "http://127.0.0.1/disk", fetch: "host" }, /is to be fetched by root@\S+, but root@\S+ lacks flock: let this machine fetch/],
      ] as const) {
        const { inputs, failures } = await caller.check("on-host", { source });
        expect(failures).toMatchObject([{ property: "source", reason: expect.stringMatching(reason) }]);
        await expect(importedDisk.create(caller.context, inputs)).rejects.toThrow(reason);
      }
      await importedDisk.delete(caller.context, state.diskId, state);
    } finally {
      await kvm.run("umount", "/usr/bin/flock");
    }
  });

  it("but not to have its content read by a qemu-img that is not there", async () => {
    await using caller = await openCaller(loginTo(kvm, "root"));
    await kvm.run("mount", "--bind", "/dev/null", "/usr/bin/qemu-img");
    try {
      const { failures } = await caller.check("web", { verify: "content" });
      expect(failures).toMatchObject([
        { property: "verify", reason: expect.stringMatching(/read by qemu-img, which root@\S+ lacks: install qemu-utils there/) },
      ]);
    } finally {
      await kvm.run("umount", "/usr/bin/qemu-img");
    }
  });

  it("into a file system that only libvirt sees, and as a part file where commands see it too", async () => {
    for (const { bed, host, isSeen } of [
      { bed: libvirtd, host: { uri: libvirtd.uri }, isSeen: false },
      { bed: kvm, host: loginTo(kvm, "root"), isSeen: true },
    ]) {
      await using pool = await openFsPool(bed);
      await using caller = await openCaller(host);
      const state = await caller.create("fs", { pool: pool.name });
      expect(caller.wayTold()?.includes("commands on this machine do not see the storage")).toBe(isSeen ? undefined : true);
      expect(state.isUploaded).toBe(isSeen ? undefined : true);
      expect(await bed.virsh("vol-dumpxml", "--pool", pool.name, state.volumeName)).toMatch(/<format type='qcow2'\/>/);
      await bed.run("cp", state.path, join(bed.directory, "copy.qcow2"));
      const found = await guestByQemu(join(bed.directory, "copy.qcow2"), "qcow2", caller.path("back.raw"));
      expect(sha256(found)).toBe(sha256(caller.guest));
      await importedDisk.delete(caller.context, state.diskId, state);
      expect(await bed.virsh("vol-list", pool.name)).not.toContain(state.volumeName);
    }
  });

  it("into a partition, which is raw and has the name that libvirt gives it, and boots a machine", async () => {
    await using pool = await openDiskPool(libvirtd);
    await using caller = await openCaller({ uri: libvirtd.uri });
    const next = `${pool.device}p1`;
    expect((await caller.check("part", { pool: "disk" })).failures).toMatchObject([
      { property: "format", reason: expect.stringContaining('set `format: "raw"`') },
      { property: "name", reason: expect.stringContaining(`set \`name: "${next}"\``) },
    ]);
    const { path: file } = await prepareGuest("raw", { hash: false });
    const place = { pool: "disk", format: "raw", name: next };
    const declared = { ...place, source: { file } };
    expect((await caller.check("part", { ...declared, capacity: "1GiB" })).failures).toMatchObject([{ property: "pool" }]);
    const state = await caller.create("part", declared);
    expect(state).toMatchObject({ path: `/dev/${next}`, volumeName: next, isUploaded: true });
    const [device, guest] = [await readFile(state.path), await readFile(file)];
    expect(sha256(device.subarray(0, guest.length))).toBe(sha256(guest));
    expect(await importedDisk.read(caller.context, state.diskId, state)).toMatchObject({ id: next });
    expect((await caller.check("part", declared, state)).failures).toEqual([]);
    expect((await caller.check("other", place)).failures).toMatchObject([
      { property: "name", reason: expect.stringContaining("exists on") },
    ]);

    const declaredMachine = {
      origin: "organization/project/stack/guest",
      importedDisk: { diskId: state.diskId, path: state.path, format: "raw", pool: "disk" },
      memoryMiB: 256,
      domainType: "qemu",
      serialLog: join(libvirtd.directory, "device.log"),
      waitFor: [{ type: "serial", text: "virtlift-guest done", timeoutSeconds: 90 }],
    };
    const machine = await virtualMachine.check(caller.context, undefined, declaredMachine);
    expect(machine.failures).toEqual([]);
    const { id, state: running } = await virtualMachine.create(caller.context, machine.inputs);
    expect(await libvirtd.virsh("dumpxml", running.name)).toMatch(new RegExp(`<disk type='block' [^]*<source dev='${state.path}'`));
    expect(parseGuestReport(await readFile(declaredMachine.serialLog, "utf8"))).toMatchObject({
      firmware: "bios",
      disks: [{ device: "/dev/sda", sizeBytes: device.length }],
    });
    await virtualMachine.delete(caller.context, id, running);

    // What lies on a device may be an older owner's: it is shown, and left to be removed by hand.
    const host = caller.context.hosts.open({ uri: libvirtd.uri });
    const left = { id: "left", pool: "disk", path: expect.stringMatching(`/${pool.device}p2$`) as string };
    const options = { isBlock: true, capacityBytes: 8 * 1024 * 1024, writer: "one", signal: caller.context.signal };
    await using _upload = await openUpload(host, { ...options, id: left.id, pool: left.pool, finalPath: `/dev/${pool.device}p2` });
    expect(await findLeftovers(host, 0)).toMatchObject([{ ...left, modifiedSeconds: undefined, isWriting: false }]);
    expect(await clearLeftovers(host, 0)).toEqual([]);
    expect(await findLeftovers(host, 0)).toMatchObject([left]);
  }, 120_000);
});
