/** Where zstd frames end: what inflates them takes what follows for another frame, or leaves it out. Source: RFC 8878, section 3.1.1. */
import { viewOf } from "./bytes.ts";
import { ImageError } from "./parser.ts";

const FRAME_MAGIC = 0xfd2f_b528;
const BLOCK_HEADER_BYTES = 3;
const CHECKSUM_BYTES = 4;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4];
const CONTENT_SIZE_BYTES = [0, 2, 4, 8];
const RLE_BLOCK = 1;

/**
 * The length of the frame that `bytes` begin with; what follows it is not looked at. A `zstd` run holds one frame and then whatever lies behind.
 * Throws ImageError when they begin with no frame, or end before it does.
 */
export function zstdFrameLength(bytes: Uint8Array): number {
  const view = viewOf(bytes);
  if (bytes.length < 5 || view.getUint32(0, true) !== FRAME_MAGIC)
    throw new ImageError("a compressed cluster holds no zstd frame: the image is damaged");
  const { restBytes, hasChecksum } = frameHeader(bytes[4]!);
  let end = 5 + restBytes;
  for (let isLast = false; !isLast;) {
    if (end + BLOCK_HEADER_BYTES > bytes.length) throw endsEarly();
    const block = blockHeader(bytes[end]! | (bytes[end + 1]! << 8) | (bytes[end + 2]! << 16));
    isLast = block.isLast;
    end += BLOCK_HEADER_BYTES + block.storedBytes;
  }
  if (hasChecksum) end += CHECKSUM_BYTES;
  if (end > bytes.length) throw endsEarly();
  return end;
}

function endsEarly(): ImageError {
  return new ImageError("a compressed cluster ends before its zstd frame does: the image is truncated or damaged");
}

const SKIPPABLE_MAGIC = 0x184d_2a50;
const SKIPPABLE_MASK = 0xffff_fff0;

/** What the next bytes of a zstd file are, where they are not only passed by. */
type ZstdPart = "magic" | "skippable size" | "descriptor" | "block";

const PART_BYTES: Readonly<Record<ZstdPart, number>> = { magic: 4, "skippable size": 4, descriptor: 1, block: BLOCK_HEADER_BYTES };

/** Cuts a zstd file that comes in chunks where its frames end. Feed it every chunk, in order. */
export class ZstdSplitter {
  #part: ZstdPart = "magic";
  #head: number[] = [];
  #passBytes = 0;
  #hasChecksum = false;
  /** The frame ends with the bytes that are passed by. */
  #isLast = false;

  /** The chunk in pieces, none of which reaches beyond the end of a frame. They share its memory. Throws ImageError where no frame begins. */
  split(chunk: Uint8Array): readonly Uint8Array[] {
    const pieces: Uint8Array[] = [];
    let start = 0;
    for (let at = 0; at < chunk.length;) {
      if (this.#passBytes > 0) {
        const passed = Math.min(this.#passBytes, chunk.length - at);
        this.#passBytes -= passed;
        at += passed;
      } else {
        this.#head.push(chunk[at++]!);
        if (this.#head.length === PART_BYTES[this.#part]) this.#advance(viewOf(Uint8Array.from([...this.#head.splice(0), 0])));
      }
      if (this.#isLast && this.#passBytes === 0) {
        this.#isLast = false;
        pieces.push(chunk.subarray(start, at));
        start = at;
      }
    }
    if (start < chunk.length) pieces.push(chunk.subarray(start));
    return pieces;
  }

  /** Takes a part whose bytes are all there, with one byte more so that three can be read as four. */
  #advance(view: DataView): void {
    switch (this.#part) {
      case "magic": {
        const magic = view.getUint32(0, true);
        if (magic === FRAME_MAGIC) this.#part = "descriptor";
        else if ((magic & SKIPPABLE_MASK) >>> 0 === SKIPPABLE_MAGIC) this.#part = "skippable size";
        else throw new ImageError("it has other bytes behind the end of a zstd frame: it is damaged");
        return;
      }
      case "skippable size":
        this.#end(view.getUint32(0, true));
        return;
      case "descriptor": {
        const { restBytes, hasChecksum } = frameHeader(view.getUint8(0));
        this.#hasChecksum = hasChecksum;
        this.#passBytes = restBytes;
        this.#part = "block";
        return;
      }
      case "block": {
        const { isLast, storedBytes } = blockHeader(view.getUint32(0, true));
        if (isLast) this.#end(storedBytes + (this.#hasChecksum ? CHECKSUM_BYTES : 0));
        else this.#passBytes = storedBytes;
        return;
      }
    }
  }

  #end(restBytes: number): void {
    this.#passBytes = restBytes;
    this.#isLast = true;
    this.#part = "magic";
  }
}

/** What a frame's descriptor byte says: how many bytes of the header follow it. */
function frameHeader(descriptor: number): { readonly restBytes: number; readonly hasChecksum: boolean } {
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const sizeFlag = descriptor >>> 6;
  const contentSizeBytes = sizeFlag === 0 && isSingleSegment ? 1 : CONTENT_SIZE_BYTES[sizeFlag]!;
  const restBytes = (isSingleSegment ? 0 : 1) + DICTIONARY_ID_BYTES[descriptor & 3]! + contentSizeBytes;
  return { restBytes, hasChecksum: (descriptor & 0x04) !== 0 };
}

function blockHeader(header: number): { readonly isLast: boolean; readonly storedBytes: number } {
  return { isLast: (header & 1) !== 0, storedBytes: ((header >>> 1) & 3) === RLE_BLOCK ? 1 : header >>> 3 };
}
