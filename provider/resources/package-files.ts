/** The files of a package on this machine, read at once: beside each other in a folder, or together in a zip archive. Knows nothing of what they hold. */
import type { Buffer } from "node:buffer";
import { closeSync, constants, fstatSync, openSync, readSync } from "node:fs";
import { basename, dirname, join, posix } from "node:path";
import { crc32, inflateRawSync } from "node:zlib";
import { DiskError } from "../errors.ts";
import { type Answer, type Ask, ImageError, MAX_READ_BYTES, type Parser } from "../image/parser.ts";
import { quoted } from "../image/words.ts";
import { isZip, locateMember, parseZip, selectMember, ZIP_MAGIC_BYTES, type ZipMember, type ZipPlace } from "../image/zip.ts";

/** Beyond this many questions an archive leads in circles: it asks one for each member. */
const MAX_ASKS = 100_000;

export interface PackageFile {
  readonly sizeBytes: number;
  /** At most `length` bytes at `offset`, fewer only at the end. */
  read(offset: number, length: number): Uint8Array;
}

/** The package itself under "", the others by their plain names beside it. Close it with `using`. */
export interface PackageFiles extends Disposable {
  /** The plain name of the package itself: in a zip archive that of the OVF or OVA. */
  readonly name: string;
  /** Undefined when there is no such file. Throws ImageError on a name with a path. */
  find(name: string): PackageFile | undefined;
  /** Throws DiskError (step "source") when there is no such file. */
  file(name: string): PackageFile;
}

/** Throws DiskError when the package cannot be read, ImageError when it is a zip archive that holds no machine, or is damaged. */
export function openPackage(path: string): PackageFiles {
  const folder = new Folder(path);
  try {
    return isZip(folder.file("").read(0, ZIP_MAGIC_BYTES)) ? new Zipped(folder) : folder;
  } catch (error) {
    folder[Symbol.dispose]();
    throw error;
  }
}

/** Runs a parser on the files of a package. Throws what it throws, DiskError when a file cannot be read. */
export function driveAtOnce<T>(parser: Parser<T>, files: PackageFiles): T {
  let asks = 0;
  for (let step = parser.next(); ; step = parser.next(answerTo(step.value, files))) {
    if (step.done) return step.value;
    if (++asks > MAX_ASKS) throw new ImageError("the archive leads in circles");
  }
}

function answerTo(ask: Ask, files: PackageFiles): Answer {
  if (ask.kind === "size") return files.find(ask.file)?.sizeBytes;
  if (ask.length > MAX_READ_BYTES) throw new ImageError(`it asks for ${ask.length} bytes at once`);
  return files.file(ask.file).read(ask.offset, ask.length);
}

/** The package's files, each opened once: the package itself under "", the others by their plain names beside it. */
class Folder implements PackageFiles {
  readonly name: string;
  readonly #path: string;
  readonly #open = new Map<string, OpenedFile | undefined>();

  constructor(path: string) {
    this.name = basename(path);
    this.#path = path;
  }

