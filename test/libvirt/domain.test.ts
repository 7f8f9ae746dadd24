/** Domain XML both ways: against readable fixtures, against itself for generated machines, and against real daemons. */
import { readFile } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { describe, expect, test as base } from "vitest";
import type { GivenDevices } from "../../provider/libvirt/domain-keep.ts";
import { Libvirt } from "../../provider/libvirt/client.ts";
import { DOMAIN_DEFINE, DOMAIN_METADATA, DOMAIN_START, DOMAIN_UNDEFINE, DOMAIN_XML } from "../../provider/libvirt/constants.ts";
import {
  type DomainSpec,
  MACHINE_NAMESPACE,
  MACHINE_PREFIX,
  parseDomain,
  parseOtherWords,
  parsePlacement,
  renderDomain,
  renderMetadata,
} from "../../provider/libvirt/domain.ts";
import { hasHardware } from "../../provider/resources/virtual-machine-spec.ts";
import { type Libvirtd, openLibvirtd } from "../bed/libvirtd.ts";
import { generateDomain } from "./domain-generator.ts";
import type { XmlPatch } from "../../provider/libvirt/xml-patch.ts";

const test = base.extend<{ readonly libvirtd: Libvirtd }>({
  libvirtd: [
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    async ({}, use) => {
      await using libvirtd = await openLibvirtd();
      await use(libvirtd);
    },
    { scope: "file" },
  ],
});

const open = (libvirtd: Libvirtd, uri: string) => Libvirt.open(createConnection(libvirtd.socketPath), { uri, host: "the bed" });

const plain: DomainSpec = {
  type: "qemu",
  name: "web",
  uuid: "5f2c1c8e-3f7a-5d0b-9a43-1f1f0c6a8c01",
  metadata: {
    origin: "acme/shop/prod/web",
    disks: [{ diskId: "web-root", source: "ova", migrationRef: "wave-3/web" }],
    volumes: [],
    tags: {},
  },
  memoryKiB: 64 * 1024,
  vcpus: 1,
  arch: "x86_64",
  machine: "q35",
  firmware: "bios",
  secureBoot: false,
  cpu: { mode: "maximum" },
  clock: "utc",
  hasHyperv: false,
  disks: [
    {
      device: "disk",
      path: "/images/web-root.qcow2",
      format: "qcow2",
      bus: "sata",
      target: "sda",
      bootOrder: 1,
      isReadOnly: false,
      discard: "unmap",
    },
  ],
  interfaces: [{ type: "user", mac: "52:54:00:12:34:56", model: "e1000e" }],
  serialLog: "/var/log/libvirt/qemu/web-serial0.log",
  graphics: { type: "vnc", listen: "127.0.0.1" },
  video: "vga",
  hasTpm: false,
  hasBalloon: true,
  hasRng: true,
};

const FIXTURES: Record<string, DomainSpec> = {
  "bios-sata": plain,
  "uefi-secure-boot": {
    ...plain,
    name: "vault",
    title: 'Vault & "keys" <new>',
    description: "First line\nsecond line",
    metadata: {
      origin: "acme/shop/prod/vault",
      disks: [],
      volumes: [
        { path: "/images/vault-boot.qcow2", isUnfinished: false },
        { path: "/images/vault-data.raw", isUnfinished: true },
      ],
      tags: { owner: "ops & co" },
    },
    firmware: "uefi",
    secureBoot: true,
    vcpus: 4,
    disks: [
      { device: "disk", path: "/images/vault-boot.qcow2", format: "qcow2", bus: "virtio", target: "vda", bootOrder: 1, isReadOnly: false },
      {
        device: "disk",
        path: "/images/vault-data.raw",
        format: "raw",
        bus: "scsi",
        target: "sda",
        serial: "data-1",
        isReadOnly: false,
        isShareable: true,
        cache: "none",
        io: "native",
        discard: "ignore",
      },
      { device: "cdrom", path: "/images/tools.iso", format: "raw", bus: "sata", target: "sdb", isReadOnly: true },
    ],
    interfaces: [
      { type: "network", source: "default", mac: "52:54:00:aa:bb:01", model: "virtio" },
      { type: "bridge", source: "br0", mac: "52:54:00:aa:bb:02", model: "virtio" },
    ],
  },
  "uefi-pc": {
    ...plain,
    name: "old",
    machine: "pc",
    firmware: "uefi",
    cpu: { mode: "custom", model: "Nehalem" },
    disks: [
      { device: "disk", path: "/images/old.raw", format: "raw", bus: "ide", target: "hda", bootOrder: 1, isReadOnly: false },
      { device: "cdrom", path: "/images/tools.iso", format: "raw", bus: "ide", target: "hdb", isReadOnly: true },
    ],
    interfaces: [{ type: "user", mac: "52:54:00:12:34:57", model: "e1000" }],
  },
};

