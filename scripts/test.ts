/** `npm test`: brings the machine what the tests need, runs them, and ends with one plain line that says how many passed and failed. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { argv, env, execPath, exit } from "node:process";
import { CommandError } from "../provider/errors.ts";
import { prepareGuest } from "./guest/guest.ts";
import { GUEST, LIBVIRT, preparePackages, SetupError, TESTS } from "./setup/packages.ts";
import { preparePulumi } from "./setup/pulumi.ts";
import { say, step } from "./setup/steps.ts";

const ROOT = dirname(import.meta.dirname);

/** What vitest's JSON reporter writes, as far as it is read here. */
interface Results {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly testResults: readonly { readonly status: string; readonly assertionResults: readonly unknown[] }[];
}

try {
  await preparePackages([...LIBVIRT, ...GUEST, ...TESTS]);
  const pulumi = await preparePulumi();
  await step("proof guest", async () => void (await prepareGuest()));
  exit(await runTests(pulumi, argv.slice(2)));
} catch (error) {
  if (!(error instanceof SetupError || error instanceof CommandError)) throw error;
  say(`✗ ${error.message}`);
  exit(1);
}

/** Gives vitest's exit code; what it reported of single tests decides the last line. */
async function runTests(pulumi: string, rest: readonly string[]): Promise<number> {
  const directory = await mkdtemp(join(tmpdir(), "virtlift-results-"));
  try {
    const report = join(directory, "results.json");
    const path = [join(ROOT, "node_modules/.bin"), dirname(execPath), pulumi, env["PATH"] ?? "", "/usr/sbin", "/sbin"].join(delimiter);
    const reporters = ["--reporter=default", "--reporter=json", "--reporter=./scripts/flaky-reporter.ts", `--outputFile.json=${report}`];
    const child = spawn(execPath, [join(ROOT, "node_modules/vitest/vitest.mjs"), "run", ...reporters, ...rest], {
      cwd: ROOT,
      env: { ...env, PATH: path },
      stdio: "inherit",
    });
    const [code] = (await once(child, "exit")) as [number | null];
    const { passed, failed } = count(await readFile(report, "utf8").catch(() => undefined), code);
    say(`${passed} passed, ${failed} failed`);
    return code ?? 1;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** A file that cannot be loaded, and a run that failed outside of any test, count as one failure each. */
function count(report: string | undefined, code: number | null): { readonly passed: number; readonly failed: number } {
  if (report === undefined) return { passed: 0, failed: 1 };
  const results = JSON.parse(report) as Results;
  const unloaded = results.testResults.filter((file) => file.status === "failed" && file.assertionResults.length === 0).length;
  const failed = results.numFailedTests + unloaded;
  return { passed: results.numPassedTests, failed: failed === 0 && code !== 0 ? 1 : failed };
}
