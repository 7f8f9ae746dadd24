/** VirtualMachine against libvirt's test driver: all but what a guest does. */
import { describe, expect, test as base } from "vitest";
import { LibvirtError } from "../../provider/errors.ts";
import { MACHINE_NAMESPACE } from "../../provider/libvirt/domain.ts";
import type { PropertyChange } from "../../provider/resources/resource.ts";
import { UNKNOWN } from "../../provider/resources/unknown.ts";
import { VirtualMachineSchema } from "../../provider/resources/virtual-machine-schema.ts";
import type { MachineInputs } from "../../provider/resources/virtual-machine-spec.ts";
import { MACHINE_CHANGES } from "../../provider/resources/virtual-machine-changes.ts";
import { type MachineState, virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { type MachineBench, machineFixtures, type MachineFixtures, openMachineBench } from "./machine-bench.ts";

const ORIGIN = "acme/shop/prod/web";

/** The desk's connection has a fresh test driver: a pool `default-pool`, a network `default` and a machine `test`. */
const test = base.extend<MachineFixtures & { readonly host: { readonly uri: string } }>({
  ...machineFixtures({}),
  host: async ({ libvirtd }, use) => use({ uri: libvirtd.testUri }),
});

const DISK = { diskId: "web-root", path: "/default-pool/web-root.qcow2", source: "ova", migrationRef: "wave-3/web" };

const args = (host: object, more: object = {}) => ({ origin: ORIGIN, host, importedDisk: DISK, powerState: "stopped", ...more });

async function libvirtOf(desk: MachineBench, host: { readonly uri: string }) {
  return desk.context.hosts.open(host).libvirt();
}

async function xmlOf(desk: MachineBench, host: { readonly uri: string }, name = "web"): Promise<string> {
  const libvirt = await libvirtOf(desk, host);
  return libvirt.domainGetXMLDesc(await libvirt.domainLookupByName(name), 2);
}

describe("check", () => {
  test("fills in everything that is known before the machine exists, always alike", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host, { networks: [{ network: "default" }, { type: "user", model: "virtio" }] }));
    expect(inputs).toMatchObject({
      name: "web",
      uuid: expect.stringMatching(/^[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/),
      importedDisk: { ...DISK, format: "qcow2" },
      diskPaths: [DISK.path],
      bus: "sata",
      networks: [
        { network: "default", model: "e1000e" },
        { type: "user", model: "virtio" },
      ],
      domainType: "test",
      serialLog: "/var/log/libvirt/qemu/web-serial0.log",
    });
    expect(inputs.macAddresses).toEqual(inputs.networks.map(({ mac }) => mac));
    expect(new Set(inputs.macAddresses.map((mac) => mac.slice(0, 9)))).toEqual(new Set(["52:54:00:"]));
    expect(await desk.checked(args(host, { networks: [{ network: "default" }, { type: "user", model: "virtio" }] }))).toEqual(inputs);
  });

  test("takes the host from the disk, then from the configuration", async ({ desk, host }) => {
    const { host: _host, ...homeless } = args(host);
    expect(await desk.failures(homeless)).toEqual([{ property: "host", reason: expect.stringContaining("virtlift:host") }]);
    const fromDisk = await desk.checked({ ...homeless, importedDisk: { ...DISK, host: host.uri } });
    expect(fromDisk.host).toEqual(host);
    await using configured = openMachineBench({ "virtlift:host": host.uri });
    expect((await configured.checked(homeless)).host).toEqual(host);
  });

  test("keeps identity and addresses once they are given, whatever they would be made from", async ({ desk, host }) => {
    const first = await desk.checked(args(host, { uuid: "0B0E6D2E-5a4e-4d8c-9f8e-3f1c55f0a001", networks: [{ type: "user" }] }));
    const moved = await desk.checked(args(host, { origin: "acme/shop/stage/web", networks: [{ type: "user" }] }), first);
    expect([moved.uuid, moved.macAddresses]).toEqual(["0b0e6d2e-5a4e-4d8c-9f8e-3f1c55f0a001", first.macAddresses]);
  });

  test("stays the same machine under another logical name, unless its name was declared", async ({ desk, host }) => {
    const first = await desk.checked(args(host));
    const origin = "acme/shop/prod/shop-web";
    const renamed = await desk.checked(args(host, { origin }), first);
    expect([renamed.name, renamed.uuid, renamed.serialLog]).toEqual([first.name, first.uuid, first.serialLog]);
    const named = await desk.checked(args(host, { origin, name: "web-1" }));
    expect((await desk.checked(args(host, { origin }), named)).name).toBe("shop-web");
  });

  test("places an imported disk in its pool when only its id is known", async ({ desk, host }) => {
    const { diskPaths } = await desk.checked(
      args(host, {
        importedDisk: { diskId: "a", pool: "default-pool" },
        disks: [{ disk: { diskId: "b", pool: "default-pool", format: "raw" } }],
      }),
    );
    expect(diskPaths).toEqual(["/default-pool/a.qcow2", "/default-pool/b.raw"]);
  });

  const REFUSED: Readonly<Record<string, readonly [object, string, string]>> = {
    "neither disk nor image": [{ importedDisk: undefined }, "importedDisk", "neither is given"],
    "both disk and image": [{ image: "/x.qcow2" }, "image", "both are given"],
    "a property that does not exist": [{ memory: 2 }, "memory", "there is no such property"],
    "a MAC address that is none": [{ networks: [{ type: "user", mac: "52:54:00:12:34" }] }, "networks[0].mac", "six pairs of hex digits"],
    "a multicast MAC address": [{ networks: [{ type: "user", mac: "53:54:00:12:34:56" }] }, "networks[0].mac", "no multicast"],
    "an interface on two things": [{ networks: [{ network: "default", bridge: "br0" }] }, "networks[0]", "exactly one of"],
    "a disk of two kinds": [{ disks: [{ path: "/a.raw", volume: "b" }] }, "disks[0]", "exactly one of"],
    "a blank disk without a name": [{ disks: [{ size: "1GiB" }] }, "disks[0]", "a `size` and a `name`"],
    "a size that is none": [{ disks: [{ size: "big", name: "data" }] }, "disks[0].size", '"big" is no size'],
    "a title of two lines": [{ title: "a\nb" }, "title", "one line"],
    "a control character": [{ description: "a\u0001" }, "description", "control character"],
    "Secure Boot without UEFI": [{ secureBoot: true }, "secureBoot", 'set `firmware: "uefi"`'],
    "Secure Boot on a pc": [{ secureBoot: true, firmware: "uefi", machine: "pc" }, "secureBoot", "needs the chipset q35"],
    "a bus that libvirt has not": [{ bus: "nvme" }, "bus", "libvirt has no NVMe disks that are made from a file"],
    "IDE on a q35": [{ bus: "ide" }, "bus", "has no IDE"],
    "a CD-ROM on virtio": [{ disks: [{ path: "/a.iso", device: "cdrom", bus: "virtio" }] }, "disks[0].bus", "no CD-ROM on virtio"],
    "a custom CPU without a model": [{ cpu: { mode: "custom" } }, "cpu", "needs one"],
    "more CPUs than at most": [{ vcpus: 4, maxVcpus: 2 }, "maxVcpus", "more than its 2 at most"],
    "a topology of other CPUs": [{ vcpus: 4, cpuTopology: { sockets: 1, cores: 2 } }, "cpuTopology", "are 2 CPUs, and the machine has 4"],
    "a CPU that is pinned and not there": [{ cpuPinning: { "1": "0" } }, "cpuPinning.1", "has no CPU 1"],
    "CPUs of the host that are none": [{ cpuPinning: { "0": "3-1" } }, "cpuPinning.0", '"3-1" names no CPUs'],
    "more memory than at most": [{ memoryMiB: 64, maxMemoryMiB: 32 }, "maxMemoryMiB", "more than its 32 at most"],
    "memory to come without the balloon": [
      { memoryMiB: 64, maxMemoryMiB: 128, ballooning: false },
      "ballooning",
      "is given by the balloon",
    ],
    "a loader without UEFI": [{ loader: { path: "/fw" } }, "loader", 'set `firmware: "uefi"`'],
    "native input and output through the cache": [{ bootDisk: { io: "native" } }, "bootDisk.io", 'set `cache: "none"`'],
    "two disks that boot first": [
      { disks: [{ path: "/b.raw", format: "raw", bootOrder: 1 }] },
      "disks[0].bootOrder",
      "bootDisk has the place 1",
    ],
    "a shared disk that is not raw": [
      { disks: [{ path: "/b", format: "qcow2", shareable: true }] },
      "disks[0].shareable",
      "only a raw disk",
    ],
    "queues of a model without": [{ networks: [{ type: "user", queues: 2 }] }, "networks[0]", 'need the `model: "virtio"`'],
    "a patch of two kinds": [{ xmlPatches: [{ path: "a", text: "b", remove: true }] }, "xmlPatches[0]", "exactly one of"],
    "an adoption of two names": [{ adopt: {} }, "adopt", "exactly one of"],
    "a network that is not there": [
      { networks: [{ network: "lan" }] },
      "networks[0].network",
      "there is no network lan on this machine: it has default",
    ],
    "a MAC address of another machine": [
      { networks: [{ type: "user", mac: "AA:BB:CC:DD:EE:FF" }] },
      "networks[0].mac",
      "the machine test on this machine has the address aa:bb:cc:dd:ee:ff already",
    ],
    "a MAC address twice": [
      {
        networks: [
          { type: "user", mac: "52:54:00:00:00:01" },
          { type: "user", mac: "52:54:00:00:00:01" },
        ],
      },
      "networks[1].mac",
      "two interfaces",
    ],
    "the name of another machine": [{ name: "test" }, "name", "there is a machine test on this machine already"],
    "the UUID of another machine": [
      { uuid: "6695eb01-f6a4-8304-79aa-97f2502e193f" },
      "uuid",
      "the machine test on this machine has the UUID",
    ],
    "the disk of another machine": [
      { importedDisk: { ...DISK, path: "/guest/diskimage1" } },
      "importedDisk",
      "the machine test on this machine uses",
    ],
    "a disk twice": [{ disks: [{ path: DISK.path, format: "qcow2" }] }, "disks[0]", "twice"],
    "a pool that is not there": [
      { disks: [{ size: 1024, name: "d", pool: "fast" }] },
      "disks[0].pool",
      "there is no pool fast on this machine",
    ],
    "a volume that is not there": [{ disks: [{ volume: "x", pool: "default-pool" }] }, "disks[0].volume", "there is no volume x"],
    "a file of an unknown format": [{ disks: [{ path: "/x.img" }] }, "disks[0].format", 'say "qcow2" or "raw"'],
    "a template that a copy cannot find": [
      { importedDisk: undefined, image: { path: "/x.qcow2", pool: "default-pool" } },
      "image.path",
      'or use the mode "overlay"',
    ],
  };
  test.for(Object.entries(REFUSED))(
    "refuses %s in one sentence with the user's own path",
    async ([, [more, property, words]], { desk, host }) => {
      const failures = await desk.failures(args(host, more));
      expect(failures).toEqual([{ property, reason: expect.stringContaining(words) }]);
      expect(failures[0]?.reason).toMatch(new RegExp(`^${property.replaceAll(/[[\]]/g, "\\$&")}(: | is not a)[^\n]+[^.]$`));
    },
  );

  test("refuses a host that cannot be reached, by its property", async ({ desk }) => {
    const host = { uri: "qemu+unix:///system?socket=/nonexistent/socket" };
    expect(await desk.failures(args(host))).toEqual([{ property: "host", reason: expect.stringContaining("/nonexistent/socket") }]);
  });

  test("leaves what preview does not know alone, and fills in the rest", async ({ desk, host }) => {
    const news = args(host, { title: UNKNOWN, importedDisk: { ...DISK, path: UNKNOWN }, networks: [{ type: "user" }] });
    const inputs = await desk.checked(news);
    expect(inputs).toMatchObject({ name: "web", title: UNKNOWN, vcpus: 1, importedDisk: { path: UNKNOWN }, diskPaths: UNKNOWN });
    expect(inputs.macAddresses[0]).toMatch(/^52:54:00:/);
    const unknownHost = await desk.checked({ ...news, host: UNKNOWN });
    expect(unknownHost).toMatchObject({ host: UNKNOWN, name: "web" });
    expect((await desk.failures({ ...news, vcpus: 0 }))[0]?.property).toBe("vcpus");
  });

  test("does not accuse the machine of itself", async ({ desk, host }) => {
    const news = args(host, { networks: [{ network: "default" }], disks: [{ size: "1GiB", name: "data", pool: "default-pool" }] });
    const inputs = await desk.checked(news);
    await virtualMachine.create(desk.context, inputs);
    expect(await desk.failures(news, inputs)).toEqual([]);
    // The second check of a replacement knows nothing of the first machine.
    expect(await desk.failures(news)).toEqual([]);
    expect(await desk.failures({ ...news, origin: "acme/shop/prod/other", name: "web" })).toEqual(
      expect.arrayContaining([{ property: "name", reason: expect.stringContaining(`(of ${ORIGIN})`) }]),
    );
  });

  test("refuses that a disk shrinks, and lets it grow", async ({ desk, host }) => {
    const disk = { size: "2MiB", name: "data", pool: "default-pool" };
    const inputs = await desk.checked(args(host, { disks: [disk] }));
    await virtualMachine.create(desk.context, inputs);
    expect(await desk.failures(args(host, { disks: [{ ...disk, size: "1MiB" }] }), inputs)).toEqual([
      { property: "disks[0].size", reason: expect.stringContaining("a disk that shrinks loses what is at its end") },
    ]);
    expect(await desk.failures(args(host, { disks: [{ ...disk, size: "3MiB" }] }), inputs)).toEqual([]);
  });

  test("keeps an interface's address when another one goes, and when it moves to another network", async ({ desk, host }) => {
    const networks = [{ type: "user" }, { network: "default" }, { bridge: "br0", model: "virtio" }];
    const first = await desk.checked(args(host, { networks }));
    const [user, , bridged] = first.macAddresses;
    const fewer = await desk.checked(args(host, { networks: [networks[0], networks[2]] }), first);
    expect(fewer.macAddresses).toEqual([user, bridged]);
    const moved = await desk.checked(args(host, { networks: [networks[0], { bridge: "br1", model: "virtio" }] }), fewer);
    expect(moved.macAddresses).toEqual([user, bridged]);
    const more = await desk.checked(args(host, { networks: [{ network: "default" }, networks[0]] }), moved);
    expect(more.macAddresses[1]).toBe(user);
    expect(new Set(more.macAddresses).size).toBe(2);
  });

  test("keeps a disk's name in libvirt when another one goes", async ({ desk, host }) => {
    const disk = (name: string) => ({ size: "1MiB", name, pool: "default-pool", bus: "virtio" });
    const first = await desk.checked(args(host, { disks: [disk("a"), { device: "cdrom" }, disk("b")] }));
    expect(first.diskTargets).toEqual(["sda", "vda", "sdb", "vdb"]);
    const fewer = await desk.checked(args(host, { disks: [{ device: "cdrom", path: "/x.iso" }, disk("b"), disk("c")] }), first);
    expect(fewer.diskTargets).toEqual(["sda", "sdb", "vdb", "vda"]);
  });

  test("keeps the seed that the machine was made with when its policy says so", async ({ desk, host }) => {
    const seed = { userData: "#cloud-config\n{}\n", pool: "default-pool" };
    const first = await desk.checked(args(host, { cloudInit: seed }));
    expect(first.cloudInit?.volumePath).toMatch(/^\/default-pool\/web-seed-[0-9a-f]{8}\.iso$/);
    const changed = { ...seed, userData: "#cloud-config\nhostname: x\n" };
    const effects = async (cloudInit: object) => {
      const news = await desk.checked(args(host, { cloudInit }), first);
      const { changes } = await virtualMachine.diff(desk.context, "id", { ...first, ...OUTPUTS }, news);
      return [news.cloudInit?.volumePath === first.cloudInit?.volumePath, ...changes.map(({ effect }) => effect)];
    };
    expect(await effects(seed)).toEqual([true]);
    expect(await effects(changed)).toEqual([false, "live"]);
    expect(await effects({ ...changed, onChange: "ignore" })).toEqual([true, "live"]);
    expect(await effects({ ...changed, onChange: "replace" })).toEqual([false, "replace"]);
  });

  test("asks for consent before a running guest is restarted, and says what will happen with it", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host, { powerState: "running" }));
    await virtualMachine.create(desk.context, inputs);
    const more = { powerState: "running", vcpus: 2, title: "new" };
    expect(await desk.failures(args(host, more), inputs)).toEqual([
      { property: "vcpus", reason: expect.stringContaining("onRestartRequired") },
    ]);
    expect(await desk.failures(args(host, { ...more, onRestartRequired: "restart" }), inputs)).toEqual([]);
    expect(desk.logged.at(-1)).toBe("info: web: the guest is restarted for vcpus");
    expect(await desk.failures(args(host, { ...more, onRestartRequired: "defer" }), inputs)).toEqual([]);
    expect(desk.logged.at(-1)).toBe("info: web: vcpus will change at the guest's next start");
    expect(await desk.failures(args(host, { ...more, powerState: "stopped" }), inputs)).toEqual([]);
    expect(desk.logged.at(-1)).toBe('info: web: it runs, and is shut down: declare `powerState: "running"` to leave it so');
    expect(await desk.failures(args(host, { powerState: "paused" }), inputs)).toEqual([]);
    expect(desk.logged.at(-1)).toBe('info: web: it runs, and is paused: declare `powerState: "running"` to leave it so');
  });
});

