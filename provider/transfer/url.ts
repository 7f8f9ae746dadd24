/** A source on a web server: its header by small ranges, its body by one request, which is taken up again where it broke. */
import type { IncomingMessage } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import { ConnectionError, DiskError } from "../errors.ts";
import { urlFileName, WebClient, type WebOptions, type WebSpec } from "./http.ts";
import { type Folder, MissingFile, Range, refusePath } from "./range.ts";

/** What the first request brings: the parsers' first block. */
const HEAD_BYTES = 256 * 1024;

/** Reads of at least this begin a request for all that follows; smaller ones are asked for alone. */
const STREAMED_READ_BYTES = 1024 * 1024;

/** Attempts that bring nothing before the way is given up, and the first pause between them; it doubles. */
const MAX_BARREN_ATTEMPTS = 5;
const FIRST_PAUSE_MS = 250;

/** A file on a web server and those beside it under their URLs. */
export class WebFolder implements Folder {
  readonly #url: URL;
  readonly #client: WebClient;
  readonly #open = new Map<string, Promise<WebFile>>();

  /** Throws DiskError (step "source") on a URL that is not read. Asks nothing yet. */
  constructor(spec: WebSpec, options: WebOptions = {}) {
    this.#client = new WebClient(spec, options);
    this.#url = new URL(spec.url);
  }

