/** The client against real daemons: libvirt's test driver, and QEMU through a private libvirtd. */
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, test as base } from "vitest";
import { Libvirt, type Download } from "../../provider/libvirt/client.ts";
import {
  DOMAIN_DEVICE_MODIFY,
  DOMAIN_LIFECYCLE,
  DOMAIN_METADATA,
  DOMAIN_START,
  DOMAIN_STATE,
  DOMAIN_UNDEFINE,
  DOMAIN_VCPU,
  DOMAIN_XML,
  LIBVIRT_ERROR,
  LIST_DOMAINS,
  STORAGE_POOL_STATE,
  STORAGE_VOL_INFO,
  STORAGE_VOL_TRANSFER,
} from "../../provider/libvirt/constants.ts";
import type { StoragePool } from "../../provider/libvirt/procedures.ts";
import { openLibvirtd, type Libvirtd } from "../bed/libvirtd.ts";
import { FakeLibvirtd, long, none, OK, REPLY, some, text, word } from "../fakes/libvirtd.ts";

const MIB = 1024 * 1024;

const test = base.extend<{ readonly libvirtd: Libvirtd }>({
  libvirtd: [
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    async ({}, use) => {
      await using libvirtd = await openLibvirtd({ poolMiB: 64 });
      await use(libvirtd);
    },
    { scope: "file" },
  ],
});

function openQemu(libvirtd: Libvirtd): Promise<Libvirt> {
  return Libvirt.open(createConnection(libvirtd.socketPath), { uri: "qemu:///system", host: "the bed" });
}

function openTestDriver(libvirtd: Libvirtd): Promise<Libvirt> {
  return Libvirt.open(createConnection(libvirtd.socketPath), { uri: "test:///default", host: "the bed" });
}

function volumeXml(name: string, capacity: number): string {
  return `<volume><name>${name}</name><capacity>${capacity}</capacity><allocation>0</allocation><target><format type="raw"/></target></volume>`;
}

/** A machine without a disk, whose firmware shows itself on the serial console. */
function domainXml(name: string, memoryMiB = 32): string {
  return `<domain type="qemu"><name>${name}</name><memory unit="MiB">${memoryMiB}</memory><vcpu>1</vcpu>
    <os><type arch="x86_64" machine="q35">hvm</type><bios useserial="yes"/></os><features><acpi/></features>
    <devices><serial type="pty"/><console type="pty"/><video><model type="vga"/></video><graphics type="vnc" autoport="yes" listen="127.0.0.1"/>
    <controller type="scsi" model="virtio-scsi"/></devices></domain>`;
}

async function bytesOf(download: Download): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for await (const piece of download) parts.push("data" in piece ? piece.data : Buffer.alloc(piece.hole));
  return Buffer.concat(parts);
}

/** Waits for what comes as an event. Fails after ten seconds. */
async function until(isTrue: () => boolean): Promise<void> {
  for (const deadline = Date.now() + 10_000; !isTrue(); await sleep(10)) {
    if (Date.now() > deadline) throw new Error("it did not come in ten seconds");
  }
}

