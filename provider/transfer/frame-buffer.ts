/** Gathers what is written to a volume into frames, the stretches of bytes that are sent, hashed and compared as one. */

/** Gaps up to this are filled with zeros rather than beginning a new frame. */
const MAX_FILLED_GAP_BYTES = 64 * 1024;

/** Bytes that belong at `offset`, in memory that threads can share: the taker's until it is released. */
export interface Frame {
  readonly offset: number;
  readonly bytes: Uint8Array<SharedArrayBuffer>;
}

/** One frame is filled at a time; those that were taken and released lend their memory to the next ones. */
export class FrameBuffer {
  readonly #frameBytes: number;
  readonly #spare: SharedArrayBuffer[] = [];
  #memory: Uint8Array<SharedArrayBuffer> | undefined;
  #offset = 0;
  #length = 0;

  /** A frame ends at the latest at the next multiple of `frameBytes`. */
  constructor(frameBytes: number) {
    this.#frameBytes = frameBytes;
  }

  /** Copies as many of the bytes as belong to this frame, and returns their number. When it is not all, the frame has to be taken before the rest. */
  add(offset: number, bytes: Uint8Array): number {
    if (this.#length > 0 && !this.#reaches(offset)) return 0;
    if (this.#length === 0) this.#offset = offset;
    this.#memory ??= new Uint8Array(this.#spare.pop() ?? new SharedArrayBuffer(this.#frameBytes));
    const room = this.#frameBytes - (offset % this.#frameBytes);
    const piece = bytes.subarray(0, room);
    this.#memory.set(piece, this.#length);
    this.#length += piece.length;
    return piece.length;
  }

  /** Whether the frame takes nothing more. */
  get isFull(): boolean {
    return this.#length > 0 && (this.#offset + this.#length) % this.#frameBytes === 0;
  }

  /** What was gathered; undefined when that is nothing. The next frame begins empty. */
  take(): Frame | undefined {
    const memory = this.#memory;
    if (memory === undefined || this.#length === 0) return undefined;
    const frame = { offset: this.#offset, bytes: memory.subarray(0, this.#length) };
    this.#memory = undefined;
    this.#length = 0;
    return frame;
  }

  /** Takes back the memory of a frame that nobody reads any more. */
  release(frame: Frame): void {
    this.#spare.push(frame.bytes.buffer);
  }

  /** Drops what was gathered, and all memory. */
  clear(): void {
    this.#length = 0;
    this.#memory = undefined;
    this.#spare.length = 0;
  }

  /** Whether the frame goes on at `offset`, or comes to it by a small gap, which is filled. */
  #reaches(offset: number): boolean {
    if (this.isFull) return false;
    const end = this.#offset + this.#length;
    const gap = offset - end;
    if (gap === 0) return true;
    const isNear = gap > 0 && gap <= MAX_FILLED_GAP_BYTES && Math.floor(offset / this.#frameBytes) === Math.floor(end / this.#frameBytes);
    if (!isNear) return false;
    this.#memory?.fill(0, this.#length, this.#length + gap);
    this.#length += gap;
    return true;
  }
}
