/** Where a disk's bytes come from: files on this machine and members of an OVA, opened, parsed and watched for changes. */
import { constants } from "node:fs";
import { open, type FileHandle } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { DiskError } from "../errors.ts";
import type { DiskImage, ImageFormat, RunList } from "../image/image.ts";
import { openImage } from "../image/open.ts";
import { type Digest, parseDigest } from "../image/manifest.ts";
import { openOva, openOvf, type OvfPackage, type PackagedDisk, selectDisk } from "../image/ova.ts";
import { ImageError, MAX_READ_BYTES, type Answer, type Ask, type Parser } from "../image/parser.ts";

/** Blocks that the parsers' many small reads are answered from. */
const BLOCK_BYTES = 256 * 1024;
const CACHED_BLOCKS = 16;

/** Beyond this many questions a parser runs in circles: a 16 TiB disk's tables take fewer. */
const MAX_ASKS = 4_000_000;

/** Names beside an image: plain ones only, so that no header leads to another folder. */
const PLAIN_NAME = /^[^/\\\0]+$/;

/** A range of a file on this machine. */
export interface SourceFile {
  /** The name that messages show. */
  readonly name: string;
  readonly sizeBytes: number;
  /** What the file occupies on this machine, holes left out; a member of an archive counts in full. */
  readonly allocatedBytes: number;
  /** What the file's bytes must hash to; undefined when nobody says. */
  readonly expected: Digest | undefined;
  /** At most `length` bytes at `offset`, fewer only at the end. The buffer is the caller's. */
  read(offset: number, length: number): Promise<Buffer>;
}

/** What a user may declare as a source. */
export type SourceSpec = { readonly file: string } | { readonly ova: string; readonly disk?: string | number | undefined };

/** An open source. Close it with `await using`. */
export interface OpenSource extends AsyncDisposable {
  /** The path as declared. */
  readonly path: string;
  readonly image: DiskImage;
  /** The files of `image.files`, in the same order. */
  readonly files: readonly SourceFile[];
  /** The machine that the disk was packed with, and which of its disks it is; undefined outside of an OVA or OVF. */
  readonly packed: { readonly package: OvfPackage; readonly disk: PackagedDisk } | undefined;
  /** Sentences for the user: what the parsers noted, and whether a digest vouches for the source. */
  readonly notes: readonly string[];
  /** Reads the image's tables: what lies where in the files. Throws DiskError (step "header") when they are refused. */
  runs(): Promise<RunList>;
  /** Throws DiskError (step "source") when a file was written, replaced or cut since it was opened. */
  assertUnchanged(): Promise<void>;
}

/**
 * Opens a source and parses its header.
 *
 * `checksum` is the user's own digest of the disk file, in the form `sha256:<hex>`; else an OVF manifest's counts. `format` is only given to have
 * the bytes taken for it. Throws DiskError: step "source" when a file cannot be read, step "header" when its bytes are refused.
 */
export async function openSource(
  spec: SourceSpec,
  options: { readonly checksum?: string | undefined; readonly format?: ImageFormat } = {},
): Promise<OpenSource> {
  const path = "file" in spec ? spec.file : spec.ova;
  const folder = new Folder(path);
  try {
    return await parse(folder, spec, path, options);
  } catch (error) {
    await folder.close();
    throw refused(path, error);
  }
}

function refused(path: string, error: unknown): unknown {
  return error instanceof ImageError ? new DiskError(`${path}: ${error.message}`, { step: "header", path, cause: error }) : error;
}

async function parse(
  folder: Folder,
  spec: SourceSpec,
  path: string,
  options: { readonly checksum?: string | undefined; readonly format?: ImageFormat },
): Promise<OpenSource> {
  const { resolve, packed, notes } = "ova" in spec ? await unpack(folder, spec.ova, spec.disk) : plain(folder);
  const disk = await resolve("");
  const image = await drive(openImage({ sizeBytes: disk.sizeBytes, ...(options.format && { format: options.format }) }), resolve);
  const declared = options.checksum === undefined ? undefined : parseDigest(options.checksum);
  const files: SourceFile[] = [];
  for (const { name } of image.files) {
    const file = await resolve(name);
    const expected = (name === "" ? declared : undefined) ?? packed?.package.manifest?.get(file.name);
    const { sizeBytes, allocatedBytes } = file;
    files.push({ name: file.name, sizeBytes, allocatedBytes, expected, read: (offset, length) => file.read(offset, length) });
  }
  const isVouched = files.every((file) => file.expected !== undefined);
  return {
    path,
    image,
    files,
    packed,
    notes: [
      ...notes,
      ...image.notes,
      ...(isVouched ? [] : ["no checksum vouches for the source: give `checksum`, or an OVA with a manifest"]),
    ],
    runs: async () => {
      try {
        return await drive(image.runs(), resolve);
      } catch (error) {
        throw refused(path, error);
      }
    },
    assertUnchanged: () => folder.assertUnchanged(),
    [Symbol.asyncDispose]: () => folder.close(),
  };
}

