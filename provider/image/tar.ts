/** The members of a tar archive: names, places and sizes, nothing of what they hold. Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". */
import { Buffer } from "node:buffer";
import { isZero, latin1, roundUp, safeNumber } from "./bytes.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";
import { quoted } from "./words.ts";

const BLOCK_BYTES = 512;
/** Member headers that are read before an archive is taken for endless, skipped ones included. */
const MAX_HEADERS = 4096;
/** Of one pax header or GNU long name. */
const MAX_EXTENSION_BYTES = 64 * 1024;
/** Of all pax headers and GNU long names together. */
const MAX_EXTENSIONS_BYTES = 4 * 1024 * 1024;

/** A regular file in the archive. `name` is data: it may hold folders, `..` or anything else, and is never to be used as a path. */
export interface TarMember {
  readonly name: string;
  /** Where the contents begin, in bytes from the archive's start. */
  readonly offset: number;
  readonly sizeBytes: number;
}

/** What the extension headers before a member say about it. */
interface Extensions {
  readonly name?: string;
  readonly sizeBytes?: number;
}

/**
 * Reads all headers: ustar, old v7, pax (`path`, `size`), GNU (long names, sizes in base 256). Folders, links, devices and the `._` files of
 * macOS are left out; the members come in the archive's order. `sizeBytes` is the archive's size; the end may lack its two blocks of zeros.
 *
 * Throws ImageError when a header does not match its checksum, a member ends beyond the archive, one is stored sparse, or bounds are passed.
 */
export function* parseTar(sizeBytes: number): Parser<readonly TarMember[]> {
  const members: TarMember[] = [];
  let globals: Extensions = {};
  let extensions: Extensions = {};
  let extensionBytes = 0;
  let offset = 0;
  for (let headers = 0; offset < sizeBytes; headers++) {
    if (headers === MAX_HEADERS) throw new ImageError(`the tar archive has more than ${MAX_HEADERS} members: it is no OVA, or has no end`);
    const header = yield* readExactly("", offset, BLOCK_BYTES, headers === 0 ? "the tar archive" : "a tar header");
    if (isZero(header)) break;
    if (!hasChecksum(header)) throw new ImageError(damaged(headers, offset));
    const type = String.fromCharCode(header[156]!);
    if (type === "S") throw new ImageError("the tar archive holds a GNU sparse file, which is not read: make it again without --sparse");
    const isFile = type === "0" || type === "\0" || type === "7";
    const declaredBytes = holdsData(type) ? (numberAt(header, 124, 12) ?? refuseSize(offset)) : 0;
    const memberBytes = isFile ? (extensions.sizeBytes ?? globals.sizeBytes ?? declaredBytes) : declaredBytes;
    const name = (isFile ? (extensions.name ?? globals.name) : undefined) ?? nameOf(header);
    const start = offset + BLOCK_BYTES;
    if (start + memberBytes > sizeBytes) {
      throw new ImageError(
        `the tar archive ends early: ${quoted(name)} should end at offset ${start + memberBytes}, but the file has only ${sizeBytes} bytes`,
      );
    }
    if ("xgL".includes(type)) {
      extensionBytes += memberBytes;
      if (memberBytes > MAX_EXTENSION_BYTES || extensionBytes > MAX_EXTENSIONS_BYTES)
        throw new ImageError(`the tar archive has an extension header of ${memberBytes} bytes at offset ${offset}, more than is read`);
      const bytes = yield* readExactly("", start, memberBytes, "a tar extension header");
      if (type === "g") globals = { ...globals, ...parsePax(bytes) };
      else extensions = { ...extensions, ...(type === "x" ? parsePax(bytes) : { name: untilNul(bytes) }) };
    } else {
      if (isFile && !isMacFile(name) && !name.endsWith("/")) members.push({ name, offset: start, sizeBytes: memberBytes });
      extensions = {};
    }
    offset = start + roundUp(memberBytes, BLOCK_BYTES);
  }
  return members;
}

function damaged(headers: number, offset: number): string {
  return headers === 0
    ? "the file is no tar archive: its first header does not match its checksum"
    : `the tar header at offset ${offset} does not match its checksum: the archive is damaged`;
}

