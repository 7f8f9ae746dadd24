/** XDR (RFC 4506), the encoding of libvirt's RPC: big-endian, everything a multiple of four bytes. Knows no packet and no procedure. */

/** The most bytes of one string: REMOTE_STRING_MAX of libvirt's remote_protocol.x. */
export const MAX_STRING_BYTES = 4 * 1024 * 1024;

/** Bytes are not what the protocol says, or a value has no place in it. The message is one sentence without a subject's name. */
export class XdrError extends Error {
  override readonly name = "XdrError";
}

/** Reads values one after the other. Every method throws XdrError when the bytes end early or a declared length is over its bound. */
export class XdrReader {
  readonly #bytes: Buffer;
  #offset = 0;

  /** Reads from `bytes` in place: they must not change while the reader is in use. */
  constructor(bytes: Uint8Array) {
    this.#bytes = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get remainingBytes(): number {
    return this.#bytes.length - this.#offset;
  }

  int32(): number {
    return this.#bytes.readInt32BE(this.#advance(4));
  }

  uint32(): number {
    return this.#bytes.readUInt32BE(this.#advance(4));
  }

  int64(): bigint {
    return this.#bytes.readBigInt64BE(this.#advance(8));
  }

  uint64(): bigint {
    return this.#bytes.readBigUInt64BE(this.#advance(8));
  }

  double(): number {
    return this.#bytes.readDoubleBE(this.#advance(8));
  }

  /** Exactly `lengthBytes` bytes and their padding; no length precedes them. A view, not a copy. */
  opaque(lengthBytes: number): Buffer {
    const start = this.#advance(lengthBytes + paddingBytes(lengthBytes));
    return this.#bytes.subarray(start, start + lengthBytes);
  }

  /** UTF-8; what is not UTF-8 becomes U+FFFD. */
  string(maxBytes = MAX_STRING_BYTES): string {
    const lengthBytes = this.uint32();
    if (lengthBytes > maxBytes) throw new XdrError(`a string declares ${lengthBytes} bytes, more than ${maxBytes}`);
    return this.opaque(lengthBytes).toString("utf8");
  }

  /** The number of items that follow. Refuses more than `maxItems`, and more than the rest could hold at four bytes each. */
  count(maxItems: number): number {
    const items = this.uint32();
    if (items > maxItems) throw new XdrError(`a list declares ${items} items, more than ${maxItems}`);
    if (items * 4 > this.remainingBytes) throw new XdrError(`a list declares ${items} items, ${this.remainingBytes} bytes follow`);
    return items;
  }

  /** Throws XdrError when anything is left to read. */
  end(): void {
    if (this.remainingBytes > 0) throw new XdrError(`${this.remainingBytes} bytes too many at offset ${this.#offset}`);
  }

  #advance(lengthBytes: number): number {
    if (lengthBytes > this.remainingBytes) {
      throw new XdrError(`${lengthBytes} bytes expected at offset ${this.#offset}, ${this.remainingBytes} found`);
    }
    const start = this.#offset;
    this.#offset += lengthBytes;
    return start;
  }
}

/** Collects values one after the other. Every method throws XdrError when the value does not fit its type. */
export class XdrWriter {
  readonly #pieces: Uint8Array[] = [];

  int32(value: number): void {
    const bytes = Buffer.alloc(4);
    bytes.writeInt32BE(integer(value, -(2 ** 31), 2 ** 31 - 1));
    this.#pieces.push(bytes);
  }

  uint32(value: number): void {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32BE(integer(value, 0, 2 ** 32 - 1));
    this.#pieces.push(bytes);
  }

  int64(value: bigint): void {
    if (BigInt.asIntN(64, value) !== value) throw new XdrError(`${value} is no signed 64-bit number`);
    const bytes = Buffer.alloc(8);
    bytes.writeBigInt64BE(value);
    this.#pieces.push(bytes);
  }

  uint64(value: bigint): void {
    if (BigInt.asUintN(64, value) !== value) throw new XdrError(`${value} is no unsigned 64-bit number`);
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(value);
    this.#pieces.push(bytes);
  }

  double(value: number): void {
    const bytes = Buffer.alloc(8);
    bytes.writeDoubleBE(value);
    this.#pieces.push(bytes);
  }

  /** The bytes and their padding, without a length. They must not change until `bytes()` was called. */
  opaque(bytes: Uint8Array): void {
    this.#pieces.push(bytes, Buffer.alloc(paddingBytes(bytes.length)));
  }