/** Opens a file by the name that a parser gave; "" is the image itself. */
type Resolve = (name: string) => Promise<Range>;

interface Unpacked {
  readonly resolve: Resolve;
  readonly packed: OpenSource["packed"];
  readonly notes: readonly string[];
}

function plain(folder: Folder): Unpacked {
  return { resolve: (name) => folder.file(name), packed: undefined, notes: [] };
}

/** A disk of a machine in an OVA, or in an OVF beside its files. */
async function unpack(folder: Folder, path: string, wanted: string | number | undefined): Promise<Unpacked> {
  const { sizeBytes } = await folder.file("");
  const isDescriptor = path.toLowerCase().endsWith(".ovf");
  const machine = await drive(isDescriptor ? openOvf(basename(path), sizeBytes) : openOva(sizeBytes), (name) => folder.file(name));
  const disk = selectDisk(machine.disks, wanted);
  const { place } = disk;
  const resolve: Resolve = async (name) => {
    if (name === "" || name === place.name) return (await folder.file(place.file)).slice(place.name, place.offset, place.sizeBytes);
    throw new ImageError(`${place.name} is only a part of a disk: a package holds each disk in one file`);
  };
  return { resolve, packed: { package: machine, disk }, notes: machine.notes };
}

/**
 * Runs a parser, answering what it asks from the files that `resolve` opens.
 * Throws what the parser throws, and ImageError when it asks for too much: its image leads in circles.
 */
export async function drive<T>(parser: Parser<T>, resolve: Resolve): Promise<T> {
  let asks = 0;
  for (let step = parser.next(); ;) {
    if (step.done) return step.value;
    if (++asks > MAX_ASKS) throw new ImageError("its tables lead in circles");
    let answer: Answer;
    try {
      answer = await answerTo(step.value, resolve);
    } catch (error) {
      step = parser.throw(error);
      continue;
    }
    step = parser.next(answer);
  }
}

async function answerTo(ask: Ask, resolve: Resolve): Promise<Answer> {
  switch (ask.kind) {
    case "size":
      try {
        return (await resolve(ask.file)).sizeBytes;
      } catch (error) {
        if (error instanceof MissingFile) return undefined;
        throw error;
      }
    case "read":
      if (ask.length > MAX_READ_BYTES) throw new ImageError(`it asks for ${ask.length} bytes at once`);
      return (await resolve(ask.file)).readCached(ask.offset, ask.length);
  }
}

/** The named file does not exist: an answer for `size`, an error for all else. */
class MissingFile extends DiskError {}

/** The folder of a source: opens its files once each and remembers what they looked like. */
class Folder {
  readonly #path: string;
  readonly #open = new Map<
    string,
    Promise<{ readonly handle: FileHandle; readonly range: Range; readonly seen: string; readonly path: string }>
  >();

  constructor(path: string) {
    this.#path = path;
  }

  /** The image itself for "", else the plain name beside it. Throws ImageError on a name with a path, DiskError when it cannot be read. */
  async file(name: string): Promise<Range> {
    if (name !== "" && (!PLAIN_NAME.test(name) || name === "." || name === "..")) {
      throw new ImageError(`it refers to ${JSON.stringify(name)}: only files beside it are read`);
    }
    const key = name === basename(this.#path) ? "" : name;
    let opened = this.#open.get(key);
    if (!opened) {
      opened = this.#openFile(key === "" ? this.#path : join(dirname(this.#path), key), key === "");
      this.#open.set(key, opened);
    }
    return (await opened).range;
  }

  async #openFile(path: string, isImage: boolean) {
    // A link beside the image could lead anywhere; O_NONBLOCK keeps a FIFO from hanging the open.
    const flags = constants.O_RDONLY | constants.O_NONBLOCK | (isImage ? 0 : constants.O_NOFOLLOW);
    let handle: FileHandle;
    try {
      handle = await open(path, flags);
    } catch (error) {
      throw unreadable(path, error, isImage);
    }
    const stat = await handle.stat({ bigint: true });
    if (!stat.isFile()) {
      await handle.close();
      throw new DiskError(`${path} is not a regular file`, { step: "source", path });
    }
    const range = new Range(basename(path), Number(stat.size), Number(stat.blocks) * 512, (offset, length) =>
      readFully(handle, path, offset, length),
    );
    return { handle, range, seen: identity(stat), path };
  }