describe("diff", () => {
  test("knows what each property's change takes", () => {
    const known = Object.keys(MACHINE_CHANGES);
    expect(known).toEqual(expect.arrayContaining(Object.keys(VirtualMachineSchema.shape)));
  });

  const CHANGES: Readonly<Record<string, readonly [object, readonly (readonly [string, PropertyChange["effect"]])[]]>> = {
    nothing: [{}, []],
    "memory and title": [
      { memoryMiB: 4096, title: "x" },
      [
        ["memoryMiB", "restart"],
        ["title", "live"],
      ],
    ],
    "a default that is said": [
      { tpm: false, rng: true, clock: "utc", hyperv: false },
      [
        ["rng", "live"],
        ["tpm", "live"],
        ["hyperv", "live"],
        ["clock", "live"],
      ],
    ],
    "memory and CPUs to come": [
      { maxVcpus: 4, maxMemoryMiB: 4096 },
      [
        ["maxVcpus", "restart"],
        ["maxMemoryMiB", "restart"],
      ],
    ],
    "the guest's system to Windows": [{ guest: "windows" }, [["guest", "restart"]]],
    "the guest's system to another Linux": [{ guest: "debian12" }, [["guest", "live"]]],
    "the name": [{ name: "other" }, [["name", "replace"]]],
    "where the disk lies": [{ importedDisk: { ...DISK, format: "qcow2", path: "/default-pool/new.qcow2" } }, [["importedDisk", "restart"]]],
    "what is known about the disk": [{ importedDisk: { ...DISK, format: "qcow2", migrationRef: "wave-4" } }, [["importedDisk", "live"]]],
    "an unknown name": [{ name: UNKNOWN }, [["name", "live"]]],
    "an unknown host": [{ host: UNKNOWN }, [["host", "live"]]],
    "an unknown disk": [{ importedDisk: UNKNOWN }, [["importedDisk", "restart"]]],
  };
  test.for(Object.entries(CHANGES))("of %s", async ([, [more, expected]], { desk, host }) => {
    const olds = { ...(await desk.checked(args(host))), ...OUTPUTS };
    const { changes } = await virtualMachine.diff(desk.context, olds.uuid, olds, { ...(await desk.checked(args(host))), ...more });
    expect(changes.map(({ property, effect }) => [property, effect])).toEqual(expect.arrayContaining([...expected]));
    expect(changes).toHaveLength(expected.length);
  });

  test("another way to the same host is no other machine, and another host is", async ({ desk }) => {
    const base = { host: { uri: "qemu+ssh://root@kvm1/system" }, name: "web" } as unknown as MachineInputs;
    const effects = async (host: object) =>
      (await virtualMachine.diff(desk.context, "id", base as unknown as MachineState, { ...base, host } as MachineInputs)).changes.map(
        ({ effect }) => effect,
      );
    expect(await effects({ uri: "qemu+ssh://mover@kvm1:2222/system", identityFile: "/k", jumpHosts: ["a"] })).toEqual(["live"]);
    expect(await effects({ uri: "qemu+ssh://root@kvm2/system" })).toEqual(["replace"]);
  });

  test("a definition that waits for the guest's next start is a change once the restart is wanted", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host, { powerState: "running", onRestartRequired: "restart" }));
    const olds = { ...inputs, ...OUTPUTS, powerState: "running" as const, restartPending: true };
    expect((await virtualMachine.diff(desk.context, "id", olds, inputs)).changes).toMatchObject([{ effect: "restart" }]);
    const deferred = { ...olds, onRestartRequired: "defer" as const };
    expect((await virtualMachine.diff(desk.context, "id", deferred, { ...inputs, onRestartRequired: "defer" })).changes).toEqual([]);
  });
});

