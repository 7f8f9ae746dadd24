/** Small valid qcow2 and VMDK images, made byte by byte and independently of the parsers and the writer. Hostile tests patch them; the fuzzer mutates them. */
import { deflateRawSync, deflateSync } from "node:zlib";

const SECTOR = 512;

/** Cluster or grain number to the byte that fills it; stored in this order. */
export type Filling = ReadonlyMap<number, number>;

const FILLING: Filling = new Map([
  [3, 0x33],
  [0, 0x11],
  [5, 0x55],
]);

/** What the guest sees. */
export function filledGuest(sizeBytes: number, unitBytes: number, filling: Filling = FILLING): Buffer {
  const guest = Buffer.alloc(sizeBytes);
  for (const [unit, fill] of filling) guest.fill(fill, unit * unitBytes, Math.min((unit + 1) * unitBytes, sizeBytes));
  return guest;
}

/** The qcow2 seed has clusters of 512 bytes: header, L1, L2, refcount table, refcount block, then data. */
export const QCOW2_CLUSTER = 512;
export const QCOW2_L1 = 1 * QCOW2_CLUSTER;
export const QCOW2_L2 = 2 * QCOW2_CLUSTER;
export const QCOW2_DATA = 5 * QCOW2_CLUSTER;
/** Its disk: 6 clusters. */
const QCOW2_SIZE = 6 * QCOW2_CLUSTER;

/** A qcow2 of version 3, header length 104, no extensions. `isCompressed`: the clusters are deflated and packed. */
export function qcow2Seed(isCompressed = false): Buffer {
  const header = Buffer.alloc(QCOW2_CLUSTER);
  header.write("QFI\xfb", "latin1");
  header.writeUInt32BE(3, 4);
  header.writeUInt32BE(9, 20);
  header.writeBigUInt64BE(BigInt(QCOW2_SIZE), 24);
  header.writeUInt32BE(1, 36);
  header.writeBigUInt64BE(BigInt(QCOW2_L1), 40);
  header.writeBigUInt64BE(BigInt(3 * QCOW2_CLUSTER), 48);
  header.writeUInt32BE(1, 56);
  header.writeUInt32BE(4, 96);
  header.writeUInt32BE(104, 100);
  const l1 = Buffer.alloc(QCOW2_CLUSTER);
  l1.writeBigUInt64BE((1n << 63n) | BigInt(QCOW2_L2));
  const l2 = Buffer.alloc(QCOW2_CLUSTER);
  const refcountTable = Buffer.alloc(QCOW2_CLUSTER);
  refcountTable.writeBigUInt64BE(BigInt(4 * QCOW2_CLUSTER));
  const refcounts = Buffer.alloc(QCOW2_CLUSTER);
  for (let cluster = 0; cluster < 5; cluster++) refcounts.writeUInt16BE(1, cluster * 2);
  let data = Buffer.alloc(0);
  for (const [cluster, fill] of FILLING) {
    const offset = QCOW2_DATA + data.length;
    const plain = Buffer.alloc(QCOW2_CLUSTER, fill);
    l2.writeBigUInt64BE(isCompressed ? (1n << 62n) | BigInt(offset) : (1n << 63n) | BigInt(offset), cluster * 8);
    const host = Math.floor(offset / QCOW2_CLUSTER);
    refcounts.writeUInt16BE(refcounts.readUInt16BE(host * 2) + 1, host * 2);
    data = Buffer.concat([data, isCompressed ? deflateRawSync(plain) : plain]);
  }
  return Buffer.concat([header, l1, l2, refcountTable, refcounts, data]);
}

/** The VMDK seeds have grains of 4 KiB: header, 20 sectors of descriptor; the disk is 5 grains and a sector. */
export const VMDK_GRAIN = 8 * SECTOR;
export const VMDK_CAPACITY_SECTORS = 41;
export const VMDK_SIZE = VMDK_CAPACITY_SECTORS * SECTOR;
const VMDK_DESCRIPTOR = 1 * SECTOR;
const DESCRIPTOR_SECTORS = 20;
/** Of a monolithicSparse seed. */
export const VMDK_DIRECTORY = 21 * SECTOR;
export const VMDK_TABLE = 22 * SECTOR;
export const VMDK_DATA = 32 * SECTOR;

/** A descriptor's text. */
export function descriptorText(createType: string, extents: readonly string[], more: readonly string[] = []): string {
  const lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", `createType="${createType}"`, ...more];
  return `${[...lines, "# Extent description", ...extents, "#DDB", 'ddb.adapterType = "lsilogic"'].join("\n")}\n`;
}

