import { once } from "node:events";
import { type AddressInfo, createServer } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, test } from "vitest";
import { Calls, engineGone, parseEngineAddress } from "../provider/engine.ts";

test.for([
  ["127.0.0.1:34567", { host: "127.0.0.1", port: 34567 }],
  ["localhost:1", { host: "localhost", port: 1 }],
  ["127.0.0.1:65536", undefined],
  ["/usr/bin/vitest", undefined],
  ["run", undefined],
  [undefined, undefined],
] as const)("reads the engine's address from the last argument %s", ([argument, address]) => {
  expect(parseEngineAddress(argument)).toEqual(address);
});

test("an engine is gone when nobody listens any more, and not before", async () => {
  const engine = createServer((socket) => socket.destroy()).listen(0, "127.0.0.1");
  await once(engine, "listening");
  const { port } = engine.address() as AddressInfo;

  let isGone = false;
  const gone = engineGone({ host: "127.0.0.1", port }, 10).then(() => (isGone = true));
  await sleep(150);
  expect(isGone).toBe(false);
  engine.close();
  await gone;
});

test("the end aborts the calls that run, waits for them, and lets no other begin", async () => {
  const calls = new Calls();
  const steps: string[] = [];
  const running = calls.run(async () => {
    await sleep(60_000, undefined, { signal: calls.signal }).catch(() => steps.push("told"));
    await sleep(20);
    steps.push("tidied");
  });
  await calls.end("the engine is gone");
  expect(steps).toEqual(["told", "tidied"]);
  await running;
  await expect(calls.run(async () => steps.push("late"))).rejects.toThrow("the engine is gone");
});

test("a call's failure is the caller's, and it counts no longer", async () => {
  const calls = new Calls();
  await expect(calls.run(async () => Promise.reject(new Error("broken")))).rejects.toThrow("broken");
  await calls.end("over");
});