describe("libvirt's test driver", () => {
  test("answers about itself and its node", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    expect(await libvirt.connectGetType()).toBe("TEST");
    expect(await libvirt.connectGetUri()).toBe("test:///default");
    expect(await libvirt.connectGetLibVersion()).toBeGreaterThanOrEqual(9_000_000);
    expect(await libvirt.connectSupportsFeature(14)).toBe(true);
    expect(await libvirt.nodeGetInfo()).toEqual({
      model: "i686",
      memory: 3_145_728,
      cpus: 16,
      mhz: 1400,
      nodes: 2,
      sockets: 2,
      cores: 2,
      threads: 2,
    });
    expect(await libvirt.nodeGetSecurityModel()).toEqual({ model: "testSecurity", doi: "" });
    expect(await libvirt.connectGetCapabilities()).toMatch(/^<capabilities>/);
  });

  test("lists and finds its domain, pool and network by name and by UUID", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    const domain = await libvirt.domainLookupByName("test");
    expect(domain).toEqual({ name: "test", uuid: "6695eb01-f6a4-8304-79aa-97f2502e193f", id: 1 });
    expect(await libvirt.domainLookupByUUID(domain.uuid)).toEqual(domain);
    expect(await libvirt.connectListAllDomains(LIST_DOMAINS.active)).toEqual([domain]);
    expect(await libvirt.connectListAllDomains(LIST_DOMAINS.inactive)).toEqual([]);
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    expect(await libvirt.storagePoolLookupByUUID(pool.uuid)).toEqual(pool);
    expect(await libvirt.connectListAllStoragePools()).toEqual([pool]);
    const network = await libvirt.networkLookupByName("default");
    expect(await libvirt.networkLookupByUUID(network.uuid)).toEqual(network);
    expect(await libvirt.connectListAllNetworks()).toEqual([network]);
    expect(await libvirt.networkGetBridgeName(network)).toBe("virbr0");
    expect(await libvirt.networkIsActive(network)).toBe(true);
    expect(await libvirt.domainInterfaceAddresses(domain, 0)).toMatchObject([{ addrs: [{ type: 0, prefix: 24 }] }]);
  });

  test("changes a domain and tells how it is", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    const domain = await libvirt.domainLookupByName("test");
    expect(await libvirt.domainGetInfo(domain)).toMatchObject({ state: DOMAIN_STATE.running, memory: 2_097_152, nrVirtCpu: 2 });
    await libvirt.domainSuspend(domain);
    expect(await libvirt.domainGetState(domain)).toEqual({ state: DOMAIN_STATE.paused, reason: 1 });
    await libvirt.domainResume(domain);
    await libvirt.domainSetMemory(domain, 1_048_576);
    await libvirt.domainSetVcpusFlags(domain, 1, DOMAIN_VCPU.live);
    expect(await libvirt.domainGetVcpusFlags(domain, DOMAIN_VCPU.live)).toBe(1);
    await libvirt.domainSetAutostart(domain, true);
    expect(await libvirt.domainGetAutostart(domain)).toBe(true);
    const snapshot = await libvirt.domainSnapshotCreateXML(domain, "<domainsnapshot><name>before</name></domainsnapshot>");
    expect(await libvirt.domainListAllSnapshots(domain)).toEqual([snapshot]);
    expect(await libvirt.domainSnapshotLookupByName(domain, "before")).toEqual(snapshot);
    await libvirt.domainRevertToSnapshot(snapshot);
    await libvirt.domainSnapshotDelete(snapshot);
    await expect(libvirt.domainSnapshotLookupByName(domain, "before")).rejects.toMatchObject({ code: LIBVIRT_ERROR.noDomainSnapshot });
    await libvirt.domainDestroy(domain);
    expect(await libvirt.domainIsActive(domain)).toBe(false);
    await libvirt.domainUndefine(domain);
    await expect(libvirt.domainGetXMLDesc(domain)).rejects.toMatchObject({ code: LIBVIRT_ERROR.noDomain });
  });

  test("tells the listeners of a kind of event, once each, until they stop", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    const domain = await libvirt.domainLookupByName("test");
    const first: number[] = [];
    const second: number[] = [];
    const stopFirst = await libvirt.onDomainEvent("lifecycle", ({ event }) => first.push(event));
    const stopSecond = await libvirt.onDomainEvent("lifecycle", ({ event }) => second.push(event));
    await libvirt.domainDestroy(domain);
    await until(() => first.length === 1 && second.length === 1);
    await stopFirst();
    await stopFirst();
    await libvirt.domainCreate(domain);
    await until(() => second.length === 2);
    await stopSecond();
    const stopThird = await libvirt.onDomainEvent("lifecycle", ({ event }) => first.push(event));
    await libvirt.domainDestroy(domain);
    await until(() => first.length === 2);
    await stopThird();
    expect(first).toEqual([DOMAIN_LIFECYCLE.stopped, DOMAIN_LIFECYCLE.stopped]);
    expect(second).toEqual([DOMAIN_LIFECYCLE.stopped, DOMAIN_LIFECYCLE.started]);
  });

  test("tells of pools and networks too", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    const seen: string[] = [];
    await libvirt.onStoragePoolEvent("lifecycle", ({ pool, event }) => seen.push(`${pool.name} ${event}`));
    await libvirt.onStoragePoolEvent("refresh", ({ pool }) => seen.push(`${pool.name} refresh`));
    await libvirt.onNetworkEvent("lifecycle", ({ net, event }) => seen.push(`${net.name} ${event}`));
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    await libvirt.storagePoolRefresh(pool);
    await libvirt.storagePoolDestroy(pool);
    await until(() => seen.length === 2);
    expect(seen).toEqual(["default-pool refresh", "default-pool 3"]);
  });

  test("refuses by its codes", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    await expect(libvirt.domainLookupByName("nobody")).rejects.toMatchObject({
      name: "LibvirtError",
      code: 42,
      procedure: "DomainLookupByName",
    });
    await expect(libvirt.networkLookupByName("nothing")).rejects.toMatchObject({ code: 43 });
    await expect(libvirt.storagePoolLookupByName("nothing")).rejects.toMatchObject({ code: 49 });
    await expect(libvirt.storageVolLookupByName(pool, "nothing")).rejects.toMatchObject({ code: 50 });
    await expect(libvirt.storagePoolCreate(pool)).rejects.toMatchObject({ code: 55 });
    await expect(libvirt.domainAgentCommand(await libvirt.domainLookupByName("test"), "{}")).rejects.toMatchObject({ code: 3 });
  });

  test("gives up what a signal ends, and keeps the connection for the rest", async ({ libvirtd }) => {
    await using libvirt = await openTestDriver(libvirtd);
    await expect(libvirt.withSignal(AbortSignal.abort()).connectGetUri()).rejects.toMatchObject({
      name: "ConnectionError",
      phase: "aborted",
    });
    expect(await libvirt.connectGetUri()).toBe("test:///default");
  });
});

