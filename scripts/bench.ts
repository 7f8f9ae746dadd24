/**
 * `npm run bench`: measures what the project promises to be quick at, beside what people do instead, and prints what was reached of what was aimed at.
 * Names of sections (`npm run bench -- copy preview`) run those alone. `--quick` takes a quarter of the data and one round, and leaves out what is
 * large; `--rounds N` says how often each contender runs (default 3), `--machines N` how many a large batch has (default 50). Needs root: hosts are
 * private ones, in name spaces of their own.
 */
import { argv, exit, getuid } from "node:process";
import { parseArgs } from "node:util";
import { benchBatch } from "./bench/batch.ts";
import { benchCopy } from "./bench/copy.ts";
import { benchPreview } from "./bench/preview.ts";
import { LIBVIRT, preparePackages, SetupError, TESTS } from "./setup/packages.ts";
import { say } from "./setup/steps.ts";

const USAGE = `npm run bench -- [section ...] [--quick] [--rounds <n>] [--machines <n>]   measures as root, and prints what was reached of what was aimed at

section: copy, preview, batch; default: all of them
--quick: a quarter of the data, one round, and nothing large
--rounds: how often each contender runs; default 3
--machines: how many a large batch has; default 50`;

const { values: options, positionals: wanted } = parseOptions(argv.slice(2));
const isQuick = options.quick;
const rounds = Number(options.rounds ?? (isQuick ? 1 : 3));

/** By name; run in this order. Each prints its own results. */
const SECTIONS: Readonly<Record<string, () => Promise<void>>> = {
  copy: () => benchCopy({ isQuick, rounds }),
  preview: () => benchPreview(),
  batch: () => benchBatch({ isQuick, planned: Number(options.machines) }),
};

/** Ends the process where there is nothing to measure: asked for help, or for what there is not. */
function parseOptions(args: readonly string[]) {
  const known = {
    quick: { type: "boolean", default: false },
    rounds: { type: "string" },
    machines: { type: "string", default: "50" },
    help: { type: "boolean", short: "h" },
  } as const;
  try {
    const parsed = parseArgs({ args: [...args], options: known, allowPositionals: true });
    if (parsed.values.help !== true) return parsed;
    say(USAGE);
    exit(0);
  } catch (error) {
    say(`✗ ${error instanceof Error ? error.message : String(error)}\n${USAGE}`);
    exit(1);
  }
}

try {
  if (getuid?.() !== 0) throw new SetupError("the benchmark needs root: its hosts are private ones, in name spaces of their own");
  if (!Number.isInteger(rounds) || rounds < 1) throw new SetupError(`--rounds ${options.rounds} is no number of rounds: give 1 or more`);
  if (!/^[1-9]\d{0,3}$/.test(options.machines))
    throw new SetupError(`--machines ${options.machines} is no number of machines: give 1 to 9999`);
  const unknown = wanted.find((name) => !Object.hasOwn(SECTIONS, name));
  if (unknown !== undefined)
    throw new SetupError(`there is no section ${unknown} of the benchmark, only ${Object.keys(SECTIONS).join(", ")}`);
  await preparePackages([...LIBVIRT, ...TESTS, { debian: "e2fsprogs", brings: ["mkfs.ext4"] }]);
  for (const [name, run] of Object.entries(SECTIONS)) if (wanted.length === 0 || wanted.includes(name)) await run();
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  say(`✗ ${error.message}`);
  exit(1);
}
