import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { type OvfSystem, parseOvf } from "../../provider/image/ovf.ts";
import { ImageError } from "../../provider/image/parser.ts";

const VMWARE = fixture("vmware");
const GIB = 1024 ** 3;
const MIB = 1024 ** 2;

function fixture(name: string): string {
  return readFileSync(new URL(`../fixtures/ovf/${name}.ovf`, import.meta.url), "utf8");
}

/** VMware's export with one piece of text replaced. */
function changed(from: string | RegExp, to: string): string {
  const text = VMWARE.replace(from, to);
  if (text === VMWARE) throw new Error(`the fixture does not hold ${from}`);
  return text;
}

/** The smallest envelope: hardware items and what comes before the machine. */
function envelope(items: string, before = "", system = ""): string {
  return `<Envelope>${before}<VirtualSystem id="vm"><VirtualHardwareSection>${items}</VirtualHardwareSection>${system}</VirtualSystem></Envelope>`;
}

test("reads everything of a VMware export that a machine is made of", () => {
  expect(parseOvf(VMWARE)).toMatchObject({
    name: "app01",
    annotation: "Application server\r\nowner: ops <ops@example.org>",
    guest: { cimId: 94, vendorId: "ubuntu64Guest", description: "Ubuntu Linux (64-bit)" },
    hardwareVersion: "vmx-19",
    cpus: 4,
    coresPerSocket: 2,
    memoryMiB: 8192,
    firmware: "efi",
    secureBoot: true,
    cpuHotAdd: true,
    memoryHotAdd: false,
    hasVtpm: true,
    usbControllers: ["vmware.usb.xhci"],
    videoRamKiB: 8192,
    cdroms: [{ name: "CD/DVD drive 1", file: undefined }],
    others: ['other device "VMCI device" (vmware.vmci)'],
    product: { name: "Example Application", vendor: "Example Ltd", version: "4.2.1 build 7" },
    transports: ["iso", "com.vmware.guestInfo"],
    licences: ["Use it well."],
    notes: [],
  } satisfies Partial<OvfSystem>);
});

test("reads the network adapters with the PCI slot that the interface's name hangs on", () => {
  expect(parseOvf(VMWARE).nics).toEqual([
    { name: "Network adapter 1", model: "VmxNet3", network: "VM Network", mac: undefined, connected: true, pciSlot: 192 },
    {
      name: "Network adapter 2",
      model: "E1000e",
      network: "DPG-Storage & Backup",
      mac: "00:50:56:9a:0b:0c",
      connected: false,
      pciSlot: undefined,
    },
  ]);
});

test("lists disks by controller and unit, not as the document has them", () => {
  const { disks } = parseOvf(VMWARE);
  expect(disks.map(({ name }) => name)).toEqual(["Hard disk 1", "Hard disk 2", "Hard disk 3"]);
  expect(disks[0]).toMatchObject({
    controller: { bus: "scsi", model: "VirtualSCSI", busNumber: 0 },
    unit: 0,
    capacityBytes: 40 * GIB,
    populatedBytes: 9_388_031,
    file: { href: "app01-1.vmdk", sizeBytes: 1_048_576 },
  });
  expect(disks[1]).toMatchObject({ unit: 1, capacityBytes: 100 * GIB });
});

test("takes a capacity from a property, and a disk without a file as blank", () => {
  expect(parseOvf(VMWARE).disks[2]).toMatchObject({ controller: { busNumber: 1 }, capacityBytes: GIB, file: undefined });
});

test("reads a VirtualBox export with its MAC addresses and firmware", () => {
  const system = parseOvf(fixture("virtualbox"));
  expect(system).toMatchObject({
    name: "dev",
    guest: { cimId: 96, vendorId: "Debian_64" },
    cpus: 2,
    memoryMiB: 2048,
    firmware: "efi",
    secureBoot: false,
    cdroms: [{ name: "cdrom1", file: { href: "dev-disk002.iso" } }],
    others: ['sound card "sound" (ensoniq1371)'],
  });
  expect(system.nics.map(({ model, mac }) => [model, mac])).toEqual([
    ["E1000", "08:00:27:4f:3b:f4"],
    ["virtio", "08:00:27:a1:b2:c3"],
  ]);
  expect(system.disks.map(({ name, controller }) => [name, controller?.bus])).toEqual([
    ["disk1", "sata"],
    ["disk2", "ide"],
  ]);
});

test("reads oVirt's dialect", () => {
  expect(parseOvf(fixture("ovirt"))).toMatchObject({
    name: "db01",
    cpus: 8,
    coresPerSocket: 4,
    memoryMiB: 16_384,
    firmware: "efi",
    secureBoot: true,
    controllers: [],
    disks: [{ name: "db01_Disk1", controller: { bus: "scsi", model: "VirtIO_SCSI" }, capacityBytes: 20 * GIB, parentId: undefined }],
    nics: [{ network: "ovirtmgmt", mac: "56:6f:1a:8b:00:01" }],
  });
});

