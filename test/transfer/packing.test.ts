import { randomBytes } from "node:crypto";
import { zstdDecompressSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { PackingChoice, packFrame } from "../../provider/transfer/packing.ts";

const FRAME_BYTES = 8 * 1024 * 1024;

describe("a frame", () => {
  it("becomes one zstd stream that is smaller", async () => {
    const frame = Buffer.concat([Buffer.alloc(3_000_000, "text of a file\n"), randomBytes(100_000)]);
    const packed = Buffer.concat((await packFrame(frame)) ?? []);
    expect(packed.length).toBeLessThan(frame.length / 10);
    expect(zstdDecompressSync(packed).equals(frame)).toBe(true);
  });

  it("stays as it is where packing saves less than a tenth", async () => {
    expect(await packFrame(randomBytes(FRAME_BYTES))).toBeUndefined();
    expect(await packFrame(Buffer.concat([randomBytes(FRAME_BYTES), Buffer.alloc(500_000)]))).toBeUndefined();
  });
});

/** How many of the frames are packed, when one takes so many milliseconds to leave. */
function packedShare(choice: PackingChoice, frames: number, plainMs: number, packedMs: number, startMs = 0): number {
  let packed = 0;
  let nowMs = startMs;
  // The way of a frame is settled while the one before it leaves.
  let isPacked = choice.isPacked;
  for (let frame = 0; frame < frames; frame++) {
    const isNextPacked = choice.isPacked;
    nowMs += isPacked ? packedMs : plainMs;
    packed += isPacked ? 1 : 0;
    choice.left(FRAME_BYTES, isPacked, nowMs);
    isPacked = isNextPacked;
  }
  return packed / frames;
}

describe("the choice between packed and plain", () => {
  it("is packed for nearly all frames where that is quicker", () => {
    expect(packedShare(new PackingChoice(), 1000, 400, 200)).toBeGreaterThan(0.95);
  });

  it("is plain for nearly all frames where packing is slower, or gains little for its price", () => {
    expect(packedShare(new PackingChoice(), 1000, 50, 80)).toBeLessThan(0.05);
    expect(packedShare(new PackingChoice(), 1000, 100, 95)).toBeLessThan(0.05);
  });

  it("changes when the wire does", () => {
    const choice = new PackingChoice();
    expect(packedShare(choice, 200, 50, 80)).toBeLessThan(0.2);
    expect(packedShare(choice, 2000, 400, 200, 20_000)).toBeGreaterThan(0.8);
    expect(packedShare(choice, 2000, 50, 80, 1_000_000)).toBeLessThan(0.5);
  });

  it("does not take a pause between frames of different kinds for the time of either", () => {
    const choice = new PackingChoice();
    for (let nowMs = 0; !choice.isPacked; nowMs += 100) choice.left(FRAME_BYTES, false, nowMs);
    choice.left(FRAME_BYTES, true, 1_000_000);
    for (let frame = 1; frame <= 3; frame++) choice.left(FRAME_BYTES, true, 1_000_000 + frame * 50);
    expect(choice.isPacked).toBe(true);
    choice.left(FRAME_BYTES, true, 1_000_200);
    expect(choice.isPacked).toBe(true);
  });
});