/** Whether a file that begins with these 512 bytes is a tar archive: an old one has no magic, but any has its checksum. */
export function isTar(start: Uint8Array): boolean {
  return start.length >= BLOCK_BYTES && !isZero(start.subarray(0, BLOCK_BYTES)) && hasChecksum(start.subarray(0, BLOCK_BYTES));
}

/** Links, devices, folders and pipes have none behind their header, whatever their size field says. */
function holdsData(type: string): boolean {
  return !"123456".includes(type);
}

/** Whether the sum of all bytes, the checksum's own taken as spaces, is as declared. Some old programs summed signed bytes. */
function hasChecksum(header: Uint8Array): boolean {
  const declared = numberAt(header, 148, 8);
  let unsigned = 0;
  let signed = 0;
  for (let index = 0; index < BLOCK_BYTES; index++) {
    const byte = index >= 148 && index < 156 ? 0x20 : header[index]!;
    unsigned += byte;
    signed += (byte << 24) >> 24;
  }
  return declared === unsigned || declared === signed;
}

/** An octal number, or where its first bit is set (GNU) a big-endian binary one. undefined when it is neither, or negative. */
function numberAt(header: Uint8Array, offset: number, length: number): number | undefined {
  const field = header.subarray(offset, offset + length);
  if ((field[0]! & 0x80) !== 0) {
    if (field[0] !== 0x80) return undefined;
    return safeNumber(BigInt(`0x${Buffer.from(field.subarray(1)).toString("hex")}`), "a size in the tar archive");
  }
  const text = latin1(field)
    .replace(/\0[^]*$/, "")
    .trim();
  return /^[0-7]+$/.test(text) ? Number.parseInt(text, 8) : undefined;
}

function refuseSize(offset: number): never {
  throw new ImageError(`the tar header at offset ${offset} has no size that can be read: the archive is damaged`);
}

/** The name field, led by ustar's prefix field where there is one; GNU's old header has other things there. */
function nameOf(header: Uint8Array): string {
  const name = untilNul(header.subarray(0, 100));
  const prefix = latin1(header, 257, 263) === "ustar\0" ? untilNul(header.subarray(345, 500)) : "";
  return prefix === "" ? name : `${prefix}/${name}`;
}

function untilNul(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return Buffer.from(end === -1 ? bytes : bytes.subarray(0, end)).toString("utf8");
}

/** Records of `<length> <key>=<value>\n`; the length counts the whole record in bytes. */
function parsePax(bytes: Uint8Array): Extensions {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let extensions: Extensions = {};
  let offset = 0;
  while (offset < buffer.length && buffer[offset] !== 0) {
    const space = buffer.indexOf(0x20, offset);
    const digits = space === -1 ? "" : buffer.toString("latin1", offset, Math.min(space, offset + 8));
    const end = offset + Number(digits);
    if (!/^[0-9]+$/.test(digits) || end <= space + 1 || end > buffer.length || buffer[end - 1] !== 0x0a)
      throw new ImageError("the tar archive has a pax header that cannot be read: it is damaged");
    const record = buffer.toString("utf8", space + 1, end - 1);
    const equals = record.indexOf("=");
    const [key, value] = [record.slice(0, equals), record.slice(equals + 1)];
    if (key.startsWith("GNU.sparse."))
      throw new ImageError("the tar archive holds a GNU sparse file, which is not read: make it again without --sparse");
    if (key === "path") extensions = { ...extensions, name: value };
    if (key === "size") extensions = { ...extensions, sizeBytes: paxSize(value) };
    offset = end;
  }
  return extensions;
}

function paxSize(value: string): number {
  if (!/^[0-9]{1,20}$/.test(value))
    throw new ImageError(`the tar archive has a pax size of ${quoted(value)}, which is no number: it is damaged`);
  return safeNumber(BigInt(value), "a size in the tar archive");
}

/** Resource forks and attributes that macOS puts beside each file. */
function isMacFile(name: string): boolean {
  return name.slice(name.lastIndexOf("/") + 1).startsWith("._");
}
