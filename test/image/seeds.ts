/**
 * Small valid images of the formats that have block tables, and the archives around them, made byte by byte and independently of the parsers.
 * Hostile tests patch and seal them; the fuzzer mutates them.
 */
import { createHash } from "node:crypto";

/** The parameters of a dynamic image that its maker lays out. Blocks that are not named hold no data. */
export interface BlockImage {
  readonly virtualSizeBytes: number;
  /** Block number to the byte that fills it; stored in this order. */
  readonly blocks: ReadonlyMap<number, number>;
}

const MIB = 1024 * 1024;
const DEFAULT_IMAGE: BlockImage = {
  virtualSizeBytes: 5 * MIB + 512,
  blocks: new Map([
    [3, 0x33],
    [0, 0x11],
  ]),
};

/** What the guest sees on such a disk. */
export function guestOf(image: BlockImage, blockBytes: number): Buffer {
  const guest = Buffer.alloc(image.virtualSizeBytes);
  for (const [block, fill] of image.blocks) guest.fill(fill, block * blockBytes, Math.min((block + 1) * blockBytes, guest.length));
  return guest;
}

/** Runs a change over a copy of the bytes. */
export function patched(bytes: Buffer, change: (copy: Buffer) => void): Buffer {
  const copy = Buffer.from(bytes);
  change(copy);
  return copy;
}

export const VHD_BLOCK_BYTES = 64 * 1024;

/** A fixed VHD of one repeated byte. */
export function fixedVhdSeed(virtualSizeBytes = 8192, fill = 0x5a): Buffer {
  const footer = vhdFooter(virtualSizeBytes, 2);
  footer.fill(0xff, 16, 24);
  return sealVhd(Buffer.concat([Buffer.alloc(virtualSizeBytes, fill), footer]));
}

/** A dynamic VHD with blocks of VHD_BLOCK_BYTES: footer copy, dynamic header at 512, block table at 1536. */
export function dynamicVhdSeed(image: BlockImage = { ...DEFAULT_IMAGE, virtualSizeBytes: 5 * VHD_BLOCK_BYTES + 512 }): Buffer {
  const entryCount = Math.ceil(image.virtualSizeBytes / VHD_BLOCK_BYTES);
  const footer = vhdFooter(image.virtualSizeBytes, 3);
  footer.writeBigUInt64BE(512n, 16);
  const header = Buffer.alloc(1024);
  header.write("cxsparse", "latin1");
  header.fill(0xff, 8, 16);
  header.writeBigUInt64BE(1536n, 16);
  header.writeUInt32BE(0x0001_0000, 24);
  header.writeUInt32BE(entryCount, 28);
  header.writeUInt32BE(VHD_BLOCK_BYTES, 32);
  const table = Buffer.alloc(Math.ceil((entryCount * 4) / 512) * 512, 0xff);
  const data: Buffer[] = [];
  let sector = (1536 + table.length) / 512;
  for (const [block, fill] of image.blocks) {
    table.writeUInt32BE(sector, block * 4);
    data.push(Buffer.alloc(512, 0xff), Buffer.alloc(VHD_BLOCK_BYTES, fill));
    sector += 1 + VHD_BLOCK_BYTES / 512;
  }
  return sealVhd(Buffer.concat([footer, header, table, ...data, footer]));
}

function vhdFooter(virtualSizeBytes: number, type: number): Buffer {
  const footer = Buffer.alloc(512);
  footer.write("conectix", "latin1");
  footer.writeUInt32BE(2, 8);
  footer.writeUInt32BE(0x0001_0000, 12);
  footer.write("win ", 28, "latin1");
  footer.writeUInt32BE(0x000a_0000, 32);
  footer.write("Wi2k", 36, "latin1");
  footer.writeBigUInt64BE(BigInt(virtualSizeBytes), 40);
  footer.writeBigUInt64BE(BigInt(virtualSizeBytes), 48);
  footer.writeUInt32BE(type, 60);
  footer.fill(0x42, 68, 84);
  return footer;
}

/** Makes the checksums of a VHD right again, in place: footer, and where they are its copy and the dynamic header. */
export function sealVhd(bytes: Buffer): Buffer {
  const seal = (offset: number, cookie: string, length: number, checksumOffset: number): void => {
    if (offset < 0 || bytes.toString("latin1", offset, offset + 8) !== cookie) return;
    bytes.writeUInt32BE(0, offset + checksumOffset);
    const sum = bytes.subarray(offset, offset + length).reduce((total, byte) => total + byte, 0);
    bytes.writeUInt32BE(~sum >>> 0, offset + checksumOffset);
  };
  seal(bytes.length - 512, "conectix", 512, 64);
  seal(0, "conectix", 512, 64);
  seal(512, "cxsparse", 1024, 36);
  return bytes;
}

/** Where the hand-made VHDX has its metadata region and block table. */
export const VHDX_METADATA_OFFSET = 2 * MIB;
export const VHDX_TABLE_OFFSET = 3 * MIB;