test("reads a XenServer export", () => {
  expect(parseOvf(fixture("xenserver"))).toMatchObject({
    name: "win2019",
    cpus: 4,
    memoryMiB: 8192,
    firmware: "efi",
    disks: [{ name: "system", controller: undefined, unit: 0, capacityBytes: 32 * GIB }],
    nics: [{ network: "Network 0", mac: "ca:fe:12:34:56:78" }],
  });
});

test("reads an Amazon export", () => {
  expect(parseOvf(fixture("aws"))).toMatchObject({
    cpus: 1,
    memoryMiB: 1024,
    firmware: "bios",
    disks: [{ controller: { bus: "ide" }, capacityBytes: 8 * GIB, file: { href: "export-i-0123456789abcdef0-disk1.vmdk" } }],
    nics: [{ model: "E1000", network: "VM Network" }],
  });
});

test.each([
  ["byte * 2^20", 512],
  ["byte*1024*1024", 512],
  ["MegaBytes", 512],
  ["MB", 512],
  ["byte * 2^30", 512 * 1024],
  ["GigaBytes", 512 * 1024],
  ["", 512],
])("reads 512 units of memory in %j", (units, memoryMiB) => {
  const unit = units === "" ? "" : `<AllocationUnits>${units}</AllocationUnits>`;
  expect(parseOvf(envelope(`<Item><ResourceType>4</ResourceType><VirtualQuantity>512</VirtualQuantity>${unit}</Item>`)).memoryMiB).toBe(
    memoryMiB,
  );
});

test("sorts buses of all kinds", () => {
  const items = [
    ["20", "vmware.nvme.controller", "1"],
    ["5", "PIIX4", "2"],
    ["20", "AHCI", "3"],
    ["20", "VirtioSCSI", "4"],
    ["6", "lsilogic", "5"],
  ]
    .map(
      ([type, subtype, id]) =>
        `<Item><ResourceType>${type}</ResourceType><ResourceSubType>${subtype}</ResourceSubType><InstanceID>${id}</InstanceID></Item>` +
        `<Item><ResourceType>17</ResourceType><Parent>${id}</Parent><AddressOnParent>0</AddressOnParent><HostResource>ovf:/disk/d${id}</HostResource></Item>`,
    )
    .join("");
  const disks = [1, 2, 3, 4, 5].map((id) => `<Disk diskId="d${id}" capacity="${MIB}"/>`).join("");
  const system = parseOvf(envelope(items, `<DiskSection>${disks}</DiskSection>`));
  expect(system.disks.map(({ id, controller }) => `${id} ${controller?.bus}`)).toEqual([
    "d4 scsi",
    "d5 scsi",
    "d3 sata",
    "d2 ide",
    "d1 nvme",
  ]);
});

test("takes the items of the default deployment option in place of the general ones", () => {
  const options = `<DeploymentOptionSection><Configuration id="small"/><Configuration id="large" default="true"/></DeploymentOptionSection>`;
  const cpu = (count: number, configuration: string): string =>
    `<Item ${configuration}><InstanceID>1</InstanceID><ResourceType>3</ResourceType><VirtualQuantity>${count}</VirtualQuantity></Item>`;
  const system = parseOvf(envelope(cpu(1, "") + cpu(2, 'ovf:configuration="small"') + cpu(8, 'ovf:configuration="large"'), options));
  expect(system).toMatchObject({ cpus: 8, deploymentOption: "large", deploymentOptions: ["small", "large"] });
});

test("chooses a machine of a collection by name or id, and lists them otherwise", () => {
  const machine = (id: string, name: string): string =>
    `<VirtualSystem ovf:id="${id}"><Name>${name}</Name><VirtualHardwareSection/></VirtualSystem>`;
  const text = `<Envelope><VirtualSystemCollection>${machine("a", "web")}<VirtualSystemCollection>${machine("b", "db")}</VirtualSystemCollection></VirtualSystemCollection></Envelope>`;
  expect(parseOvf(text, { system: "db" }).id).toBe("b");
  expect(parseOvf(text, { system: "a" }).name).toBe("web");
  expect(() => parseOvf(text)).toThrow(new ImageError('the OVF descriptor holds 2 machines: say which one is meant ("web", "db")'));
  expect(() => parseOvf(text, { system: "x" })).toThrow(
    new ImageError('the OVF descriptor holds no machine named "x"; it holds "web", "db"'),
  );
});

test("keeps a disk that no hardware item refers to, last and with a note", () => {
  const before = `<DiskSection><Disk diskId="lost" capacity="${MIB}"/></DiskSection>`;
  expect(parseOvf(envelope("", before))).toMatchObject({
    disks: [{ id: "lost", controller: undefined }],
    notes: ["1 disk is attached to no controller in the descriptor and comes last"],
  });
});

