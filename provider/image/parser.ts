/**
 * How an image parser talks to the world without touching it: a generator that asks for bytes and is resumed with them.
 * Pure: who answers (a file, a member of an OVA, a URL, a test's buffer) is not known here.
 */

/** What a parser may ask. `file` is a plain basename beside the image; "" is the image itself. */
export type Ask =
  | { readonly kind: "read"; readonly file: string; readonly offset: number; readonly length: number }
  | { readonly kind: "size"; readonly file: string };

/** The answer to a read: at most `length` bytes, fewer only at the end of the file. To a size: bytes, or undefined when there is no such file. */
export type Answer = Uint8Array | number | undefined;

/** A parser of T. Throws `ImageError` when the bytes are not what they must be. */
export type Parser<T> = Generator<Ask, T, Answer>;

/** The most that one ask may read: whoever answers refuses more. */
export const MAX_READ_BYTES = 16 * 1024 * 1024;

/** The image is damaged, hostile, or of a kind that is refused. The message is one sentence for the user, without the file's name. */
export class ImageError extends Error {
  override readonly name = "ImageError";
}

/** Asks for exactly `length` bytes. Throws ImageError saying `what` ends early when the file is shorter. */
export function* readExactly(file: string, offset: number, length: number, what: string): Parser<Uint8Array> {
  const bytes = yield* readUpTo(file, offset, length);
  if (bytes.length < length)
    throw new ImageError(`${what} ends early: ${length} bytes expected at offset ${offset}, ${bytes.length} found`);
  return bytes;
}

/** Asks for up to `length` bytes; fewer come back at the end of the file. */
export function* readUpTo(file: string, offset: number, length: number): Parser<Uint8Array> {
  const answer = yield { kind: "read", file, offset, length };
  if (!(answer instanceof Uint8Array)) throw new TypeError("a read was not answered with bytes");
  return answer;
}

/** Asks for a file's size in bytes; undefined when there is no such file. */
export function* sizeOf(file: string): Parser<number | undefined> {
  const answer = yield { kind: "size", file };
  if (answer instanceof Uint8Array) throw new TypeError("a size was answered with bytes");
  return answer;
}
