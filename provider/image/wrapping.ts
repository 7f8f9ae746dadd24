/** What an image may be wrapped in, told from its first bytes, and how large it is inside. Knows how wrappings begin and end, not how to take them off. */
import { latin1, safeNumber, viewOf } from "./bytes.ts";
import { ImageError, type Parser, readExactly, readUpTo } from "./parser.ts";

export type Wrapping = "gzip" | "xz" | "zstd";

const MAGICS: readonly { readonly start: string; readonly wrapping: Wrapping }[] = [
  { start: "\x1f\x8b\x08", wrapping: "gzip" },
  { start: "\xfd7zXZ\0", wrapping: "xz" },
  { start: "\x28\xb5\x2f\xfd", wrapping: "zstd" },
];

/** The bytes that tell a wrapping. */
export const WRAPPING_MAGIC_BYTES = 6;

/** What the bytes are wrapped in; undefined when in nothing that is known. */
export function wrappingOf(start: Uint8Array): Wrapping | undefined {
  const text = latin1(start, 0, WRAPPING_MAGIC_BYTES);
  return MAGICS.find((magic) => text.startsWith(magic.start))?.wrapping;
}

/**
 * How many bytes the wrapped file says to hold, for a file of `sizeBytes`: zstd's first frame header, xz's last index. Only its word: undefined when
 * it says nothing that counts, as gzip, which says it modulo 4 GiB. Of several frames or streams in one file only one is asked.
 */
export function* declaredSize(wrapping: Wrapping, sizeBytes: number): Parser<number | undefined> {
  try {
    switch (wrapping) {
      case "gzip":
        return undefined;
      case "zstd":
        return yield* zstdSize();
      case "xz":
        return yield* xzSize(sizeBytes);
    }
  } catch (error) {
    // Damaged, or with bytes behind the end: taking it off will say so.
    if (error instanceof ImageError) return undefined;
    throw error;
  }
}

const ZSTD_DICTIONARY_ID_BYTES = [0, 1, 2, 4];

/** Source: RFC 8878, section 3.1.1.1. */
function* zstdSize(): Parser<number | undefined> {
  const header = yield* readUpTo("", 0, 18);
  const descriptor = header[4] ?? 0;
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const flag = descriptor >>> 6;
  if (flag === 0 && !isSingleSegment) return undefined;
  const offset = 5 + (isSingleSegment ? 0 : 1) + ZSTD_DICTIONARY_ID_BYTES[descriptor & 3]!;
  const lengthBytes = 2 ** flag;
  if (header.length < offset + lengthBytes) return undefined;
  const view = viewOf(header);
  if (flag === 0) return view.getUint8(offset);
  // Two bytes count from 256 on.
  if (flag === 1) return view.getUint16(offset, true) + 256;
  return flag === 2 ? view.getUint32(offset, true) : safeNumber(view.getBigUint64(offset, true), "the size in the zstd frame");
}

const XZ_FOOTER_BYTES = 12;
const MAX_XZ_INDEX_BYTES = 1024 * 1024;

/** Source: The .xz File Format 1.2.1, sections 2.1.2 and 4. */
function* xzSize(sizeBytes: number): Parser<number | undefined> {
  const footer = yield* readExactly("", Math.max(0, sizeBytes - XZ_FOOTER_BYTES), XZ_FOOTER_BYTES, "the xz stream's footer");
  if (latin1(footer, 10, 12) !== "YZ") return undefined;
  const indexBytes = (viewOf(footer).getUint32(4, true) + 1) * 4;
  if (indexBytes > MAX_XZ_INDEX_BYTES || indexBytes + XZ_FOOTER_BYTES > sizeBytes) return undefined;
  const index = yield* readExactly("", sizeBytes - XZ_FOOTER_BYTES - indexBytes, indexBytes, "the xz stream's index");
  if (index[0] !== 0) return undefined;
  let at = 1;
  const next = (): number => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = index[at++];
      if (byte === undefined || shift > 56n) throw new ImageError("the xz stream's index cannot be read: it is damaged");
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return safeNumber(value, "a size in the xz stream's index");
    }
  };
  let total = 0;
  for (let records = next(); records > 0; records--) {
    next();
    total += next();
  }
  return total;
}