describe("QEMU's driver", () => {
  async function defaultPool(libvirt: Libvirt): Promise<StoragePool> {
    return libvirt.storagePoolLookupByName("default");
  }

  test("takes a sparse upload and gives the same bytes back, sparse and whole", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const pool = await defaultPool(libvirt);
    expect(await libvirt.storagePoolGetInfo(pool)).toMatchObject({ state: STORAGE_POOL_STATE.running, capacity: 64 * MIB });
    const volume = await libvirt.storageVolCreateXML(pool, volumeXml("sparse.raw", 16 * MIB));
    expect(volume).toEqual({ pool: "default", name: "sparse.raw", key: join(libvirtd.poolPath, "sparse.raw") });
    const data = randomBytes(MIB);
    const upload = await libvirt.storageVolUpload(volume, 0, 16 * MIB, STORAGE_VOL_TRANSFER.sparse);
    await upload.hole(3 * MIB);
    await upload.write(data);
    await upload.hole(12 * MIB);
    await upload.finish();
    const expected = Buffer.concat([Buffer.alloc(3 * MIB), data, Buffer.alloc(12 * MIB)]);
    expect(Buffer.compare(await readFile(volume.key), expected)).toBe(0);
    expect(await libvirt.storageVolGetInfo(volume)).toEqual({ type: 0, capacity: 16 * MIB, allocation: MIB });
    expect(await libvirt.storageVolGetInfoFlags(volume, STORAGE_VOL_INFO.physical)).toMatchObject({ allocation: 16 * MIB });

    const holes: number[] = [];
    for await (const piece of await libvirt.storageVolDownload(volume, 0, 0, STORAGE_VOL_TRANSFER.sparse)) {
      if ("hole" in piece) holes.push(piece.hole);
    }
    expect(holes).toEqual([3 * MIB, 12 * MIB]);
    expect(Buffer.compare(await bytesOf(await libvirt.storageVolDownload(volume)), expected)).toBe(0);
    expect(Buffer.compare(await bytesOf(await libvirt.storageVolDownload(volume, 3 * MIB, MIB)), data)).toBe(0);

    await libvirt.storageVolDelete(volume);
    await expect(libvirt.storageVolGetInfo(volume)).rejects.toMatchObject({ code: LIBVIRT_ERROR.noStorageVol });
  });

  test("finds, resizes, clones and wipes volumes", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const pool = await defaultPool(libvirt);
    const volume = await libvirt.storageVolCreateXML(pool, volumeXml("base.raw", MIB));
    await expect(libvirt.storageVolCreateXML(pool, volumeXml("base.raw", MIB))).rejects.toMatchObject({
      code: LIBVIRT_ERROR.storageVolExist,
    });
    expect(await libvirt.storageVolLookupByPath(volume.key)).toEqual(volume);
    expect(await libvirt.storageVolLookupByKey(volume.key)).toEqual(volume);
    expect(await libvirt.storagePoolLookupByVolume(volume)).toEqual(pool);
    expect(await libvirt.storagePoolLookupByTargetPath(libvirtd.poolPath)).toEqual(pool);
    await libvirt.storageVolResize(volume, 2 * MIB);
    const clone = await libvirt.storageVolCreateXMLFrom(pool, volumeXml("clone.raw", 2 * MIB), volume);
    expect(await libvirt.storagePoolListAllVolumes(pool)).toEqual(expect.arrayContaining([volume, clone]));
    expect(await libvirt.storageVolGetPath(clone)).toBe(join(libvirtd.poolPath, "clone.raw"));
    await libvirt.storageVolWipe(clone);
    await libvirt.storageVolDelete(clone);
    await libvirt.storageVolDelete(volume);
  });

  test("reports a pool that runs full in the middle of an upload, and serves on", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const volume = await libvirt.storageVolCreateXML(await defaultPool(libvirt), volumeXml("full.raw", 256 * MIB));
    const upload = await libvirt.storageVolUpload(volume);
    const chunk = Buffer.alloc(MIB, 1);
    const writeAll = async (): Promise<void> => {
      for (let written = 0; written < 256; written += 1) await upload.write(chunk);
      await upload.finish();
    };
    const error = await writeAll().then(
      () => expect.fail("it fitted"),
      (refused: Error) => refused,
    );
    expect(error).toMatchObject({ code: LIBVIRT_ERROR.systemError, procedure: "StorageVolUpload" });
    expect(error.message).toContain("No space left on device");
    await upload.abort();
    await libvirt.storageVolDelete(volume);
  });

  test("lets go of an upload and of a download that are given up halfway", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const volume = await libvirt.storageVolCreateXML(await defaultPool(libvirt), volumeXml("half.raw", 32 * MIB));
    const upload = await libvirt.storageVolUpload(volume);
    await upload.write(randomBytes(MIB));
    await upload.abort("the test wants it so");
    await expect(upload.write(Buffer.alloc(1))).rejects.toThrow("StorageVolUpload was given up: the test wants it so (on the bed)");
    for await (const piece of await libvirt.storageVolDownload(volume)) {
      expect(piece).toHaveProperty("data");
      break;
    }
    const given = new AbortController();
    const download = await libvirt.withSignal(given.signal).storageVolDownload(volume);
    given.abort();
    await expect(bytesOf(download)).rejects.toMatchObject({ phase: "aborted" });
    await libvirt.storageVolDelete(volume);
  });

  test("does not send a hole to an upload that is not sparse", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const volume = await libvirt.storageVolCreateXML(await defaultPool(libvirt), volumeXml("dense.raw", MIB));
    const upload = await libvirt.storageVolUpload(volume);
    await expect(upload.hole(MIB)).rejects.toThrow("a hole was sent to an upload without the flag sparse");
    await upload.abort();
    await libvirt.storageVolDelete(volume);
  });

  test("makes, starts and removes a pool", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const path = join(libvirtd.directory, "second");
    await mkdir(path);
    await writeFile(join(path, "found.raw"), Buffer.alloc(512));
    const seen: number[] = [];
    await libvirt.onStoragePoolEvent("lifecycle", ({ event }) => seen.push(event));
    const pool = await libvirt.storagePoolDefineXML(`<pool type="dir"><name>second</name><target><path>${path}</path></target></pool>`);
    expect(await libvirt.storagePoolIsActive(pool)).toBe(false);
    await libvirt.storagePoolBuild(pool);
    await libvirt.storagePoolCreate(pool);
    await libvirt.storagePoolSetAutostart(pool, true);
    expect(await libvirt.storagePoolGetAutostart(pool)).toBe(true);
    await libvirt.storagePoolRefresh(pool);
    expect((await libvirt.storagePoolListAllVolumes(pool)).map(({ name }) => name)).toEqual(["found.raw"]);
    expect(await libvirt.storagePoolGetXMLDesc(pool)).toContain(`<path>${path}</path>`);
    await libvirt.storagePoolDestroy(pool);
    await libvirt.storagePoolUndefine(pool);
    await expect(libvirt.storagePoolRefresh(pool)).rejects.toMatchObject({ code: LIBVIRT_ERROR.noStoragePool });
    await until(() => seen.length === 5);
  });

  test("starts a network and finds no lease in it", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const seen: number[] = [];
    await libvirt.onNetworkEvent("lifecycle", ({ event }) => seen.push(event));
    const network = await libvirt.networkLookupByName("default");
    expect(await libvirt.networkIsActive(network)).toBe(false);
    await libvirt.networkCreate(network);
    expect(await libvirt.networkGetDhcpLeases(network)).toEqual([]);
    const host = '<host mac="52:54:00:00:00:01" ip="192.168.122.10"/>';
    const [addLast, section, live] = [3, 4, 1];
    await libvirt.networkUpdate(network, addLast, section, -1, host, live);
    expect(await libvirt.networkGetXMLDesc(network)).toContain("ip='192.168.122.10'");
    expect(await libvirt.networkGetAutostart(network)).toBe(false);
    await until(() => seen.includes(2));
  });

  test("defines a domain, redefines it in place, and keeps metadata", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const seen: number[] = [];
    await libvirt.onDomainEvent("lifecycle", ({ event }) => seen.push(event));
    const domain = await libvirt.domainDefineXMLFlags(domainXml("quiet"));
    expect(domain).toMatchObject({ name: "quiet", id: -1 });
    const again = await libvirt.domainDefineXMLFlags(domainXml("quiet", 48).replace("<name>", `<uuid>${domain.uuid}</uuid><name>`));
    expect(again.uuid).toBe(domain.uuid);
    expect(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive)).toContain("<memory unit='KiB'>49152</memory>");
    const uri = "https://example.test/mark";
    await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.element, "<mark/>", "m", uri, DOMAIN_DEVICE_MODIFY.config);
    expect(await libvirt.domainGetMetadata(domain, DOMAIN_METADATA.element, uri)).toBe("<mark/>");
    await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.element, undefined, undefined, uri, DOMAIN_DEVICE_MODIFY.config);
    await expect(libvirt.domainGetMetadata(domain, DOMAIN_METADATA.element, uri)).rejects.toMatchObject({
      code: LIBVIRT_ERROR.noDomainMetadata,
    });
    expect(await libvirt.domainRename(domain, "quieter")).toBe(0);
    expect(await libvirt.domainHasManagedSaveImage(domain)).toBe(false);
    await libvirt.domainUndefineFlags(domain, DOMAIN_UNDEFINE.managedSave | DOMAIN_UNDEFINE.nvram);
    await expect(libvirt.domainLookupByUUID(domain.uuid)).rejects.toMatchObject({ code: LIBVIRT_ERROR.noDomain });
    await until(() => seen.at(-1) === DOMAIN_LIFECYCLE.undefined);
    expect(seen).toContain(DOMAIN_LIFECYCLE.defined);
  });

  test("runs a machine: screen, console, block information, a disk that comes, an agent that is not there", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    const pool = await defaultPool(libvirt);
    const volume = await libvirt.storageVolCreateXML(pool, volumeXml("hot.raw", MIB));
    const added: string[] = [];
    await libvirt.onDomainEvent("deviceAdded", ({ devAlias }) => added.push(devAlias));
    const domain = await libvirt.domainCreateXML(domainXml("awake"), DOMAIN_START.paused);
    expect(domain.id).toBeGreaterThan(0);
    expect(await libvirt.domainIsPersistent(domain)).toBe(false);

    const { mime, picture } = await libvirt.domainScreenshot(domain);
    expect(mime).toBe("image/png");
    expect((await bytesOf(picture)).subarray(1, 4).toString()).toBe("PNG");

    // libvirt locks the console's terminal there; the bed's /run starts empty.
    await libvirtd.run("mkdir", "--parents", "/run/lock");
    const terminal = await libvirt.domainOpenConsole(domain);
    let shown = "";
    terminal.on("data", (chunk: Buffer) => (shown += chunk.toString()));
    await libvirt.domainResume(domain);
    await until(() => shown.includes("SeaBIOS"));
    terminal.write("\u001b");
    terminal.destroy();
    await once(terminal, "close");

    const disk = `<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="${volume.key}"/><target dev="sda" bus="scsi"/></disk>`;
    await libvirt.domainAttachDeviceFlags(domain, disk, DOMAIN_DEVICE_MODIFY.live);
    await until(() => added.length > 0);
    expect(added).toEqual(["scsi0-0-0-0"]);
    expect(await libvirt.domainGetBlockInfo(domain, "sda")).toMatchObject({ capacity: MIB, physical: MIB });
    expect(await libvirt.domainGetBlockJobInfo(domain, "sda")).toEqual({ found: false, type: 0, bandwidth: 0, cur: 0, end: 0 });
    await libvirt.domainBlockResize(domain, "sda", 2048);
    expect(await libvirt.domainGetBlockInfo(domain, "sda")).toMatchObject({ capacity: 2 * MIB });
    await libvirt.domainDetachDeviceFlags(domain, disk, DOMAIN_DEVICE_MODIFY.live);

    await expect(libvirt.domainAgentCommand(domain, '{"execute":"guest-ping"}')).rejects.toMatchObject({ procedure: "DomainAgentCommand" });
    expect(await libvirt.domainGetMessages(domain)).toEqual([]);
    await libvirt.domainDestroyFlags(domain);
    await expect(libvirt.domainGetState(domain)).rejects.toMatchObject({ code: LIBVIRT_ERROR.noDomain });
    await libvirt.storageVolDelete(volume);
  });

  test("rejects what waits when the daemon is killed", async ({ libvirtd }) => {
    await using libvirt = await openQemu(libvirtd);
    await libvirtd.freezeDaemon();
    const waiting = Array.from({ length: 8 }, () => libvirt.connectGetCapabilities());
    const settled = Promise.allSettled(waiting);
    await libvirtd.killDaemon();
    for (const { status } of await settled) expect(status).toBe("rejected");
    await libvirt.closed;
    expect(libvirt.isOpen).toBe(false);
  });
});

