/** A source's file, read once from its start to its end while its digest is taken. */
import { ImageError } from "../image/parser.ts";
import { HashThread } from "./hash-thread.ts";
import type { SourceFile } from "./source.ts";

const READ_BYTES = 1024 * 1024;

interface Chunk {
  readonly offset: number;
  readonly bytes: Buffer;
}

/** Hands out ranges whose offsets never go back. Dispose of it in any case. */
export class ForwardReader implements AsyncDisposable {
  readonly #file: SourceFile;
  readonly #onRead: (bytes: number) => void;
  readonly #hash: HashThread;
  /** Neighbours; the first may hold the range that was asked for last. */
  #chunks: Chunk[] = [];
  #end = 0;
  #next: Promise<Buffer> | undefined;

  constructor(file: SourceFile, onRead: (bytes: number) => void) {
    this.#file = file;
    this.#onRead = onRead;
    const { expected } = file;
    this.#hash = new HashThread("sha256", ...(expected && expected.algorithm !== "sha256" ? [expected.algorithm] : []));
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

  /** Reads what is left and compares the digest. Resolves with the SHA-256 in hex; throws ImageError when another was expected. */
  async finish(): Promise<string> {
    while (await this.#read()) this.#chunks = [];
    if (this.#end !== this.#file.sizeBytes) throw this.endsEarly();
    const [digest = "", other] = await this.#hash.digest();
    const found = other ?? digest;
    const { expected, name } = this.#file;
    if (expected && expected.hex !== found) {
      throw new ImageError(`${name} is damaged: its ${expected.algorithm} is ${found}, and ${expected.hex} was promised`);
    }
    return digest;
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
    const bytes = await (this.#next ?? this.#file.read(this.#end, READ_BYTES));
    if (bytes.length === 0) return false;
    this.#chunks.push({ offset: this.#end, bytes });
    this.#end += bytes.length;
    // The next block is read while this one is worked on.
    this.#next = this.#file.read(this.#end, READ_BYTES);
    this.#next.catch(() => {});
    await this.#hash.update(bytes);
    this.#onRead(bytes.length);
    return true;
  }
}
