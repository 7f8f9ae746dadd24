import { expect, test } from "vitest";
import { ClusterMap } from "../../provider/image/cluster-map.ts";

test("gives words back as big-endian bytes, zeros where none was set", () => {
  const map = new ClusterMap();
  map.set(17, 0x8000_0001, 0x0000_0200);
  map.set(40, 0, 0x1_0000);
  const words = new DataView(map.copy(16, 32).buffer);
  for (let index = 0; index < 32; index++) {
    const expected = index === 1 ? 0x8000_0001_0000_0200n : index === 24 ? 0x1_0000n : 0n;
    expect(words.getBigUint64(index * 8)).toBe(expected);
  }
  expect(map.count).toBe(2);
});

test("knows what is set over a range far larger than its memory", () => {
  const map = new ClusterMap();
  const far = 2 ** 40;
  for (const index of [0, 16 * 8192 * 3, far, far + 8192]) map.set(index, 0, 512);
  expect([map.has(0), map.has(1), map.has(far), map.has(far - 1)]).toEqual([true, false, true, false]);
  expect([
    map.hasAny(16, 16 * 8192 * 3 - 16),
    map.hasAny(16, 16 * 8192 * 3),
    map.hasAny(far + 16, 8176),
    map.hasAny(far + 16, 8192),
  ]).toEqual([false, true, false, true]);
});
