/** Frames packed for the wire: zstd, where the host can unpack it and the wire is what holds the copy up. Which it is, is tried. */
import { promisify } from "node:util";
import { constants, zstdCompress } from "node:zlib";

/** Pieces are packed at the same time, each as a zstd frame of its own: together they are one stream. Source: RFC 8878, section 3. */
const PIECE_BYTES = 1024 * 1024;

/** The quickest that still takes a half off ordinary files. */
const LEVEL = 1;

/** Of what shrinks by less the host is spared the unpacking. */
const WORTHWHILE_SHARE = 0.9;

/** Frames whose leaving is timed before a way is judged. */
const TRIAL_FRAMES = 3;

/** Frames that are sent in the way that was found quicker before the other one is tried again; twice as many after each trial that changed nothing. */
const FIRST_STRETCH_FRAMES = 64;
const MAX_STRETCH_FRAMES = 512;

/** How much quicker packed frames must be: packing costs both ends their processors. */
const MIN_GAIN = 1.15;

const compress = promisify<Uint8Array, { params: Readonly<Record<number, number>>; chunkSize: number }, Buffer>(zstdCompress);

/** The frame as zstd, on libuv's threads; undefined for one that does not shrink enough. The bytes must stay as they are until it resolves. */
export async function packFrame(bytes: Uint8Array): Promise<readonly Buffer[] | undefined> {
  const pieces: Promise<Buffer>[] = [];
  for (let at = 0; at < bytes.length; at += PIECE_BYTES) {
    const piece = bytes.subarray(at, at + PIECE_BYTES);
    pieces.push(compress(piece, { params: { [constants.ZSTD_c_compressionLevel]: LEVEL }, chunkSize: piece.length }));
  }
  const packed = await Promise.all(pieces);
  return packed.reduce((sum, { length }) => sum + length, 0) < bytes.length * WORTHWHILE_SHARE ? packed : undefined;
}

/** Finds out whether frames leave sooner packed or plain, by sending a few of each in turn, and keeps to the quicker way. Knows no wire: it is told. */
export class PackingChoice {
  #isPacked = false;
  #isTrial = true;
  #stretchFrames = FIRST_STRETCH_FRAMES;
  /** What was timed of the present way. */
  #frames = 0;
  #bytes = 0;
  #ms = 0;
  /** Bytes per millisecond of the other way, when it was tried last. */
  #otherRate: number | undefined;
  #last: { readonly isPacked: boolean; readonly leftMs: number } | undefined;

  /** Whether the next frame is to be packed. */
  get isPacked(): boolean {
    return this.#isPacked;
  }

  /** A frame of so many bytes, unpacked, has left: what lies between two of one kind is the time that the second took. */
  left(lengthBytes: number, isPacked: boolean, nowMs: number): void {
    const last = this.#last;
    this.#last = { isPacked, leftMs: nowMs };
    // Frames that were under way when the way changed tell about neither.
    if (last === undefined || last.isPacked !== isPacked || isPacked !== this.#isPacked) return;
    this.#frames++;
    this.#bytes += lengthBytes;
    this.#ms += nowMs - last.leftMs;
    if (this.#frames === (this.#isTrial ? TRIAL_FRAMES : this.#stretchFrames)) this.#decide();
  }

  #decide(): void {
    const rate = this.#bytes / Math.max(1, this.#ms);
    const other = this.#otherRate;
    [this.#frames, this.#bytes, this.#ms, this.#otherRate] = [0, 0, 0, rate];
    if (!this.#isTrial || other === undefined) {
      this.#isPacked = !this.#isPacked;
      this.#isTrial = true;
      return;
    }
    const [packed, plain] = this.#isPacked ? [rate, other] : [other, rate];
    const isPacked = packed > plain * MIN_GAIN;
    // The trial was of the way that is not the usual one.
    const isChange = isPacked === this.#isPacked;
    this.#stretchFrames = isChange ? FIRST_STRETCH_FRAMES : Math.min(MAX_STRETCH_FRAMES, this.#stretchFrames * 2);
    this.#isPacked = isPacked;
    this.#isTrial = false;
  }
}
