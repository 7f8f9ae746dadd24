/** VirtualMachine on a real QEMU without a guest system: what it is made of, what drifts, what is adopted, and that what fails leaves no trace. */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test as base } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import type { MachineInputs } from "../../provider/resources/virtual-machine-spec.ts";
import { virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { type Libvirtd, openKvmHost } from "../bed/libvirtd.ts";
import { machineFixtures, type MachineFixtures, openMachineBench } from "./machine-bench.ts";

const test = base.extend<MachineFixtures>(machineFixtures());

/** A small volume in the pool, as a disk to boot from. Gives its path. */
async function placeDisk(libvirtd: Libvirtd, name: string, format: "qcow2" | "raw" = "qcow2"): Promise<string> {
  const file = `${name}.${format}`;
  await libvirtd.virsh("vol-create-as", "default", file, "1M", "--format", format);
  return join(libvirtd.poolPath, file);
}

async function machine(libvirtd: Libvirtd, name: string, more: object = {}) {
  return {
    origin: `acme/shop/prod/${name}`,
    host: libvirtd.uri,
    domainType: "qemu",
    memoryMiB: 64,
    serialLog: join(libvirtd.directory, `${name}.log`),
    importedDisk: { diskId: name, path: await placeDisk(libvirtd, name) },
    shutdownTimeoutSeconds: 1,
    onShutdownTimeout: "cut",
    ...more,
  };
}

const EVERYTHING = {
  description: "All of it",
  vcpus: 2,
  maxVcpus: 4,
  cpuTopology: { sockets: 1, cores: 2, threads: 2 },
  cpuPinning: { "0": "0", "1": "0,1" },
  maxMemoryMiB: 128,
  cpu: { mode: "custom", model: "Nehalem", features: { vmx: "disable" } },
  firmware: "uefi",
  loader: { path: "/usr/share/OVMF/OVMF_CODE_4M.fd", nvramTemplate: "/usr/share/OVMF/OVMF_VARS_4M.fd" },
  guest: "win11",
  tpm: true,
  smbios: { system: { manufacturer: "VMware, Inc.", serial: "VMware-56 4d 0a" }, baseBoard: { product: "440BX" } },
  bus: "virtio",
  bootDisk: { cache: "none", io: "native", serial: "root-1" },
  networks: [
    { network: "default", model: "virtio", queues: 2, mtu: 1400 },
    { type: "user", model: "e1000e", link: "down" },
  ],
  graphics: { type: "vnc", listen: "0.0.0.0" },
  video: "virtio",
  watchdog: "poweroff",
  cloudInit: { userData: "#cloud-config\nhostname: all\n", networkData: "version: 2\n", metaData: "instance-id: one\n" },
  xmlPatches: [
    { path: "devices/video/model", set: { heads: "2" } },
    { path: "sysinfo", add: "<oemStrings><entry>one of ours</entry></oemStrings>" },
    { path: "devices/input[@type='tablet']", remove: true },
  ],
  powerState: "paused",
};

describe("a machine with everything", () => {
  test("starts paused, is read without drift, drifts in the user's own words, and goes with its NVRAM, TPM and seed", async ({
    libvirtd,
    desk,
  }) => {
    const { context } = desk;
    const disks = [
      { path: await placeDisk(libvirtd, "shared", "raw"), shareable: true, bus: "scsi" },
      { device: "cdrom" },
      { size: "1MiB", name: "data", discard: "ignore", bootOrder: 2 },
    ];
    const news = await machine(libvirtd, "all", { ...EVERYTHING, disks });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(context, inputs);
    expect(state).toMatchObject({
      powerState: "paused",
      restartPending: false,
      ready: true,
      diskTargets: ["vda", "sda", "sdb", "vdb", "sdc"],
    });
    const xml = await libvirtd.virsh("dumpxml", "all");
    for (const words of [
      "<clock offset='localtime'>",
      "<entry name='serial'>VMware-56 4d 0a</entry>",
      "<entry>one of ours</entry>",
      "heads='2'",
      "<tpm model='tpm-crb'>",
      "<watchdog model='i6300esb' action='poweroff'>",
      "<vcpupin vcpu='1' cpuset='0-1'/>",
      "<link state='down'/>",
      "<shareable/>",
    ]) {
      expect(xml).toContain(words);
    }
    expect(xml).not.toContain("type='tablet'");
    const { stdout } = await runCommand(["qemu-img", "info", "-f", "raw", "--output=json", inputs.cloudInit!.volumePath, "-U"]);
    expect(JSON.parse(stdout)).toMatchObject({ "virtual-size": expect.any(Number) });
    expect(await virtualMachine.read(context, id, state)).toEqual({ id, state, inputs });
    expect((await virtualMachine.diff(context, id, state, await desk.checked(news, inputs))).changes).toEqual([]);

    const changed = (await libvirtd.virsh("dumpxml", "all", "--inactive", "--security-info"))
      .replace("current='2'>4<", "current='1'>4<")
      .replace("VMware-56 4d 0a", "changed")
      .replace(/<watchdog[^]*?<\/watchdog>/, "")
      .replace("<link state='down'/>", "")
      .replace("<shareable/>", "")
      .replace("listen='0.0.0.0'", "listen='127.0.0.1'")
      .replace("<listen type='address' address='0.0.0.0'/>", "");
    const file = join(libvirtd.directory, "all.xml");
    await writeFile(file, changed);
    await libvirtd.virsh("define", file);
    await libvirtd.virsh("autostart", "all");
    const seen = await virtualMachine.read(context, id, state);
    const drifted = Object.entries(seen!.inputs).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(inputs[key as never]));
    expect(Object.fromEntries(drifted)).toMatchObject({
      vcpus: 1,
      smbios: { system: { serial: "changed" } },
      networks: [inputs.networks[0], { type: "user", mac: inputs.macAddresses[1], model: "e1000e" }],
      graphics: { type: "vnc", listen: "127.0.0.1" },
      disks: [{ path: inputs.disks[0]!.path, readOnly: false }, inputs.disks[1], inputs.disks[2]],
    });
    expect(drifted.map(([key]) => key).toSorted()).toEqual(["disks", "graphics", "networks", "smbios", "vcpus", "watchdog"]);

    const swtpm = join(libvirtd.directory, "lib/swtpm", inputs.uuid);
    expect(existsSync(swtpm)).toBe(true);
    await virtualMachine.delete(context, id, seen!.state);
    expect(await virtualMachine.read(context, id, seen!.state)).toBeUndefined();
    const elsewhere = { ...seen!.state, hostUuid: "6b0f3d0e-0000-4000-8000-000000000000", hostName: "other" };
    const calls = [virtualMachine.read(context, id, elsewhere), virtualMachine.update(context, id, elsewhere, inputs)];
    for (const call of [...calls, virtualMachine.delete(context, id, elsewhere)]) {
      await expect(call).rejects.toThrow(
        /^qemu\+unix:.* leads to another host here \(\S+, UUID [\da-f-]{36}\) than the one that all was made on \(other, UUID 6b0f3d0e-/,
      );
    }
    expect([existsSync(swtpm), existsSync(join(libvirtd.directory, "lib/qemu/nvram/all_VARS.fd"))]).toEqual([false, false]);
    expect((await readdir(libvirtd.poolPath)).filter((name) => name.startsWith("all") || name.startsWith("shared"))).toEqual([
      "all.qcow2",
      "shared.raw",
    ]);
  }, 60_000);

  test("what a running machine cannot take waits for its next start, or is refused, and what fails leaves no trace", async ({
    libvirtd,
    desk,
  }) => {
    const { context } = desk;
    const news = await machine(libvirtd, "firm", { bus: "virtio" });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(context, inputs);
    const dump = async () => [await libvirtd.virsh("dumpxml", "firm"), await libvirtd.virsh("dumpxml", "firm", "--inactive")];
    const before = await dump();

    expect(await desk.failures({ ...news, watchdog: "reset" }, inputs)).toEqual([
      { property: "watchdog", reason: expect.stringContaining("changes at its next start only") },
    ]);
    await expect(virtualMachine.update(context, id, state, { ...inputs, watchdog: "reset" })).rejects.toThrow(
      "changes at its next start only",
    );
    expect(await dump()).toEqual(before);

    const broken = await desk.checked(
      {
        ...news,
        disks: [{ path: join(libvirtd.poolPath, "none.raw"), format: "raw" }],
      },
      inputs,
    );
    await expect(virtualMachine.update(context, id, state, broken)).rejects.toThrow("none.raw");
    expect((await dump()).map((xml) => xml.match(/<disk |<interface /g))).toEqual(before.map((xml) => xml.match(/<disk |<interface /g)));

    // A default that is said changes nothing.
    expect(await desk.failures({ ...news, tpm: false, rng: true, graphics: { type: "vnc" } }, inputs)).toEqual([]);
    const deferred = await desk.checked({ ...news, watchdog: "reset", onRestartRequired: "defer" }, inputs);
    const pending = await virtualMachine.update(context, id, state, deferred);
    expect(pending).toMatchObject({ restartPending: true, powerState: "running" });
    expect((await virtualMachine.diff(context, id, pending, deferred)).changes).toEqual([]);

    await libvirtd.virsh("snapshot-create-as", "firm", "before");
    await libvirtd.virsh("managedsave", "firm");
    const saved = await virtualMachine.read(context, id, pending);
    expect(saved?.state.powerState).toBe("stopped");
    await virtualMachine.delete(context, id, saved!.state);
    expect(await libvirtd.virsh("list", "--all", "--name")).not.toContain("firm");
    await rm(inputs.diskPaths[0]!);
  }, 60_000);

  test("what another hand plugged in stays through an update that says nothing of it, running and defined", async ({ libvirtd, desk }) => {
    const news = await machine(libvirtd, "shared-hands", { bus: "virtio", powerState: "paused" });
    const inputs = await desk.checked(news);
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const theirs = await placeDisk(libvirtd, "theirs", "raw");
    const plugged = ["--targetbus", "virtio", "--subdriver", "raw", "--live", "--config"];
    await libvirtd.virsh("attach-disk", "shared-hands", theirs, "vdz", ...plugged);
    const cable = ["--mac", "52:54:00:77:77:01", "--model", "virtio", "--live", "--config"];
    await libvirtd.virsh("attach-interface", "shared-hands", "network", "default", ...cable);
    await libvirtd.virsh("blkdeviotune", "shared-hands", "vda", "--total-iops-sec", "700", "--live", "--config");

    await libvirtd.virsh("desc", "shared-hands", "--live", "--config", "by hand");
    await libvirtd.virsh("autostart", "shared-hands");

    const titled = await desk.checked({ ...news, title: "Shop" }, inputs);
    const after = await virtualMachine.update(desk.context, id, state, titled);
    for (const xml of [await libvirtd.virsh("dumpxml", "shared-hands"), await libvirtd.virsh("dumpxml", "shared-hands", "--inactive")]) {
      for (const words of ["<title>Shop</title>", theirs, "52:54:00:77:77:01", "<total_iops_sec>700<", ">by hand<"])
        expect(xml).toContain(words);
    }
    expect(await libvirtd.virsh("dominfo", "shared-hands")).toMatch(/Autostart: +enable/);
    await libvirtd.virsh("destroy", "shared-hands");
    await desk.checked({ ...news, title: "Shop", tags: { by: "us" } }, titled);
    expect(desk.logged.at(-1)).toMatch(/^info: shared-hands: it is off, and is started/);
    await virtualMachine.delete(desk.context, id, after);
    await Promise.all([rm(theirs), rm(inputs.diskPaths[0]!)]);
  });

  test("a machine that libvirt cannot start without its log daemon says how to start that, and is started once it runs", async ({
    libvirtd,
    desk,
  }) => {
    const inputs = await desk.checked(await machine(libvirtd, "mute", { powerState: "paused" }));
    await libvirtd.run("sh", "-c", "kill $(cat /run/virtlogd.pid); while [ -e /run/libvirt/virtlogd-sock ]; do sleep 0.05; done");
    try {
      await expect(virtualMachine.create(desk.context, inputs)).rejects.toThrow(
        /^mute is defined on this machine, but DomainCreateWithFlags failed: .*virtlogd-sock'.* \(on this machine\): .*systemctl enable --now virtlogd\.socket, or set stdio_handler = "file" in \S+qemu\.conf/,
      );
    } finally {
      await libvirtd.run("virtlogd", "-d");
    }
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    expect(state.powerState).toBe("paused");
    await virtualMachine.delete(desk.context, id, state);
  });

  test("a machine with Secure Boot is defined with the firmware that has Microsoft's keys", async ({ libvirtd, desk }) => {
    const inputs = await desk.checked(
      await machine(libvirtd, "safe", { firmware: "uefi", secureBoot: true, tpm: true, powerState: "paused" }),
    );
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    expect(await libvirtd.virsh("dumpxml", "safe")).toMatch(/secure='yes'[^]*OVMF_CODE[^<]*\.(ms|secboot)\.fd[^]*OVMF_VARS[^']*\.ms\.fd/);
    await virtualMachine.delete(desk.context, id, state);
  });
});

interface ByHand {
  readonly virsh: readonly (readonly string[])[];
  /** The properties that are found other than they were. */
  readonly found: (inputs: MachineInputs) => object;
}

/** What a human does to the machine `drift`, in this order. */
const byHand = (other: string, medium: string): Readonly<Record<string, ByHand>> => ({
  "takes memory": { virsh: [["setmem", "drift", "48M", "--config"]], found: () => ({ memoryMiB: 48 }) },
  "gives a CPU": { virsh: [["setvcpus", "drift", "2", "--config"]], found: () => ({ vcpus: 2 }) },
  "adds an interface": {
    virsh: [["attach-interface", "drift", "network", "default", "--mac", "52:54:00:0d:0d:0d", "--model", "virtio", "--config"]],
    found: ({ networks }) => ({ networks: [...networks, { network: "default", mac: "52:54:00:0d:0d:0d", model: "virtio" }] }),
  },
  "swaps a disk": {
    virsh: [
      ["detach-disk", "drift", "vdb", "--config"],
      ["attach-disk", "drift", other, "vdb", "--subdriver", "qcow2", "--config"],
    ],
    found: ({ disks }) => ({ disks: [expect.objectContaining({ path: other, format: "qcow2", bus: "virtio" }), ...disks.slice(1)] }),
  },
  "grows a disk under the guest": {
    virsh: [["blockresize", "drift", "vdc", "2MiB"]],
    found: ({ disks }) => ({ disks: [expect.objectContaining({ path: other }), { ...disks[1], size: 2 * 2 ** 20 }, disks[2]] }),
  },
  "puts a medium into the drive": {
    virsh: [["change-media", "drift", "sda", medium, "--insert", "--config"]],
    found: ({ disks }) => ({
      disks: [
        expect.objectContaining({ path: other }),
        { ...disks[1], size: 2 * 2 ** 20 },
        expect.objectContaining({ device: "cdrom", path: medium }),
      ],
    }),
  },
  "pins a CPU": { virsh: [["vcpupin", "drift", "0", "0", "--config"]], found: () => ({ cpuPinning: { "0": "0" } }) },
  "writes another title": { virsh: [["desc", "drift", "--title", "--config", "Mine"]], found: () => ({ title: "Mine" }) },
  "lets it start with its host": { virsh: [["autostart", "drift"]], found: () => ({ autostart: true }) },
  "pauses it": { virsh: [["suspend", "drift"]], found: () => ({ powerState: "paused" }) },
  "cuts its power": { virsh: [["destroy", "drift"]], found: () => ({ powerState: "stopped" }) },
  "shrinks the disk": {
    virsh: [["vol-resize", "drift-data.qcow2", "512KiB", "--pool", "default", "--shrink"]],
    found: ({ disks }) => ({
      disks: [
        expect.objectContaining({ path: other }),
        { ...disks[1], size: 512 * 1024 },
        expect.objectContaining({ device: "cdrom", path: medium }),
      ],
    }),
  },
});

test("what a human does with virsh is found in the user's own words, and the next update takes it back", async ({ libvirtd, desk }) => {
  const { context } = desk;
  const medium = join(libvirtd.poolPath, "medium.iso");
  await writeFile(medium, Buffer.alloc(64 * 1024));
  const data = { size: 1_000_000, name: "data" };
  const first = { path: await placeDisk(libvirtd, "first") };
  const news = await machine(libvirtd, "drift", {
    bus: "virtio",
    maxMemoryMiB: 128,
    vcpus: 1,
    maxVcpus: 2,
    cpuPinning: {},
    title: "Ours",
    autostart: false,
    powerState: "running",
    networks: [{ network: "default", model: "virtio" }],
    disks: [first, data, { device: "cdrom" }],
  });
  const inputs = await desk.checked(news);
  const { id, state } = await virtualMachine.create(context, inputs);
  const before = await virtualMachine.read(context, id, state);
  expect(before?.inputs).toEqual(inputs);
  // What was only defined by hand goes without a restart; what has grown does not shrink again.
  expect(await desk.failures(news, { ...inputs, vcpus: 2 })).toEqual([]);
  const grown = inputs.disks.map((disk) => ({ ...disk, size: disk.size && 2 * disk.size }));
  expect(await desk.failures(news, { ...inputs, disks: grown })).toEqual([
    { property: "disks[1].size", reason: expect.stringContaining("declare the size that it has by now") },
  ]);
  let seen = before!;
  for (const [what, { virsh, found }] of Object.entries(byHand(await placeDisk(libvirtd, "other"), medium))) {
    for (const argv of virsh) await libvirtd.virsh(...argv);
    const expected = { ...seen.inputs, ...found(inputs) };
    seen = (await virtualMachine.read(context, id, state))!;
    expect([what, seen.inputs]).toEqual([what, expected]);
  }
  const wanted = await desk.checked(news, seen.inputs);
  const repaired = await virtualMachine.update(context, id, seen.state, wanted);
  expect(repaired).toMatchObject({ powerState: "running", restartPending: false });
  expect((await virtualMachine.read(context, id, repaired))?.inputs).toEqual(inputs);
  await virtualMachine.delete(context, id, repaired);
  expect(await readdir(libvirtd.poolPath)).not.toContain("drift-data.qcow2");
});

test("a machine whose disk is the base of another one's, in whatever pool, is not deleted, and an overlay knows its base", async ({
  libvirtd,
  desk,
}) => {
  const template = await placeDisk(libvirtd, "template");
  const folder = join(libvirtd.directory, "other");
  await mkdir(folder, { mode: 0o711 });
  await libvirtd.virsh("pool-create-as", "other", "dir", "--target", folder);
  const declare = (name: string, image: object) => ({
    origin: `acme/shop/prod/${name}`,
    host: libvirtd.uri,
    domainType: "qemu",
    powerState: "stopped",
    image: { mode: "overlay", ...image },
  });
  const base = await desk.checked(declare("base", { path: template }));
  const [basePath = ""] = base.diskPaths;
  const made = await virtualMachine.create(desk.context, base);
  const top = await desk.checked(declare("top", { path: basePath, pool: "other" }));
  expect(top.image?.template).toEqual({ path: basePath, format: "qcow2" });
  const overlay = await virtualMachine.create(desk.context, top);
  const refusal = () => virtualMachine.delete(desk.context, made.id, made.state).catch((error: Error) => error.message);
  expect(await refusal()).toContain(`${join(folder, "top-boot.qcow2")} stands on it: nothing was changed`);
  await libvirtd.virsh("pool-destroy", "other");
  expect(await refusal()).toContain("the machine top uses it: nothing was changed");
  expect(await libvirtd.virsh("list", "--all", "--name")).toContain("base");
  await libvirtd.virsh("pool-create-as", "other", "dir", "--target", folder);
  await virtualMachine.delete(desk.context, overlay.id, overlay.state);
  await virtualMachine.delete(desk.context, made.id, made.state);
  expect([...(await readdir(libvirtd.poolPath)), ...(await readdir(folder))].filter((name) => name.includes("-boot"))).toEqual([]);
});

describe("what a host's kernel gives", () => {
  test("is asked for in preview, and a machine on huge pages and on a device of the host starts where it is there", async ({ desk }) => {
    await using kvm = await openKvmHost();
    // The bed's own shows the devices of the machine that runs the test.
    await kvm.run("mount", "-t", "sysfs", "none", "/sys");
    const [device] = /\bvl\w+i\b/.exec(await kvm.run("ls", "/sys/class/net")) ?? [];
    const news = {
      ...(await machine(kvm, "kernel", { hugepages: "2MiB", networks: [{ direct: device, mode: "private", model: "virtio" }] })),
      host: { uri: kvm.sshUri(), identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile },
    };
    const properties = async (args: object) => (await desk.failures(args)).map(({ property }) => property);
    await using pages = await reserveHugepages(64 / 2);
    expect(await properties({ ...news, memoryMiB: pages.count * 2 + 16 })).toEqual(["hugepages"]);
    expect(await properties({ ...news, networks: [{ direct: "none0" }] })).toEqual(["networks[0].direct", "hugepages"]);

    // The bed's /dev is no devtmpfs, where the kernel would show the tap of a macvtap.
    await kvm.run("sh", "-c", "mkdir /run/kernel && mount -t devtmpfs none /run/kernel");
    await kvm.run("sh", "-c", "for number in $(seq 0 99); do ln -s /run/kernel/tap$number /dev/tap$number; done");
    await kvm.run("sh", "-c", "mkdir /dev/hugepages && mount -t hugetlbfs none /dev/hugepages");
    await kvm.killDaemon();
    await using later = openMachineBench();
    const inputs = await later.checked(news);
    const { id, state } = await virtualMachine.create(later.context, inputs);
    expect(state).toMatchObject({ powerState: "running", restartPending: false });
    expect(await kvm.virsh("domiflist", "kernel")).toMatch(new RegExp(`macvtap\\d+ +direct +${device} +virtio`));
    expect(await pages.free()).toBe(pages.count - 64 / 2);
    expect(await virtualMachine.read(later.context, id, state)).toEqual({ id, state, inputs });
    await virtualMachine.delete(later.context, id, state);
  }, 60_000);
});

/** Reserves huge pages of 2 MiB on this machine, beside those that are reserved already, and gives them back. */
async function reserveHugepages(more: number) {
  const folder = "/sys/kernel/mm/hugepages/hugepages-2048kB";
  const read = async (name: string): Promise<number> => Number(await readFile(join(folder, name), "utf8"));
  const before = await read("nr_hugepages");
  await writeFile(join(folder, "nr_hugepages"), String(before + more));
  return {
    count: await read("nr_hugepages"),
    free: () => read("free_hugepages"),
    [Symbol.asyncDispose]: () => writeFile(join(folder, "nr_hugepages"), String(before)),
  };
}

describe("patches", () => {
  test.for([
    [{ path: "devices/nothing", remove: true }, "there is no element devices/nothing"],
    [{ path: "devices//video", set: { a: "b" } }, "is no path"],
    [{ path: "devices", add: "<open>" }, "is not well-formed XML"],
  ] as const)("%j is refused with its place", async ([patch, words], { libvirtd, desk }) => {
    const news = { ...(await machine(libvirtd, "patched", {}).catch(() => undefined)), origin: "a/b/c/patched", host: libvirtd.uri };
    const importedDisk = { diskId: "patched", path: join(libvirtd.poolPath, "patched.qcow2") };
    expect(await desk.failures({ ...news, importedDisk, xmlPatches: [{ path: "", set: { a: "b" } }, patch] })).toEqual([
      { property: "xmlPatches[1]", reason: expect.stringContaining(words) },
    ]);
  });
});

describe("adoption", () => {
  /** What machines have that no property says: in the definition, among its devices, and how libvirt writes what is to be seen of it afterwards. */
  const OTHERS: Readonly<Record<string, readonly [string, string, string]>> = {
    timezone: ['<clock offset="timezone" timezone="Europe/Berlin"/>', "", "timezone='Europe/Berlin'"],
    disk: [
      "",
      '<disk type="network" device="disk"><driver name="qemu" type="raw"/><source protocol="nbd" name="n"><host name="nbd.invalid" port="10809"/></source><target dev="vdb" bus="virtio"/></disk>',
      "<host name='nbd.invalid' port='10809'/>",
    ],
    virtiofs: [
      '<memoryBacking><source type="memfd"/><access mode="shared"/></memoryBacking>',
      '<filesystem type="mount"><driver type="virtiofs"/><source dir="/srv"/><target dir="srv"/></filesystem>',
      "<driver type='virtiofs'/>",
    ],
    shmem: ["", '<shmem name="seen"><model type="ivshmem-plain"/><size unit="M">4</size></shmem>', "<model type='ivshmem-plain'/>"],
    iommu: [
      '<features><acpi/><ioapic driver="qemu"/></features>',
      '<iommu model="intel"><driver intremap="on"/></iommu>',
      "<driver intremap='on'/>",
    ],
    redirdev: [
      "",
      '<controller type="usb" index="0" model="qemu-xhci"/><controller type="usb" index="1" model="qemu-xhci"/><redirdev bus="usb" type="tcp"><source mode="connect" host="localhost" service="4000"/><protocol type="raw"/><address type="usb" bus="1" port="1"/></redirdev>',
      "<address type='usb' bus='1' port='1'/>",
    ],
    bridged: [
      "",
      '<controller type="pci" index="0" model="pcie-root"/><controller type="pci" index="1" model="pcie-root-port"/><controller type="pci" index="2" model="pcie-to-pci-bridge"/><interface type="user"><mac address="52:54:00:0a:0b:0d"/><model type="rtl8139"/><address type="pci" domain="0" bus="2" slot="1" function="0"/></interface>',
      "bus='0x02' slot='0x01'",
    ],
  };
  const FLOPPY = '<disk type="file" device="floppy"><source file="/a.img"/><target dev="fda" bus="fdc"/></disk>';

  /** Defines a machine by the name, with such others, and gives what adopts it. */
  async function defineOthers(libvirtd: Libvirtd, name: string, inDomain: string, inDevices: string) {
    const path = await placeDisk(libvirtd, `${name}-root`);
    const file = join(libvirtd.directory, `${name}.xml`);
    await writeFile(
      file,
      `<domain type="qemu"><name>${name}</name><memory unit="MiB">64</memory><os><type arch="x86_64" machine="q35">hvm</type></os>${inDomain}
        <devices><disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="${path}"/><target dev="vda" bus="virtio"/></disk>
        <graphics type="spice"/>${inDevices}</devices></domain>`,
    );
    await libvirtd.virsh("define", file);
    const importedDisk = { diskId: `${name}-root`, path };
    return { origin: `acme/shop/prod/${name}`, host: libvirtd.uri, importedDisk, adopt: { name } };
  }

  test("takes what no property says as it is", async ({ libvirtd, desk }) => {
    for (const [name, [inDomain, inDevices, seen]] of Object.entries(OTHERS)) {
      const inputs = await desk.checked(await defineOthers(libvirtd, name, inDomain, inDevices));
      const { id, state } = await virtualMachine.create(desk.context, inputs);
      expect(await libvirtd.virsh("dumpxml", name)).toContain(seen);
      expect((await virtualMachine.read(desk.context, id, state))?.inputs).toEqual(inputs);
      expect(desk.logged).toContain(
        `info: ${name}: adoption changes graphics from {"type":"spice"} to {"type":"spice","listen":"127.0.0.1"}`,
      );
      await libvirtd.virsh("undefine", name);
    }
  });

  test("stops in the preview at what cannot be kept", async ({ libvirtd, desk }) => {
    const [inDomain, inDevices] = OTHERS["virtiofs"]!;
    const shared = await defineOthers(libvirtd, "shared", inDomain, inDevices);
    expect(await desk.failures({ ...shared, hugepages: "2MiB" })).toEqual([
      {
        property: "adopt",
        reason: expect.stringMatching(
          /^adopt: the machine shared on .* has what cannot be kept beside the declared properties, as libvirt says \(.*virtiofs.*shared memory.*\): remove it there/,
        ),
      },
    ]);
    const drives = await defineOthers(libvirtd, "drives", "", FLOPPY);
    expect(await desk.failures(drives)).toEqual([
      {
        property: "adopt",
        reason: expect.stringMatching(
          /^adopt: the machine drives on .* has a floppy fda on fdc, which no disk of virtlift's can be: remove it/,
        ),
      },
    ]);
    await virtualMachine.create(desk.context, await desk.checked({ ...drives, disks: [] }));
    expect(await libvirtd.virsh("dumpxml", "drives")).not.toContain("fda");
    for (const name of ["shared", "drives"]) await libvirtd.virsh("undefine", name);
  });

  test("takes over a running machine without a restart, says first what will change, and keeps what nobody declared", async ({
    libvirtd,
    desk,
  }) => {
    const { context } = desk;
    const path = await placeDisk(libvirtd, "old-root");
    const data = await placeDisk(libvirtd, "old-data", "raw");
    const file = join(libvirtd.directory, "old.xml");
    const uuid = "b7f0d1a2-3c4d-4e5f-8a9b-0c1d2e3f4a5b";
    await writeFile(
      file,
      `<domain type="qemu"><name>old</name><uuid>${uuid}</uuid><title>Old one</title><memory unit="MiB">96</memory><vcpu>2</vcpu><iothreads>1</iothreads>
        <cputune><shares>512</shares></cputune>
        <os><type arch="x86_64" machine="pc-i440fx-6.2">hvm</type><boot dev="hd"/></os><features><acpi/></features><clock offset="localtime"/>
        <devices>
          <disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="${path}"/><target dev="vda" bus="virtio"/></disk>
          <disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="${data}"/><target dev="vdb" bus="virtio"/><serial>d1</serial></disk>
          <interface type="network"><mac address="52:54:00:0a:0b:0c"/><source network="default"/><model type="e1000"/></interface>
          <serial type="pty"><log file="${join(libvirtd.directory, "old.log")}"/></serial>
          <graphics type="vnc" autoport="yes" listen="127.0.0.1"/>
          <sound model="ich6"/><parallel type="null"/>
          <channel type="unix"><target type="virtio" name="org.example.0"/></channel><channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
        </devices></domain>`,
    );
    await libvirtd.virsh("define", file);
    await libvirtd.virsh("start", "old");
    const domainId = await libvirtd.virsh("domid", "old");

    const news = {
      origin: "acme/shop/prod/mine",
      host: libvirtd.uri,
      importedDisk: { diskId: "old-root", path },
      adopt: { name: "old" },
      title: "Mine",
    };
    const inputs = await desk.checked(news);
    expect(inputs).toMatchObject({
      name: "old",
      uuid,
      machine: "pc",
      memoryMiB: 96,
      vcpus: 2,
      clock: "localtime",
      bus: "virtio",
      networks: [{ network: "default", mac: "52:54:00:0a:0b:0c", model: "e1000" }],
      disks: [{ path: data, serial: "d1" }],
    });
    expect(desk.logged).toEqual(
      expect.arrayContaining([
        `info: mine: the machine old (${uuid}) is adopted and not restarted`,
        "info: mine: adoption leaves alone what no property knows: iothreads, parallel (null), channel (org.example.0), sound (ich6)",
      ]),
    );
    expect(desk.logged).toContainEqual('info: mine: adoption changes title from "Old one" to "Mine"');
    expect(desk.logged.join("\n")).not.toMatch(/changes (memoryMiB|vcpus|networks|clock|bus|machine)/);
    expect(await libvirtd.virsh("dumpxml", "old")).not.toContain("virtlift.dev");

    const { id, state } = await virtualMachine.create(context, inputs);
    expect(await libvirtd.virsh("domid", "old")).toBe(domainId);
    expect(state).toMatchObject({ powerState: "running", name: "old", uuid });
    const xml = await libvirtd.virsh("dumpxml", "old", "--inactive");
    expect(xml).toContain("pc-i440fx-6.2");
    expect(xml).toContain('origin="acme/shop/prod/mine"');
    const others = ["<iothreads>1<", "<sound model='ich6'>", "<parallel type='null'>", "name='org.example.0'"];
    expect(others.filter((words) => !xml.includes(words))).toEqual([]);
    expect(await desk.failures({ ...news, origin: "acme/shop/prod/theirs" })).toEqual([
      { property: "adopt", reason: expect.stringContaining("belongs to acme/shop/prod/mine") },
    ]);

    const again = await desk.checked(news, inputs);
    expect(again).toEqual(inputs);
    const seen = await virtualMachine.read(context, id, state);
    expect((await virtualMachine.diff(context, id, seen!.state, again)).changes).toEqual([]);
    await virtualMachine.delete(context, id, { ...state, shutdownTimeoutSeconds: 1 });
    expect([existsSync(path), existsSync(data)]).toEqual([true, true]);
  }, 60_000);

  test("of a machine that is not there is refused with the names of those that are", async ({ libvirtd, desk }) => {
    const news = { origin: "a/b/c/ghost", host: libvirtd.uri, importedDisk: { diskId: "x", path: "/x.qcow2" }, adopt: { name: "ghost" } };
    expect(await desk.failures(news)).toEqual([
      { property: "adopt", reason: expect.stringContaining("there is no machine ghost on this machine") },
    ]);
  });
});