test("says that a MAC address cannot be read", () => {
  const system = parseOvf(changed("00:50:56:9A:0B:0C", "00:50:56"));
  expect(system.nics[1]?.mac).toBeUndefined();
  expect(system.notes).toEqual(['the MAC address "00:50:56" of "Network adapter 2" cannot be read; a new one is made']);
});

test.each<{ readonly name: string; readonly xml: string; readonly sentence: string }>([
  { name: "no XML", xml: "hello", sentence: "the OVF descriptor is not well-formed XML: char 'h' is not expected. (line 1)" },
  { name: "another document", xml: "<domain/>", sentence: 'the OVF descriptor is none: its root element is "domain", not "Envelope"' },
  { name: "no machine", xml: "<Envelope/>", sentence: "the OVF descriptor holds no virtual machine" },
  {
    name: "a machine without hardware",
    xml: '<Envelope><VirtualSystem ovf:id="x"/></Envelope>',
    sentence: 'machine "x" of the OVF descriptor has no hardware section',
  },
  {
    name: "a document type",
    xml: `<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><Envelope>&a;</Envelope>`,
    sentence: "the OVF descriptor has a document type declaration, which is not allowed",
  },
  {
    name: "an entity of its own",
    xml: changed("A virtual machine", "&lol;"),
    sentence: 'the OVF descriptor uses the entity "&lol;", which is not known',
  },
  {
    name: "a deep document",
    xml: `${"<a>".repeat(1000)}${"</a>".repeat(1000)}`,
    sentence: "the OVF descriptor is not readable XML: Maximum nested tags exceeded",
  },
  {
    name: "a huge document",
    xml: `<a>${" ".repeat(5 * MIB)}</a>`,
    sentence: "the OVF descriptor has 5242887 characters; at most 4194304 are read",
  },
  {
    name: "very many tags",
    xml: `<a>${"<b/>".repeat(200_000)}</a>`,
    sentence: "the OVF descriptor has more than 200000 tags, which are not read",
  },
  {
    name: "very many items",
    xml: envelope("<Item/>".repeat(5000)),
    sentence: "the OVF descriptor names 5000 hardware items; at most 4096 are read",
  },
  {
    name: "an item of no type",
    xml: changed("<rasd:ResourceType>3<", "<rasd:ResourceType>cpu<"),
    sentence: 'a hardware item of the OVF descriptor has resource type "cpu", which is no number',
  },
  {
    name: "a quantity in words",
    xml: changed("<rasd:VirtualQuantity>4<", "<rasd:VirtualQuantity>four<"),
    sentence: '<VirtualQuantity> of a hardware item in the OVF descriptor is "four", which is no number',
  },
  {
    name: "an unknown unit of memory",
    xml: changed(/byte \* 2\^20<\/rasd/, "byte * 2^x</rasd"),
    sentence: 'the OVF descriptor uses the unit "byte * 2^x", which is not known',
  },
  {
    name: "an absurd unit",
    xml: changed(/byte \* 2\^20<\/rasd/, "byte * 2^99</rasd"),
    sentence: 'the OVF descriptor uses the unit "byte * 2^99", which is not known',
  },
  {
    name: "a capacity beyond all disks",
    xml: changed('capacity="40"', 'capacity="9000000000000"'),
    sentence: 'the capacity of disk "vmdisk1" is 9.663676416e+21 bytes, larger than any disk',
  },
  {
    name: "a capacity from nowhere",
    xml: changed("${scratchBytes}", "${other}"),
    sentence: 'the capacity of disk "vmdisk3" is property "other", which has no value',
  },
  {
    name: "a disk of nothing",
    xml: changed("${scratchBytes}", "0"),
    sentence: 'disk "vmdisk3" of the OVF descriptor has neither a file nor a capacity',
  },
  {
    name: "a disk that is not there",
    xml: changed("ovf:/disk/vmdisk1", "ovf:/disk/vmdisk9"),
    sentence: '"Hard disk 1" of the OVF descriptor refers to "ovf:/disk/vmdisk9", which the descriptor does not hold',
  },
  {
    name: "a file that is not there",
    xml: changed('fileRef="file2"', 'fileRef="file9"'),
    sentence: 'disk "vmdisk2" of the OVF descriptor refers to file "file9", which the descriptor does not name',
  },
  { name: "a disk twice", xml: changed('diskId="vmdisk2"', 'diskId="vmdisk1"'), sentence: 'the OVF descriptor names disk "vmdisk1" twice' },
  { name: "a file twice", xml: changed('ovf:id="file2"', 'ovf:id="file1"'), sentence: 'the OVF descriptor names file "file1" twice' },
])("refuses $name", ({ xml, sentence }) => {
  expect(() => parseOvf(xml)).toThrow(new ImageError(sentence));
});

test("refuses a descriptor that is cut anywhere", () => {
  const end = VMWARE.lastIndexOf("</Envelope>");
  for (let length = 0; length < end; length += 97) expect(() => parseOvf(VMWARE.slice(0, length))).toThrow(ImageError);
});
