import { expect, test, vi } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { openVmx, parseVmx } from "../../provider/image/vmx.ts";
import { drive, fromBytes } from "./drive.ts";
import { vmxSeed } from "./seeds.ts";
import { descriptorText, qcow2Seed, sparseVmdkSeed, VMDK_SIZE } from "./sparse-seeds.ts";

/** What the largest file may take, on a machine that may be slow. */
const BOUND_MS = 20_000;
vi.setConfig({ testTimeout: 2 * BOUND_MS });

const parse = (...more: readonly string[]) => parseVmx(Buffer.from(vmxSeed(more)));

test("reads the hardware as VMware has it, disks by controller and unit", () => {
  const system = parse(
    'scsi0:10.present = "TRUE"',
    'scsi0:10.fileName = "ten.vmdk"',
    'scsi0:2.present = "TRUE"',
    'scsi0:2.fileName = "two.vmdk"',
    'scsi0:3.present = "FALSE"',
    'scsi0:3.fileName = "gone.vmdk"',
    'nvme0:0.present = "TRUE"',
    'nvme0:0.fileName = "nvme.vmdk"',
    'nvme0:0.deviceType = "disk"',
  );
  expect(system).toMatchObject({
    name: 'the "web" server',
    annotation: "first line\nsecond line",
    guest: { vendorId: "ubuntu-64" },
    hardwareVersion: "vmx-19",
    cpus: 4,
    coresPerSocket: 2,
    memoryMiB: 2048,
    firmware: "efi",
    secureBoot: true,
    cdroms: [{ name: "ide1:0", file: undefined }],
    usbControllers: ["usb_xhci"],
    hasVtpm: false,
  });
  expect(system.disks.map(({ name, controller, file }) => [name, controller?.bus, controller?.model, file?.href])).toEqual([
    ["scsi0:0", "scsi", "pvscsi", "a.vmdk"],
    ["scsi0:2", "scsi", "pvscsi", "two.vmdk"],
    ["scsi0:10", "scsi", "pvscsi", "ten.vmdk"],
    ["nvme0:0", "nvme", undefined, "nvme.vmdk"],
  ]);
});

test("reads interfaces with the address that their kind says, their network, and a pulled cable", () => {
  const system = parse(
    'ethernet1.present = "TRUE"',
    'ethernet1.addressType = "static"',
    'ethernet1.address = "00:50:56:00:00:09"',
    'ethernet1.generatedAddress = "00:0c:29:00:00:09"',
    'ethernet1.startConnected = "FALSE"',
    'ethernet1.connectionType = "nat"',
    'ethernet10.present = "TRUE"',
    'ethernet2.present = "FALSE"',
  );
  expect(system.nics).toEqual([
    { name: "ethernet0", model: "vmxnet3", network: "VM Network", mac: "00:0c:29:aa:bb:cc", connected: true, pciSlot: undefined },
    { name: "ethernet1", model: undefined, network: "nat", mac: "00:50:56:00:00:09", connected: false, pciSlot: undefined },
    { name: "ethernet10", model: undefined, network: "bridged", mac: undefined, connected: true, pciSlot: undefined },
  ]);
});

test("says what has no field of its own: passthrough, ports, sound, a suspended memory, a disk that forgets", () => {
  const system = parse(
    'pciPassthru0.present = "TRUE"',
    'pciPassthru0.virtualDev = "vmiop"',
    'serial0.present = "TRUE"',
    'sound.present = "TRUE"',
    'floppy0.present = "TRUE"',
    'scsi0:5.present = "TRUE"',
    'scsi0:5.deviceType = "scsi-passthru"',
    'scsi0:0.mode = "independent-nonpersistent"',
    'checkpoint.vmState = "web.vmss"',
    'vtpm.present = "TRUE"',
  );
  expect(system.others).toEqual([
    'PCI passthrough "pcipassthru0" (vmiop)',
    'serial port "serial0"',
    'sound card "sound"',
    'device passthrough "scsi0:5"',
  ]);
  expect(system.notes.join("\n")).toMatch(/it was suspended.*\nscsi0:0 forgot its changes/);
  expect(system).toMatchObject({ hasVtpm: true, floppies: [{ name: "floppy drive 0" }] });
});

