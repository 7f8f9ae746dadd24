/** Small readers over bytes that the format parsers share. Knows no format. */
import { Buffer } from "node:buffer";
import { ImageError } from "./parser.ts";

/** A view of exactly these bytes, wherever they lie in their buffer. */
export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A number read from 64 bits. Throws ImageError naming `what` (which begins the sentence) when it is over 2^53 - 1, which no file or disk is. */
export function safeNumber(value: bigint, what: string): number {
  if (value > BigInt(Number.MAX_SAFE_INTEGER))
    throw new ImageError(`${what} is ${value}: larger than any file or disk, so the header is damaged`);
  return Number(value);
}

const ZEROS = Buffer.alloc(64 * 1024);

/** Whether every byte is zero. No bytes are. */
export function isZero(bytes: Uint8Array): boolean {
  for (let offset = 0; offset < bytes.length; offset += ZEROS.length) {
    const piece = bytes.subarray(offset, offset + ZEROS.length);
    if (Buffer.compare(piece, ZEROS.subarray(0, piece.length)) !== 0) return false;
  }
  return true;
}

/** The bytes as text, one character a byte: for magics and for words that are compared, not shown. */
export function latin1(bytes: Uint8Array, start = 0, end: number = bytes.length): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1", start, end);
}

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value));
}

/** Rounded up to a multiple of `unit`. */
export function roundUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit;
}
