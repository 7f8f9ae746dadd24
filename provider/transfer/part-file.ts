/** A disk on its way: the part file on the host, written in frames that are hashed at both ends, and its publication. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { CommandError, ConnectionError, DiskError } from "../errors.ts";
import type { Host, HostStream } from "../host/hosts.ts";
import { FrameBuffer } from "./frame-buffer.ts";
import { HashThread } from "./hash-thread.ts";
import { PackingChoice, packFrame } from "./packing.ts";
import { type GuestOnHost, type Part, pathTaken } from "./part.ts";
import { RECEIVER } from "./receiver.ts";
import { type Throttle, throttled } from "./throttle.ts";

/** Frames end at multiples of this: large enough that the host's two processes a frame cost nothing, small enough to hold a few. */
export const FRAME_BYTES = 8 * 1024 * 1024;

/** Up to this a frame is hashed in place. */
const MAX_SMALL_FRAME_BYTES = 64 * 1024;

/** Frames sent and not yet hashed by the host. */
const MAX_FRAMES_IN_FLIGHT = 3;

/** The most extents of a disk's content that a host may tell: more than a file system makes of any disk. */
const MAX_EXTENTS = 1 << 22;

const MAX_ANSWER_CHARACTERS = 1000;

/** How long a dying predecessor may keep its lock, unless told otherwise. */
const LOCK_PATIENCE_MS = 15_000;

/** The folder inside a pool's that holds what is not finished. A directory pool does not descend into it. */
export const WORK_FOLDER = ".virtlift";

export interface PartFileOptions {
  /** Names the part: the same import finds it again, two different ones never meet. A plain file name. */
  readonly id: string;
  /** Absolute path of the volume-to-be. */
  readonly finalPath: string;
  readonly signal: AbortSignal;
  /** How long to wait for the lock. Default 15,000. */
  readonly lockPatienceMs?: number;
  /** Whether `writtenDigest` will be asked for. Default false. */
  readonly hashesAll?: boolean;
  /** What frames wait for. Default: nothing. */
  readonly throttle?: Throttle | undefined;
}

/** Opens the part file of an import on the host, taking its lock. Throws PathTaken when the final path exists, DiskError when another writer holds the lock. */
export async function openPartFile(host: Pick<Host, "label" | "isLocal" | "stream">, options: PartFileOptions): Promise<PartFile> {
  const work = posix.join(posix.dirname(options.finalPath), WORK_FOLDER);
  const deadline = Date.now() + (options.lockPatienceMs ?? LOCK_PATIENCE_MS);
  for (;;) {
    const stream = await host.stream(["sh", "-c", RECEIVER, "virtlift", work, options.id, options.finalPath], { signal: options.signal });
    const part = new PartFile(stream, host, options);
    const state = await part.begin();
    if (state === "ready") return part;
    await part[Symbol.asyncDispose]();
    if (state === "exists") throw pathTaken(options.finalPath, host.label);
    if (Date.now() > deadline) {
      throw new DiskError(
        `another import is writing ${options.finalPath} on ${host.label} right now (it holds ${posix.join(work, `${options.id}.lock`)}): let it end or stop it, then run up again`,
        { step: "transfer", path: options.finalPath },
      );
    }
    await sleep(500, undefined, { signal: options.signal });
  }
}

/** An open part file. One frame is filled while the last one is sent; `write` waits when the host is behind. Not for concurrent use. */
export class PartFile implements Part {
  readonly #stream: HostStream;
  readonly #host: string;
  readonly #path: string;
  readonly #throttle: Throttle | undefined;
  readonly #signal: AbortSignal;
  readonly #answers: Answers;
  /** Digests of what the host holds from an earlier run, by `offset length`. */
  readonly #held = new Map<string, string>();
  /** Digests of what was sent and not yet confirmed, by `offset length`. */
  readonly #sent = new Map<string, Promise<string>>();
  readonly #frames = new FrameBuffer(FRAME_BYTES);
  #hashesAll: boolean;
  #hash: HashThread | undefined;
  /** Settles when the transport has taken the last frame. */
  #sending: Promise<void> = Promise.resolve();
  #abandonWrite: (error: unknown) => void = () => {};
  readonly #isLocal: boolean;
  /** Absent where nothing can be packed, or need not be. */
  #packing: PackingChoice | undefined;
  /** Where this run's frames lie, in the order in which they came. */
  readonly #placed: { readonly offset: number; lengthBytes: number }[] = [];
  #endBytes = 0;
  #isSized = false;
  #sentBytes = 0;
  #keptBytes = 0;

