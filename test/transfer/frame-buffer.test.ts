import { randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { FrameBuffer } from "../../provider/transfer/frame-buffer.ts";

const FRAME_BYTES = 256 * 1024;
const GAP_BYTES = 64 * 1024;

/** What comes out as frames when all of these are written in order. */
function framesOf(writes: readonly { readonly offset: number; readonly bytes: Uint8Array }[]) {
  const buffer = new FrameBuffer(FRAME_BYTES);
  const frames: { readonly offset: number; readonly bytes: Buffer }[] = [];
  const take = () => {
    const frame = buffer.take();
    if (frame === undefined) return;
    frames.push({ offset: frame.offset, bytes: Buffer.from(frame.bytes) });
    buffer.release(frame);
  };
  for (const { offset, bytes } of writes) {
    for (let at = 0; at < bytes.length;) {
      at += buffer.add(offset + at, bytes.subarray(at));
      if (at < bytes.length || buffer.isFull) take();
    }
  }
  take();
  return frames;
}

describe("a frame buffer", () => {
  const noise = randomBytes(3 * FRAME_BYTES);

  it("gives the same frames however the bytes are cut", () => {
    const expected = [0, 1, 2].map((index) => ({
      offset: index * FRAME_BYTES,
      bytes: noise.subarray(index * FRAME_BYTES, (index + 1) * FRAME_BYTES),
    }));
    for (const pieceBytes of [1000, 65_536, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, noise.length]) {
      const writes = Array.from({ length: Math.ceil(noise.length / pieceBytes) }, (_, index) => ({
        offset: index * pieceBytes,
        bytes: noise.subarray(index * pieceBytes, (index + 1) * pieceBytes),
      }));
      expect(framesOf(writes)).toEqual(expected);
    }
  });

  it("begins anywhere, and ends at the next multiple", () => {
    const frames = framesOf([{ offset: FRAME_BYTES + 512, bytes: noise.subarray(0, FRAME_BYTES) }]);
    expect(frames).toEqual([
      { offset: FRAME_BYTES + 512, bytes: noise.subarray(0, FRAME_BYTES - 512) },
      { offset: 2 * FRAME_BYTES, bytes: noise.subarray(FRAME_BYTES - 512, FRAME_BYTES) },
    ]);
  });

  it("fills a small gap with zeros, whatever lay in its memory, and begins anew behind a larger one, before a step back, and in the next frame", () => {
    const [first, second] = [noise.subarray(0, 512), noise.subarray(512, 1024)];
    const full = { offset: 0, bytes: noise.subarray(0, FRAME_BYTES) };
    const start = FRAME_BYTES;
    const pair = (gapBytes: number) =>
      framesOf([full, { offset: start, bytes: first }, { offset: start + 512 + gapBytes, bytes: second }]).slice(1);
    expect(pair(GAP_BYTES)).toEqual([{ offset: start, bytes: Buffer.concat([first, Buffer.alloc(GAP_BYTES), second]) }]);
    for (const gapBytes of [GAP_BYTES + 1, -512, -1024]) {
      const apart = [
        { offset: start, bytes: first },
        { offset: start + 512 + gapBytes, bytes: second },
      ];
      expect(pair(gapBytes)).toEqual(apart);
    }
    const across = [
      { offset: FRAME_BYTES - 1024, bytes: first },
      { offset: FRAME_BYTES, bytes: second },
    ];
    expect(framesOf(across)).toEqual(across);
  });

  it("gives nothing when nothing was added, or it was dropped", () => {
    const buffer = new FrameBuffer(FRAME_BYTES);
    expect(buffer.take()).toBe(undefined);
    buffer.add(0, noise.subarray(0, 512));
    buffer.clear();
    expect(buffer.take()).toBe(undefined);
    expect(buffer.isFull).toBe(false);
  });
});