function sparseHeader(options: {
  readonly flags: number;
  readonly version: number;
  readonly directorySector: bigint;
  readonly compress: number;
  readonly descriptor: boolean;
}): Buffer {
  const header = Buffer.alloc(SECTOR);
  header.write("KDMV", "latin1");
  header.writeUInt32LE(options.version, 4);
  header.writeUInt32LE(options.flags, 8);
  header.writeBigUInt64LE(BigInt(VMDK_CAPACITY_SECTORS), 12);
  header.writeBigUInt64LE(BigInt(VMDK_GRAIN / SECTOR), 20);
  header.writeBigUInt64LE(options.descriptor ? 1n : 0n, 28);
  header.writeBigUInt64LE(options.descriptor ? BigInt(DESCRIPTOR_SECTORS) : 0n, 36);
  header.writeUInt32LE(512, 44);
  header.writeBigUInt64LE(options.directorySector, 56);
  header.writeBigUInt64LE(32n, 64);
  header.write("\n \r\n", 73, "latin1");
  header.writeUInt16LE(options.compress, 77);
  return header;
}

/** monolithicSparse: grain directory at sector 21, grain table at 22, grains from 32 on. Without a descriptor: an extent of a split disk. */
export function sparseVmdkSeed(
  text: string | undefined = descriptorText("monolithicSparse", [`RW ${VMDK_CAPACITY_SECTORS} SPARSE "seed.vmdk"`]),
): Buffer {
  const bytes = Buffer.alloc(VMDK_DATA);
  sparseHeader({ flags: 1, version: 1, directorySector: 21n, compress: 0, descriptor: text !== "" }).copy(bytes);
  bytes.write(text, VMDK_DESCRIPTOR);
  bytes.writeUInt32LE(22, VMDK_DIRECTORY);
  const grains: Buffer[] = [];
  for (const [grain, fill] of FILLING) {
    bytes.writeUInt32LE((VMDK_DATA + grains.length * VMDK_GRAIN) / SECTOR, VMDK_TABLE + grain * 4);
    grains.push(Buffer.alloc(VMDK_GRAIN, fill));
  }
  return Buffer.concat([bytes, ...grains]);
}

/** streamOptimized as VMware writes it: grains in ascending order, each behind its marker; then table, directory, footer and end, each behind its own. */
export function streamVmdkSeed(): Buffer {
  const descriptor = Buffer.alloc(DESCRIPTOR_SECTORS * SECTOR);
  descriptor.write(descriptorText("streamOptimized", [`RDONLY ${VMDK_CAPACITY_SECTORS} SPARSE "call-me-stream.vmdk"`]));
  const flags = 0x3_0001;
  const pieces = [sparseHeader({ flags, version: 3, directorySector: 0xffff_ffff_ffff_ffffn, compress: 1, descriptor: true }), descriptor];
  let sector = 1 + DESCRIPTOR_SECTORS;
  const put = (bytes: Buffer): number => {
    const place = sector;
    const padded = Buffer.alloc(Math.ceil(bytes.length / SECTOR) * SECTOR);
    bytes.copy(padded);
    pieces.push(padded);
    sector += padded.length / SECTOR;
    return place;
  };
  const marker = (sectors: number, type: number): void => {
    const bytes = Buffer.alloc(SECTOR);
    bytes.writeBigUInt64LE(BigInt(sectors));
    bytes.writeUInt32LE(type, 12);
    put(bytes);
  };
  const table = Buffer.alloc(4 * SECTOR);
  for (const [grain, fill] of [...FILLING].sort(([a], [b]) => a - b)) {
    const stream = deflateSync(Buffer.alloc(VMDK_GRAIN, fill));
    const head = Buffer.alloc(12);
    head.writeBigUInt64LE(BigInt((grain * VMDK_GRAIN) / SECTOR));
    head.writeUInt32LE(stream.length, 8);
    table.writeUInt32LE(put(Buffer.concat([head, stream])), grain * 4);
  }
  marker(4, 1);
  const directory = Buffer.alloc(SECTOR);
  directory.writeUInt32LE(put(table));
  marker(1, 2);
  const directorySector = put(directory);
  marker(1, 3);
  put(sparseHeader({ flags, version: 3, directorySector: BigInt(directorySector), compress: 1, descriptor: true }));
  put(Buffer.alloc(SECTOR));
  return Buffer.concat(pieces);
}

/** A COWD extent: directory at sector 4, a table of 4096 entries behind it, then grains. */
export function cowdSeed(): Buffer {
  const tableSector = 5;
  const dataSector = tableSector + 32;
  const bytes = Buffer.alloc(dataSector * SECTOR);
  bytes.write("COWD", "latin1");
  for (const [index, value] of [1, 3, VMDK_CAPACITY_SECTORS, VMDK_GRAIN / SECTOR, 4, 1].entries())
    bytes.writeUInt32LE(value, 4 + index * 4);
  bytes.writeUInt32LE(tableSector, 4 * SECTOR);
  const grains: Buffer[] = [];
  for (const [grain, fill] of FILLING) {
    bytes.writeUInt32LE(dataSector + (grains.length * VMDK_GRAIN) / SECTOR, tableSector * SECTOR + grain * 4);
    grains.push(Buffer.alloc(VMDK_GRAIN, fill));
  }
  return Buffer.concat([bytes, ...grains]);
}