const OUTPUTS = { powerState: "stopped", ipAddresses: [], restartPending: false, ready: true, ownVolumes: [] } as const;

describe("a machine's life", () => {
  test("is defined, started, changed, read and removed; the imported disk stays", async ({ desk, host }) => {
    const { context } = desk;
    const libvirt = await libvirtOf(desk, host);
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    await libvirt.storageVolCreateXML(pool, "<volume><name>web-root.qcow2</name><capacity>1048576</capacity></volume>");
    const disks = [{ size: "1MiB", name: "data", pool: "default-pool" }];
    const inputs = await desk.checked(
      args(host, { powerState: "running", disks, tags: { owner: "ops" }, title: "Web", description: "Shop" }),
    );
    const { id, state } = await virtualMachine.create(context, inputs);
    expect(id).toBe(inputs.uuid);
    expect(state).toMatchObject({
      powerState: "running",
      ready: true,
      restartPending: false,
      ownVolumes: ["/default-pool/web-data.qcow2"],
    });
    expect((await virtualMachine.diff(context, id, state, inputs)).changes).toEqual([]);
    expect(await xmlOf(desk, host)).toContain(`origin="${ORIGIN}"`);

    const seen = await virtualMachine.read(context, id, state);
    expect(seen).toEqual({ id, state, inputs });

    const news = await desk.checked(args(host, { powerState: "stopped", vcpus: 3, disks: [], autostart: true, title: "Shop" }), inputs);
    const updated = await virtualMachine.update(context, id, state, news);
    expect(updated).toMatchObject({ powerState: "stopped", vcpus: 3, ownVolumes: ["/default-pool/web-data.qcow2"] });
    expect(await xmlOf(desk, host)).toMatch(/<title>Shop<\/title>[^]*<vcpu placement='static'>3</);
    expect(desk.logged.at(-1)).toContain("web-data.qcow2 is no longer a disk of the machine; it stays");
    expect((await virtualMachine.diff(context, id, updated, news)).changes).toEqual([]);

    const unnamed = "/default-pool/web-root.qcow2";
    await virtualMachine.delete(context, id, { ...updated, ownVolumes: [...updated.ownVolumes, unnamed] });
    expect(desk.logged.at(-1)).toContain(`${unnamed} on this machine stays: the machine's definition names it no more`);
    await expect(libvirt.domainLookupByName("web")).rejects.toThrow(LibvirtError);
    expect((await libvirt.storagePoolListAllVolumes(pool)).map(({ name }) => name)).toEqual(["web-root.qcow2"]);
    expect(await virtualMachine.read(context, id, updated)).toBeUndefined();
    await virtualMachine.delete(context, id, updated);
  });

  test("what a human changes is drift of what was declared, and of nothing else", async ({ desk, host }) => {
    const { context } = desk;
    const networks = [{ type: "user" }, { network: "default" }];
    const inputs = await desk.checked(args(host, { memoryMiB: 64, networks, title: "Web" }));
    const { id, state } = await virtualMachine.create(context, inputs);
    const libvirt = await libvirtOf(desk, host);
    const changed = (await xmlOf(desk, host))
      .replaceAll(">65536<", ">131072<")
      .replace(">1</vcpu>", ">2</vcpu>")
      .replace("<title>Web</title>", "")
      .replace(/<interface type='user'>[^]*?<\/interface>/, "")
      .replace(
        "</devices>",
        "<interface type='bridge'><mac address='52:54:00:00:00:09'/><source bridge='br7'/><model type='virtio'/></interface></devices>",
      );
    const domain = await libvirt.domainDefineXML(changed);
    await libvirt.domainCreate(domain);
    const seen = await virtualMachine.read(context, id, state);
    expect(seen?.inputs).toEqual({
      ...inputs,
      memoryMiB: 128,
      title: undefined,
      networks: [inputs.networks[1], { bridge: "br7", mac: "52:54:00:00:00:09", model: "virtio" }],
      powerState: "running",
    });
    expect(seen?.state.powerState).toBe("running");
    const { changes } = await virtualMachine.diff(context, id, seen!.state, inputs);
    expect(changes.map(({ property }) => property)).toEqual(["memoryMiB", "networks", "powerState", "title"]);
    const repaired = await virtualMachine.update(context, id, seen!.state, inputs);
    expect((await virtualMachine.read(context, id, repaired))?.inputs).toEqual(inputs);
  });

  test("a create that was killed is gone on with, and its half volume is made anew", async ({ desk, host }) => {
    const libvirt = await libvirtOf(desk, host);
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    const inputs = await desk.checked(args(host, { disks: [{ size: "2MiB", name: "data", pool: "default-pool" }] }));
    await virtualMachine.create(desk.context, inputs);
    const half = (await xmlOf(desk, host)).replace(/(volume path="[^"]*")/, '$1 state="unfinished"');
    await libvirt.domainDefineXML(half);
    await libvirt.storageVolDelete(await libvirt.storageVolLookupByName(pool, "web-data.qcow2"));
    await libvirt.storageVolCreateXML(pool, "<volume><name>web-data.qcow2</name><capacity>1</capacity></volume>");

    const news = await desk.checked(args(host, { disks: [{ size: "2MiB", name: "data", pool: "default-pool" }] }));
    const { state } = await virtualMachine.create(desk.context, news);
    expect(state.ownVolumes).toEqual(["/default-pool/web-data.qcow2"]);
    const { capacity } = await libvirt.storageVolGetInfo(await libvirt.storageVolLookupByName(pool, "web-data.qcow2"));
    expect(capacity).toBe(2 * 1024 * 1024);
    expect(await xmlOf(desk, host)).not.toContain("unfinished");
  });

  test("a create that fails leaves nothing, and what is in its way as it was", async ({ desk, host }) => {
    const libvirt = await libvirtOf(desk, host);
    const pool = await libvirt.storagePoolLookupByName("default-pool");
    const disks = ["one", "two"].map((name) => ({ size: "1MiB", name, pool: "default-pool" }));
    const inputs = await desk.checked(args(host, { disks }));
    await libvirt.storageVolCreateXML(pool, "<volume><name>web-two.qcow2</name><capacity>7</capacity></volume>");
    await expect(virtualMachine.create(desk.context, inputs)).rejects.toThrow(LibvirtError);
    await expect(libvirt.domainLookupByName("web")).rejects.toThrow(LibvirtError);
    expect((await libvirt.storagePoolListAllVolumes(pool)).map(({ name }) => name)).toEqual(["web-two.qcow2"]);
  });

  test("create never touches a machine that is not its own", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host));
    const libvirt = await libvirtOf(desk, host);
    const foreign = `<domain type="test"><name>theirs</name><uuid>${inputs.uuid}</uuid><memory>65536</memory><os><type>hvm</type></os></domain>`;
    await libvirt.domainDefineXML(foreign);
    await expect(virtualMachine.create(desk.context, inputs)).rejects.toThrow("is not ours: nothing was changed");
    expect(await xmlOf(desk, host, "theirs")).toContain("<name>theirs</name>");
  });

  test("a machine that another state made is taken over by consent only, but for one that was made just now", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host));
    await virtualMachine.create(desk.context, inputs);
    const made = await xmlOf(desk, host);
    const [, finished] = /finished="([^"]+)"/.exec(made) ?? [];
    expect(Date.now() - Date.parse(finished!)).toBeLessThan(60_000);
    // As after an engine that was killed before it kept the answer.
    await virtualMachine.create(desk.context, await desk.checked(args(host)));
    expect(await xmlOf(desk, host)).toContain(`finished="${finished}"`);

    const hourAgo = made.replace(finished!, new Date(Date.now() - 3_600_000).toISOString());
    await (await libvirtOf(desk, host)).domainDefineXML(hourAgo);
    await using later = openMachineBench();
    expect(await later.failures(args(host, { title: "Shop" }))).toEqual([
      {
        property: "adopt",
        reason: expect.stringMatching(
          /^adopt: the machine web on .* was made for acme\/shop\/prod\/web on \d{4}-\d\d-\d\d, and this stack's state does not know it: set `adopt: \{ uuid: "[\da-f-]{36}" \}` to take it over/,
        ),
      },
    ]);
    await expect(virtualMachine.create(later.context, inputs)).rejects.toThrow("this stack's state does not know it");
    expect(await later.failures(args(host), inputs)).toEqual([]);
    const adopted = await later.checked(args(host, { title: "Shop", adopt: { uuid: inputs.uuid } }));
    await virtualMachine.create(later.context, adopted);
    expect(await xmlOf(later, host)).toContain("<title>Shop</title>");
  });

  test("delete refuses a machine that another program owns by now", async ({ desk, host }) => {
    const { id, state } = await virtualMachine.create(desk.context, await desk.checked(args(host)));
    const moved = { ...state, origin: "acme/shop/stage/web" };
    await expect(virtualMachine.delete(desk.context, id, moved)).rejects.toThrow(`belongs to ${ORIGIN} and is not deleted`);
  });

  test("delete refuses while another machine has a volume of its own, and leaves both as they are", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host, { disks: [{ size: "1MiB", name: "data", pool: "default-pool" }] }));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const libvirt = await libvirtOf(desk, host);
    const [path] = state.ownVolumes;
    const disk = `<disk type="file" device="disk"><source file="${path}"/><target dev="sda" bus="sata"/></disk>`;
    await libvirt.domainDefineXML(
      `<domain type="test"><name>theirs</name><memory>65536</memory><os><type>hvm</type></os><devices>${disk}</devices></domain>`,
    );
    await expect(virtualMachine.delete(desk.context, id, state)).rejects.toThrow(/the machine theirs uses it: nothing was changed/);
    expect(await xmlOf(desk, host)).toContain(path);
    await libvirt.domainUndefineFlags(await libvirt.domainLookupByName("web"), 0);
    await virtualMachine.delete(desk.context, id, state);
    expect(desk.logged.at(-1)).toMatch(/^warn: web: \/default-pool\/web-data\.qcow2 on .* stays: the machine that it was made for is gone/);
    expect((await libvirt.storageVolLookupByPath(path!)).key).toBe(path);
  });

  const MARKS: Readonly<Record<string, readonly [string, RegExp]>> = {
    "bears another's mark": [
      `<metadata><v:machine xmlns:v="${MACHINE_NAMESPACE}" origin="acme/lab/test/db"/></metadata>`,
      /^uuid: the machine web on .* belongs to acme\/lab\/test\/db and is not changed: remove it by hand, or run pulumi state delete \(/,
    ],
    "bears a mark that is not of virtlift": [
      `<metadata><v:machine xmlns:v="http://zoo.example/" origin="${ORIGIN}"/></metadata>`,
      /^uuid: the machine web on .* bears no mark of virtlift, .* and is not changed: set `adopt` to take it over, remove it by hand, or/,
    ],
    "bears no mark": ["", /^uuid: the machine web on .* bears no mark of virtlift/],
  };
  test.for(Object.entries(MARKS))(
    "a machine in place of ours that %s is neither changed nor deleted",
    async ([, [mark, reason]], { desk, host }) => {
      const disks = [{ size: "1MiB", name: "data", pool: "default-pool" }];
      const inputs = await desk.checked(args(host, { disks }));
      const { id, state } = await virtualMachine.create(desk.context, inputs);
      const libvirt = await libvirtOf(desk, host);
      await libvirt.domainUndefineFlags(await libvirt.domainLookupByName("web"), 0);
      const theirs = `<domain type="test"><name>web</name><uuid>${inputs.uuid}</uuid>${mark}<memory>65536</memory><os><type>hvm</type></os></domain>`;
      await libvirt.domainDefineXML(theirs);
      const found = await xmlOf(desk, host);

      await using later = openMachineBench();
      const news = args(host, { title: "Shop", disks: [{ path: "/default-pool/web-data.qcow2", format: "qcow2" }] });
      expect(await later.failures(news, inputs)).toEqual([{ property: "uuid", reason: expect.stringMatching(reason) }]);
      await virtualMachine.read(desk.context, id, state);
      expect(desk.logged.at(-1)).toMatch(/^warn: web: the machine web on .* and is not changed/);
      await expect(virtualMachine.update(desk.context, id, state, inputs)).rejects.toThrow("and is not changed");
      await expect(virtualMachine.delete(desk.context, id, state)).rejects.toThrow(
        "and is not deleted: remove it by hand, or run pulumi state delete",
      );
      expect(await xmlOf(desk, host)).toBe(found);
      expect((await libvirt.storageVolLookupByPath(state.ownVolumes[0]!)).key).toBe(state.ownVolumes[0]);
    },
  );

  test("without a mark it is changed by consent only, and then bears ours", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const libvirt = await libvirtOf(desk, host);
    await libvirt.domainDefineXML((await xmlOf(desk, host)).replace(/<metadata>[^]*<\/metadata>/, ""));
    const news = await desk.checked(args(host, { adopt: { uuid: inputs.uuid } }), inputs);
    await virtualMachine.delete(desk.context, id, await virtualMachine.update(desk.context, id, state, news));
    await expect(libvirt.domainLookupByName("web")).rejects.toThrow(LibvirtError);
  });

  test("under another logical name it is changed and deleted by the origin that it was made for", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const news = await desk.checked(args(host, { origin: "acme/shop/prod/shop-web" }), inputs);
    const renamed = await virtualMachine.update(desk.context, id, state, news);
    expect(await xmlOf(desk, host)).toContain('origin="acme/shop/prod/shop-web"');
    // As after an engine that was killed before it kept the answer.
    expect(await virtualMachine.update(desk.context, id, state, news)).toEqual(renamed);
    await virtualMachine.delete(desk.context, id, renamed);
  });

  test("a machine that was undefined by hand is made again by an update", async ({ desk, host }) => {
    const inputs = await desk.checked(args(host, { disks: [{ size: "1MiB", name: "data", pool: "default-pool" }] }));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const libvirt = await libvirtOf(desk, host);
    await libvirt.domainUndefineFlags(await libvirt.domainLookupByName("web"), 0);
    expect(await virtualMachine.update(desk.context, id, state, inputs)).toEqual(state);
  });

  test("after an undefine by hand a volume of its own is not taken again but as the user's", async ({ desk, host }) => {
    const news = (disk: object) => args(host, { disks: [{ pool: "default-pool", ...disk }] });
    const inputs = await desk.checked(news({ size: "1MiB", name: "data" }));
    const { id, state } = await virtualMachine.create(desk.context, inputs);
    const libvirt = await libvirtOf(desk, host);
    await libvirt.domainUndefineFlags(await libvirt.domainLookupByName("web"), 0);
    await using later = openMachineBench();
    for (const olds of [inputs, undefined])
      expect(await later.failures(news({ size: "1MiB", name: "data" }), olds)).toEqual([
        { property: "disks[0].name", reason: expect.stringContaining("to keep what is in it declare it by its `path`") },
      ]);
    const kept = await later.checked(news({ path: state.ownVolumes[0], format: "qcow2" }), inputs);
    const updated = await virtualMachine.update(later.context, id, state, kept);
    expect(updated.ownVolumes).toEqual([]);
    await virtualMachine.delete(later.context, id, updated);
    expect((await libvirt.storageVolLookupByPath(state.ownVolumes[0]!)).key).toBe(state.ownVolumes[0]);
  });
});
