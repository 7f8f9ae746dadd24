/** Small valid zip archives, made byte by byte and independently of the parser. Hostile tests patch them; the fuzzer mutates them. */
import { crc32, deflateRawSync } from "node:zlib";

/** One member of a hand-made zip archive. */
export interface ZipEntry {
  readonly name: string;
  readonly data: Uint8Array;
  readonly isDeflated?: boolean;
  /** Sizes and checksum stand behind the data, and zeros in the local header. */
  readonly hasDescriptor?: boolean;
}

/** Each local header is this long without its name, each entry of the directory that, and the end record this. */
export const ZIP_LOCAL_BYTES = 30;
export const ZIP_ENTRY_BYTES = 46;
export const ZIP_END_BYTES = 22;

/** An archive; with `isLarge` as zip64, all numbers in its extra fields. */
export function zipSeed(entries: readonly ZipEntry[], isLarge = false): Buffer {
  const locals: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const { name, data, isDeflated = false, hasDescriptor = false } of entries) {
    const stored = isDeflated ? deflateRawSync(data) : Buffer.from(data);
    const common = Buffer.alloc(26);
    common.writeUInt16LE(isLarge ? 45 : 20, 0);
    common.writeUInt16LE(hasDescriptor ? 8 : 0, 2);
    common.writeUInt16LE(isDeflated ? 8 : 0, 4);
    common.writeUInt32LE(crc32(data), 10);
    common.writeUInt32LE(stored.length, 14);
    common.writeUInt32LE(data.length, 18);
    common.writeUInt16LE(Buffer.byteLength(name), 22);
    const sums = Buffer.from(common.subarray(10, 22));
    const local = Buffer.concat([Buffer.from("PK\x03\x04", "latin1"), common, Buffer.from(name), stored]);
    if (hasDescriptor) local.fill(0, 14, 26);
    const whole = Buffer.concat([local, ...(hasDescriptor ? [Buffer.from("PK\x07\x08", "latin1"), sums] : [])]);
    const extra = Buffer.alloc(isLarge ? 28 : 0);
    if (isLarge) {
      extra.writeUInt16LE(1, 0);
      extra.writeUInt16LE(24, 2);
      for (const [index, number] of [data.length, stored.length, offset].entries()) extra.writeBigUInt64LE(BigInt(number), 4 + index * 8);
      common.fill(0xff, 14, 22);
      common.writeUInt16LE(extra.length, 24);
    }
    const rest = Buffer.alloc(14);
    rest.writeUInt32LE(isLarge ? 0xffff_ffff : offset, 10);
    directory.push(Buffer.concat([Buffer.from("PK\x01\x02\x1e\x03", "latin1"), common, rest, Buffer.from(name), extra]));
    locals.push(whole);
    offset += whole.length;
  }
  const listed = Buffer.concat(directory);
  const end = Buffer.alloc(ZIP_END_BYTES);
  end.write("PK\x05\x06", "latin1");
  end.writeUInt16LE(entries.length, 8);
  end.writeUInt16LE(entries.length, 10);
  end.writeUInt32LE(listed.length, 12);
  end.writeUInt32LE(offset, 16);
  if (!isLarge) return Buffer.concat([...locals, listed, end]);
  const record = Buffer.alloc(56);
  record.write("PK\x06\x06", "latin1");
  record.writeBigUInt64LE(44n, 4);
  for (const [index, number] of [entries.length, entries.length, listed.length, offset].entries())
    record.writeBigUInt64LE(BigInt(number), 24 + index * 8);
  const locator = Buffer.alloc(20);
  locator.write("PK\x06\x07", "latin1");
  locator.writeBigUInt64LE(BigInt(offset + listed.length), 8);
  locator.writeUInt32LE(1, 16);
  end.fill(0xff, 8, 20);
  return Buffer.concat([...locals, listed, record, locator, end]);
}
