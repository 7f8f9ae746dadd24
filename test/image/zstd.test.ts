import { zstdCompressSync, zstdDecompressSync, constants } from "node:zlib";
import { expect, test } from "vitest";
import { zstdFrameLength } from "../../provider/image/zstd.ts";
import { guestOf } from "./qemu.ts";

const NOISE = guestOf(300_000, [{ offset: 0, length: 300_000, content: "noise" }]);

test.each([
  { name: "noise in several blocks", content: NOISE, params: {} },
  { name: "text", content: Buffer.from("text ".repeat(20_000)), params: {} },
  { name: "one repeated byte", content: Buffer.alloc(400_000, 7), params: {} },
  { name: "nothing", content: Buffer.alloc(0), params: {} },
  { name: "a checksum", content: NOISE, params: { [constants.ZSTD_c_checksumFlag]: 1 } },
  { name: "no content size", content: NOISE, params: { [constants.ZSTD_c_contentSizeFlag]: 0 } },
])("finds the end of a frame that other bytes follow: $name", ({ content, params }) => {
  const frame = zstdCompressSync(content, { params });
  const followed = Buffer.concat([frame, frame, Buffer.alloc(512, 0x28)]);
  expect(zstdFrameLength(followed)).toBe(frame.length);
  expect(zstdDecompressSync(followed.subarray(0, zstdFrameLength(followed))).equals(content)).toBe(true);
});

test("refuses a frame at every byte where it may be cut", () => {
  const frame = zstdCompressSync(Buffer.from("a short frame, with a checksum"), { params: { [constants.ZSTD_c_checksumFlag]: 1 } });
  for (let length = 0; length < frame.length; length++) {
    expect(() => zstdFrameLength(frame.subarray(0, length))).toThrow(/holds no zstd frame|ends before its zstd frame does/);
  }
});
