/** Mutates small valid images and watches what the parsers make of them. The same seed does the same. */
import { ImageError, MAX_READ_BYTES } from "../../provider/image/parser.ts";
import { openImage } from "../../provider/image/open.ts";
import { openOva } from "../../provider/image/ova.ts";
import { openVmx } from "../../provider/image/vmx.ts";
import { readStamp } from "../../provider/image/qcow2.ts";
import { locateMember, parseZip, selectMember } from "../../provider/image/zip.ts";
import { drive, fromBytes, type Source } from "./drive.ts";
import { dynamicVhdSeed, fixedVhdSeed, ovfSeed, sealTarHeader, sealVhd, sealVhdx, tarSeed, vdiSeed, vhdxSeed, vmxSeed } from "./seeds.ts";
import { cowdSeed, descriptorText, qcow2Seed, sparseVmdkSeed, streamVmdkSeed, VMDK_CAPACITY_SECTORS } from "./sparse-seeds.ts";
import { zipSeed } from "./zip-seeds.ts";

/** A valid file and those beside it; each of them is mutated. */
interface Seed {
  readonly name: string;
  readonly file: Buffer;
  readonly beside: Readonly<Record<string, Buffer>>;
  /** Makes checksums right again, in place, so that mutations reach what they protect. */
  readonly seal?: (bytes: Buffer) => unknown;
  /** Parses the file and proves what comes out. Throws ImageError when it is refused. */
  readonly parse: (source: Source, sizeBytes: number) => void;
}

function seeds(): readonly Seed[] {
  const extent = `RW ${VMDK_CAPACITY_SECTORS}`;
  const image = (name: string, file: Buffer, more: Partial<Seed> = {}): Seed => ({ name, file, beside: {}, parse: proveImage, ...more });
  const split = (name: string, type: string, line: string, bytes: Buffer): Seed =>
    image(name, Buffer.from(descriptorText(type, [line])), { beside: { "a.vmdk": bytes } });
  const disk = fixedVhdSeed();
  const ova = tarSeed([
    { name: "seed.ovf", data: Buffer.from(ovfSeed("seed-disk1.vhd", disk.length)) },
    { name: "seed-disk1.vhd", data: disk },
  ]);
  const members = [
    { name: "web/disk.raw", data: Buffer.alloc(4096, 7), isDeflated: true, hasDescriptor: true },
    { name: "web/seed.ovf", data: Buffer.from("<Envelope/>") },
  ];
  const openArchive = (source: Source, sizeBytes: number): unknown => drive(openOva(sizeBytes), source, BUDGET);
  return [
    image("qcow2", qcow2Seed()),
    image("compressed qcow2", qcow2Seed(true)),
    { name: "stamp", file: qcow2Seed(), beside: {}, parse: (source) => drive(readStamp(), source, BUDGET) },
    image("monolithicSparse", sparseVmdkSeed()),
    image("streamOptimized", streamVmdkSeed()),
    split("split VMDK", "twoGbMaxExtentSparse", `${extent} SPARSE "a.vmdk"`, sparseVmdkSeed("")),
    split("COWD", "vmfsSparse", `${extent} VMFSSPARSE "a.vmdk"`, cowdSeed()),
    split("flat VMDK", "monolithicFlat", 'RW 8 FLAT "a.vmdk" 0', Buffer.alloc(4096, 1)),
    image("fixed VHD", disk, { seal: sealVhd }),
    image("dynamic VHD", dynamicVhdSeed(), { seal: sealVhd }),
    image("VHDX", vhdxSeed(), { seal: sealVhdx }),
    image("VDI", vdiSeed()),
    { name: "OVA", file: ova, beside: {}, seal: sealTarHeader, parse: openArchive },
    image("zip", zipSeed(members), { parse: proveZip }),
    image("zip64", zipSeed(members, true), { parse: proveZip }),
    {
      name: "VMX",
      file: Buffer.from(vmxSeed()),
      beside: { "a.vmdk": sparseVmdkSeed() },
      parse: (source, sizeBytes) => drive(openVmx(sizeBytes), source, BUDGET),
    },
  ];
}

/** What one parse may cost: a mutated number may name tables as large as these small files, but no larger. */
const BUDGET = { asks: 20_000, bytes: 8 * MAX_READ_BYTES };

const MAX_PARSE_MS = 2000;

/** Where formats keep their numbers and tables: most mutations go there. */
const HOT_BYTES = 4096;

/** Numbers at which bounds break. */
const EDGES: readonly bigint[] = [
  0n,
  1n,
  2n,
  511n,
  512n,
  0x7fff_ffffn,
  0x8000_0000n,
  0xffff_ffffn,
  (1n << 53n) - 1n,
  1n << 53n,
  (1n << 63n) - 1n,
  (1n << 64n) - 1n,
];

/** mulberry32: a small generator of numbers in [0, 1). */
function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b_79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

export interface FuzzResult {
  readonly parses: number;
  readonly refused: number;
}

/**
 * Mutates and parses for `durationMs`. Throws an Error that names the seed's name, the round and the bytes that were changed when a parser throws
 * anything but an ImageError of one line, asks for too much, takes too long, or gives a run outside its file or the disk.
 */
