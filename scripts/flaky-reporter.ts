/** A reporter for vitest that names the tests which passed at their second try only: nothing else would show them. */
import { stdout } from "node:process";
import type { Reporter, TestCase } from "vitest/node";

export default class FlakyReporter implements Reporter {
  readonly #flaky: string[] = [];

  onTestCaseResult(test: TestCase): void {
    if (test.diagnostic()?.flaky === true) this.#flaky.push(`${test.module.relativeModuleId}: ${test.fullName}`);
  }

  onTestRunEnd(): void {
    for (const each of this.#flaky) stdout.write(`passed at the second try only: ${each}\n`);
  }
}
