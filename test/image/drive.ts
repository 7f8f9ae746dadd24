/** Answers the asks of a parser from buffers or files, within bounds, and reads the guest's disk by a parsed image: the reference that tests compare. */
import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { inflateRawSync, inflateSync, zstdDecompressSync } from "node:zlib";
import type { DiskImage, Run, RunList } from "../../provider/image/image.ts";
import { MAX_READ_BYTES, type Parser } from "../../provider/image/parser.ts";
import { zstdFrameLength } from "../../provider/image/zstd.ts";

/** Where asks are answered from: "" is the image, any other name a file beside it. */
export interface Source {
  read(file: string, offset: number, length: number): Uint8Array;
  size(file: string): number | undefined;
}

/** What a parser may spend before the test fails. */
export interface Budget {
  readonly asks: number;
  readonly bytes: number;
}

const DEFAULT_BUDGET: Budget = { asks: 100_000, bytes: 1024 * 1024 * 1024 };

/** A source of bytes in memory: the image, and the files beside it by name. */
export function fromBytes(image: Uint8Array, beside: Readonly<Record<string, Uint8Array>> = {}): Source {
  const find = (file: string): Uint8Array | undefined => (file === "" ? image : beside[file]);
  return {
    read: (file, offset, length) => find(file)?.slice(offset, offset + length) ?? new Uint8Array(0),
    size: (file) => find(file)?.length,
  };
}

/** A source of the file at `path` and of those in its folder. Fails the test when a parser asks for a name that is no plain basename. */
export function fromFile(path: string): Source {
  const locate = (file: string): string => {
    if (file !== basename(file)) throw new Error(`a parser asked for ${file}, which is no plain basename`);
    return file === "" ? path : join(dirname(path), file);
  };
  const withFile = <T>(file: string, use: (descriptor: number) => T): T | undefined => {
    let descriptor: number;
    try {
      descriptor = openSync(locate(file), "r");
    } catch (error) {
      if (error instanceof Error && "code" in error && error.code === "ENOENT") return undefined;
      throw error;
    }
    try {
      return use(descriptor);
    } finally {
      closeSync(descriptor);
    }
  };
  return {
    read(file, offset, length) {
      const bytes = Buffer.alloc(length);
      return bytes.subarray(0, withFile(file, (descriptor) => readSync(descriptor, bytes, 0, length, offset)) ?? 0);
    },
    size: (file) => withFile(file, (descriptor) => fstatSync(descriptor).size),
  };
}

/** Runs a parser to its end. Throws what it throws, and an Error when it asks for too much or for nonsense. */
export function drive<T>(parser: Parser<T>, source: Source, budget: Budget = DEFAULT_BUDGET): T {
  let asks = 0;
  let bytes = 0;
  let step = parser.next();
  while (step.done !== true) {
    const ask = step.value;
    if (++asks > budget.asks) throw new Error(`the parser asked more than ${budget.asks} times`);
    if (ask.kind === "size") {
      step = parser.next(source.size(ask.file));
      continue;
    }
    if (!Number.isSafeInteger(ask.offset) || ask.offset < 0) throw new Error(`the parser read at ${ask.offset}`);
    if (!Number.isSafeInteger(ask.length) || ask.length < 0 || ask.length > MAX_READ_BYTES)
      throw new Error(`the parser read ${ask.length} bytes`);
    bytes += ask.length;
    if (bytes > budget.bytes) throw new Error(`the parser read more than ${budget.bytes} bytes`);
    step = parser.next(source.read(ask.file, ask.offset, ask.length));
  }
  return step.value;
}

/** The bytes that a run gives the guest: `run.lengthBytes` of them. */
export function readRun(image: DiskImage, run: Run, source: Source): Uint8Array {
  const stored = source.read(image.files[run.file]?.name ?? "", run.fileOffset, run.storedBytes);
  if (stored.length !== run.storedBytes) throw new Error(`a run at ${run.fileOffset} lies outside its file`);
  return decode(run, stored).subarray(0, run.lengthBytes);
}

/** The whole guest's disk, read by the runs. */
export function readGuest(image: DiskImage, source: Source, runs: RunList = drive(image.runs(), source)): Buffer {
  const guest = Buffer.alloc(image.virtualSizeBytes);
  for (const run of runs) {
    const bytes = readRun(image, run, source);
    if (bytes.length !== run.lengthBytes)
      throw new Error(`the run at guest offset ${run.virtualOffset} gave ${bytes.length} of ${run.lengthBytes} bytes`);
    guest.set(bytes, run.virtualOffset);
  }
  return guest;
}

function decode(run: Run, stored: Uint8Array): Uint8Array {
  switch (run.encoding) {
    case "plain":
      return stored;
    case "grain":
      return inflateSync(stored.subarray(12));
    case "deflate":
      return inflateRawSync(stored);
    case "zstd":
      return zstdDecompressSync(stored.subarray(0, zstdFrameLength(stored)));
  }
}
