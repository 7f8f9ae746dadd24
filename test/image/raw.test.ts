import { expect, test } from "vitest";
import { rawImage } from "../../provider/image/raw.ts";
import { drive, fromBytes, readGuest } from "./drive.ts";

test("a raw image is one run over the whole file, whatever its size", () => {
  const image = rawImage(5 * 2 ** 40);
  expect(image).toMatchObject({ format: "raw", virtualSizeBytes: 5 * 2 ** 40, granularityBytes: 512, notes: [] });
  expect([...drive(image.runs(), fromBytes(new Uint8Array(0)))]).toEqual([
    { file: 0, fileOffset: 0, storedBytes: 5 * 2 ** 40, virtualOffset: 0, lengthBytes: 5 * 2 ** 40, encoding: "plain" },
  ]);
});

test("the guest reads the file's bytes", () => {
  const bytes = Buffer.alloc(1536, "raw");
  expect(readGuest(rawImage(1536), fromBytes(bytes)).equals(bytes)).toBe(true);
});

test.each([
  [0, "the file is empty"],
  [511, "no multiple of 512"],
  [1025, "truncate -s %512"],
])("a file of %i bytes is refused", (sizeBytes, says) => {
  expect(() => rawImage(sizeBytes)).toThrow(says);
});