  async file(name: string): Promise<Range> {
    if (name !== "") refusePath(name);
    let opened = this.#open.get(name);
    if (!opened) {
      opened = WebFile.open(
        name === "" ? this.#client : this.#client.at(new URL(encodeURIComponent(name), this.#url)),
        name === "" ? urlFileName(this.#url) : name,
      );
      this.#open.set(name, opened);
    }
    return (await opened).range;
  }

  async assertUnchanged(): Promise<void> {
    for (const file of await Promise.all(this.#open.values())) await file.assertUnchanged();
  }

  async close(): Promise<void> {
    for (const opened of await Promise.allSettled(this.#open.values())) if (opened.status === "fulfilled") opened.value.close();
  }
}

/** What tells one state of a file on a server from another. */
interface Validator {
  /** What goes into If-Range; undefined when the server gives nothing that may. */
  readonly ifRange: string | undefined;
  readonly sizeBytes: number | undefined;
}

class WebFile {
  readonly #client: WebClient;
  readonly #validator: Validator;
  readonly #head: Buffer;
  readonly range: Range;
  #body: Body | undefined;

  private constructor(client: WebClient, name: string, found: Found) {
    this.#client = client;
    this.#validator = found;
    this.#head = found.head;
    this.range = new Range(
      name,
      { sizeBytes: found.sizeBytes, isForwardOnly: !found.hasRanges },
      { readAt: (offset, length) => this.#readAt(offset, length), readForward: (offset, length) => this.#readForward(offset, length) },
    );
  }

  /** Asks for the first bytes, which tells all that must be known. Throws MissingFile on 404 and 410, DiskError on any other refusal. */
  static async open(client: WebClient, name: string): Promise<WebFile> {
    return new WebFile(client, name, await retry(() => askFirst(client)));
  }

  async assertUnchanged(): Promise<void> {
    if (this.range.isForwardOnly || this.range.sizeBytes === 0) return;
    const answer = await retry(() => this.#ask(0, 1));
    answer.destroy();
  }

  close(): void {
    this.#body?.close();
  }

  async #readAt(offset: number, length: number): Promise<Buffer> {
    if (length <= 0) return Buffer.alloc(0);
    if (offset + length <= this.#head.length) return Buffer.from(this.#head.subarray(offset, offset + length));
    if (this.range.isForwardOnly) {
      throw new DiskError(`${this.#client.shown} gives no ranges, so that it cannot be read at ${offset}`, {
        step: "source",
        path: this.#client.shown,
      });
    }
    return retry(async () => {
      const answer = await this.#ask(offset, length);
      try {
        const bytes = await new Body(answer, offset).take(length);
        if (bytes.length < length) throw this.#broken("the connection ended early");
        return bytes;
      } catch (error) {
        throw error instanceof ConnectionError || error instanceof DiskError ? error : this.#broken(messageOf(error), error);
      } finally {
        answer.destroy();
      }
    });
  }

  /** One request serves all reads that follow each other; where it breaks, another goes on from there. */
  async #readForward(offset: number, length: number): Promise<Buffer> {
    if (length <= 0) return Buffer.alloc(0);
    if (this.#body?.offset !== offset) {
      if (!this.range.isForwardOnly && length < STREAMED_READ_BYTES) return this.#readAt(offset, length);
      if (this.range.isForwardOnly && offset !== 0) {
        throw new DiskError(`${this.#client.shown} gives no ranges, so that it cannot be read at ${offset}`, {
          step: "source",
          path: this.#client.shown,
        });
      }
      this.#body?.close();
      this.#body = undefined;
    }
    const parts: Buffer[] = [];
    let filled = 0;
    let barren = 0;
    while (filled < length) {
      try {
        this.#body ??= new Body(await this.#askRest(offset + filled), offset + filled);
        const bytes = await this.#body.take(length - filled);
        parts.push(bytes);
        filled += bytes.length;
        barren = 0;
        if (filled < length) {
          if (this.#validator.sizeBytes === undefined) break;
          throw this.#broken("the connection ended early");
        }
      } catch (error) {
        if (this.#body) {
          const rescued = this.#body.rescue(length - filled);
          parts.push(rescued);
          filled += rescued.length;
          if (rescued.length > 0) barren = 0;
        }
        this.#body?.close();
        this.#body = undefined;
        if (error instanceof DiskError || isFinal(error)) throw error;
        const broken = error instanceof ConnectionError ? error : this.#broken(messageOf(error), error);
        if (this.range.isForwardOnly || this.#validator.ifRange === undefined) {
          throw new ConnectionError(`${broken.message}; the server gives no way to go on from there: run up again`, {
            host: broken.host,
            phase: "closed",
            cause: broken,
          });
        }
        if (++barren >= MAX_BARREN_ATTEMPTS) throw broken;
        await sleep(FIRST_PAUSE_MS * 2 ** (barren - 1));
      }
    }
    return parts.length === 1 ? parts[0]! : Buffer.concat(parts);
  }

  /** All from `offset` on. */
  async #askRest(offset: number): Promise<IncomingMessage> {
    if (!this.range.isForwardOnly) return this.#ask(offset, undefined);
    const answer = await this.#client.get();
    if (answer.statusCode !== 200) throw refusal(this.#client, answer);
    return answer;
  }

  async #ask(offset: number, length: number | undefined): Promise<IncomingMessage> {
    const { ifRange, sizeBytes } = this.#validator;
    const last = length === undefined ? "" : String(offset + length - 1);
    const answer = await this.#client.get({ range: `bytes=${offset}-${last}`, ...(ifRange !== undefined && { "if-range": ifRange }) });
    // With If-Range a server that has something else by now sends all of that.
    if (answer.statusCode === 200 || answer.statusCode === 416) throw this.#changed(answer);
    if (answer.statusCode !== 206) throw refusal(this.#client, answer);
    const found = parseContentRange(answer);
    if (found?.start !== offset || (length !== undefined && found.end !== offset + length - 1)) {
      answer.destroy();
      throw new DiskError(`${this.#client.shown} answers with other bytes than it was asked for`, {
        step: "source",
        path: this.#client.shown,
      });
    }
    if (found.total !== sizeBytes || validatorOf(answer) !== ifRange) throw this.#changed(answer);
    return answer;
  }

  #changed(answer: IncomingMessage): DiskError {
    answer.destroy();
    return new DiskError(`${this.#client.shown} changed while it was read: run up again`, { step: "source", path: this.#client.shown });
  }

  #broken(reason: string, cause?: unknown): ConnectionError {
    return new ConnectionError(`cannot read ${this.#client.shown}: ${reason}`, { host: this.#client.shown, phase: "closed", cause });
  }
}

interface Found extends Validator {
  readonly head: Buffer;
  readonly hasRanges: boolean;
}

async function askFirst(client: WebClient): Promise<Found> {
  const answer = await client.get({ range: `bytes=0-${HEAD_BYTES - 1}` });
  try {
    if (answer.statusCode === 416 && /^bytes \*\/0$/.test(answer.headers["content-range"] ?? "")) {
      throw new DiskError(`${client.shown} is empty`, { step: "source", path: client.shown });
    }
    const hasRanges = answer.statusCode === 206;
    if (!hasRanges && answer.statusCode !== 200) throw refusal(client, answer);
    const encoding = answer.headers["content-encoding"];
    if (encoding !== undefined && encoding !== "identity") {
      throw new DiskError(`${client.shown} comes encoded as ${JSON.stringify(encoding)}, though that was not asked for`, {
        step: "source",
        path: client.shown,
      });
    }
    const range = hasRanges ? parseContentRange(answer) : undefined;
    if (hasRanges && (range === undefined || range.start !== 0 || range.total === undefined)) {
      throw new DiskError(`${client.shown} answers with a range that it was not asked for, or does not say its size`, {
        step: "source",
        path: client.shown,
      });
    }
    const declared = answer.headers["content-length"];
    const sizeBytes = range?.total ?? (declared === undefined ? undefined : Number(declared));
    const wanted = Math.min(HEAD_BYTES, sizeBytes ?? HEAD_BYTES);
    const head = await new Body(answer, 0).take(wanted);
    if (head.length < wanted && sizeBytes !== undefined) {
      throw new ConnectionError(`cannot read ${client.shown}: the connection ended early`, { host: client.shown, phase: "closed" });
    }
    return { head, hasRanges, sizeBytes, ifRange: validatorOf(answer) };
  } catch (error) {
    if (error instanceof DiskError || error instanceof ConnectionError) throw error;
    throw new ConnectionError(`cannot read ${client.shown}: ${messageOf(error)}`, { host: client.shown, phase: "closed", cause: error });
  } finally {
    answer.destroy();
  }
}

/** What may stand in If-Range: a strong ETag, else the time of the last change. Source: RFC 9110, sections 8.8 and 13.1.5. */
function validatorOf({ headers }: IncomingMessage): string | undefined {
  return headers.etag !== undefined && !headers.etag.startsWith("W/") ? headers.etag : headers["last-modified"];
}

function parseContentRange({ headers }: IncomingMessage) {
  const match = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15}|\*)$/.exec(headers["content-range"] ?? "");
  return match ? { start: Number(match[1]), end: Number(match[2]), total: match[3] === "*" ? undefined : Number(match[3]) } : undefined;
}

/** The sentence for a status that brings no bytes. */
function refusal(client: WebClient, answer: IncomingMessage): Error {
  const { statusCode = 0 } = answer;
  answer.destroy();
  const detail = { step: "source", path: client.shown } as const;
  if (statusCode === 404 || statusCode === 410) return new MissingFile(`there is nothing at ${client.shown} (HTTP ${statusCode})`, detail);
  if (statusCode === 401 || statusCode === 403) {
    return new DiskError(
      `${client.shown} is refused without other rights (HTTP ${statusCode}): give what it wants as \`headers\`, such as Authorization`,
      detail,
    );
  }
  const words = `${client.shown} answers HTTP ${statusCode}`;
  if (statusCode === 429 || statusCode >= 500) return new ConnectionError(words, { host: client.shown, phase: "connect" });
  return new DiskError(words, detail);
}

/** Tries again what a network breaks. */
async function retry<T>(ask: () => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ConnectionError) || isFinal(error) || error.phase === "connect" || attempt === MAX_BARREN_ATTEMPTS)
        throw error;
      await sleep(FIRST_PAUSE_MS * 2 ** (attempt - 1));
    }
  }
}

/** Stopped by us: no reason to try again. */
function isFinal(error: unknown): boolean {
  return error instanceof ConnectionError && error.phase === "aborted";
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The body of an answer, from an offset of the file on. */
class Body {
  readonly #answer: IncomingMessage;
  readonly #chunks: AsyncIterator<Buffer>;
  #parts: Buffer[] = [];
  #heldBytes = 0;
  #offset: number;

  constructor(answer: IncomingMessage, offset: number) {
    this.#answer = answer;
    this.#chunks = (answer as AsyncIterable<Buffer>)[Symbol.asyncIterator]();
    this.#offset = offset;
  }

  /** Where the next byte lies in the file. */
  get offset(): number {
    return this.#offset;
  }

  /** The next `length` bytes, fewer only at the end. Throws what breaks the connection; what had come by then is for `rescue`. */
  async take(length: number): Promise<Buffer> {
    while (this.#heldBytes < length) {
      const { done, value } = await this.#chunks.next();
      if (done) break;
      this.#parts.push(value);
      this.#heldBytes += value.length;
    }
    return this.rescue(length);
  }

  /** At most `length` of the bytes that have come. */
  rescue(length: number): Buffer {
    const all = this.#parts.length === 1 ? this.#parts[0]! : Buffer.concat(this.#parts);
    const bytes = all.subarray(0, length);
    const rest = all.subarray(length);
    this.#parts = rest.length > 0 ? [rest] : [];
    this.#heldBytes = rest.length;
    this.#offset += bytes.length;
    return bytes;
  }

  close(): void {
    this.#answer.on("error", () => {});
    this.#answer.destroy();
  }
}