  /** UTF-8. A NUL is refused: libvirt's strings end at it. */
  string(value: string): void {
    if (value.includes("\0")) throw new XdrError("a string for libvirt holds a NUL character");
    const bytes = Buffer.from(value, "utf8");
    if (bytes.length > MAX_STRING_BYTES)
      throw new XdrError(`a string for libvirt has ${bytes.length} bytes, more than ${MAX_STRING_BYTES}`);
    this.uint32(bytes.length);
    this.opaque(bytes);
  }

  /** All that was written, as a new buffer. */
  bytes(): Buffer {
    return Buffer.concat(this.#pieces);
  }
}

/** How a value of type T lies on the wire. */
export interface Codec<T> {
  readonly decode: (reader: XdrReader) => T;
  readonly encode: (writer: XdrWriter, value: T) => void;
}

export const int32: Codec<number> = { decode: (reader) => reader.int32(), encode: (writer, value) => writer.int32(value) };
export const uint32: Codec<number> = { decode: (reader) => reader.uint32(), encode: (writer, value) => writer.uint32(value) };
export const int64: Codec<bigint> = { decode: (reader) => reader.int64(), encode: (writer, value) => writer.int64(value) };
export const uint64: Codec<bigint> = { decode: (reader) => reader.uint64(), encode: (writer, value) => writer.uint64(value) };
export const double: Codec<number> = { decode: (reader) => reader.double(), encode: (writer, value) => writer.double(value) };
export const string: Codec<string> = { decode: (reader) => reader.string(), encode: (writer, value) => writer.string(value) };

/** An int that is 0 or 1. Any other than 0 reads as true, as libvirt reads it. */
export const boolean: Codec<boolean> = {
  decode: (reader) => reader.int32() !== 0,
  encode: (writer, value) => writer.int32(value ? 1 : 0),
};

/** No bytes at all. */
export const nothing: Codec<void> = { decode: () => undefined, encode: () => undefined };

/** A flag and, when it is set, the value. */
export function optional<T>(codec: Codec<T>): Codec<T | undefined> {
  return {
    decode: (reader) => (reader.int32() === 0 ? undefined : codec.decode(reader)),
    encode: (writer, value) => {
      writer.int32(value === undefined ? 0 : 1);
      if (value !== undefined) codec.encode(writer, value);
    },
  };
}

/** A count and that many values, at most `maxItems`. */
export function list<T>(codec: Codec<T>, maxItems: number): Codec<readonly T[]> {
  return {
    decode: (reader) => Array.from({ length: reader.count(maxItems) }, () => codec.decode(reader)),
    encode: (writer, values) => {
      if (values.length > maxItems) throw new XdrError(`a list for libvirt has ${values.length} items, more than ${maxItems}`);
      writer.uint32(values.length);
      for (const value of values) codec.encode(writer, value);
    },
  };
}

/** Named fields, on the wire in the order in which they are written here. */
export function struct<T extends object>(fields: { readonly [K in keyof T]: Codec<T[K]> }): Codec<Readonly<T>> {
  const names = Object.keys(fields) as (keyof T)[];
  return {
    decode: (reader) => Object.fromEntries(names.map((name) => [name, fields[name].decode(reader)])) as T,
    encode: (writer, value) => {
      for (const name of names) fields[name].encode(writer, value[name]);
    },
  };
}

/** Values by position. */
export function tuple<T extends readonly unknown[]>(...items: { readonly [K in keyof T]: Codec<T[K]> }): Codec<T> {
  return {
    decode: (reader) => items.map((item) => item.decode(reader)) as unknown as T,
    encode: (writer, values) => {
      for (const [index, item] of items.entries()) item.encode(writer, values[index]);
    },
  };
}

/** Decodes all of `bytes`. Throws XdrError when they end early or go on. */
export function decodeAll<T>(codec: Codec<T>, bytes: Uint8Array): T {
  const reader = new XdrReader(bytes);
  const value = codec.decode(reader);
  reader.end();
  return value;
}

/** The bytes of one value. */
export function encodeAll<T>(codec: Codec<T>, value: NoInfer<T>): Buffer {
  const writer = new XdrWriter();
  codec.encode(writer, value);
  return writer.bytes();
}

function paddingBytes(lengthBytes: number): number {
  return (4 - (lengthBytes % 4)) % 4;
}

function integer(value: number, lowest: number, highest: number): number {
  if (!Number.isInteger(value) || value < lowest || value > highest) {
    throw new XdrError(`${value} is no whole number from ${lowest} to ${highest}`);
  }
  return value;
}