/** Everything that a machine can have, on one each of the two chipsets. */
Object.assign(FIXTURES, {
  "windows-q35": {
    ...plain,
    name: "win",
    metadata: { ...plain.metadata, patches: "0123456789abcdef" },
    memoryKiB: 2048 * 1024,
    maxMemoryKiB: 4096 * 1024,
    hugepagesKiB: 2048,
    vcpus: 2,
    maxVcpus: 4,
    pinning: [
      { vcpu: 0, cpus: "0" },
      { vcpu: 1, cpus: "0-1" },
    ],
    firmware: "uefi",
    loader: { path: "/usr/share/OVMF/OVMF_CODE_4M.fd", nvramTemplate: "/usr/share/OVMF/OVMF_VARS_4M.fd", nvram: "/images/win_VARS.fd" },
    smbios: {
      system: { manufacturer: "VMware, Inc.", product: "VMware7,1", serial: "VMware-56 4d a1", family: "x" },
      baseBoard: { manufacturer: "Intel", serial: "None" },
      chassis: { asset: "No Asset Tag" },
    },
    cpu: { mode: "custom", model: "Nehalem", features: { vmx: "disable", aes: "require" } },
    topology: { sockets: 1, cores: 2, threads: 2 },
    clock: "localtime",
    hasHyperv: true,
    disks: [
      {
        device: "disk",
        path: "/dev/vg0/win",
        format: "raw",
        bus: "virtio",
        target: "vda",
        bootOrder: 1,
        isReadOnly: false,
        discard: "unmap",
      },
      { device: "cdrom", bus: "sata", target: "sda", bootOrder: 2, isReadOnly: true },
    ],
    interfaces: [
      { type: "direct", source: "eth0", mode: "bridge", mac: "52:54:00:aa:bb:03", model: "virtio", queues: 2, isLinkDown: true },
      { type: "bridge", source: "br0", mac: "52:54:00:aa:bb:04", model: "virtio", vlan: [42], mtu: 9000 },
    ],
    graphics: { type: "vnc", listen: "0.0.0.0" },
    video: "virtio",
    hasTpm: true,
    watchdog: "poweroff",
  },
  "headless-pc": {
    ...plain,
    name: "bare",
    machine: "pc",
    hugepagesKiB: 0,
    cpu: { mode: "maximum" },
    topology: { sockets: 2, cores: 1, threads: 1 },
    vcpus: 2,
    disks: [{ ...plain.disks[0]!, bus: "ide", target: "hda" }],
    interfaces: [],
    graphics: undefined,
    video: undefined,
    hasBalloon: false,
    hasRng: false,
  },
} satisfies Record<string, DomainSpec>);

/** libvirt writes the controllers that it added itself behind the others, until it is told of them. */
function sortControllers(xml: string): string {
  const controllers = / {4}<controller [^>]*(?:\/>|>[^]*?<\/controller>)\n/g;
  const sorted = (xml.match(controllers) ?? []).toSorted();
  return xml.replace(controllers, () => sorted.shift()!);
}

describe.each(Object.entries(FIXTURES))("the machine %s", (name, spec) => {
  test("is written as in its fixture, and read back as it was", async () => {
    const xml = renderDomain(spec);
    expect(xml).toBe(await readFile(join(import.meta.dirname, `../fixtures/domain/${name}.xml`), "utf8"));
    expect(parseDomain(xml)).toEqual(spec);
  });

  test("is what QEMU's driver says that it has defined, whatever that adds", async ({ libvirtd }) => {
    await using libvirt = await open(libvirtd, "qemu:///system");
    const domain = await libvirt.domainDefineXMLFlags(renderDomain(spec), DOMAIN_DEFINE.validate);
    const xml = await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive);
    expect(xml).toContain("<controller");
    expect(parseDomain(xml)).toEqual(spec);
    const again = await libvirt.domainDefineXMLFlags(renderDomain(spec, parsePlacement(xml)), DOMAIN_DEFINE.validate);
    expect(sortControllers(await libvirt.domainGetXMLDesc(again, DOMAIN_XML.inactive))).toBe(sortControllers(xml));
    await libvirt.domainUndefineFlags(domain, DOMAIN_UNDEFINE.nvram);
  });

  test("is what the test driver says that it has defined", async ({ libvirtd }) => {
    await using libvirt = await open(libvirtd, "test:///default");
    const tested: DomainSpec = { ...spec, type: "test" };
    const domain = await libvirt.domainDefineXMLFlags(renderDomain(tested));
    expect(parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive))).toEqual(tested);
  });
});