  constructor(
    stream: HostStream,
    host: Pick<Host, "label" | "isLocal">,
    options: Pick<PartFileOptions, "finalPath" | "hashesAll" | "throttle" | "signal">,
  ) {
    this.#stream = stream;
    this.#host = host.label;
    this.#isLocal = host.isLocal;
    this.#path = options.finalPath;
    this.#throttle = options.throttle;
    this.#signal = options.signal;
    this.#hashesAll = options.hashesAll === true;
    // Whatever breaks the stream settles `done`; an unheard "error" event would end the process.
    stream.io.on("error", () => {});
    // A write that is under way when its process dies never calls back.
    stream.done.catch((error: unknown) => this.#abandonWrite(error));
    this.#answers = new Answers(stream, (error) => this.#explain(error));
  }

  /** Bytes that went over the wire. */
  get sentBytes(): number {
    return this.#sentBytes;
  }

  /** Bytes that the host held already, proven by their hash. */
  get keptBytes(): number {
    return this.#keptBytes;
  }

  /** The receiver's first word. */
  async begin(): Promise<"ready" | "busy" | "exists"> {
    const answer = await this.#answers.next();
    if (answer === "ready zstd") {
      if (!this.#isLocal) this.#packing = new PackingChoice();
      return "ready";
    }
    if (answer === "ready" || answer === "busy" || answer === "exists") return answer;
    throw this.#unexpected(answer);
  }

  /** Learns which frames an earlier run left, hashed anew by the host. Call it before the first write. */
  async resume(): Promise<{ readonly frames: number }> {
    await this.#send("resume\n");
    for (;;) {
      const answer = await this.#answers.next();
      if (answer === "ok") return { frames: this.#held.size };
      const have = parseHave(answer);
      if (!have) throw this.#unexpected(answer);
      this.#held.set(have.key, have.digest);
    }
  }

  /** Writes bytes at an offset. Contiguous bytes make one frame; the buffer is free again when the promise resolves. */
  async write(offset: number, bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length;) {
      at += this.#frames.add(offset + at, bytes.subarray(at));
      if (at < bytes.length || this.#frames.isFull) await this.#flush();
    }
  }

  /** Sends what is held, and waits until the host has confirmed the hash of every frame and made it durable. */
  async settle(): Promise<void> {
    await this.#flush();
    while (this.#sent.size > 0) await this.#confirm();
    this.#frames.clear();
    await this.#command("sync\n");
  }

  /** Sets the size of the part, for what ends in a hole. */
  async setSize(sizeBytes: number): Promise<void> {
    await this.#clearGaps(sizeBytes);
    await this.#command(`size ${sizeBytes}\n`);
    this.#isSized = true;
  }

  async allocate(sizeBytes: number): Promise<void> {
    await this.setSize(sizeBytes);
    await this.#command(`allocate ${sizeBytes}\n`);
  }

  /** The SHA-256 of what the host holds from `offset` to the end, in hex. */
  async digest(offset: number): Promise<string> {
    await this.#send(`digest ${offset}\n`);
    const answer = await this.#answers.next();
    const digest = /^digest ([0-9a-f]{64})$/.exec(answer)?.[1];
    if (digest === undefined) throw this.#unexpected(answer);
    return digest;
  }

  async writtenDigest(): Promise<string> {
    const [digest] = (await this.#hash?.digest()) ?? [];
    if (digest === undefined) throw new Error("the part was not opened to hash all that is written, or nothing was");
    this.#hashesAll = false;
    await this.#hash?.[Symbol.asyncDispose]();
    this.#hash = undefined;
    return digest;
  }

  async readGuest(format: "qcow2" | "raw"): Promise<GuestOnHost> {
    await this.#send(`guest ${format}\n`);
    const extents: { offset: number; lengthBytes: number }[] = [];
    for (;;) {
      const answer = await this.#answers.next();
      const [verb, ...numbers] = answer.split(" ");
      const [first = Number.NaN, second = Number.NaN] = numbers.map(Number);
      if (verb === "data" && second > 0 && extents.length < MAX_EXTENTS) extents.push({ offset: first, lengthBytes: second });
      else if (verb === "guest" && first >= 0)
        return { sizeBytes: first, extents, digest: (offset, lengthBytes) => this.#guestDigest(offset, lengthBytes) };
      else throw this.#unexpected(answer);
    }
  }

  /** Keeps `stamp` beside the part, bound to its inode: for formats that have no room for one. */
  async stamp(stamp: Uint8Array): Promise<void> {
    await this.#command(Buffer.concat([Buffer.from(`stamp ${stamp.length}\n`), stamp]));
  }

  async closingTime(): Promise<number> {
    return Math.floor(Date.now() / 1000);
  }

  /**
   * Has the host run a script of sh, which knows the part as `"$part"` and a file beside it as `"$fetched"`; it should end in `exec`, so that it can be
   * stopped. `input` is its stdin, of at most some KiB; neither is in any argv. Throws DiskError with the last of what it wrote when it fails.
   */
  async run(script: string, input = ""): Promise<void> {
    const bytes = [script, input].map((text) => Buffer.from(text));
    await this.#command(Buffer.concat([Buffer.from(`run ${bytes[0]!.length} ${bytes[1]!.length}\n`), ...bytes]));
    this.#isSized = true;
  }

  /** Links the part to its final path, modified at `modifiedSeconds` (since 1970). Throws PathTaken when the path exists by now: the part is discarded. */
  async publish(modifiedSeconds: number): Promise<{ readonly allocatedBytes: number }> {
    // An earlier run of a longer source may have left an end.
    if (!this.#isSized) await this.setSize(this.#endBytes);
    await this.#send(`publish ${modifiedSeconds}\n`);
    const answer = await this.#answers.next();
    if (answer === "exists") {
      await this.discard();
      throw pathTaken(this.#path, this.#host);
    }
    const allocated = /^published (\d+)$/.exec(answer)?.[1];
    if (allocated === undefined) throw this.#unexpected(answer);
    return { allocatedBytes: Number(allocated) };
  }

  /** Removes the part and all that belongs to it. */
  async discard(): Promise<void> {
    this.#frames.clear();
    while (this.#sent.size > 0) await this.#confirm();
    await this.#command("discard\n");
  }

  /** Lets go of the lock. What was not published or discarded stays for the next run. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#stream.io.end();
    await this.#stream[Symbol.asyncDispose]();
    await this.#hash?.[Symbol.asyncDispose]();
  }

  async #guestDigest(offset: number, lengthBytes: number): Promise<string> {
    await this.#send(`content ${offset} ${lengthBytes}\n`);
    const answer = await this.#answers.next();
    const have = parseHave(answer);
    if (!have) throw this.#unexpected(answer);
    return have.digest;
  }

  /** Makes zeros of what this run did not write: an earlier one, perhaps of another version of the source, may have. */
  async #clearGaps(sizeBytes: number): Promise<void> {
    await this.#flush();
    if (this.#held.size === 0) return;
    let at = 0;
    for (const { offset, lengthBytes } of this.#placed.toSorted((a, b) => a.offset - b.offset)) {
      if (offset > at) await this.#command(`clear ${at} ${offset - at}\n`);
      at = Math.max(at, offset + lengthBytes);
    }
    if (sizeBytes > at) await this.#command(`clear ${at} ${sizeBytes - at}\n`);
  }

  async #flush(): Promise<void> {
    const frame = this.#frames.take();
    if (frame === undefined) return;
    const { offset, bytes } = frame;
    const key = `${offset} ${bytes.length}`;
    const digest = this.#digestOf(bytes);
    // Awaited when the host has answered; until then its failure must not be a stray one.
    digest.catch(() => {});
    const last = this.#placed.at(-1);
    if (last && last.offset + last.lengthBytes === offset) last.lengthBytes += bytes.length;
    else this.#placed.push({ offset, lengthBytes: bytes.length });
    this.#endBytes = Math.max(this.#endBytes, offset + bytes.length);
    if (this.#held.has(key) && this.#held.get(key) === (await digest)) {
      this.#keptBytes += bytes.length;
      this.#frames.release(frame);
      return;
    }
    while (this.#sent.size >= MAX_FRAMES_IN_FLIGHT) await this.#confirm();
    // Packed while the frame before it leaves.
    const isPacked = this.#packing?.isPacked === true && bytes.length > MAX_SMALL_FRAME_BYTES;
    // What cannot be packed goes as it is.
    const packing = isPacked ? packFrame(bytes).catch(() => undefined) : undefined;
    await this.#afterSending();
    this.#sent.set(key, digest);
    this.#sending = this.#sendFrame(key, bytes, packing);
    // Who sends or waits next hears of a failure.
    void Promise.allSettled([this.#sending, digest]).then(() => this.#frames.release(frame));
  }

  async #digestOf(bytes: Uint8Array<SharedArrayBuffer>): Promise<string> {
    // A stamp or a header is not worth a thread.
    const isAlone = this.#hash === undefined && !this.#hashesAll && bytes.length <= MAX_SMALL_FRAME_BYTES;
    if (isAlone) return createHash("sha256").update(bytes).digest("hex");
    this.#hash ??= new HashThread(...(this.#hashesAll ? ["sha256"] : []));
    return this.#hash.frame(bytes);
  }

  async #confirm(): Promise<void> {
    const answer = await this.#answers.next();
    const have = parseHave(answer);
    const digest = have && this.#sent.get(have.key);
    if (!digest) throw this.#unexpected(answer);
    this.#sent.delete(have.key);
    if (have.digest !== (await digest)) {
      throw new DiskError(
        `${this.#path} on ${this.#host} does not hold the bytes that were sent (frame ${have.key}): its storage or memory is faulty`,
        {
          step: "verify",
          path: this.#path,
        },
      );
    }
  }

  async #command(command: string | Uint8Array): Promise<void> {
    await this.#send(command);
    const answer = await this.#answers.next();
    if (answer !== "ok") throw this.#unexpected(answer);
  }

  /** Resolves when the transport has taken the bytes, and all before them. */
  async #send(bytes: string | Uint8Array): Promise<void> {
    await this.#afterSending(() => this.#write(bytes));
  }

  /** Does it when the last frame has left. */
  async #afterSending(work?: () => Promise<void>): Promise<void> {
    try {
      await this.#sending;
      await work?.();
    } catch (error) {
      // The receiver's last line says why it hung up; the broken pipe is only how we noticed.
      for (;;) {
        const answer = await this.#answers.next();
        if (!parseHave(answer)) throw this.#unexpected(answer, error);
      }
    }
  }

  async #sendFrame(key: string, bytes: Uint8Array, packing: Promise<readonly Uint8Array[] | undefined> | undefined): Promise<void> {
    const packed = await packing;
    const pieces = packed ?? [bytes];
    const wireBytes = pieces.reduce((sum, { length }) => sum + length, 0);
    await this.#write(packed === undefined ? `write ${key}\n` : `unpack ${key} ${wireBytes}\n`);
    for (const piece of pieces) for await (const part of throttled(piece, this.#throttle, this.#signal)) await this.#write(part);
    this.#sentBytes += wireBytes;
    if (bytes.length > MAX_SMALL_FRAME_BYTES) this.#packing?.left(bytes.length, packing !== undefined, performance.now());
  }

  /** One write at a time. */
  async #write(bytes: string | Uint8Array): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#abandonWrite = reject;
      this.#stream.io.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  #unexpected(given: string, cause?: unknown): DiskError | ConnectionError {
    // Whatever went wrong there may have put any bytes in it.
    const answer = given.slice(0, MAX_ANSWER_CHARACTERS).replaceAll(/[\p{Cc}\uFFFD]/gu, "?");
    if (answer.startsWith("broken ")) {
      const message = `cannot write ${this.#path} on ${this.#host}: ${answer.slice(7).trim()}; what was brought over is kept, and the next up goes on`;
      return new ConnectionError(message, { host: this.#host, phase: "closed", cause });
    }
    const reason = answer.startsWith("error ") ? answer.slice(6).trim() : `the receiver answered ${JSON.stringify(answer)}`;
    return new DiskError(`cannot write ${this.#path} on ${this.#host}: ${reason}`, {
      step: "transfer",
      path: this.#path,
      ...(cause !== undefined && { cause }),
    });
  }

  #explain(error: unknown): Error {
    if (error instanceof CommandError && error.stderrTail.trim() !== "") {
      return new DiskError(`cannot write ${this.#path} on ${this.#host}: ${error.stderrTail.trim().replaceAll("\n", " ")}`, {
        step: "transfer",
        path: this.#path,
        cause: error,
      });
    }
    return error instanceof Error ? error : new Error(String(error));
  }
}

function parseHave(answer: string): { readonly key: string; readonly digest: string } | undefined {
  const match = /^have (\d+ \d+) ([0-9a-f]{64})$/.exec(answer);
  return match ? { key: match[1]!, digest: match[2]! } : undefined;
}

/** The receiver's lines, one at a time; rejects when it ended instead of answering. */
class Answers {
  readonly #explain: (error: unknown) => Error;
  readonly #lines: string[] = [];
  #end: Error | undefined;
  #wake: () => void = () => {};

  constructor(stream: HostStream, explain: (error: unknown) => Error) {
    this.#explain = explain;
    const lines = createInterface({ input: stream.io, crlfDelay: Infinity });
    lines.on("line", (line) => {
      this.#lines.push(line);
      this.#wake();
    });
    const end = (reason: Error) => {
      this.#end ??= reason;
      this.#wake();
    };
    // After a clean end every line was delivered; a broken stream may never close its reader.
    lines.on("close", () => end(new Error("the receiver on the host ended before its work was done")));
    lines.on("error", () => {});
    stream.done.catch((error: unknown) => end(this.#explain(error)));
  }

  async next(): Promise<string> {
    for (;;) {
      const line = this.#lines.shift();
      if (line !== undefined) return line;
      if (this.#end !== undefined) throw this.#end;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }
}