test("says of a disk that is no VMDK that it does not come along, and knows what a CD-ROM drive holds, whatever it is called", () => {
  const { disks, cdroms, notes } = parse(
    'scsi0:1.present = "TRUE"',
    'scsi0:1.fileName = "data.img"',
    'scsi0:2.present = "TRUE"',
    'scsi0:2.fileName = "/dev/sdb"',
    'sata0:0.present = "TRUE"',
    'sata0:0.fileName = "tools.ISO"',
    'sata0:1.present = "TRUE"',
    'sata0:1.fileName = "tools.img"',
    'sata0:1.deviceType = "cdrom-image"',
    'sata0:2.present = "TRUE"',
    'sata0:2.fileName = "emptyBackingString"',
    'sata0:2.deviceType = "cdrom-image"',
  );
  expect(disks.map(({ name }) => name)).toEqual(["scsi0:0"]);
  expect(cdroms.map(({ name, file }) => [name, file?.href])).toEqual([
    ["ide1:0", undefined],
    ["sata0:0", "tools.ISO"],
    ["sata0:1", "tools.img"],
    ["sata0:2", undefined],
  ]);
  expect(notes).toEqual(
    ['scsi0:1 is "data.img"', 'scsi0:2 is "/dev/sdb"'].map(
      (words) => expect.stringContaining(`${words}, neither a VMDK nor an ISO`) as string,
    ),
  );
});

test("reads the text in the encoding that it declares, and the bytes that it escapes", () => {
  const line = 'guestInfo.place = "M|FCnchen"';
  const bytes = Buffer.from(vmxSeed([line]).replace('"UTF-8"', '"windows-1252"').replace("the |22web|22 server", "K\u00f6ln"), "latin1");
  const system = parseVmx(bytes);
  expect(system.name).toBe("K\u00f6ln");
  expect(system.settings.get("guestInfo.place")).toBe("M\u00fcnchen");
});

test("knows a disk's size and notes from its VMDK, flat or sparse", () => {
  const vmx = Buffer.from(vmxSeed(['scsi0:1.present = "TRUE"', 'scsi0:1.fileName = "flat.vmdk"']));
  const beside = {
    "a.vmdk": sparseVmdkSeed(),
    "flat.vmdk": Buffer.from(descriptorText("monolithicFlat", ['RW 8 FLAT "flat-flat.vmdk" 0'])),
    "flat-flat.vmdk": Buffer.alloc(4096, 1),
  };
  const { disks } = drive(openVmx(vmx.length), fromBytes(vmx, beside));
  expect(disks.map(({ index, capacityBytes, place }) => [index, capacityBytes, place?.name])).toEqual([
    [0, VMDK_SIZE, "a.vmdk"],
    [1, 4096, "flat.vmdk"],
  ]);
});

const DELTA = Buffer.from(
  descriptorText("monolithicSparse", ['RW 41 SPARSE "a-000001.vmdk"'], ['parentFileNameHint="a.vmdk"']).replace(
    "parentCID=ffffffff",
    "parentCID=12345678",
  ),
);

