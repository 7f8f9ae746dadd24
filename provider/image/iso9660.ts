/**
 * Writes small ISO 9660 images: one folder of files, with Joliet for their real names. The same files make the same bytes. Pure.
 * Source: ECMA-119, and Microsoft's Joliet specification, edition 1.
 */

const SECTOR_BYTES = 2048;
/** The first of the volume descriptors: 16 sectors are the system's. */
const DESCRIPTORS_SECTOR = 16;
/** Two volume descriptors and the one that ends them. */
const DESCRIPTOR_COUNT = 3;
const PATH_TABLE_BYTES = 10;
/** A record of a directory without its name, ECMA-119 9.1. */
const RECORD_BYTES = 33;
const FLAG_DIRECTORY = 2;
/** UCS-2 level 3, Joliet 1. */
const JOLIET_ESCAPE = "%/E";

/** A file of the image. `name` has at most 64 characters of the basic plane and no `/`. */
export interface IsoFile {
  readonly name: string;
  readonly content: Uint8Array;
}

/** One of the two trees: names as ISO 9660 has them, or as Joliet has them. */
interface Tree {
  readonly isJoliet: boolean;
  readonly pathTableSector: number;
  readonly directorySector: number;
}

/**
 * The image of a volume with this label, of at most 16 characters, and these files in the order of their names.
 * All names together must fit into a sector, as some twenty do. Throws RangeError when they do not.
 */
export function encodeIso9660(label: string, files: readonly IsoFile[]): Uint8Array {
  const sorted = files.toSorted((one, other) => (one.name < other.name ? -1 : 1));
  const tables = DESCRIPTORS_SECTOR + DESCRIPTOR_COUNT;
  // Of each tree: a path table for each byte order, and the directory.
  const plain: Tree = { isJoliet: false, pathTableSector: tables, directorySector: tables + 2 };
  const joliet: Tree = { isJoliet: true, pathTableSector: tables + 3, directorySector: tables + 5 };
  let sector = tables + 6;
  const placed = sorted.map((file) => {
    const first = sector;
    sector += Math.ceil(file.content.length / SECTOR_BYTES);
    return { ...file, sector: first };
  });
  const image = Buffer.alloc(sector * SECTOR_BYTES);
  const at = (place: number): Buffer => image.subarray(place * SECTOR_BYTES);

  for (const [index, tree] of [plain, joliet].entries()) {
    writeDescriptor(at(DESCRIPTORS_SECTOR + index), { tree, label, sectors: sector });
    writePathTable(at(tree.pathTableSector), tree.directorySector, false);
    writePathTable(at(tree.pathTableSector + 1), tree.directorySector, true);
    const records = [
      encodeRecord({ name: Buffer.of(0), sector: tree.directorySector, bytes: SECTOR_BYTES, flags: FLAG_DIRECTORY }),
      encodeRecord({ name: Buffer.of(1), sector: tree.directorySector, bytes: SECTOR_BYTES, flags: FLAG_DIRECTORY }),
      ...placed.map(({ name, content, sector: first }) =>
        encodeRecord({ name: tree.isJoliet ? encodeUcs2(name) : plainName(name), sector: first, bytes: content.length, flags: 0 }),
      ),
    ];
    const directory = Buffer.concat(records);
    if (directory.length > SECTOR_BYTES) throw new RangeError(`the names of ${files.length} files do not fit into one sector`);
    directory.copy(at(tree.directorySector));
  }
  const end = at(DESCRIPTORS_SECTOR + 2);
  end[0] = 255;
  end.write("CD001\u0001", 1, "latin1");
  for (const { content, sector: first } of placed) image.set(content, first * SECTOR_BYTES);
  return image;
}

/** ECMA-119 8.4 and 8.5. Dates are left unset. */
function writeDescriptor(
  sector: Buffer,
  { tree, label, sectors }: { readonly tree: Tree; readonly label: string; readonly sectors: number },
): void {
  const text = (from: number, to: number, value: string): void => {
    if (tree.isJoliet) encodeUcs2(value.padEnd((to - from) >> 1)).copy(sector, from, 0, to - from);
    else sector.fill(0x20, from, to).write(value, from, "latin1");
  };
  sector[0] = tree.isJoliet ? 2 : 1;
  sector.write("CD001\u0001", 1, "latin1");
  text(8, 40, "");
  text(40, 72, label);
  writeBoth32(sector, 80, sectors);
  if (tree.isJoliet) sector.write(JOLIET_ESCAPE, 88, "latin1");
  writeBoth16(sector, 120, 1);
  writeBoth16(sector, 124, 1);
  writeBoth16(sector, 128, SECTOR_BYTES);
  writeBoth32(sector, 132, PATH_TABLE_BYTES);
  sector.writeUInt32LE(tree.pathTableSector, 140);
  sector.writeUInt32BE(tree.pathTableSector + 1, 148);
  encodeRecord({ name: Buffer.of(0), sector: tree.directorySector, bytes: SECTOR_BYTES, flags: FLAG_DIRECTORY }).copy(sector, 156);
  for (const [from, to] of [
    [190, 318],
    [318, 446],
    [446, 574],
    [574, 702],
    [702, 739],
    [739, 776],
    [776, 813],
  ] as const)
    text(from, to, "");
  for (const date of [813, 830, 847, 864]) sector.fill("0", date, date + 16, "latin1");
  sector[881] = 1;
}

/** The root alone, ECMA-119 9.4. */
function writePathTable(sector: Buffer, directorySector: number, isBigEndian: boolean): void {
  sector[0] = 1;
  if (isBigEndian) {
    sector.writeUInt32BE(directorySector, 2);
    sector.writeUInt16BE(1, 6);
  } else {
    sector.writeUInt32LE(directorySector, 2);
    sector.writeUInt16LE(1, 6);
  }
}

/** ECMA-119 9.1: its length is even. The date is left unset. */
function encodeRecord({
  name,
  sector,
  bytes,
  flags,
}: {
  readonly name: Buffer;
  readonly sector: number;
  readonly bytes: number;
  readonly flags: number;
}): Buffer {
  const record = Buffer.alloc((RECORD_BYTES + name.length + 1) & ~1);
  record[0] = record.length;
  writeBoth32(record, 2, sector);
  writeBoth32(record, 10, bytes);
  record[25] = flags;
  writeBoth16(record, 28, 1);
  record[32] = name.length;
  name.copy(record, RECORD_BYTES);
  return record;
}

/** What readers without Joliet see: capitals, digits and dashes, and a version. They show it in small letters. */
function plainName(name: string): Buffer {
  return Buffer.from(`${name.toUpperCase()}.;1`, "latin1");
}

function encodeUcs2(text: string): Buffer {
  return Buffer.from(text, "utf16le").swap16();
}

function writeBoth16(target: Buffer, offset: number, value: number): void {
  target.writeUInt16LE(value, offset);
  target.writeUInt16BE(value, offset + 2);
}

function writeBoth32(target: Buffer, offset: number, value: number): void {
  target.writeUInt32LE(value, offset);
  target.writeUInt32BE(value, offset + 4);
}
