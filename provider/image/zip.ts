/** The members of a zip archive: names, places and sizes, nothing of what they hold. Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5. */
import { Buffer } from "node:buffer";
import { latin1, safeNumber, viewOf } from "./bytes.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";
import { quoted } from "./words.ts";

/** A local header, the directory, or an archive of several disks, which begins with a mark of its own. */
const STARTS: readonly string[] = ["PK\x03\x04", "PK\x05\x06", "PK\x07\x08PK\x03\x04"];

/** The bytes that tell a zip archive. */
export const ZIP_MAGIC_BYTES = 8;

const END_BYTES = 22;
const MAX_COMMENT_BYTES = 65_535;
const LOCATOR_BYTES = 20;
const ZIP64_END_BYTES = 56;
const ENTRY_BYTES = 46;
const LOCAL_BYTES = 30;

/** Members that are read before an archive is taken for none of a disk. */
const MAX_MEMBERS = 4096;
const MAX_DIRECTORY_BYTES = 4 * 1024 * 1024;
const MAX_NAME_BYTES = 1024;

const ZIP64_EXTRA = 1;
const ENCRYPTED_FLAG = 1;
const STORED = 0;
const DEFLATED = 8;
/** What programs call the ways to pack that are not read. Source: section 4.4.5. */
const METHODS: Readonly<Record<number, string>> = { 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd" };

/** A regular file in the archive. */
export interface ZipMember {
  /** With `/` between its folders, relative, without `..`. Still data: never to be used as a path. */
  readonly name: string;
  /** Where its local header begins, in bytes from the archive's start. */
  readonly headerOffset: number;
  /** Where the next member or the directory begins: it cannot reach further. */
  readonly endOffset: number;
  /** What it occupies in the archive. */
  readonly storedBytes: number;
  /** What it holds. */
  readonly sizeBytes: number;
  /** Of what it holds. */
  readonly crc32: number;
  /** 0 for stored, 8 for deflated; others are not read. */
  readonly method: number;
  readonly isEncrypted: boolean;
}

/** Where a member's bytes lie in the archive. */
export interface ZipPlace {
  readonly offset: number;
  readonly lengthBytes: number;
  readonly isDeflated: boolean;
}

/** Where the directory lies, and how many entries it has. */
interface Directory {
  readonly offset: number;
  readonly lengthBytes: number;
  readonly entryCount: number;
}

/** Whether a file that begins with these bytes is a zip archive. */
export function isZip(start: Uint8Array): boolean {
  const text = latin1(start, 0, ZIP_MAGIC_BYTES);
  return STARTS.some((magic) => text.startsWith(magic));
}

/**
 * Reads the directory at the end of an archive of `sizeBytes`, zip64 too. Folders, and what macOS puts beside each file, are left out; the members
 * come in the directory's order. What cannot be read of a single one, `locateMember` refuses.
 *
 * Throws ImageError when the archive is cut, is one part of several, has other bytes before it, or passes bounds; when members overlap, bear one name
 * twice, or a name that leads out of the archive.
 */
export function* parseZip(sizeBytes: number): Parser<readonly ZipMember[]> {
  const { offset, lengthBytes, entryCount } = yield* findDirectory(sizeBytes);
  const bytes = yield* readExactly("", offset, lengthBytes, "the zip archive's directory");
  const members: Omit<ZipMember, "endOffset">[] = [];
  let at = 0;
  for (let entry = 0; entry < entryCount; entry++) {
    const { member, lengthBytes: entryBytes } = parseEntry(bytes.subarray(at), offset + at);
    members.push(member);
    at += entryBytes;
  }
  if (at !== lengthBytes)
    throw new ImageError(`the zip archive's directory has ${lengthBytes - at} bytes behind its last entry: it is damaged`);
  const inOrder = members.toSorted((a, b) => a.headerOffset - b.headerOffset);
  const ends = new Map<object, number>();
  for (const [index, member] of inOrder.entries()) {
    const end = inOrder[index + 1]?.headerOffset ?? offset;
    // The local header may be longer: whoever reads the member looks.
    if (member.headerOffset + LOCAL_BYTES + member.storedBytes > end)
      throw new ImageError(`the zip archive's ${quoted(member.name)} reaches into what follows it: the archive is damaged or crafted`);
    ends.set(member, end);
  }
  const files = members.filter(({ name }) => isFile(name)).map((member) => ({ ...member, endOffset: ends.get(member)! }));
  const names = new Set<string>();
  for (const { name } of files) {
    if (names.has(name)) throw new ImageError(`the zip archive holds two files named ${quoted(name)}: it is damaged or crafted`);
    names.add(name);
  }
  return files;
}

/**
 * Where the bytes of a member lie. Throws ImageError when it is encrypted or packed in a way that is not read, and when its local header is another
 * than the directory's.
 */
export function* locateMember(member: ZipMember): Parser<ZipPlace> {
  const { name, headerOffset, endOffset, storedBytes, sizeBytes, method, isEncrypted } = member;
  const words = `${quoted(name)} in the zip archive`;
  if (isEncrypted) throw new ImageError(`${words} is encrypted: pack it without a password`);
  if (method !== STORED && method !== DEFLATED)
    throw new ImageError(`${words} is packed by ${METHODS[method] ?? `method ${method}`}, which is not read: pack it again by Deflate`);
  if (method === STORED && storedBytes !== sizeBytes)
    throw new ImageError(`${words} is stored in ${storedBytes} bytes and declares ${sizeBytes}: the archive is damaged or crafted`);
  const header = yield* readExactly("", headerOffset, LOCAL_BYTES, `the header of ${words}`);
  const view = viewOf(header);
  const nameBytes = view.getUint16(26, true);
  const offset = headerOffset + LOCAL_BYTES + nameBytes + view.getUint16(28, true);
  const isSame = latin1(header, 0, 4) === "PK\x03\x04" && view.getUint16(8, true) === method && nameBytes <= MAX_NAME_BYTES;
  const found = isSame ? yield* readExactly("", headerOffset + LOCAL_BYTES, nameBytes, `the name of ${words}`) : undefined;
  if (found === undefined || nameOf(found) !== name)
    throw new ImageError(`${words} has another header than the archive's directory says: the archive is damaged or crafted`);
  if (offset + storedBytes > endOffset) throw new ImageError(`${words} reaches into what follows it: the archive is damaged or crafted`);
  return { offset, lengthBytes: storedBytes, isDeflated: method === DEFLATED };
}

const DISK_NAME = /\.(?:ova|vmdk|qcow2?|vhdx?|vdi|raw|img)$/i;
/** Files of one VMDK beside its descriptor, as VMware names them. */
const EXTENT_NAME = /^(.*)-(?:flat|[fs]\d{3})(\.vmdk)$/i;

/**
 * The member that a user means: the only OVF descriptor, which then speaks for its disks; else the disk or OVA of that name, or of that index among
 * them; without a choice the only one, or the only member at all.
 *
 * Throws ImageError listing the disks when there is none such or more than one.
 */
export function selectMember(members: readonly ZipMember[], wanted: number | string | undefined): ZipMember {
  const descriptors = members.filter(({ name }) => /\.ovf$/i.test(name));
  if (descriptors.length === 1) return descriptors[0]!;
  const isExtent = ({ name }: ZipMember): boolean => {
    const [, stem, ending] = EXTENT_NAME.exec(name) ?? [];
    return stem !== undefined && members.some((other) => other.name === `${stem}${ending}`);
  };
  const named = members.filter((member) => DISK_NAME.test(member.name) && !isExtent(member));
  const disks = named.length === 0 && members.length === 1 ? members : named;
  const offer = disks.slice(0, 20).map(({ name }, index) => `${index}: ${quoted(name)}`);
  const listed = disks.length > offer.length ? `${offer.join(", ")} and ${disks.length - offer.length} more` : offer.join(", ") || "none";
  const [only] = disks;
  // The choice may be one of the disks in an OVA.
  if (only && disks.length === 1 && (wanted === undefined || /\.ova$/i.test(only.name))) return only;
  if (descriptors.length > 1) throw new ImageError(`the zip archive holds ${descriptors.length} OVF descriptors: unpack it, and name one`);
  if (wanted === undefined) {
    throw new ImageError(
      disks.length === 0
        ? `the zip archive holds no disk image among its ${members.length} files`
        : `the zip archive holds ${disks.length} disks: declare it as { ova, disk } or { url, disk } and say which one (${listed})`,
    );
  }
  const candidates = disks.filter(({ name }, index) =>
    typeof wanted === "number" ? index === wanted : [name, baseOf(name)].includes(wanted),
  );
  if (candidates.length === 1) return candidates[0]!;
  const fault = candidates.length === 0 ? "no disk" : "several disks";
  throw new ImageError(`the zip archive holds ${fault} ${quoted(`${wanted}`)} (its disks: ${listed})`);
}

/** By the end record, behind which nothing but its comment may lie. */
function* findDirectory(sizeBytes: number): Parser<Directory> {
  const tailBytes = Math.min(sizeBytes, END_BYTES + MAX_COMMENT_BYTES);
  const tailOffset = sizeBytes - tailBytes;
  const tail = yield* readExactly("", tailOffset, tailBytes, "the zip archive");
  const view = viewOf(tail);
  let at = tailBytes - END_BYTES;
  while (at >= 0 && !(view.getUint32(at, true) === 0x0605_4b50 && at + END_BYTES + view.getUint16(at + 20, true) === tailBytes)) at--;
  if (at < 0) throw new ImageError("the zip archive has no directory at its end: it is truncated, or one part of several");
  const end = tailOffset + at;
  const [disk, first, here, all] = [
    view.getUint16(at + 4, true),
    view.getUint16(at + 6, true),
    view.getUint16(at + 8, true),
    view.getUint16(at + 10, true),
  ];
  const small = { entryCount: all, lengthBytes: view.getUint32(at + 12, true), offset: view.getUint32(at + 16, true) };
  const large = yield* zip64Directory(end);
  if (large === undefined && (disk !== 0 || first !== 0 || here !== all)) throw inParts();
  const { directory, directoryEnd } = large ?? { directory: small, directoryEnd: end };
  if (directory.entryCount > MAX_MEMBERS || directory.lengthBytes > MAX_DIRECTORY_BYTES) {
    throw new ImageError(
      `the zip archive has ${directory.entryCount} members in a directory of ${directory.lengthBytes} bytes; at most ${MAX_MEMBERS} in ${MAX_DIRECTORY_BYTES} are read`,
    );
  }
  if (directory.offset + directory.lengthBytes !== directoryEnd)
    throw new ImageError("the zip archive's directory is not where its end says: it is damaged, or has other bytes before it");
  return directory;
}

/** The larger end record before the end record, which then counts: some programs write it where it is not needed. undefined where none is. */
function* zip64Directory(end: number): Parser<{ readonly directory: Directory; readonly directoryEnd: number } | undefined> {
  if (end < LOCATOR_BYTES + ZIP64_END_BYTES) return undefined;
  const locator = viewOf(yield* readExactly("", end - LOCATOR_BYTES, LOCATOR_BYTES, "the zip archive's zip64 locator"));
  if (locator.getUint32(0, true) !== 0x0706_4b50) return undefined;
  if (locator.getUint32(4, true) !== 0 || locator.getUint32(16, true) > 1) throw inParts();
  const offset = safeNumber(locator.getBigUint64(8, true), "the place of the zip archive's zip64 record");
  if (offset > end - LOCATOR_BYTES - ZIP64_END_BYTES)
    throw new ImageError("the zip archive's zip64 record is not where its locator says: the archive is damaged");
  const record = viewOf(yield* readExactly("", offset, ZIP64_END_BYTES, "the zip archive's zip64 record"));
  if (record.getUint32(0, true) !== 0x0606_4b50)
    throw new ImageError("the zip archive's zip64 record is not where its locator says: the archive is damaged");
  const numberAt = (at: number): number => safeNumber(record.getBigUint64(at, true), "a size in the zip archive's zip64 record");
  if (record.getUint32(16, true) !== 0 || record.getUint32(20, true) !== 0 || numberAt(24) !== numberAt(32)) throw inParts();
  return { directory: { entryCount: numberAt(32), lengthBytes: numberAt(40), offset: numberAt(48) }, directoryEnd: offset };
}

function inParts(): ImageError {
  return new ImageError("the zip archive is one part of several: put them together first (zip -s 0 parts.zip --out whole.zip)");
}

/** One entry of the directory, and how long it is. `offset` is where it lies. */
function parseEntry(bytes: Uint8Array, offset: number): { readonly member: Omit<ZipMember, "endOffset">; readonly lengthBytes: number } {
  const damaged = (): ImageError =>
    new ImageError(`the zip archive's directory cannot be read at offset ${offset}: the archive is damaged`);
  if (bytes.length < ENTRY_BYTES || latin1(bytes, 0, 4) !== "PK\x01\x02") throw damaged();
  const view = viewOf(bytes);
  const nameBytes = view.getUint16(28, true);
  const extraBytes = view.getUint16(30, true);
  const lengthBytes = ENTRY_BYTES + nameBytes + extraBytes + view.getUint16(32, true);
  if (lengthBytes > bytes.length) throw damaged();
  if (nameBytes > MAX_NAME_BYTES)
    throw new ImageError(`the zip archive holds a name of ${nameBytes} bytes; at most ${MAX_NAME_BYTES} are read`);
  const name = nameOf(bytes.subarray(ENTRY_BYTES, ENTRY_BYTES + nameBytes));
  if (name === "" || name.includes("\0") || /^(?:\/|[a-z]:)/i.test(name) || name.split("/").includes(".."))
    throw new ImageError(`the zip archive holds ${quoted(name)}, a name that leads out of it: it is crafted`);
  const large = zip64Numbers(bytes.subarray(ENTRY_BYTES + nameBytes, ENTRY_BYTES + nameBytes + extraBytes));
  // The numbers that do not fit stand in the extra field, in this order.
  const numberAt = (at: number): number => {
    const small = view.getUint32(at, true);
    if (small !== 0xffff_ffff) return small;
    const number = large.next();
    if (number.done === true) throw damaged();
    return number.value;
  };
  const [sizeBytes, storedBytes, headerOffset] = [numberAt(24), numberAt(20), numberAt(42)];
  if (view.getUint16(34, true) !== 0) throw inParts();
  return {
    member: {
      name,
      headerOffset,
      storedBytes,
      sizeBytes,
      crc32: view.getUint32(16, true),
      method: view.getUint16(10, true),
      isEncrypted: (view.getUint16(8, true) & ENCRYPTED_FLAG) !== 0,
    },
    lengthBytes,
  };
}

function* zip64Numbers(extra: Uint8Array): Generator<number, void> {
  const view = viewOf(extra);
  for (let at = 0; at + 4 <= extra.length; at += 4 + view.getUint16(at + 2, true)) {
    if (view.getUint16(at, true) !== ZIP64_EXTRA) continue;
    const end = Math.min(extra.length, at + 4 + view.getUint16(at + 2, true));
    for (let field = at + 4; field + 8 <= end; field += 8) yield safeNumber(view.getBigUint64(field, true), "a size in the zip archive");
    return;
  }
}

/** Some programs of Windows write its own separator. */
function nameOf(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8").replaceAll("\\", "/");
}

function isFile(name: string): boolean {
  return !name.endsWith("/") && !name.startsWith("__MACOSX/") && !baseOf(name).startsWith("._");
}

function baseOf(name: string): string {
  return name.slice(name.lastIndexOf("/") + 1);
}
