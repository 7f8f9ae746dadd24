import { zstdCompressSync, zstdDecompressSync, constants } from "node:zlib";
import { describe, expect, it, test } from "vitest";
import { ZstdSplitter, zstdFrameLength } from "../../provider/image/zstd.ts";
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

describe("a zstd file that comes in chunks", () => {
  const text = Buffer.from("a frame that a chunk may end in");
  const skippable = Buffer.from("502a4d1803000000616263", "hex");
  const frames = [
    zstdCompressSync(text, { params: { [constants.ZSTD_c_checksumFlag]: 1 } }),
    skippable,
    zstdCompressSync(Buffer.alloc(200_000)),
    zstdCompressSync(Buffer.alloc(0)),
    Buffer.from("502a4d1800000000", "hex"),
    zstdCompressSync(text),
  ];
  const whole = Buffer.concat(frames);
  const ends = frames.map((_, index) => Buffer.concat(frames.slice(0, index + 1)).length);

  it("is cut where each frame ends, wherever the chunks do", () => {
    for (let first = 0; first <= whole.length; first++) {
      const splitter = new ZstdSplitter();
      const pieces = [whole.subarray(0, first), whole.subarray(first)].flatMap((chunk) => splitter.split(chunk));
      expect(Buffer.concat(pieces).equals(whole)).toBe(true);
      let at = 0;
      const cuts = pieces.map((piece) => (at += piece.length));
      expect(new Set(cuts)).toEqual(new Set([...ends, ...(first > 0 ? [first] : [])]));
    }
  });

  it("is refused where other bytes follow a frame", () => {
    expect(() => new ZstdSplitter().split(Buffer.concat([frames[0]!, Buffer.from("junk")]))).toThrow(
      "other bytes behind the end of a zstd frame",
    );
  });
});