  find(name: string): PackageFile | undefined {
    refusePath(name);
    const known = this.#open.get(name);
    if (known !== undefined || this.#open.has(name)) return known;
    const opened = openFile(this.pathOf(name), name === "");
    this.#open.set(name, opened);
    return opened;
  }

  file(name: string): PackageFile {
    const path = this.pathOf(name);
    return this.find(name) ?? raise(new DiskError(`there is no file ${path}`, { step: "source", path }));
  }

  pathOf(name: string): string {
    return name === "" ? this.#path : join(dirname(this.#path), name);
  }

  [Symbol.dispose](): void {
    for (const file of this.#open.values()) if (file !== undefined) closeSync(file.descriptor);
    this.#open.clear();
  }
}

/** The files of a zip archive that lie in the folder of its OVF or OVA. What is packed in them is unpacked at once, and so small ones only. */
class Zipped implements PackageFiles {
  readonly name: string;
  readonly #outer: Folder;
  readonly #members: readonly ZipMember[];
  readonly #chosen: ZipMember;
  readonly #unpacked = new Map<ZipMember, Buffer>();
  #unpackedBytes = 0;

  /** Closes `outer`, whose package is the archive, with itself. */
  constructor(outer: Folder) {
    this.#outer = outer;
    this.#members = driveAtOnce(parseZip(outer.file("").sizeBytes), outer);
    this.#chosen = selectMember(this.#members, undefined);
    this.name = posix.basename(this.#chosen.name);
    if (!/\.(ovf|ova)$/i.test(this.name))
      throw new ImageError(
        `the zip archive holds no machine, but ${quoted(this.name)}: take it as a disk (source: { file }), or pack the OVF with it`,
      );
  }

  find(name: string): PackageFile | undefined {
    refusePath(name);
    const path = posix.join(posix.dirname(this.#chosen.name), name);
    const member = name === "" ? this.#chosen : this.#members.find((each) => posix.normalize(each.name) === path);
    return member && { sizeBytes: member.sizeBytes, read: (offset, length) => this.#read(member, offset, length) };
  }

  file(name: string): PackageFile {
    const path = this.#outer.pathOf("");
    return this.find(name) ?? raise(new DiskError(`the zip archive ${path} holds no ${quoted(name)}`, { step: "source", path }));
  }

  [Symbol.dispose](): void {
    this.#outer[Symbol.dispose]();
  }

  #read(member: ZipMember, offset: number, length: number): Uint8Array {
    const place = driveAtOnce(locateMember(member), this.#outer);
    if (place.isDeflated) return this.#unpack(member, place).subarray(offset, offset + length);
    const endBytes = Math.min(place.lengthBytes, offset + length);
    return this.#outer.file("").read(place.offset + offset, Math.max(0, endBytes - offset));
  }

  #unpack(member: ZipMember, { offset, lengthBytes }: ZipPlace): Buffer {
    const known = this.#unpacked.get(member);
    if (known !== undefined) return known;
    const name = quoted(member.name);
    this.#unpackedBytes += member.sizeBytes;
    if (lengthBytes > MAX_READ_BYTES || this.#unpackedBytes > MAX_READ_BYTES)
      throw new ImageError(
        `${name} in the zip archive is too large to look into as it is packed: unpack the archive, and take what is in it`,
      );
    let bytes: Buffer;
    try {
      bytes = inflateRawSync(this.#outer.file("").read(offset, lengthBytes), { maxOutputLength: Math.max(1, member.sizeBytes) });
    } catch (error) {
      throw new ImageError(`${name} in the zip archive is damaged: it does not unpack to the size that it promises`, { cause: error });
    }
    if (bytes.length !== member.sizeBytes || crc32(bytes) !== member.crc32)
      throw new ImageError(`${name} in the zip archive is damaged: its size or checksum is another than the archive promises`);
    this.#unpacked.set(member, bytes);
    return bytes;
  }
}

function refusePath(name: string): void {
  if (name.includes("/") || name === "." || name === ".." || name.includes("\0"))
    throw new ImageError(`it refers to ${quoted(name)}: only files beside it are read`);
}

/** A file of this machine, until it is closed. */
interface OpenedFile extends PackageFile {
  readonly descriptor: number;
}

function openFile(path: string, isPackage: boolean): OpenedFile | undefined {
  let descriptor: number;
  try {
    // A link beside the package could lead anywhere; O_NONBLOCK keeps a FIFO from hanging the open.
    descriptor = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK | (isPackage ? 0 : constants.O_NOFOLLOW));
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return undefined;
    const reason = error instanceof Error ? error.message : String(error);
    throw new DiskError(`cannot read ${path}: ${reason}`, { step: "source", path, cause: error });
  }
  const stat = fstatSync(descriptor);
  if (!stat.isFile()) {
    closeSync(descriptor);
    throw new DiskError(`${path} is not a regular file`, { step: "source", path });
  }
  return {
    descriptor,
    sizeBytes: stat.size,
    read(offset, length) {
      const buffer = new Uint8Array(Math.max(0, Math.min(length, stat.size - offset)));
      let filled = 0;
      while (filled < buffer.length) {
        const count = readSync(descriptor, buffer, filled, buffer.length - filled, offset + filled);
        if (count === 0) break;
        filled += count;
      }
      return buffer.subarray(0, filled);
    },
  };
}

function raise(error: Error): never {
  throw error;
}
