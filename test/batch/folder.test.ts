/** What batches of one folder keep of each other apart. */
import { appendFileSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { readBatch } from "../../sdk/batch/driver.ts";
import { findJournal } from "../../sdk/batch/folder.ts";
import type { JournalRecord } from "../../sdk/batch/journal.ts";
import { readReport } from "../../sdk/batch/report.ts";
import { openBatchBed } from "./bed.ts";

const manifestOf = (project: string) => ({
  project,
  defaults: { host: "qemu:///system" },
  machines: { web: { source: { ova: "web.ova" } } },
});
const MOVED: readonly JournalRecord[] = [
  { record: "run begun", run: "r", atMs: 0, command: "up", machines: ["web"] },
  { record: "begun", run: "r", atMs: 1, machine: "web", operation: "up", attempt: 1 },
  { record: "ended", run: "r", atMs: 2, machine: "web", operation: "up", attempt: 1, outcome: { ok: true, changes: { create: 2 } } },
  { record: "run ended", run: "r", atMs: 3 },
];

const linesOf = (records: readonly JournalRecord[]): string => records.map((record) => `${JSON.stringify(record)}\n`).join("");

test("tells and destroys the machines of one project only, though another in its folder has machines of the same names", async () => {
  await using bed = await openBatchBed(manifestOf("red"));
  {
    await using _ = await bed.openBatch();
  }
  appendFileSync(findJournal(bed.directory, "red").journal, linesOf(MOVED));
  expect(readBatch(bed.manifestPath).statuses).toMatchObject([{ standing: { state: "done" } }]);

  bed.write(manifestOf("blue"));
  expect(readBatch(bed.manifestPath).statuses).toMatchObject([{ standing: { state: "waiting" } }]);
  expect(readReport(bed.manifestPath)).toMatchObject({ runs: [], totals: { done: 0 } });
  await using blue = await bed.openBatch();
  await expect(blue.destroy({ states: ["done"] })).rejects.toThrow(
    "no machine of the manifest is state done: it has web (wave 1, state waiting)",
  );
  await expect(blue.up({}, { usePlans: true })).rejects.toThrow(
    `no plan of web was saved: run virtlift plan ${bed.manifestPath} --save first`,
  );
});

test.for([
  ["the project that its stacks name", "red"],
  ["whoever opens it first, where nothing names one", undefined],
] as const)("gives a journal that names no project to %s", async ([, owner]) => {
  await using bed = await openBatchBed(manifestOf("blue"));
  const stack = join(bed.directory, ".virtlift/stacks/web");
  mkdirSync(stack, { recursive: true });
  if (owner !== undefined) writeFileSync(join(stack, "Pulumi.yaml"), `name: ${owner}\nruntime: nodejs\n`);
  writeFileSync(join(bed.directory, ".virtlift/journal.ndjson"), linesOf(MOVED));
  const stateNow = () => readBatch(bed.manifestPath).statuses[0]?.standing.state;

  const [first, second] = owner === undefined ? ["done", "waiting"] : ["waiting", "done"];
  expect(stateNow()).toBe(first);
  {
    await using _ = await bed.openBatch();
  }
  expect(stateNow()).toBe(first);
  bed.write(manifestOf("red"));
  expect(stateNow()).toBe(second);
});