export function fuzz(seed: number, durationMs: number): FuzzResult {
  const random = generator(seed);
  const below = (limit: number): number => Math.floor(random() * limit);
  const all = seeds();
  const end = performance.now() + durationMs;
  let parses = 0;
  let refused = 0;
  for (; performance.now() < end; parses++) {
    const chosen = all[below(all.length)]!;
    const beside = Object.fromEntries(
      Object.entries(chosen.beside).map(([name, bytes]) => [name, below(2) === 0 ? mutated(bytes, below) : bytes]),
    );
    const file = mutated(chosen.file, below);
    if (below(4) === 0 && file.length === chosen.file.length) chosen.seal?.(file);
    try {
      if (!isRead(chosen, file, beside)) refused++;
    } catch (error) {
      throw new Error(`${chosen.name}, round ${parses} of seed ${seed}: ${String(error)}`, { cause: error });
    }
  }
  return { parses, refused };
}

/** Whether the parser took it. */
function isRead(seed: Seed, file: Buffer, beside: Readonly<Record<string, Buffer>>): boolean {
  const start = performance.now();
  try {
    seed.parse(fromBytes(file, beside), file.length);
    return true;
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    if (error.message.includes("\n")) throw new Error("a message has several lines", { cause: error });
    return false;
  } finally {
    const elapsedMs = performance.now() - start;
    // oxlint-disable-next-line no-unsafe-finally -- slowness outweighs what was found before it
    if (elapsedMs > MAX_PARSE_MS) throw new Error(`a parse took ${elapsedMs} ms`);
  }
}

function proveImage(source: Source, sizeBytes: number): void {
  const image = drive(openImage({ sizeBytes }), source, BUDGET);
  let guestEnd = 0;
  for (const run of drive(image.runs(), source, BUDGET)) {
    const fileSizeBytes = source.size(image.files[run.file]?.name ?? "?") ?? 0;
    const isInFile = run.storedBytes > 0 && run.fileOffset >= 0 && run.fileOffset + run.storedBytes <= fileSizeBytes;
    if (!isInFile) throw new Error(`a run lies outside its file: ${JSON.stringify(run)}`);
    if (run.lengthBytes <= 0 || run.virtualOffset < 0) throw new Error(`a run lies outside the disk: ${JSON.stringify(run)}`);
    guestEnd = Math.max(guestEnd, run.virtualOffset + run.lengthBytes);
  }
  if (guestEnd > image.virtualSizeBytes) throw new Error(`a run ends at ${guestEnd} of ${image.virtualSizeBytes} bytes`);
}

function proveZip(source: Source, sizeBytes: number): void {
  const members = drive(parseZip(sizeBytes), source, BUDGET);
  let read = 0;
  for (const member of members) {
    try {
      const { offset, lengthBytes } = drive(locateMember(member), source, BUDGET);
      if (offset < 0 || lengthBytes < 0 || offset + lengthBytes > sizeBytes)
        throw new Error(`a member lies outside: ${JSON.stringify(member)}`);
      if (member.name.startsWith("/") || member.name.split("/").includes("..")) throw new Error(`a name leads out: ${member.name}`);
      read += lengthBytes;
    } catch (error) {
      // One that cannot be read keeps nobody from the others.
      if (!(error instanceof ImageError)) throw error;
    }
  }
  if (read > sizeBytes) throw new Error("members overlap");
  selectMember(members, undefined);
}

function mutated(bytes: Buffer, below: (limit: number) => number): Buffer {
  let copy = Buffer.from(bytes);
  for (let count = 1 + below(4); count > 0; count--) {
    const offset = hotOffset(copy.length, below);
    switch (below(7)) {
      case 0:
        copy[offset]! ^= 1 << below(8);
        break;
      case 1:
        copy[offset] = below(256);
        break;
      case 2:
      case 3:
        putEdge(copy, offset - (offset % 4), below);
        break;
      case 4:
        copy.copyWithin(offset, hotOffset(copy.length, below), Math.min(copy.length, offset + 1 + below(64)));
        break;
      case 5:
        copy.fill(below(2) === 0 ? 0 : 0xff, offset, Math.min(copy.length, offset + 1 + below(16)));
        break;
      default:
        if (below(8) === 0) copy = copy.subarray(0, Math.max(1, below(copy.length)));
        break;
    }
  }
  return copy;
}

/** Mostly near the start, where the header is, or the end, where footers are. */
function hotOffset(length: number, below: (limit: number) => number): number {
  const hot = Math.min(length, HOT_BYTES);
  switch (below(4)) {
    case 0:
      return below(length);
    case 1:
      return length - 1 - below(hot);
    default:
      return below(below(2) === 0 ? Math.min(hot, 128) : hot);
  }
}

function putEdge(bytes: Buffer, offset: number, below: (limit: number) => number): void {
  const value = EDGES[below(EDGES.length)]! + BigInt(below(3));
  const isWide = below(2) === 0 && offset + 8 <= bytes.length;
  if (isWide) {
    if (below(2) === 0) bytes.writeBigUInt64LE(BigInt.asUintN(64, value), offset);
    else bytes.writeBigUInt64BE(BigInt.asUintN(64, value), offset);
  } else if (offset + 4 <= bytes.length) {
    if (below(2) === 0) bytes.writeUInt32LE(Number(BigInt.asUintN(32, value)), offset);
    else bytes.writeUInt32BE(Number(BigInt.asUintN(32, value)), offset);
  }
}
