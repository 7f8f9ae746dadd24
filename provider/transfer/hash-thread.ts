/** The digest of a long stream, computed on a thread of its own: the main one has a wire to feed. */
import { extname } from "node:path";
import { Worker } from "node:worker_threads";
import type { HashAnswer, HashQuestion, HashWorkerData } from "./hash-worker.ts";

/** Bytes are handed over in pieces of this: one is filled while the others are hashed. */
const PIECE_BYTES = 1024 * 1024;
const PIECES = 3;

/** One stream that is hashed, given by `update` or in frames. Not for concurrent use. Dispose of it in any case. */
export class HashThread implements AsyncDisposable {
  readonly #worker: Worker;
  readonly #free: ArrayBuffer[] = Array.from({ length: PIECES }, () => new ArrayBuffer(PIECE_BYTES));
  #filled = 0;
  readonly #frames: { readonly resolve: (digest: string) => void; readonly reject: (error: Error) => void }[] = [];
  #digests: readonly string[] | undefined;
  #failure: Error | undefined;
  #wake: () => void = () => {};

  /** Algorithms of the whole stream's digests, as `crypto.createHash` names them; there may be none. */
  constructor(...algorithms: readonly string[]) {
    // Beside us it has our own kind of name: .ts as source, .js when compiled.
    const program = new URL(`./hash-worker${extname(import.meta.url)}`, import.meta.url);
    // It makes hardly any garbage, and what is not collected counts as memory of ours.
    const resourceLimits = { maxYoungGenerationSizeMb: 2, maxOldGenerationSizeMb: 32 };
    this.#worker = new Worker(program, { workerData: { algorithms } satisfies HashWorkerData, execArgv: [], resourceLimits });
    this.#worker.unref();
    this.#worker.on("message", (answer: HashAnswer) => {
      if ("memory" in answer) this.#free.push(answer.memory);
      else if ("frameDigest" in answer) this.#frames.shift()?.resolve(answer.frameDigest);
      else this.#digests = answer.digests;
      this.#wake();
    });
    const fail = (error: Error): void => {
      this.#failure ??= error;
      for (const frame of this.#frames.splice(0)) frame.reject(this.#failure);
      this.#wake();
    };
    this.#worker.on("error", fail);
    this.#worker.on("exit", () => fail(new Error("the thread that hashes has ended")));
  }

  /** Takes the next bytes; they are copied, and free again when the promise resolves. It waits while the thread is behind. */
  async update(bytes: Uint8Array): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      await this.#until(() => this.#free.length > 0);
      const memory = this.#free[0]!;
      const piece = bytes.subarray(done, done + PIECE_BYTES - this.#filled);
      new Uint8Array(memory).set(piece, this.#filled);
      this.#filled += piece.length;
      done += piece.length;
      if (this.#filled === PIECE_BYTES) this.#hand();
    }
  }

  /**
   * Takes the next bytes without copying them: they must stay as they are until the promise resolves. Resolves with the SHA-256 of these bytes alone,
   * in hex.
   */
  async frame(bytes: Uint8Array<SharedArrayBuffer>): Promise<string> {
    if (this.#failure) throw this.#failure;
    return new Promise<string>((resolve, reject) => {
      this.#frames.push({ resolve, reject });
      this.#ask({ frame: bytes });
    });
  }

  /** The digests in hex, in the order of the algorithms. To be called once, at the stream's end. */
  async digest(): Promise<readonly string[]> {
    if (this.#filled > 0) this.#hand();
    this.#ask("digest");
    await this.#until(() => this.#digests !== undefined);
    return this.#digests!;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#worker.terminate();
  }

  #hand(): void {
    const memory = this.#free.shift()!;
    this.#ask({ memory, length: this.#filled }, [memory]);
    this.#filled = 0;
  }

  #ask(question: HashQuestion, transfer: ArrayBuffer[] = []): void {
    this.#worker.postMessage(question, transfer);
  }

  async #until(isSo: () => boolean): Promise<void> {
    while (!isSo()) {
      if (this.#failure) throw this.#failure;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }
}
