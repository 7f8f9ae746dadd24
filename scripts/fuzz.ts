/**
 * `npm run fuzz`: mutates images and archives for long, and stops at the first that escapes its parser.
 * `VIRTLIFT_FUZZ_SECONDS` says for how long (default 600), `VIRTLIFT_FUZZ_SEED` which seed comes first (default: any).
 */
import { randomInt } from "node:crypto";
import { env, exit } from "node:process";
import { fuzz } from "../test/image/fuzz.ts";
import { say } from "./setup/steps.ts";

/** How long one seed is followed: a line is said then. */
const SLICE_SECONDS = 10;

const seconds = Number(env["VIRTLIFT_FUZZ_SECONDS"] ?? "600");
const first = Number(env["VIRTLIFT_FUZZ_SEED"] ?? randomInt(2 ** 32 - 1));
if (!(seconds > 0) || !Number.isInteger(first)) {
  say("✗ VIRTLIFT_FUZZ_SECONDS and VIRTLIFT_FUZZ_SEED are numbers");
  exit(2);
}
let total = 0;
try {
  for (let slice = 0, left = seconds; left > 0; slice++, left -= SLICE_SECONDS) {
    const seed = (first + slice) % 2 ** 32;
    const { parses, refused } = fuzz(seed, Math.min(left, SLICE_SECONDS) * 1000);
    total += parses;
    say(`  seed ${seed}: ${parses} mutated files, ${refused} of them refused, none escaped`);
  }
} catch (error) {
  say(`✗ ${error instanceof Error ? error.message : String(error)}`);
  exit(1);
}
say(`✓ ${total} mutated files in ${seconds} s, none escaped its parser`);