test("every generated machine is read back as it was written", () => {
  const seed = Date.now() % 2 ** 31;
  for (let index = 0; index < 500; index++) {
    const spec = generateDomain(seed + index);
    expect(parseDomain(renderDomain(spec)), `seed ${seed + index}`).toEqual(spec);
  }
});

test("a machine that runs shows the hardware that was defined, under all that libvirt adds while it runs", async ({ libvirtd }) => {
  await using libvirt = await open(libvirtd, "qemu:///system");
  await libvirtd.virsh("vol-create-as", "default", "live.qcow2", "1M", "--format", "qcow2");
  const disk = { ...plain.disks[0]!, path: join(libvirtd.poolPath, "live.qcow2") };
  const common = { ...plain, disks: [disk], serialLog: join(libvirtd.directory, "live.log") };
  for (const [index, spec] of [
    common,
    { ...common, firmware: "uefi" as const },
    { ...common, firmware: "uefi" as const, secureBoot: true },
    { ...common, cpu: { mode: "host-model" } },
    { ...common, disks: [{ ...disk, bus: "virtio" as const, target: "vda" }], machine: "pc" as const, interfaces: [] },
  ].entries()) {
    const named: DomainSpec = { ...spec, name: `live${index}`, uuid: plain.uuid.replace(/01$/, `1${index}`) };
    const domain = await libvirt.domainDefineXMLFlags(renderDomain(named));
    await libvirt.domainCreateWithFlags(domain, DOMAIN_START.paused);
    const live = await libvirt.domainGetXMLDesc(domain);
    expect(live).toContain("<alias");
    expect([named.name, hasHardware(parseDomain(live), named)]).toEqual([named.name, true]);
    expect(hasHardware(parseDomain(live), { ...named, memoryKiB: named.memoryKiB * 2 })).toBe(false);
    await libvirt.domainDestroy(domain);
    await libvirt.domainUndefineFlags(domain, DOMAIN_UNDEFINE.nvram);
  }
});

test("a redefinition leaves the machine type's version and the PCI addresses of what was there", async ({ libvirtd }) => {
  await using libvirt = await open(libvirtd, "qemu:///system");
  const spec: DomainSpec = { ...plain, disks: [{ ...plain.disks[0]!, bus: "virtio", target: "vda" }] };
  const old = renderDomain(spec).replace('machine="q35"', 'machine="pc-q35-6.2"');
  const before = parsePlacement(await libvirt.domainGetXMLDesc(await libvirt.domainDefineXMLFlags(old), DOMAIN_XML.inactive));
  expect(before.machine).toBe("pc-q35-6.2");
  const more: DomainSpec = { ...spec, interfaces: [{ type: "user", mac: "52:54:00:00:00:01", model: "virtio" }, ...spec.interfaces] };
  const domain = await libvirt.domainDefineXMLFlags(renderDomain(more, before));
  const after = parsePlacement(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive));
  expect(after.machine).toBe("pc-q35-6.2");
  for (const key of ["52:54:00:12:34:56", "/images/web-root.qcow2"]) {
    expect(before.addresses.get(key)).toMatchObject({ type: "pci" });
    expect(after.addresses.get(key)).toEqual(before.addresses.get(key));
  }
  await libvirt.domainUndefineFlags(domain, 0);
});

test("what somebody else gave a machine stays with it, but for what patches speak of and what its screen does not carry", () => {
  const given = renderDomain(plain)
    .replace("<devices>", '<iothreads>2</iothreads><maxMemory slots="2">1</maxMemory><devices>')
    .replace(
      "</devices>",
      `<hostdev mode="subsystem" type="pci"><source><address bus="0x03"/></source></hostdev><memory model="dimm"/>
       <sound model="ich9"/><audio id="1" type="none"/><redirdev bus="usb" type="spicevmc"/></devices>`,
    );
  const again = (patches: readonly XmlPatch[], graphics = plain.graphics) =>
    renderDomain({ ...plain, graphics }, parsePlacement(given, patches));
  expect(again([])).toMatch(/<hostdev [^]*<address bus="0x03"\/>[^]*<sound [^]*<audio [^]*<iothreads>2</);
  expect(again([])).not.toMatch(/<memory model|maxMemory|redirdev/);
  expect(again([], { type: "spice" })).toContain('<redirdev bus="usb" type="spicevmc"/>');
  expect(again([{ path: "devices/sound", remove: true }])).not.toMatch(/<sound|<audio/);
  expect(again([{ path: "", add: "<iothreads>4</iothreads>" }])).not.toContain("iothreads");
  expect(parseOtherWords(given)).toEqual({
    staying: ["iothreads", "hostdev (pci)", "sound (ich9)", "redirdev (spicevmc)"],
    going: ["maxMemory", "memory (dimm)"],
  });
});