  async assertUnchanged(): Promise<void> {
    for (const { handle, seen, path } of await Promise.all(this.#open.values())) {
      if (identity(await handle.stat({ bigint: true })) !== seen) {
        throw new DiskError(`${path} changed while it was read: stop what writes it, then run up again`, { step: "source", path });
      }
    }
  }

  async close(): Promise<void> {
    const opened = await Promise.allSettled(this.#open.values());
    await Promise.all(opened.filter((result) => result.status === "fulfilled").map(({ value }) => value.handle.close()));
  }
}

function identity(stat: { readonly size: bigint; readonly mtimeNs: bigint; readonly ino: bigint; readonly dev: bigint }): string {
  return `${stat.dev}:${stat.ino}:${stat.size}:${stat.mtimeNs}`;
}

function unreadable(path: string, error: unknown, isImage: boolean): DiskError {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  if (code === "ENOENT") {
    return new MissingFile(isImage ? `there is no file ${path}` : `the image needs ${path}, which is not there`, { step: "source", path });
  }
  if (code === "ELOOP") return new DiskError(`${path} is a symbolic link: a part of an image must be a file`, { step: "source", path });
  const reason = error instanceof Error ? error.message : String(error);
  return new DiskError(`cannot read ${path}: ${reason}`, { step: "source", path, cause: error });
}

async function readFully(handle: FileHandle, path: string, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(length);
  let filled = 0;
  while (filled < length) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await handle.read(buffer, filled, length - filled, offset + filled));
    } catch (error) {
      throw new DiskError(`cannot read ${path} at ${offset + filled}: ${String(error)}`, { step: "source", path, cause: error });
    }
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}

/** A file or a part of one, with a few blocks cached for the parsers. */
class Range {
  readonly name: string;
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
  readonly #readAt: (offset: number, length: number) => Promise<Buffer>;
  readonly #blocks = new Map<number, Promise<Buffer>>();
  readonly #slices = new Map<string, Range>();

  constructor(name: string, sizeBytes: number, allocatedBytes: number, readAt: (offset: number, length: number) => Promise<Buffer>) {
    this.name = name;
    this.sizeBytes = sizeBytes;
    this.allocatedBytes = allocatedBytes;
    this.#readAt = readAt;
  }

  read(offset: number, length: number): Promise<Buffer> {
    return this.#readAt(offset, Math.max(0, Math.min(length, this.sizeBytes - offset)));
  }

  /** The same bytes as `read`, through the cache: for many small reads. */
  async readCached(offset: number, length: number): Promise<Buffer> {
    if (length > BLOCK_BYTES) return this.read(offset, length);
    const first = Math.floor(offset / BLOCK_BYTES);
    const start = offset - first * BLOCK_BYTES;
    const head = await this.#block(first);
    if (start + length <= BLOCK_BYTES) return head.subarray(start, start + length);
    return Buffer.concat([head.subarray(start), (await this.#block(first + 1)).subarray(0, start + length - BLOCK_BYTES)]);
  }

  slice(name: string, offset: number, sizeBytes: number): Range {
    let slice = this.#slices.get(name);
    if (!slice) {
      slice = new Range(name, sizeBytes, sizeBytes, (at, length) => this.read(offset + at, length));
      this.#slices.set(name, slice);
    }
    return slice;
  }

  #block(index: number): Promise<Buffer> {
    const cached = this.#blocks.get(index);
    if (cached) return cached;
    const block = this.read(index * BLOCK_BYTES, BLOCK_BYTES);
    this.#blocks.set(index, block);
    const oldest = this.#blocks.keys().next();
    if (this.#blocks.size > CACHED_BLOCKS && !oldest.done) this.#blocks.delete(oldest.value);
    return block;
  }
}
