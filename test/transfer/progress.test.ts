import { expect, test } from "vitest";
import { formatArrival, formatKind, formatSeconds } from "../../provider/transfer/progress.ts";
import { formatSeconds as formatSecondsOfBatch } from "../../sdk/batch/words.ts";

const MIB = 2 ** 20;

test("says the format once where it has no kinds", () => {
  expect(formatKind({ format: "raw", variant: "raw" })).toBe("raw");
  expect(formatKind({ format: "vmdk", variant: "streamOptimized" })).toBe("vmdk streamOptimized");
});

test.for([
  [0, "0 s"],
  [0.01, "0.1 s"],
  [0.72, "0.7 s"],
  [0.96, "1 s"],
  [1.4, "1 s"],
  [59.6, "1 min 0 s"],
  [7500, "2 h 5 min"],
] as const)("says of %d seconds that they are %s, in programs and batches alike", ([seconds, words]) => {
  expect(formatSeconds(seconds)).toBe(words);
  expect(formatSecondsOfBatch(seconds)).toBe(words);
});

test.for([
  [{ sentBytes: 16 * MIB, keptBytes: 0 }, "64.0 MiB virtual arrived as 16.0 MiB on the wire (75 % of its size saved)"],
  [{ sentBytes: 65 * MIB, keptBytes: 0 }, "64.0 MiB virtual arrived as 65.0 MiB on the wire (nothing saved)"],
  [
    { sentBytes: 4 * MIB, keptBytes: 12 * MIB },
    "64.0 MiB virtual arrived: 4.0 MiB on the wire now, 12.0 MiB resumed from an interrupted run (75 % of its size saved)",
  ],
] as const)("tells what was sent, resumed and saved apart: %o", ([bytes, words]) => {
  expect(formatArrival({ virtualSizeBytes: 64 * MIB, ...bytes })).toBe(words);
});
