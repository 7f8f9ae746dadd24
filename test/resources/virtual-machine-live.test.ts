/** What changes of a machine while its guest runs: one proof guest tells on its serial console that each change arrived, and that it never restarted. */
import { createHash } from "node:crypto";
import { copyFile, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test as base } from "vitest";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { encodeIso9660 } from "../../provider/image/iso9660.ts";
import { virtualMachine, type MachineState } from "../../provider/resources/virtual-machine.ts";
import type { MachineInputs } from "../../provider/resources/virtual-machine-spec.ts";
import type { Libvirtd } from "../bed/libvirtd.ts";
import { machineFixtures, type MachineFixtures } from "./machine-bench.ts";

const test = base.extend<MachineFixtures>(machineFixtures());

const SECOND_MAC = "52:54:00:be:ef:02";
const SEED = "#cloud-config\nhostname: changed\n";

type Args = Readonly<Record<string, unknown>>;

/** A change, and what shows that it came. */
interface Change {
  readonly more: Args;
  /** On the console, since the change. */
  readonly told?: RegExp;
  /** On the host. */
  readonly shown?: (libvirtd: Libvirtd) => Promise<void>;
}

/** Of each of the guest's CPUs, whether its thread may run on the first two of the host's. */
async function affinities(libvirtd: Libvirtd): Promise<readonly string[]> {
  return [...(await libvirtd.virsh("vcpuinfo", "live")).matchAll(/CPU Affinity: +(..)/g)].map(([, first]) => first!);
}

/** What the guest said of one fact, last. */
function lastOf(console: string, fact: string): string | undefined {
  return [...console.matchAll(new RegExp(`^virtlift-guest now ${fact}=(\\S+)`, "gm"))].at(-1)?.[1];
}

const network = { network: "default", model: "virtio", mac: "52:54:00:be:ef:01" };
const data = { size: "8MiB", name: "data" };

const CHANGES: Readonly<Record<string, Change>> = {
  "a CPU more": { more: { vcpus: 2 }, told: /now vcpus=2/ },
  "CPUs pinned": {
    more: { cpuPinning: { "0": "1", "1": "0-1" } },
    shown: async (libvirtd) => expect(await affinities(libvirtd)).toEqual(["-y", "yy"]),
  },
  "one CPU not pinned any more, another one moved": {
    more: { cpuPinning: { "1": "0" } },
    shown: async (libvirtd) => expect(await affinities(libvirtd)).toEqual(["yy", "y-"]),
  },
  "CPUs not pinned any more": {
    more: { cpuPinning: {} },
    shown: async (libvirtd) => expect(await affinities(libvirtd)).toEqual(["yy", "yy"]),
  },
  "more memory": { more: { memoryMiB: 320 }, told: /now memory-mib=2(5|6|7|8|9)\d/ },
  "less memory": { more: { memoryMiB: 256 }, told: /now memory-mib=(1[89]|2[0-3])\d/ },
  "a larger disk": { more: { disks: [{ ...data, size: "16MiB" }, { device: "cdrom" }] }, told: /now present=\/dev\/vdb bytes=16777216/ },
  "a disk more": {
    more: { disks: [{ ...data, size: "16MiB" }, { device: "cdrom" }, { size: "4MiB", name: "more" }] },
    told: /now present=\/dev\/vdc bytes=4194304/,
  },
  "another disk less": {
    more: { disks: [{ device: "cdrom" }, { size: "4MiB", name: "more" }] },
    told: /no more present=\/dev\/vdb/,
  },
  "a medium in the drive": {
    more: {
      disks: [
        { device: "cdrom", path: "TOOLS" },
        { size: "4MiB", name: "more" },
      ],
    },
    told: /now medium=sr\d files=readme.txt,/,
  },
  "no medium in the drive": {
    more: { disks: [{ device: "cdrom" }, { size: "4MiB", name: "more" }] },
    told: /now medium=sr\d files= *\r?\n/,
  },
  "another seed": {
    more: { cloudInit: { userData: SEED } },
    told: new RegExp(`now medium=sr\\d files=meta-data,user-data, user-data=${createHash("sha256").update(SEED).digest("hex")}`),
  },
  "an interface more": {
    more: { networks: [network, { network: "default", model: "virtio", mac: SECOND_MAC }] },
    told: new RegExp(`now present=${SECOND_MAC} carrier=1`),
  },
  "a cable out": {
    more: { networks: [network, { network: "default", model: "virtio", mac: SECOND_MAC, link: "down" }] },
    told: new RegExp(`now present=${SECOND_MAC} carrier=0`),
  },
  "a cable in, on another network": {
    more: { networks: [network, { network: "second", model: "virtio", mac: SECOND_MAC }] },
    told: new RegExp(`now present=${SECOND_MAC} carrier=1`),
    shown: async (libvirtd) =>
      expect(await libvirtd.virsh("domiflist", "live")).toMatch(new RegExp(`network +second +virtio +${SECOND_MAC}`)),
  },
  "the interfaces in another order": {
    more: {
      networks: [{ network: "second", model: "virtio", mac: SECOND_MAC }, network],
    },
  },
  "the first interface less": {
    more: { networks: [{ network: "second", model: "virtio", mac: SECOND_MAC }] },
    told: /no more present=52:54:00:be:ef:01/,
  },
  "words and autostart": {
    more: { title: "Shop", description: "Sells things", tags: { owner: "ops" }, autostart: true },
    shown: async (libvirtd) => {
      expect(await libvirtd.virsh("dumpxml", "live")).toMatch(/<title>Shop<[^]*<description>Sells things<[^]*name="owner" value="ops"/);
      expect(await libvirtd.virsh("dominfo", "live")).toMatch(/Autostart: +enable/);
    },
  },
  "a pause": {
    more: { powerState: "paused" },
    shown: async (libvirtd) => expect(await libvirtd.virsh("domstate", "live")).toContain("paused"),
  },
  "no pause": {
    more: { powerState: "running" },
    shown: async (libvirtd) => expect(await libvirtd.virsh("domstate", "live")).toContain("running"),
  },
};