/** A dynamic VHDX with blocks of 1 MiB: log region at 1 MiB (unused), metadata at 2 MiB, block table at 3 MiB, data from 4 MiB on. */
export function vhdxSeed(image: BlockImage = DEFAULT_IMAGE): Buffer {
  const bytes = Buffer.alloc(4 * MIB + image.blocks.size * MIB);
  bytes.write("vhdxfile", "latin1");
  for (const [index, offset] of [64 * 1024, 128 * 1024].entries()) {
    bytes.write("head", offset, "latin1");
    bytes.writeBigUInt64LE(BigInt(7 + index), offset + 8);
    bytes.writeUInt16LE(1, offset + 66);
    bytes.writeUInt32LE(MIB, offset + 68);
    bytes.writeBigUInt64LE(BigInt(MIB), offset + 72);
  }
  for (const offset of [192 * 1024, 256 * 1024]) {
    bytes.write("regi", offset, "latin1");
    bytes.writeUInt32LE(2, offset + 8);
    writeRegion(bytes, offset + 16, "6677c22d23f600429d64115e9bfd4a08", VHDX_TABLE_OFFSET);
    writeRegion(bytes, offset + 48, "06a27c8b90479a4bb8fe575f050f886e", VHDX_METADATA_OFFSET);
  }
  writeMetadata(bytes, image.virtualSizeBytes);
  let data = 4 * MIB;
  for (const [block, fill] of image.blocks) {
    bytes.writeBigUInt64LE(BigInt(data) | 6n, VHDX_TABLE_OFFSET + block * 8);
    bytes.fill(fill, data, data + MIB);
    data += MIB;
  }
  return sealVhdx(bytes);
}

function writeRegion(bytes: Buffer, entry: number, guid: string, offset: number): void {
  bytes.write(guid, entry, "hex");
  bytes.writeBigUInt64LE(BigInt(offset), entry + 16);
  bytes.writeUInt32LE(MIB, entry + 24);
  bytes.writeUInt32LE(1, entry + 28);
}

function writeMetadata(bytes: Buffer, virtualSizeBytes: number): void {
  const items = [
    { guid: "3767a1ca36fa434db3b633f0aa44e76b", length: 8, flags: 4, value: BigInt(MIB) },
    { guid: "2442a52f1bcd7648b2115dbed83bf4b8", length: 8, flags: 6, value: BigInt(virtualSizeBytes) },
    { guid: "1dbf41816fa90947ba47f233a8faab5f", length: 4, flags: 6, value: 512n },
    { guid: "c748a3cd5d4471449cc9e9885251c556", length: 4, flags: 6, value: 4096n },
    { guid: "ab12cabee6b2234593efc309e000c746", length: 16, flags: 6, value: 0x4242n },
  ];
  bytes.write("metadata", VHDX_METADATA_OFFSET, "latin1");
  bytes.writeUInt16LE(items.length, VHDX_METADATA_OFFSET + 10);
  for (const [index, item] of items.entries()) {
    const entry = VHDX_METADATA_OFFSET + 32 + index * 32;
    const offset = 64 * 1024 + index * 16;
    bytes.write(item.guid, entry, "hex");
    bytes.writeUInt32LE(offset, entry + 16);
    bytes.writeUInt32LE(item.length, entry + 20);
    bytes.writeUInt32LE(item.flags, entry + 24);
    bytes.writeBigUInt64LE(item.value, VHDX_METADATA_OFFSET + offset);
  }
}

/** Makes the checksums of a VHDX right again, in place. */
export function sealVhdx(bytes: Buffer): Buffer {
  for (const [offset, length] of [
    [64 * 1024, 4096],
    [128 * 1024, 4096],
    [192 * 1024, 65536],
    [256 * 1024, 65536],
  ] as const) {
    bytes.writeUInt32LE(0, offset + 4);
    bytes.writeUInt32LE(crc32c(bytes.subarray(offset, offset + length)), offset + 4);
  }
  return bytes;
}

/** One step of CRC-32C for each byte value. */
const CRC32C_STEPS = Uint32Array.from({ length: 256 }, (_, byte) => {
  let step = byte;
  for (let bit = 0; bit < 8; bit++) step = (step >>> 1) ^ ((step & 1) * 0x82f6_3b78);
  return step;
});

function crc32c(bytes: Uint8Array): number {
  return ~bytes.reduce((crc, byte) => CRC32C_STEPS[(crc ^ byte) & 0xff]! ^ (crc >>> 8), 0xffff_ffff) >>> 0;
}

export const VDI_BLOCK_BYTES = 4096;

