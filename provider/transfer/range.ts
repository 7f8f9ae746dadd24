/** Stretches of bytes that can be read, wherever they lie, and the folders they lie in. Knows no place: files, URLs and hosts bring their own reading. */
import { DiskError } from "../errors.ts";
import type { DataExtent } from "./holes.ts";
import { ImageError, MAX_READ_BYTES, type Answer, type Ask, type Parser } from "../image/parser.ts";

/** Blocks that the parsers' many small reads are answered from. */
const BLOCK_BYTES = 256 * 1024;
const CACHED_BLOCKS = 16;

/** Beyond this many questions a parser runs in circles: a 16 TiB disk's tables take fewer. */
const MAX_ASKS = 4_000_000;

/** How bytes are read. Both give at most `length` bytes at `offset`, fewer only at the end; the buffer is the caller's. */
export interface Bytes {
  /** A read anywhere. */
  readAt(offset: number, length: number): Promise<Buffer>;
  /** One of many reads that each begin where the last one ended. Default: as `readAt`. */
  readForward?(offset: number, length: number): Promise<Buffer>;
  /** Where they may be other than zeros, ascending and apart; undefined when nobody knows. Default: nobody does. */
  dataExtents?(): Promise<readonly DataExtent[] | undefined>;
}

export interface RangeSize {
  /** undefined when only the end will tell. */
  readonly sizeBytes: number | undefined;
  /** What the bytes occupy where they lie, holes left out. Default: all. */
  readonly allocatedBytes?: number;
  /** Whether the bytes can only be read forward from the start, but for a few at the start. Default false. */
  readonly isForwardOnly?: boolean;
}

/** A file or a part of one, with a few blocks cached for the parsers. */
export class Range {
  /** The name that messages show. */
  readonly name: string;
  /** Beyond all files where it is not known. */
  readonly sizeBytes: number;
  readonly knownSizeBytes: number | undefined;
  readonly allocatedBytes: number;
  readonly isForwardOnly: boolean;
  readonly #bytes: Bytes;
  readonly #blocks = new Map<number, Promise<Buffer>>();
  readonly #slices = new Map<string, Range>();

  constructor(name: string, size: RangeSize, bytes: Bytes) {
    this.name = name;
    this.knownSizeBytes = size.sizeBytes;
    this.sizeBytes = size.sizeBytes ?? Number.MAX_SAFE_INTEGER;
    this.allocatedBytes = size.allocatedBytes ?? this.sizeBytes;
    this.isForwardOnly = size.isForwardOnly ?? false;
    this.#bytes = bytes;
  }

  /** For a pass from start to end: at most `length` bytes at `offset`, fewer only at the end. */
  read(offset: number, length: number): Promise<Buffer> {
    const within = this.#clip(offset, length);
    return this.#bytes.readForward?.(offset, within) ?? this.#bytes.readAt(offset, within);
  }

  /** The same bytes as `read`, anywhere and through the cache: for many small reads. */
  async readCached(offset: number, length: number): Promise<Buffer> {
    if (length > BLOCK_BYTES) return this.#bytes.readAt(offset, this.#clip(offset, length));
    const first = Math.floor(offset / BLOCK_BYTES);
    const start = offset - first * BLOCK_BYTES;
    const head = await this.#block(first);
    if (start + length <= BLOCK_BYTES) return head.subarray(start, start + length);
    return Buffer.concat([head.subarray(start), (await this.#block(first + 1)).subarray(0, start + length - BLOCK_BYTES)]);
  }

  /** As `Bytes.dataExtents`; of a slice nobody knows. */
  async dataExtents(): Promise<readonly DataExtent[] | undefined> {
    return this.#bytes.dataExtents?.();
  }

  /** A part under a name of its own; the same one each time. */
  slice(name: string, offset: number, sizeBytes: number): Range {
    let slice = this.#slices.get(name);
    if (!slice) {
      slice = new Range(
        name,
        { sizeBytes },
        { readAt: (at, length) => this.#bytes.readAt(offset + at, length), readForward: (at, length) => this.read(offset + at, length) },
      );
      this.#slices.set(name, slice);
    }
    return slice;
  }

  #clip(offset: number, length: number): number {
    return Math.max(0, Math.min(length, this.sizeBytes - offset));
  }

  #block(index: number): Promise<Buffer> {
    const cached = this.#blocks.get(index);
    if (cached) return cached;
    const offset = index * BLOCK_BYTES;
    const block = this.#bytes.readAt(offset, this.#clip(offset, BLOCK_BYTES));
    this.#blocks.set(index, block);
    const oldest = this.#blocks.keys().next();
    if (this.#blocks.size > CACHED_BLOCKS && !oldest.done) this.#blocks.delete(oldest.value);
    return block;
  }
}

/** A source's file and what lies beside it. */
export interface Folder {
  /** The source itself for "", else the plain name beside it. Throws MissingFile, DiskError when it cannot be read, ImageError on a name with a path. */
  file(name: string): Promise<Range>;
  /** Throws DiskError (step "source") when a file that was opened is not what it was. */
  assertUnchanged(): Promise<void>;
  close(): Promise<void>;
}

/** The named file does not exist: an answer for a question about its size, an error for all else. */
export class MissingFile extends DiskError {}

/** Names beside an image: plain ones only, so that no header leads to another folder. */
const PLAIN_NAME = /^[^/\\\0]+$/;

/** Throws ImageError on a name that is not a plain one. */
export function refusePath(name: string): void {
  if (!PLAIN_NAME.test(name) || name === "." || name === "..") {
    throw new ImageError(`it refers to ${JSON.stringify(name)}: only files beside it are read`);
  }
}

/** Opens a file by the name that a parser gave; "" is the image itself. */
export type Resolve = (name: string) => Promise<Range>;

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