test.for<readonly [string, string | Buffer, Readonly<Record<string, Uint8Array>>, string]>([
  [
    "a snapshot's delta",
    vmxSeed([], "a-000001.vmdk"),
    { "a-000001.vmdk": DELTA },
    '"a-000001.vmdk", the file of scsi0:0: the VMDK is a delta on a parent disk, which holds part of its data: consolidate the snapshots',
  ],
  ["a disk that is not there", vmxSeed(), {}, 'there is no "a.vmdk" beside the VMX, the file of scsi0:0: copy it there'],
  [
    "a disk by its path",
    vmxSeed([], "/vmfs/volumes/x/a.vmdk"),
    {},
    'scsi0:0 lies at "/vmfs/volumes/x/a.vmdk": only files beside the VMX are read',
  ],
  ["a disk of another folder", vmxSeed([], "..\\a.vmdk"), {}, "only files beside the VMX are read"],
  [
    "a disk device on an ISO",
    vmxSeed([], "tools.iso"),
    { "tools.iso": Buffer.alloc(4096, 1) },
    '"tools.iso", the file of scsi0:0: it is raw, not VMDK',
  ],
  [
    "a mapping of a raw device",
    vmxSeed(),
    { "a.vmdk": Buffer.from(descriptorText("vmfsPassthroughRawDeviceMap", ['RW 8 VMFSRDM "a-rdmp.vmdk"'])) },
    '"a.vmdk", the file of scsi0:0: the VMDK is of type "vmfsPassthroughRawDeviceMap", which is not read',
  ],
  ["a disk that is no VMDK", vmxSeed(), { "a.vmdk": qcow2Seed() }, '"a.vmdk", the file of scsi0:0: it is qcow2, not VMDK'],
  ["a private file as a disk", vmxSeed(), { "a.vmdk": Buffer.alloc(1024, "key") }, "it is raw, not VMDK"],
  ["an encrypted machine", vmxSeed(['encryption.keySafe = "vmware:key/list/x"']), {}, "the machine is encrypted"],
  ["a line that means nothing", vmxSeed(["scsi0"]), {}, 'of the VMX means nothing: "scsi0"'],
  ["a quote inside a value", vmxSeed(['a.b = "c"d"']), {}, "means nothing"],
  ["a key that stands twice", vmxSeed(['MEMSIZE = "1"']), {}, 'has "MEMSIZE" twice'],
  ["a number that is none", vmxSeed(['svga.vramSize = "1e9"']), {}, 'svga.vramsize in the VMX is "1e9", which is no number'],
  [
    "a machine without processors",
    vmxSeed().replace('numvcpus = "4"', 'numvcpus = "0"'),
    {},
    "numvcpus in the VMX is 0: it may be from 1 to 1024",
  ],
  [
    "more memory than there is",
    vmxSeed().replace('memSize = "2048"', 'memSize = "99999999999"'),
    {},
    "memsize in the VMX is 99999999999: it may be from 1 to 67108864",
  ],
  [
    "an address that is none",
    vmxSeed(['ethernet7.present = "TRUE"', 'ethernet7.generatedAddress = "00:50"']),
    {},
    'the MAC address of ethernet7 in the VMX is "00:50"',
  ],
  ["an encoding that nobody knows", vmxSeed().replace('"UTF-8"', '"klingon"'), {}, 'is not text in "klingon"'],
  ["bytes that are no text", Buffer.concat([Buffer.from(vmxSeed()), Buffer.from([0x61, 0xff, 0xfe])]), {}, 'is not text in "UTF-8"'],
  ["a file that is no VMX", 'a = "b"\n', {}, "the file is no VMX"],
  ["too many keys", vmxSeed(Array.from({ length: 20_001 }, (_, index) => `k${index} = ""`)), {}, "more than 20000 keys"],
  [
    "too many disks",
    vmxSeed(Array.from({ length: 257 }, (_, index) => `nvme0:${index}.present = "1"\nnvme0:${index}.fileName = "x.vmdk"`)),
    {},
    "names 258 disks; at most 256",
  ],
  ["more than is read", Buffer.alloc(2 * 1024 * 1024, "#"), {}, "at most 1048576 are read"],
])("refuses %s", ([, vmx, beside, sentence]) => {
  const bytes = Buffer.from(vmx);
  const act = (): unknown => drive(openVmx(bytes.length), fromBytes(bytes, beside), { asks: 64, bytes: 4 * 1024 * 1024 });
  expect(act).toThrow(ImageError);
  expect(act).toThrow(sentence);
});

test("reads values without quotes, values that are empty, and what stands behind a comment sign", () => {
  const { settings } = parse("a.a = bare", "a.b=", 'a.c = "x # y" # z', "a.d = bare # z", "a.e = # z", "a.f\t=\t1  ");
  expect(["a.a", "a.b", "a.c", "a.d", "a.e", "a.f"].map((key) => settings.get(key))).toEqual(["bare", "", "x # y", "bare", "", "1"]);
});

/** Nearly as much as is read, after the head of a VMX. */
const filled = (text: string, before = ""): string => `${vmxSeed([before])}${text.repeat(Math.floor((1024 * 1024 - 2048) / text.length))}`;

test.each([
  ["nothing but empty lines", filled("\n")],
  ["a line of blanks", filled(" ", "a =")],
  ["blanks before a quote that never ends", `${vmxSeed()}a = ${" ".repeat(1024 * 1024 - 4096)}"`],
  ["an endless key", filled("a")],
  ["an endless value", `${vmxSeed()}a = "${"b".repeat(1024 * 1024 - 4096)}`],
  ["very many comment signs", `${vmxSeed()}a = b${"#".repeat(1024 * 1024 - 4096)}\rc`],
  ["very many returns", filled("\r", "a = b")],
  ["very many beginnings of an encoding", filled(".encoding = ")],
  ["very many escapes", `${vmxSeed()}a = "${"|41b".repeat(261_000)}"\n`],
  [
    "very many devices",
    vmxSeed(Array.from({ length: 19_900 }, (_, index) => `sata${index % 100}:${Math.floor(index / 100)}.present = "1"`)),
  ],
])("is done with %s in bounded time", (_, text) => {
  const bytes = Buffer.from(text);
  expect(bytes.length).toBeLessThan(1024 * 1024);
  const start = performance.now();
  let refusal: unknown;
  try {
    parseVmx(bytes);
  } catch (error) {
    refusal = error;
  }
  expect(refusal === undefined || refusal instanceof ImageError).toBe(true);
  expect(performance.now() - start).toBeLessThan(BOUND_MS);
});
