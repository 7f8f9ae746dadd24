/** VirtualMachine with guests that run: the proof guest under an emulated CPU tells on its serial console what it found. */
import { existsSync } from "node:fs";
import { copyFile, readdir, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test as base } from "vitest";
import { type GuestOptions, prepareGuest } from "../../scripts/guest/guest.ts";
import { type GuestReport, parseGuestReport } from "../../scripts/guest/report.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { importedDisk } from "../../provider/resources/imported-disk.ts";
import { Incomplete } from "../../provider/resources/resource.ts";
import { virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { type Libvirtd, openLibvirtd } from "../bed/libvirtd.ts";
import { machineFixtures, type MachineFixtures, openMachineBench } from "./machine-bench.ts";

const test = base.extend<MachineFixtures>(machineFixtures());

/** The guest's disk as a volume of the pool. Gives its path. */
async function placeGuest(libvirtd: Libvirtd, name: string, options: GuestOptions = {}): Promise<string> {
  const path = join(libvirtd.poolPath, `${name}.qcow2`);
  await copyFile((await prepareGuest("qcow2", { hash: false, ...options })).path, path);
  await libvirtd.virsh("pool-refresh", "default");
  return path;
}

const machine = (libvirtd: Libvirtd, name: string, more: object = {}) => ({
  origin: `acme/shop/prod/${name}`,
  host: libvirtd.uri,
  memoryMiB: 256,
  domainType: "qemu",
  serialLog: join(libvirtd.directory, `${name}.log`),
  waitFor: [{ type: "serial", text: "virtlift-guest done", timeoutSeconds: 90 }],
  ...more,
});

async function reportOf(serialLog: string) {
  return parseGuestReport(await readFile(serialLog, "utf8"));
}

/** `sd 64 MiB` for each disk: which of several on one bus gets which letter is left to chance in the guest's kernel. */
function drivesOf(report: GuestReport | undefined): readonly string[] {
  return (report?.disks ?? []).map(({ device, sizeBytes }) => `${device.slice(5, 7)} ${sizeBytes / 2 ** 20} MiB`).toSorted();
}

/** Changes that wait for the guest's next start, one after the other, and what makes the preview call them so. */
const DEFERRED: Readonly<Record<string, object>> = {
  vcpus: { vcpus: 2 },
  memoryMiB: { memoryMiB: 320 },
  networks: { networks: [{ network: "default", mac: "52:54:00:be:ef:01", model: "virtio" }] },
  bus: { bus: "virtio" },
  disks: {
    disks: [
      { size: "8MiB", name: "data" },
      { size: "4MiB", name: "more", bus: "sata" },
    ],
  },
  rng: { rng: false },
  watchdog: { watchdog: "poweroff" },
  smbios: { smbios: { system: { serial: "VMware-56 4d" } } },
  clock: { clock: "localtime" },
  video: { video: "virtio" },
};

describe("a guest by BIOS", () => {
  test("boots, is found at its address, keeps running under deferred changes, restarts with consent, and shuts down by itself", async ({
    libvirtd,
    desk,
  }) => {
    const { context } = desk;
    const path = await placeGuest(libvirtd, "web-root", { stay: true });
    const news = machine(libvirtd, "web", {
      importedDisk: { diskId: "web-root", path },
      networks: [{ network: "default", mac: "52:54:00:be:ef:01" }],
      disks: [{ size: "8MiB", name: "data" }],
      onRestartRequired: "defer",
    });
    const waits = [...news.waitFor, { type: "ipv4", timeoutSeconds: 60 }];
    const inputs = await desk.checked({ ...news, waitFor: waits });
    const { id, state } = await virtualMachine.create(context, inputs);
    expect(state.ipAddresses).toEqual([expect.stringMatching(/^192\.168\.122\.\d+$/)]);
    const first = await reportOf(inputs.serialLog);
    expect(first).toMatchObject({
      firmware: "bios",
      vcpus: 1,
      uuid: inputs.uuid,
      interfaces: [{ mac: "52:54:00:be:ef:01", driver: "e1000e" }],
    });
    expect(drivesOf(first)).toEqual(["sd 64 MiB", "sd 8 MiB"]);
    expect(await virtualMachine.read(context, id, state)).toEqual({ id, state, inputs });

    const started = await libvirtd.virsh("domid", "web");
    let changed: object = { ...news, title: "Web" };
    let deferred = await virtualMachine.update(context, id, state, await desk.checked(changed, inputs));
    expect(deferred.restartPending).toBe(false);
    for (const [property, more] of Object.entries(DEFERRED)) {
      changed = { ...changed, ...more };
      const later = await desk.checked(changed, inputs);
      const { changes } = await virtualMachine.diff(context, id, deferred, later);
      expect(changes).toEqual(expect.arrayContaining([expect.objectContaining({ property, effect: "restart" })]));
      deferred = await virtualMachine.update(context, id, deferred, later);
      expect([property, deferred.restartPending, deferred.powerState]).toEqual([property, true, "running"]);
    }
    expect(await libvirtd.virsh("domid", "web")).toBe(started);
    expect(await reportOf(inputs.serialLog)).toEqual({ ...first, ipv4Addresses: expect.anything() });
    expect(await libvirtd.virsh("desc", "web", "--title")).toContain("Web");

    const wanted = await desk.checked({ ...changed, onRestartRequired: "restart" }, inputs);
    expect((await virtualMachine.diff(context, id, deferred, wanted)).changes).toMatchObject([
      { property: "onRestartRequired", effect: "live" },
      { property: "onRestartRequired", effect: "restart" },
    ]);
    const restarted = await virtualMachine.update(context, id, deferred, wanted);
    expect(restarted).toMatchObject({ restartPending: false, powerState: "running" });
    const second = await reportOf(inputs.serialLog);
    expect(second).toMatchObject({ vcpus: 2, uuid: inputs.uuid, interfaces: [{ mac: "52:54:00:be:ef:01", driver: "virtio_net" }] });
    expect(second!.memoryKiB - first!.memoryKiB).toBeGreaterThan(60 * 1024);
    expect(drivesOf(second)).toEqual(["sd 4 MiB", "vd 64 MiB", "vd 8 MiB"]);
    const xml = await libvirtd.virsh("dumpxml", "web");
    expect(xml).toMatch(
      /VMware-56 4d[^]*<clock offset='localtime'>[^]*<model type='virtio' heads=[^]*<watchdog model='i6300esb' action='poweroff'>/,
    );
    expect(xml).not.toContain("<rng ");

    const stopped = await virtualMachine.update(context, id, restarted, await desk.checked({ ...news, powerState: "stopped" }, inputs));
    expect(stopped).toMatchObject({ powerState: "stopped", ipAddresses: [], vcpus: 1 });
    expect(desk.logged.filter((line) => line.startsWith("warn"))).toEqual([]);
    await virtualMachine.delete(context, id, stopped);
    expect(existsSync(path)).toBe(true);
    expect(existsSync(join(libvirtd.poolPath, "web-data.qcow2"))).toBe(false);
  }, 120_000);
});

describe("a guest by UEFI", () => {
  test("boots from an overlay of a template, keeps its NVRAM through updates, and goes with both; the template stays", async ({
    libvirtd,
    desk,
  }) => {
    const { context } = desk;
    const template = await placeGuest(libvirtd, "template");
    const news = machine(libvirtd, "efi", {
      image: { path: template, mode: "overlay", capacity: "96MiB" },
      firmware: "uefi",
      bus: "virtio",
      networks: [{ type: "user" }],
    });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(context, inputs);
    expect(state.ownVolumes).toEqual([join(libvirtd.poolPath, "efi-boot.qcow2")]);
    expect(await reportOf(inputs.serialLog)).toMatchObject({
      firmware: "uefi",
      disks: [{ device: "/dev/vda", sizeBytes: 96 * 2 ** 20 }],
      interfaces: [{ mac: inputs.macAddresses[0], driver: "virtio_net" }],
    });
    const nvram = join(libvirtd.directory, "lib/qemu/nvram/efi_VARS.fd");
    const before = await readFile(nvram);

    const changed = await desk.checked({ ...news, memoryMiB: 300, powerState: "stopped" }, inputs);
    const updated = await virtualMachine.update(context, id, state, changed);
    expect(updated).toMatchObject({ powerState: "stopped", memoryMiB: 300 });
    expect((await readFile(nvram)).equals(before)).toBe(true);

    await virtualMachine.delete(context, id, updated);
    expect(existsSync(nvram)).toBe(false);
    expect(existsSync(join(libvirtd.poolPath, "efi-boot.qcow2"))).toBe(false);
    expect(existsSync(template)).toBe(true);
  }, 120_000);
});

describe("a guest with an agent", () => {
  test("is waited for until it answers and has addresses of both kinds, and tells its name", async ({ libvirtd, desk }) => {
    const { context } = desk;
    const path = await placeGuest(libvirtd, "agent-root", { stay: true, agent: true });
    const waitFor = ["agent", "ipv6", "ipv4"].map((type) => ({ type, timeoutSeconds: 150 }));
    const networks = [{ network: "default" }];
    const inputs = await desk.checked(machine(libvirtd, "agent", { importedDisk: { diskId: "agent-root", path }, networks, waitFor }));
    const { id, state } = await virtualMachine.create(context, inputs);
    // Loopback and link-local addresses, which the agent tells too, reach nobody.
    expect(state.ipAddresses).toEqual([expect.stringMatching(/^192\.168\.122\.\d+$/), "2001:db8::77"]);
    expect(state.hostname).toBe("proof");
    expect((await virtualMachine.read(context, id, state))?.state.hostname).toBe("proof");
    await virtualMachine.delete(context, id, state);
  }, 240_000);

  test("that does not come is told of with what was seen", async ({ libvirtd, desk }) => {
    await libvirtd.virsh("vol-create-as", "default", "mute.qcow2", "1M", "--format", "qcow2");
    const importedDisk = { diskId: "mute", path: join(libvirtd.poolPath, "mute.qcow2") };
    for (const [type, words] of [
      ["agent", /showed no guest agent within 0.1 s: .*guest agent is not connected/i],
      ["ipv6", /showed no IPv6 address within 0.1 s: it has no lease, no guest agent that answers/],
    ] as const) {
      const waitFor = [{ type, timeoutSeconds: 0.1 }];
      const inputs = await desk.checked(machine(libvirtd, "mute", { importedDisk, waitFor, shutdownTimeoutSeconds: 1 }));
      const failed = await virtualMachine.create(desk.context, inputs).catch((error: unknown) => error);
      if (!(failed instanceof Incomplete)) throw failed;
      expect(failed.message).toMatch(words);
      await virtualMachine.delete(desk.context, inputs.uuid, failed.state as Parameters<typeof virtualMachine.delete>[2]);
    }
  });
});

describe("without a guest system", () => {
  test("a copy of a template of another format stands alone, at the size that is asked for", async ({ libvirtd, desk }) => {
    const guest = await prepareGuest("raw", { hash: false });
    await copyFile(guest.path, join(libvirtd.poolPath, "template.img"));
    await libvirtd.virsh("pool-refresh", "default");
    const image = { volume: "template.img", capacity: "80MiB" };
    expect(await desk.failures(machine(libvirtd, "copy", { image: { ...image, capacity: "8MiB" } }))).toEqual([
      { property: "image.capacity", reason: expect.stringContaining("a disk is never cut: give at least 67108864") },
    ]);
    const inputs = await desk.checked(machine(libvirtd, "copy", { image, powerState: "stopped" }));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const { stdout } = await runCommand(["qemu-img", "info", "--output=json", inputs.diskPaths[0]!]);
    expect(JSON.parse(stdout)).toMatchObject({ format: "qcow2", "virtual-size": 80 * 2 ** 20 });
    expect(stdout).not.toContain("backing");
    await runCommand(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", guest.path, inputs.diskPaths[0]!]);
    await virtualMachine.delete(desk.context, id, state);
    expect(await readdir(libvirtd.poolPath)).not.toContain("copy-boot.qcow2");
  });

  test("a template that is still to be imported is found in preview, and copied once it is there", async ({ libvirtd, desk }) => {
    const { context } = desk;
    const guest = await prepareGuest("qcow2", { hash: false });
    const origin = "acme/shop/prod/golden";
    const { inputs: disk } = await importedDisk.check(context, undefined, { origin, host: libvirtd.uri, source: { file: guest.path } });
    const image = { diskId: disk.diskId, path: disk.path, format: disk.format };
    const inputs = await desk.checked(machine(libvirtd, "clone", { image, powerState: "stopped" }));
    const imported = await importedDisk.create(context, disk);
    const { id, state } = await virtualMachine.create(context, inputs);
    const { stdout } = await runCommand(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", guest.path, inputs.diskPaths[0]!]);
    expect(stdout).toContain("Images are identical");
    await virtualMachine.delete(context, id, state);
    await importedDisk.delete(context, imported.id, imported.state);
  });

  test("a machine is waited for again by the next update when it did not show in time what it was to show", async ({ libvirtd, desk }) => {
    const { context } = desk;
    await libvirtd.virsh("vol-create-as", "default", "slow.qcow2", "1M", "--format", "qcow2");
    const importedDisk = { diskId: "slow", path: join(libvirtd.poolPath, "slow.qcow2") };
    const news = machine(libvirtd, "slow", { importedDisk, waitFor: [{ type: "serial", text: "login:", timeoutSeconds: 0.1 }] });
    const inputs = await desk.checked({ ...news, shutdownTimeoutSeconds: 1 });
    const sentence = /^slow on this machine runs, but showed no "login:" on its serial console within 0.1 s: .*slow.log is empty$/;
    const failed = await virtualMachine.create(context, inputs).catch((error: unknown) => error);
    if (!(failed instanceof Incomplete)) throw failed;
    expect(failed.message).toMatch(sentence);
    const partial = failed.state as Parameters<typeof virtualMachine.update>[2];
    expect(partial).toMatchObject({ ready: false, powerState: "running" });
    await expect(virtualMachine.update(context, inputs.uuid, partial, inputs)).rejects.toThrow(sentence);
    const patient = await desk.checked({ ...news, shutdownTimeoutSeconds: 1, waitFor: [{ type: "delay", seconds: 0.1 }] }, inputs);
    const state = await virtualMachine.update(context, inputs.uuid, partial, patient);
    expect(state.ready).toBe(true);
    await virtualMachine.delete(context, inputs.uuid, state);
  });

  test("a machine that does not shut down is left running with a sentence, or cut with a warning", async ({ libvirtd, desk }) => {
    const { context } = desk;
    await libvirtd.virsh("vol-create-as", "default", "deaf.qcow2", "1M", "--format", "qcow2");
    const path = join(libvirtd.poolPath, "deaf.qcow2");
    const news = machine(libvirtd, "deaf", { importedDisk: { diskId: "deaf", path }, waitFor: [], shutdownTimeoutSeconds: 1 });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(context, inputs);
    const off = await desk.checked({ ...news, powerState: "stopped" }, inputs);
    await expect(virtualMachine.update(context, id, state, off)).rejects.toThrow(
      'deaf on this machine did not shut down within 1 s of being asked: shut it down from inside, or set `onShutdownTimeout: "cut"`',
    );
    const cut = await desk.checked({ ...news, powerState: "stopped", onShutdownTimeout: "cut" }, inputs);
    expect(await virtualMachine.update(context, id, state, cut)).toMatchObject({ powerState: "stopped" });
    expect(desk.logged.at(-1)).toBe("warn: deaf on this machine did not shut down within 1 s of being asked: its power was cut");
    await virtualMachine.delete(context, id, state);
  });

  test("a machine that cannot start is defined and incomplete, and starts once its reason is mended", async ({ libvirtd, desk }) => {
    const { context } = desk;
    const path = join(libvirtd.poolPath, "late.qcow2");
    const inputs = await desk.checked(
      machine(libvirtd, "late", { importedDisk: { diskId: "late", path }, waitFor: [], shutdownTimeoutSeconds: 1 }),
    );
    const failed = await virtualMachine.create(context, inputs).catch((error: unknown) => error);
    if (!(failed instanceof Incomplete)) throw failed;
    expect(failed.message).toMatch(/^late is defined on this machine, but DomainCreate failed: .*late\.qcow2/);
    expect(failed.resourceId).toBe(inputs.uuid);
    const partial = failed.state as Parameters<typeof virtualMachine.update>[2];
    expect(partial.powerState).toBe("stopped");
    await runCommand(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"]);
    const state = await virtualMachine.update(context, inputs.uuid, partial, inputs);
    expect(state.powerState).toBe("running");
    await virtualMachine.delete(context, inputs.uuid, state);
    await rm(path);
  });

  test("a snapshot's file on top of a disk is kept by an update, and said", async ({ libvirtd, desk }) => {
    const { context } = desk;
    const path = await placeGuest(libvirtd, "snap-root");
    const news = machine(libvirtd, "snap", { importedDisk: { diskId: "snap-root", path }, powerState: "stopped" });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(context, inputs);
    await libvirtd.virsh("snapshot-create-as", "snap", "before", "--disk-only");
    const top = join(libvirtd.poolPath, "snap-root.before");
    expect(await libvirtd.virsh("domblklist", "snap")).toContain(top);
    const seen = await virtualMachine.read(context, id, state);
    expect(seen?.inputs).toEqual(inputs);
    expect(desk.logged.at(-1)).toContain(`its disk sda is ${top}, not ${path}`);
    const updated = await virtualMachine.update(context, id, seen!.state, await desk.checked({ ...news, vcpus: 2 }, inputs));
    expect(await libvirtd.virsh("domblklist", "snap")).toContain(top);
    expect(desk.logged.at(-1)).toBe(`warn: snap: a snapshot put ${top} on top of ${path}; the machine keeps running on it`);
    await virtualMachine.delete(context, id, updated);
    expect(existsSync(top)).toBe(true);
  });

  test("what the host does not have active or installed is said in preview", async ({ libvirtd, desk }) => {
    await using quiet = await openLibvirtd();
    const importedDisk = { diskId: "a", path: "/a.qcow2" };
    const networks = [{ network: "default" }];
    expect(await desk.failures(machine(quiet, "web", { importedDisk, networks }))).toEqual([
      { property: "networks[0].network", reason: expect.stringContaining("is not active: virsh net-start default") },
    ]);
    expect(await desk.failures(machine(quiet, "web", { importedDisk, networks, powerState: "stopped" }))).toEqual([]);
    expect(await desk.failures(machine(libvirtd, "web", { importedDisk, firmware: "uefi", secureBoot: true }))).toEqual([]);
    await quiet.run("mount", "-t", "tmpfs", "none", "/usr/share/qemu/firmware");
    await quiet.killDaemon();
    // What the host offers is asked once in a deployment.
    await using later = openMachineBench();
    expect(await later.failures(machine(quiet, "web", { importedDisk, firmware: "uefi" }))).toEqual([
      { property: "firmware", reason: expect.stringContaining("has no UEFI firmware for q35 machines") },
    ]);
  });
});
