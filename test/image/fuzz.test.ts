import { randomInt } from "node:crypto";
import { expect, test } from "vitest";
import { fuzz } from "./fuzz.ts";

/** Longer by VIRTLIFT_FUZZ_SECONDS; a run is repeated by VIRTLIFT_FUZZ_SEED. */
const SECONDS = Number(process.env["VIRTLIFT_FUZZ_SECONDS"] ?? "3");
const SEED = Number(process.env["VIRTLIFT_FUZZ_SEED"] ?? randomInt(2 ** 32 - 1));

test(`no mutated image escapes its parser (seed ${SEED})`, { timeout: SECONDS * 1000 + 30_000 }, () => {
  const { parses, refused } = fuzz(SEED, SECONDS * 1000);
  expect(refused).toBeGreaterThan(parses / 20);
  expect(refused).toBeLessThan(parses);
});
