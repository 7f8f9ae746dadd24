import { afterEach, expect, test, vi } from "vitest";
import { ConnectionError } from "../../provider/errors.ts";
import { createThrottle, openThrottle, shareThrottle, throttled } from "../../provider/transfer/throttle.ts";

const KIB = 1024;

afterEach(() => vi.useRealTimers());

test("lets bytes leave at its rate and no sooner, in the order in which they were asked for", async () => {
  vi.useFakeTimers({ toFake: ["performance", "setTimeout"], now: 0 });
  vi.advanceTimersByTime(10_000);
  const throttle = createThrottle(1000 * KIB);
  const left: string[] = [];
  for (const name of ["a", "b", "c"]) void throttle.take(250 * KIB).then(() => left.push(name));
  // After a pause a tenth of a second's worth goes at once.
  await vi.advanceTimersByTimeAsync(149);
  expect(left).toEqual([]);
  await vi.advanceTimersByTimeAsync(2);
  expect(left).toEqual(["a"]);
  await vi.advanceTimersByTimeAsync(250);
  expect(left).toEqual(["a", "b"]);
  await vi.advanceTimersByTimeAsync(250);
  expect(left).toEqual(["a", "b", "c"]);
});

test("cuts what is sent into pieces only where there is a limit", async () => {
  const bytes = Buffer.alloc(600 * KIB, 7);
  const lengths = async (limit: Parameters<typeof throttled>[1]) => {
    const found: number[] = [];
    for await (const piece of throttled(bytes, limit, new AbortController().signal)) found.push(piece.length / KIB);
    return found;
  };
  expect(await lengths(undefined)).toEqual([600]);
  const taken: number[] = [];
  expect(await lengths({ bytesPerSecond: 1, take: async (count) => void taken.push(count / KIB) })).toEqual([256, 256, 88]);
  expect(taken).toEqual([256, 256, 88]);
});

test("is one limit for all who share it", async () => {
  await using shared = await shareThrottle(4000 * KIB);
  const users = [openThrottle(shared.setting), openThrottle(shared.setting)];
  expect(users.map(({ bytesPerSecond }) => bytesPerSecond)).toEqual([4000 * KIB, 4000 * KIB]);
  const began = performance.now();
  await Promise.all(users.flatMap((user) => [0, 1, 2].map(() => user.take(200 * KIB))));
  // 1200 KiB at 4000 KiB/s are 300 ms, of which 100 go at once.
  expect(performance.now() - began).toBeGreaterThan(190);
});

test("lets nobody send when the process that keeps the limit is gone", async () => {
  const shared = await shareThrottle(KIB);
  const user = openThrottle(shared.setting);
  const [late] = await Promise.allSettled([user.take(1000), shared[Symbol.asyncDispose]()]);
  expect(late).toMatchObject({ status: "rejected", reason: expect.any(ConnectionError) as unknown });
  await expect(user.take(1)).rejects.toThrow("the process that limits the bandwidth of this run is gone");
});

test("lets nobody wait for it who is told to stop, whoever keeps the limit", async () => {
  await using shared = await shareThrottle(KIB);
  for (const throttle of [createThrottle(KIB), openThrottle(shared.setting)]) {
    const stop = new AbortController();
    const waiting = [throttle.take(100 * KIB, stop.signal), throttle.take(100 * KIB, stop.signal)];
    stop.abort(new Error("the engine is gone"));
    for (const each of waiting) await expect(each).rejects.toThrow("the engine is gone");
    await expect(throttle.take(1, stop.signal)).rejects.toThrow("the engine is gone");
  }
});

test("refuses a limit at which nothing would arrive", () => {
  for (const setting of ["1023", "1 /run/limit"])
    expect(() => openThrottle(setting)).toThrow("too little for any disk: give at least 1024");
  expect(openThrottle("1024").bytesPerSecond).toBe(1024);
});

test.for(["", "0", "-1", "50MiB", "1e6", "1000 socket", "1000\n/x"])("refuses %j as a limit", (setting) => {
  expect(() => openThrottle(setting)).toThrow("which is no rate: give a number of bytes per second");
});