/** A dynamic VDI with blocks of VDI_BLOCK_BYTES: block map at 512, data at 1024. */
export function vdiSeed(image: BlockImage = { ...DEFAULT_IMAGE, virtualSizeBytes: 5 * VDI_BLOCK_BYTES + 512 }): Buffer {
  const blockCount = Math.ceil(image.virtualSizeBytes / VDI_BLOCK_BYTES);
  const header = Buffer.alloc(1024);
  header.write("<<< Oracle VM VirtualBox Disk Image >>>\n", "latin1");
  header.writeUInt32LE(0xbeda_107f, 64);
  header.writeUInt32LE(0x0001_0001, 68);
  header.writeUInt32LE(0x190, 72);
  header.writeUInt32LE(1, 76);
  header.writeUInt32LE(512, 340);
  header.writeUInt32LE(1024, 344);
  header.writeUInt32LE(512, 360);
  header.writeBigUInt64LE(BigInt(image.virtualSizeBytes), 368);
  header.writeUInt32LE(VDI_BLOCK_BYTES, 376);
  header.writeUInt32LE(blockCount, 384);
  header.writeUInt32LE(image.blocks.size, 388);
  header.fill(0x42, 392, 408);
  header.fill(0xff, 512, 512 + blockCount * 4);
  const data: Buffer[] = [];
  for (const [block, fill] of image.blocks) {
    header.writeUInt32LE(data.length, 512 + block * 4);
    data.push(Buffer.alloc(VDI_BLOCK_BYTES, fill));
  }
  return Buffer.concat([header, ...data]);
}

/** One member of a hand-made tar. `type` as tar's header has it: "0" a file, "x" a pax header, "L" a GNU long name. */
export interface TarEntry {
  readonly name: string;
  readonly data: Uint8Array;
  readonly type?: string;
}

/** A ustar archive with its two blocks of zeros at the end. */
export function tarSeed(entries: readonly TarEntry[]): Buffer {
  const pieces = entries.flatMap(({ name, data, type }) => {
    const header = Buffer.alloc(512);
    header.write(name, 0, 100, "utf8");
    header.write("0000644\0", 100, "latin1");
    header.write(`${data.length.toString(8).padStart(11, "0")}\0`, 124, "latin1");
    header.write(type ?? "0", 156, "latin1");
    header.write("ustar\x0000", 257, "latin1");
    return [sealTarHeader(header), data, Buffer.alloc(-data.length & 511)];
  });
  return Buffer.concat([...pieces, Buffer.alloc(1024)]);
}

/** Makes the checksum of a tar header right again, in place. */
export function sealTarHeader(header: Buffer): Buffer {
  header.fill(0x20, 148, 156);
  const sum = header.subarray(0, 512).reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148, "latin1");
  return header;
}

/** An OVF descriptor of a machine with one disk in `href`. */
export function ovfSeed(href: string, sizeBytes: number): string {
  return `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References><File ovf:id="file1" ovf:href="${href}" ovf:size="${sizeBytes}"/></References>
  <DiskSection><Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="64" ovf:capacityAllocationUnits="byte * 2^20"/></DiskSection>
  <VirtualSystem ovf:id="seed">
    <Name>seed</Name>
    <VirtualHardwareSection>
      <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
      <Item><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource></Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
`;
}

/** An OVA with that descriptor, a SHA-256 manifest of both files, and the disk. */
export function ovaSeed(disk: Uint8Array = fixedVhdSeed()): Buffer {
  const descriptor = Buffer.from(ovfSeed("seed-disk1.vhd", disk.length));
  const digest = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");
  const manifest = Buffer.from(`SHA256(seed.ovf)= ${digest(descriptor)}\nSHA256(seed-disk1.vhd)= ${digest(disk)}\n`);
  return tarSeed([
    { name: "seed.ovf", data: descriptor },
    { name: "seed.mf", data: manifest },
    { name: "seed-disk1.vhd", data: disk },
  ]);
}

/** A VMX of one disk, with lines of the test's own behind. */
export function vmxSeed(more: readonly string[] = [], disk = "a.vmdk"): string {
  const lines = [
    "#!/usr/bin/vmware",
    '.encoding = "UTF-8"',
    'config.version = "8"',
    'virtualHW.version = "19"',
    'displayName = "the |22web|22 server"',
    'annotation = "first line|0Asecond line"',
    'guestOS = "ubuntu-64"',
    'numvcpus = "4"',
    'cpuid.coresPerSocket = "2"',
    'memSize = "2048"',
    'firmware = "efi"',
    'uefi.secureBoot.enabled = "TRUE"',
    'scsi0.present = "TRUE"',
    'scsi0.virtualDev = "pvscsi"',
    'scsi0:0.present = "TRUE"',
    `scsi0:0.fileName = "${disk}"`,
    'scsi0:0.deviceType = "scsi-hardDisk"',
    'ide1:0.present = "TRUE"',
    'ide1:0.fileName = "auto detect"',
    'ide1:0.deviceType = "cdrom-raw"',
    'ethernet0.present = "TRUE"',
    'ethernet0.virtualDev = "vmxnet3"',
    'ethernet0.networkName = "VM Network"',
    'ethernet0.addressType = "generated"',
    'ethernet0.generatedAddress = "00:0C:29:AA:BB:CC"',
    'usb_xhci.present = "TRUE"',
  ];
  return `${[...lines, ...more].join("\r\n")}\r\n`;
}
