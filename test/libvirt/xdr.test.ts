import { expect, test } from "vitest";
import {
  boolean,
  decodeAll,
  double,
  encodeAll,
  int32,
  int64,
  list,
  MAX_STRING_BYTES,
  nothing,
  optional,
  string,
  struct,
  tuple,
  uint32,
  uint64,
  XdrError,
  XdrReader,
  XdrWriter,
  type Codec,
} from "../../provider/libvirt/xdr.ts";

const person = struct<{ name: string; age: number; nick: string | undefined }>({ name: string, age: uint32, nick: optional(string) });

/** One row a value: the codec, what it holds, and its bytes as RFC 4506 has them. */
function row<T>(name: string, codec: Codec<T>, value: NoInfer<T>, hex: string): [string, Codec<unknown>, unknown, string] {
  return [name, codec as Codec<unknown>, value, hex.replaceAll(" ", "")];
}

const ROWS = [
  row("int32", int32, -2, "fffffffe"),
  row("uint32", uint32, 0xffff_fffe, "fffffffe"),
  row("int64", int64, -(2n ** 63n), "8000000000000000"),
  row("uint64", uint64, 2n ** 64n - 1n, "ffffffffffffffff"),
  row("double", double, 1.5, "3ff8000000000000"),
  row("boolean", boolean, true, "00000001"),
  row("nothing", nothing, undefined, ""),
  row("empty string", string, "", "00000000"),
  row("string", string, "sillyprog", "00000009 73696c6c7970726f67 000000"),
  row("string of a multiple of four", string, "john", "00000004 6a6f686e"),
  row("UTF-8", string, "ä€", "00000005 c3a4e282ac 000000"),
  row("absent", optional(uint32), undefined, "00000000"),
  row("present", optional(uint32), 7, "00000001 00000007"),
  row("list", list(int32, 3), [1, -1], "00000002 00000001 ffffffff"),
  row("tuple", tuple<[string, number]>(string, uint32), ["a", 1], "00000001 61000000 00000001"),
  row("struct", person, { name: "ann", age: 3, nick: undefined }, "00000003 616e6e00 00000003 00000000"),
];

test.each(ROWS)("writes and reads %s", (_name, codec, value, hex) => {
  expect(encodeAll(codec, value).toString("hex")).toBe(hex);
  expect(decodeAll(codec, Buffer.from(hex, "hex"))).toEqual(value);
});

test.each(ROWS)("refuses %s when its bytes end early, at every point", (_name, codec, _value, hex) => {
  const bytes = Buffer.from(hex, "hex");
  for (let length = 0; length < bytes.length; length += 1) {
    expect(() => decodeAll(codec, bytes.subarray(0, length))).toThrow(XdrError);
  }
});

test("reads any int but 0 as true, as libvirt does", () => {
  expect(decodeAll(boolean, Buffer.from("01000000", "hex"))).toBe(true);
  expect(decodeAll(optional(uint32), Buffer.from("0100000000000005", "hex"))).toBe(5);
});

test("refuses bytes that are left over", () => {
  expect(() => decodeAll(uint32, Buffer.alloc(8))).toThrow("4 bytes too many at offset 4");
});

test("bounds a string by its declared length before reading it", () => {
  const bytes = Buffer.from([0xff, 0xff, 0xff, 0xff]);
  expect(() => decodeAll(string, bytes)).toThrow(`a string declares 4294967295 bytes, more than ${MAX_STRING_BYTES}`);
});

test("bounds a list by its maximum and by the bytes that follow, before it allocates", () => {
  const reader = (count: number): XdrReader => new XdrReader(encodeAll(uint32, count));
  expect(() => reader(4).count(3)).toThrow("a list declares 4 items, more than 3");
  expect(() => reader(0xffff_ffff).count(0xffff_ffff)).toThrow("a list declares 4294967295 items, 0 bytes follow");
});

test("reads opaque bytes as a view, with their padding", () => {
  const bytes = Buffer.from("aabbcc00 00000001".replace(" ", ""), "hex");
  const reader = new XdrReader(bytes);
  const opaque = reader.opaque(3);
  expect(opaque.toString("hex")).toBe("aabbcc");
  expect(opaque.buffer).toBe(bytes.buffer);
  expect(reader.uint32()).toBe(1);
});

test.each([
  ["a number over its range", (writer: XdrWriter) => writer.uint32(2 ** 32)],
  ["a number under its range", (writer: XdrWriter) => writer.uint32(-1)],
  ["a fraction", (writer: XdrWriter) => writer.int32(1.5)],
  ["a bigint over its range", (writer: XdrWriter) => writer.uint64(2n ** 64n)],
  ["a negative bigint where none may be", (writer: XdrWriter) => writer.uint64(-1n)],
  ["a signed bigint over its range", (writer: XdrWriter) => writer.int64(2n ** 63n)],
  ["a NUL in a string", (writer: XdrWriter) => writer.string("a\0b")],
  ["a string over its bound", (writer: XdrWriter) => writer.string("x".repeat(MAX_STRING_BYTES + 1))],
])("does not write %s", (_name, write) => {
  expect(() => write(new XdrWriter())).toThrow(XdrError);
});

test("does not write a list over its bound", () => {
  expect(() => encodeAll(list(int32, 1), [1, 2])).toThrow("a list for libvirt has 2 items, more than 1");
});
