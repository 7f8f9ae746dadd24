/** The last proof of an import: the guest's disk as the host's qemu-img reads it, against the source read a second time, range by range. */
import { createHash, type Hash } from "node:crypto";
import { DiskError } from "../errors.ts";
import type { Run, RunList } from "../image/image.ts";
import { inflateRun } from "./decode.ts";
import type { GuestOnHost } from "./part.ts";
import type { OpenSource } from "./source.ts";

/** Ranges are cut here: how precisely a difference is told. */
const RANGE_BYTES = 16 * 1024 * 1024;

/** Ranges with less than this between them become one. */
const MAX_GAP_BYTES = 1024 * 1024;

const PIECE_BYTES = 1024 * 1024;
/** Pieces that are read and inflated ahead of the hash. */
const PIECES_AHEAD = 16;

const ZEROS = Buffer.alloc(MAX_GAP_BYTES);

/** A part of the guest's disk. */
interface Range {
  readonly offset: number;
  readonly end: number;
}

interface Piece {
  readonly offset: number;
  readonly bytes: Buffer;
}

export interface ContentOptions {
  readonly capacityBytes: number;
  /** Where the disk is, for messages. */
  readonly place: string;
  readonly path: string;
  readonly signal: AbortSignal;
}

/**
 * Compares by SHA-256 all ranges that the source or the host has data in; what neither has is zeros on both sides. Knows nothing of how the volume
 * was written. The cost is a second reading of the source.
 *
 * Throws DiskError (step "verify") naming the first range that differs, ImageError when the source can no more be read.
 */
export async function verifyContent(guest: GuestOnHost, source: OpenSource, runs: RunList, options: ContentOptions): Promise<void> {
  const { capacityBytes, place, path, signal } = options;
  const differs = (what: string): DiskError =>
    new DiskError(`${path} on ${place} is not what its source is: ${what}; its storage, its memory or its qemu-img is faulty`, {
      step: "verify",
      path,
    });
  if (guest.sizeBytes !== capacityBytes) throw differs(`it has ${guest.sizeBytes} bytes for its guest instead of ${capacityBytes}`);
  const content = new GuestContent(source, runs);
  try {
    for (const range of ranges(runs, guest)) {
      signal.throwIfAborted();
      const [theirs, ours] = await Promise.all([guest.digest(range.offset, range.end - range.offset), content.digest(range)]);
      if (theirs !== ours) throw differs(`its guest would read other bytes between ${range.offset} and ${range.end}`);
    }
  } finally {
    await content.close();
  }
}

/** Everything that either side has data in, ascending, joined where little lies between, cut at multiples of RANGE_BYTES. */
function* ranges(runs: RunList, guest: GuestOnHost): Generator<Range, void> {
  let current: Range | undefined;
  for (const { offset, end } of merged(
    source(runs),
    guest.extents.map(({ offset, lengthBytes }) => ({ offset, end: offset + lengthBytes })),
  )) {
    if (current !== undefined && offset <= current.end + MAX_GAP_BYTES) {
      current = { offset: current.offset, end: Math.max(current.end, end) };
    } else {
      if (current !== undefined) yield* cut(current);
      current = { offset, end };
    }
  }
  if (current !== undefined) yield* cut(current);
}

function* source(runs: RunList): Generator<Range, void> {
  for (const { virtualOffset, lengthBytes } of runs.inGuestOrder()) yield { offset: virtualOffset, end: virtualOffset + lengthBytes };
}

/** Two ascending sequences as one. */
function* merged(some: Iterable<Range>, others: readonly Range[]): Generator<Range, void> {
  let next = 0;
  for (const range of some) {
    for (let other = others[next]; other !== undefined && other.offset < range.offset; other = others[++next]) yield other;
    yield range;
  }
  yield* others.slice(next);
}

function* cut(range: Range): Generator<Range, void> {
  for (let { offset } = range; offset < range.end;) {
    const end = Math.min(range.end, (Math.floor(offset / RANGE_BYTES) + 1) * RANGE_BYTES);
    yield { offset, end };
    offset = end;
  }
}

/** The guest's disk as the source has it, hashed from its start to its end. */
class GuestContent {
  readonly #pieces: AsyncGenerator<Piece, void>;
  #piece: IteratorResult<Piece, void> | undefined;

  constructor(source: OpenSource, runs: RunList) {
    this.#pieces = readPieces(source, runs);
  }

  /** The SHA-256 of a range in hex. Ranges ascend, and leave out no data. */
  async digest(range: Range): Promise<string> {
    const hash = createHash("sha256");
    for (let at = range.offset; at < range.end;) {
      this.#piece ??= await this.#pieces.next();
      const piece = this.#piece.done ? undefined : this.#piece.value;
      if (piece === undefined || piece.offset > at) {
        const end = Math.min(range.end, piece?.offset ?? range.end);
        addZeros(hash, end - at);
        at = end;
        continue;
      }
      const bytes = piece.bytes.subarray(at - piece.offset, range.end - piece.offset);
      hash.update(bytes);
      at += bytes.length;
      if (at >= piece.offset + piece.bytes.length) this.#piece = undefined;
    }
    return hash.digest("hex");
  }

  async close(): Promise<void> {
    await this.#pieces.return();
  }
}

function addZeros(hash: Hash, lengthBytes: number): void {
  for (let left = lengthBytes; left > 0; left -= ZEROS.length) hash.update(ZEROS.subarray(0, left));
}

/** All guest data in the order of the guest's disk. */
async function* readPieces(source: OpenSource, runs: RunList): AsyncGenerator<Piece, void> {
  const ahead: Promise<Piece>[] = [];
  try {
    for (const run of runs.inGuestOrder()) {
      for (const piece of startReading(source, run)) {
        // Awaited in its turn; until then its failure must not be a stray one.
        piece.catch(() => {});
        ahead.push(piece);
        if (ahead.length >= PIECES_AHEAD) yield await ahead.shift()!;
      }
    }
    while (ahead.length > 0) yield await ahead.shift()!;
  } finally {
    await Promise.allSettled(ahead);
  }
}

function* startReading(source: OpenSource, run: Run): Generator<Promise<Piece>, void> {
  const file = source.files[run.file]!;
  if (run.encoding !== "plain") {
    yield file
      .read(run.fileOffset, run.storedBytes)
      .then(async (stored) => inflateRun(run, stored, source.image.virtualSizeBytes))
      .then((bytes) => ({ offset: run.virtualOffset, bytes }));
    return;
  }
  for (let at = 0; at < run.lengthBytes; at += PIECE_BYTES) {
    yield file
      .read(run.fileOffset + at, Math.min(PIECE_BYTES, run.lengthBytes - at))
      .then((bytes) => ({ offset: run.virtualOffset + at, bytes }));
  }
}