test("what means the same in both definitions stays word for word, and what another hand gave stays when it was never ours", () => {
  const graphics = { type: "vnc", listen: "0.0.0.0" };
  const connected = { type: "network", source: "default", mac: "52:54:00:00:00:09", model: "virtio" } as const;
  const spec: DomainSpec = { ...plain, graphics, interfaces: [connected] };
  const given = renderDomain(spec)
    .replace(/<metadata>/, '<metadata><z:machine xmlns:z="http://zoo.example/" origin="zoo/a/b/c"><z:volume path="/x"/></z:machine>')
    .replace(/<graphics /, '<graphics passwd="hunter22" port="5907" ')
    .replace(/<features>/, '<features><pae/><kvm><hidden state="on"/></kvm>')
    .replace(/<on_crash>destroy/, "<on_crash>preserve")
    .replace(/<\/source>|(<source file="[^"]*")\/>/, '$1><slices><slice type="storage" offset="1048576" size="512"/></slices></source>')
    .replace(/(<source network="[^"]*")\/>/, '$1 portgroup="vlan10"/>')
    .replace(
      "</devices>",
      `<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="/images/theirs.raw"/><target dev="vdz" bus="virtio"/><iotune><total_iops_sec>7</total_iops_sec></iotune></disk>
       <interface type="network"><mac address="52:54:00:77:77:01"/><source network="other"/><model type="virtio"/></interface></devices>`,
    );
  const again = (news: Partial<DomainSpec>, devices: GivenDevices = spec) =>
    renderDomain({ ...spec, ...news }, parsePlacement(given, [], devices));
  for (const words of [
    '<z:volume path="/x"/></z:machine>',
    'passwd="hunter22"',
    'port="5907"',
    '<hidden state="on"/>',
    "<pae/>",
    "<on_crash>preserve",
    'offset="1048576"',
    'portgroup="vlan10"',
    "<total_iops_sec>7<",
    '<source network="other"/>',
  ]) {
    expect(given).toContain(words);
    expect(again({ title: "Shop" })).toContain(words);
  }
  expect(again({ graphics: { type: "vnc", listen: "127.0.0.1" } })).not.toContain("hunter22");
  const theirs: GivenDevices = { disks: [{ target: "vdz" }], interfaces: [{ mac: "52:54:00:77:77:01" }] };
  expect(again({}, theirs)).not.toMatch(/theirs\.raw|network="other"/);
});

test("metadata that is set on a machine is read as if it had been defined with it", async ({ libvirtd }) => {
  await using libvirt = await open(libvirtd, "qemu:///system");
  const domain = await libvirt.domainDefineXMLFlags(renderDomain({ ...plain, name: "labelled" }));
  const { metadata } = FIXTURES["uefi-secure-boot"]!;
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.element, renderMetadata(metadata), MACHINE_PREFIX, MACHINE_NAMESPACE, 2);
  expect(parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive)).metadata).toEqual(metadata);
  await libvirt.domainUndefineFlags(domain, 0);
});

test("machines of others are read as far as they have what ours have", () => {
  const xml = `<domain type='xen' id='3'><name>legacy</name><uuid>${plain.uuid}</uuid><memory unit='GiB'>2</memory><vcpu placement='static' current='1'>2</vcpu>
    <os><type arch='i686' machine='xenfv'>hvm</type><loader readonly='yes' type='pflash' secure='yes'>/fw</loader></os><features><smm state='on'/></features>
    <metadata><x:machine xmlns:x='urn:other' id='1'/></metadata>
    <devices><disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vda' bus='virtio'/></disk>
    <interface type='direct'><mac address='52:54:00:AA:00:01'/><source dev='eth0' mode='bridge'/></interface></devices></domain>`;
  expect(parseDomain(xml)).toMatchObject({
    type: "xen",
    metadata: undefined,
    memoryKiB: 2 * 1024 * 1024,
    vcpus: 1,
    maxVcpus: 2,
    machine: "xenfv",
    firmware: "uefi",
    secureBoot: true,
    disks: [{ device: "disk", path: undefined, format: undefined, target: "vda" }],
    interfaces: [{ type: "direct", mac: "52:54:00:aa:00:01", model: undefined }],
  });
});

test("a document type declaration is refused, and so is text that XML cannot hold", () => {
  expect(() => parseDomain('<!DOCTYPE d [<!ENTITY a "b">]><domain/>')).toThrow("document type declaration");
  expect(() => renderDomain({ ...plain, title: "bell\u0007" })).toThrow("XML cannot hold the character U+0007");
});