test(
  "a running guest sees each change that can be made while it runs, and never restarts",
  { timeout: 180_000 },
  async ({ libvirtd, desk }) => {
    const { context } = desk;
    const path = join(libvirtd.poolPath, "live-root.qcow2");
    await copyFile((await prepareGuest("qcow2", { hash: false, stay: true })).path, path);
    const tools = join(libvirtd.poolPath, "tools.iso");
    await writeFile(tools, encodeIso9660("tools", [{ name: "readme.txt", content: Buffer.from("hello\n") }]));
    await libvirtd.virsh("pool-refresh", "default");
    await writeFile(join(libvirtd.directory, "second.xml"), '<network><name>second</name><bridge name="virbr7"/></network>');
    await libvirtd.virsh("net-create", join(libvirtd.directory, "second.xml"));

    const serialLog = join(libvirtd.directory, "live.log");
    let args: Args = {
      origin: "acme/shop/prod/live",
      host: libvirtd.uri,
      domainType: "qemu",
      importedDisk: { diskId: "live-root", path },
      bus: "virtio",
      memoryMiB: 256,
      maxMemoryMiB: 320,
      vcpus: 1,
      maxVcpus: 3,
      disks: [data, { device: "cdrom" }],
      networks: [network],
      cloudInit: { userData: "#cloud-config\n{}\n" },
      waitFor: [{ type: "serial", text: "virtlift-guest now vcpus=1", timeoutSeconds: 90 }],
      serialLog,
    };
    let inputs: MachineInputs = await desk.checked(args);
    const { id, state: first } = await virtualMachine.create(context, inputs);
    let state: MachineState = first;
    expect(state.diskTargets).toEqual(["vda", "vdb", "sda", "sdb"]);
    expect(await virtualMachine.read(context, id, state)).toEqual({ id, state, inputs });

    for (const [name, { more, told, shown }] of Object.entries(CHANGES)) {
      const before = (await readFile(serialLog, "utf8")).length;
      args = { ...args, ...(JSON.parse(JSON.stringify(more).replaceAll("TOOLS", tools)) as Args) };
      const news = await desk.checked(args, inputs);
      const { changes } = await virtualMachine.diff(context, id, state, news);
      expect([name, changes.map(({ effect }) => effect).filter((effect) => effect !== "live")]).toEqual([name, []]);
      expect([name, changes.length]).toEqual([name, Object.keys(more).length]);
      state = await virtualMachine.update(context, id, state, news);
      inputs = news;
      await expect
        .poll(async () => (await readFile(serialLog, "utf8")).slice(before), { timeout: 20_000, message: name })
        .toMatch(told ?? /^/);
      await shown?.(libvirtd);
      const seen = await virtualMachine.read(context, id, state);
      expect([name, seen?.inputs, state.restartPending]).toEqual([name, inputs, false]);
    }
    const shown = async () => [
      await libvirtd.virsh("domblklist", "live"),
      await libvirtd.virsh("domblklist", "live", "--inactive"),
      await libvirtd.virsh("domiflist", "live"),
    ];
    const before = await shown();
    const onOtherBuses = {
      bus: "sata",
      disks: [{ device: "cdrom" }, { size: "4MiB", name: "more", bus: "scsi" }],
      onRestartRequired: "defer",
    };
    const moving = await desk.checked({ ...args, ...onOtherBuses }, inputs);
    state = await virtualMachine.update(context, id, state, moving);
    expect([state.restartPending, (await shown())[0]]).toEqual([true, before[0]]);
    state = await virtualMachine.update(context, id, state, inputs);
    expect([state.restartPending, await shown()]).toEqual([false, before]);

    const broken = [
      { device: "cdrom" },
      { size: "4MiB", name: "more" },
      { size: "1MiB", name: "new" },
      { path: join(libvirtd.poolPath, "none.raw"), format: "raw" },
    ];
    const impossible = await desk.checked({ ...args, disks: broken }, inputs);
    await expect(virtualMachine.update(context, id, state, impossible)).rejects.toThrow("none.raw");
    expect(await shown()).toEqual(before);
    expect(await readdir(libvirtd.poolPath)).not.toContain("live-new.qcow2");
    expect(await virtualMachine.read(context, id, state)).toEqual({ id, state, inputs });

    const console = await readFile(serialLog, "utf8");
    expect([...console.matchAll(/virtlift-guest kernel=/g)]).toHaveLength(1);
    expect(Number(lastOf(console, "vcpus"))).toBe(2);
    expect(desk.logged.filter((line) => line.startsWith("warn"))).toEqual([]);
    expect((await readdir(libvirtd.poolPath)).filter((name) => name.startsWith("live-seed-"))).toHaveLength(1);
    expect(state.ownVolumes.map((volume) => volume.replace(/-[0-9a-f]{8}\.iso$/, ".iso")).toSorted()).toEqual(
      ["live-data.qcow2", "live-more.qcow2", "live-seed.iso"].map((file) => join(libvirtd.poolPath, file)),
    );
  },
);