describe("opening and closing", () => {
  test("says how to get in where only SASL is offered", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "qemu:///system", host: "root@kvm1" });
    daemon.reply(await daemon.next(), Buffer.concat([word(1), word(1)]));
    await expect(opening).rejects.toMatchObject({
      name: "ConnectionError",
      phase: "login",
      message: expect.stringMatching(/^libvirt wants a SASL login, .* \(on root@kvm1\)$/),
    });
    expect(daemon.isClosed).toBe(true);
  });

  test("asks polkit where the daemon wants it, and says who may when it refuses", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "qemu:///system", host: "mover@kvm1" });
    daemon.reply(await daemon.next(), Buffer.concat([word(1), word(2)]));
    const polkit = await daemon.next();
    expect(polkit.procedure).toBe(70);
    daemon.refuse(polkit, 45, "authentication failed: no agent is available to authenticate");
    await expect(opening).rejects.toMatchObject({
      phase: "login",
      message: expect.stringContaining("log in as root or as a member of the group libvirt"),
    });
  });

  test("opens the URI after polkit has agreed", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "qemu:///system", host: "mover@kvm1" });
    daemon.reply(await daemon.next(), Buffer.concat([word(1), word(2)]));
    daemon.reply(await daemon.next(), word(1));
    const open = await daemon.next();
    expect(open.procedure).toBe(1);
    expect(open.payload).toEqual(Buffer.concat([some(text("qemu:///system")), word(0)]));
    daemon.reply(open);
    expect((await opening).isOpen).toBe(true);
  });

  test("destroys the transport when libvirt refuses the URI, or the signal fires", async ({ libvirtd }) => {
    const socket = createConnection(libvirtd.socketPath);
    await expect(Libvirt.open(socket, { uri: "nothing:///here", host: "the bed" })).rejects.toMatchObject({ name: "LibvirtError" });
    expect(socket.destroyed).toBe(true);
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "qemu:///system", host: "kvm1", signal: AbortSignal.timeout(20) });
    await expect(opening).rejects.toMatchObject({ phase: "aborted" });
    expect(daemon.isClosed).toBe(true);
  });

  test("says goodbye once, and closes twice", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "test:///default", host: "kvm1" });
    await daemon.welcome();
    const libvirt = await opening;
    const closing = libvirt.close();
    const goodbye = await daemon.next();
    expect(goodbye.procedure).toBe(2);
    daemon.send({ ...goodbye, type: REPLY, status: OK });
    await closing;
    await libvirt.close();
    await libvirt.closed;
    expect(libvirt.isOpen).toBe(false);
  });

  test("closes without an answer after a second, and rejects what waits", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "test:///default", host: "kvm1" });
    await daemon.welcome();
    const libvirt = await opening;
    const waiting = libvirt.connectGetUri().catch((error: Error) => error);
    await libvirt.close();
    expect(await waiting).toMatchObject({ phase: "closed" });
  });

  test("decodes leases and interfaces with all that may be absent", async () => {
    const daemon = new FakeLibvirtd();
    const opening = Libvirt.open(daemon.transport, { uri: "test:///default", host: "kvm1" });
    await daemon.welcome();
    const libvirt = await opening;
    const domain = { name: "web", uuid: "6695eb01-f6a4-8304-79aa-97f2502e193f", id: 1 };
    const interfaces = libvirt.domainInterfaceAddresses(domain, 1);
    daemon.reply(await daemon.next(), Buffer.concat([word(1), text("lo"), none, word(1), word(1), text("::1"), word(128)]));
    expect(await interfaces).toEqual([{ name: "lo", hwaddr: undefined, addrs: [{ type: 1, addr: "::1", prefix: 128 }] }]);
    const leases = libvirt.networkGetDhcpLeases({ name: "default", uuid: domain.uuid }, "52:54:00:00:00:01");
    const question = await daemon.next();
    expect(question.payload.subarray(-36)).toEqual(Buffer.concat([some(text("52:54:00:00:00:01")), word(1), word(0)]).subarray(-36));
    const lease = [text("vnet0"), long(1_800_000_000n), word(0), none, none, text("192.168.122.9"), word(24), some(text("web")), none];
    daemon.reply(question, Buffer.concat([word(1), ...lease, word(1)]));
    expect(await leases).toEqual([
      {
        iface: "vnet0",
        expirytime: 1_800_000_000,
        type: 0,
        mac: undefined,
        iaid: undefined,
        ipaddr: "192.168.122.9",
        prefix: 24,
        hostname: "web",
        clientid: undefined,
      },
    ]);
    const guest = libvirt.domainGetGuestInfo(domain);
    const parameter = (field: string, type: number, value: Buffer): Buffer => Buffer.concat([text(field), word(type), value]);
    const parameters = [parameter("fs.count", 2, word(3)), parameter("os.id", 7, text("debian")), parameter("live", 6, word(1))];
    daemon.reply(await daemon.next(), Buffer.concat([word(parameters.length), ...parameters]));
    expect(await guest).toEqual(
      new Map<string, unknown>([
        ["fs.count", 3],
        ["os.id", "debian"],
        ["live", true],
      ]),
    );
    const answer = libvirt.domainAgentCommand(domain, "{}", 5);
    const call = await daemon.next();
    expect([call.program, call.procedure]).toEqual([0x20008087, 3]);
    daemon.reply(call, some(text('{"return":{}}')));
    expect(await answer).toBe('{"return":{}}');
  });
});
