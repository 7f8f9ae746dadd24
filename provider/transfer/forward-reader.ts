/** A source's file, read once from its start to its end while its digest is taken. */
import { ImageError } from "../image/parser.ts";
import { HashThread } from "./hash-thread.ts";
import { type DataExtent, DataHash } from "./holes.ts";
import type { SourceFile } from "./source.ts";

const READ_BYTES = 1024 * 1024;

const ZEROS = Buffer.alloc(READ_BYTES);

interface Chunk {
  readonly offset: number;
  readonly bytes: Buffer;
}

/** The digest of a file that was read: of all its bytes, or of its data alone as `ImportResult.sourceDigest` says. */
export interface FileDigest {
  readonly kind: "sha256" | "sha256-data";
  readonly hex: string;
}

/** Hands out ranges whose offsets never go back. Dispose of it in any case. */
export class ForwardReader implements AsyncDisposable {
  readonly #file: SourceFile;
  readonly #onRead: (bytes: number) => void;
  readonly #hash: HashThread;
  readonly #data: DataHash;
  readonly #extents: readonly DataExtent[] | undefined;
  /** Of the extents, the first that was not read to its end. */
  #extent = 0;
  readonly #kind: FileDigest["kind"];
  /** Neighbours; the first may hold the range that was asked for last. */
  #chunks: Chunk[] = [];
  #end = 0;
  #next: { readonly offset: number; readonly bytes: Promise<Buffer> } | undefined;

  /** Of a file with `extents` only those are read, and may be asked for. Where a digest was promised, its zeros are hashed all the same. */
  constructor(file: SourceFile, extents: readonly DataExtent[] | undefined, onRead: (bytes: number) => void) {
    this.#file = file;
    this.#extents = extents;
    this.#kind = extents !== undefined && file.expected === undefined ? "sha256-data" : "sha256";
    this.#onRead = onRead;
    const { expected } = file;
    this.#hash = new HashThread("sha256", ...(expected && expected.algorithm !== "sha256" ? [expected.algorithm] : []));
    this.#data = new DataHash(this.#hash);
  }

  /**
   * From `offset` on at least `least` bytes, and more up to `most` as far as they are at hand; fewer only at the file's end. `offset` is never before
   * the last one's. The bytes are never overwritten.
   */
  async take(offset: number, least: number, most: number = least): Promise<Buffer> {
    do {
      while (this.#chunks[0] && this.#chunks[0].offset + this.#chunks[0].bytes.length <= offset) this.#chunks.shift();
    } while (this.#end < offset + least && (await this.#read()));
    const [first] = this.#chunks;
    if (first === undefined) return Buffer.alloc(0);
    const start = offset - first.offset;
    if (first.bytes.length - start >= least || this.#chunks.length === 1) return first.bytes.subarray(start, start + most);
    const pieces = this.#chunks.map((chunk) => chunk.bytes.subarray(Math.max(0, offset - chunk.offset), offset + least - chunk.offset));
    return Buffer.concat(pieces);
  }

  /** Reads what is left and compares the digest. Throws ImageError when another was expected. */
  async finish(): Promise<FileDigest> {
    while (await this.#read()) this.#chunks = [];
    if (this.#end !== this.#file.sizeBytes) throw this.endsEarly();
    const [digest = "", other] = await this.#hash.digest();
    const found = other ?? digest;
    const { expected, name } = this.#file;
    if (expected && expected.hex !== found) {
      throw new ImageError(`${name} is damaged: its ${expected.algorithm} is ${found}, and ${expected.hex} was promised`);
    }
    return { kind: this.#kind, hex: digest };
  }

  /** What to throw when the file's tables promise more than it holds. */
  endsEarly(): ImageError {
    return new ImageError(`${this.#file.name} ends early, at ${this.#end} of ${this.#file.sizeBytes} bytes`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#hash[Symbol.asyncDispose]();
  }

  /** Whether there was more. */
  async #read(): Promise<boolean> {
    const { offset, bytes: reading } = this.#next ?? this.#startReading();
    const bytes = await reading;
    await this.#pass(offset);
    if (bytes.length === 0) return false;
    this.#chunks.push({ offset, bytes });
    this.#end += bytes.length;
    // The next block is read while this one is worked on.
    this.#next = this.#startReading();
    this.#next.bytes.catch(() => {});
    await this.#take(offset, bytes);
    this.#onRead(bytes.length);
    return true;
  }

  /** From where the last read ended, or from the next extent; nothing at the file's end. */
  #startReading(): { readonly offset: number; readonly bytes: Promise<Buffer> } {
    const extents = this.#extents;
    if (extents === undefined) return { offset: this.#end, bytes: this.#file.read(this.#end, READ_BYTES) };
    while (this.#extent < extents.length && extents[this.#extent]!.end <= this.#end) this.#extent++;
    const extent = extents[this.#extent];
    if (extent === undefined) return { offset: this.#file.sizeBytes, bytes: Promise.resolve(Buffer.alloc(0)) };
    const offset = Math.max(this.#end, extent.offset);
    return { offset, bytes: this.#file.read(offset, Math.min(READ_BYTES, extent.end - offset)) };
  }

  /** Takes what lies before `offset` and was not read for zeros. */
  async #pass(offset: number): Promise<void> {
    const holeBytes = offset - this.#end;
    if (holeBytes === 0) return;
    this.#end = offset;
    this.#onRead(holeBytes);
    if (this.#kind === "sha256-data") return;
    for (let left = holeBytes; left > 0; left -= ZEROS.length) await this.#hash.update(ZEROS.subarray(0, left));
  }

  async #take(offset: number, bytes: Buffer): Promise<void> {
    if (this.#kind === "sha256") {
      await this.#hash.update(bytes);
      return;
    }
    await this.#data.update(offset, bytes);
  }
}
