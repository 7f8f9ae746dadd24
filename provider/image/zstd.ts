/** Where a zstd frame ends: what inflates it takes what follows for another frame. Source: RFC 8878, section 3.1.1. */
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
  const descriptor = bytes[4]!;
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const hasChecksum = (descriptor & 0x04) !== 0;
  const sizeFlag = descriptor >>> 6;
  const contentSizeBytes = sizeFlag === 0 && isSingleSegment ? 1 : CONTENT_SIZE_BYTES[sizeFlag]!;
  let end = 5 + (isSingleSegment ? 0 : 1) + DICTIONARY_ID_BYTES[descriptor & 3]! + contentSizeBytes;
  let isLast = false;
  while (!isLast) {
    if (end + BLOCK_HEADER_BYTES > bytes.length) throw endsEarly();
    const header = bytes[end]! | (bytes[end + 1]! << 8) | (bytes[end + 2]! << 16);
    isLast = (header & 1) !== 0;
    end += BLOCK_HEADER_BYTES + (((header >>> 1) & 3) === RLE_BLOCK ? 1 : header >>> 3);
  }
  if (hasChecksum) end += CHECKSUM_BYTES;
  if (end > bytes.length) throw endsEarly();
  return end;
}

function endsEarly(): ImageError {
  return new ImageError("a compressed cluster ends before its zstd frame does: the image is truncated or damaged");
}
