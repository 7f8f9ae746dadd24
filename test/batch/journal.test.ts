import { appendFileSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { Journal, type JournalRecord, readJournal, standingOf } from "../../sdk/batch/journal.ts";
import { openDirectory } from "../bed/directory.ts";

const begun = (atMs: number, attempt = 1): JournalRecord => ({ record: "begun", run: "r", atMs, machine: "web", operation: "up", attempt });
const done: JournalRecord = {
  record: "ended",
  run: "r",
  atMs: 9,
  machine: "web",
  operation: "up",
  attempt: 1,
  outcome: { ok: true, changes: { create: 2 } },
  made: { machine: { name: "web" }, disks: [] },
};

test("remembers over restarts, and loses no more than the line that a kill cut off", async () => {
  await using folder = await openDirectory("journal");
  const path = join(folder.path, "journal.ndjson");
  {
    using journal = new Journal(path);
    journal.append(begun(1));
  }
  appendFileSync(path, '{"record":"ended","run":"r","ma');
  {
    using journal = new Journal(path);
    expect(journal.records).toEqual([begun(1)]);
    journal.append(done);
  }
  expect(readJournal(path)).toEqual([begun(1), done]);
  expect(readFileSync(path, "utf8").split("\n")).toHaveLength(4);
  expect(readJournal(join(folder.path, "none"))).toEqual([]);
});

test("tells how a machine stands: what began and did not end was interrupted, unless a driver is at work", () => {
  expect(standingOf([], "web", false).state).toBe("waiting");
  expect(standingOf([begun(1)], "web", false)).toMatchObject({ state: "interrupted", beganMs: 1 });
  expect(standingOf([begun(1)], "web", true).state).toBe("running");
  expect(standingOf([begun(1), done], "web", false)).toMatchObject({
    state: "done",
    beganMs: 1,
    endedMs: 9,
    made: { machine: { name: "web" } },
  });
  const failed: JournalRecord = { ...done, outcome: { ok: false, cause: "refused", reasons: ["no"] }, made: undefined };
  expect(standingOf([begun(1), failed], "web", false)).toMatchObject({ state: "failed", reasons: ["no"], cause: "refused" });
  expect(standingOf([begun(1), done, begun(20), failed], "web", false)).toMatchObject({
    state: "failed",
    made: { machine: { name: "web" } },
  });
  const destroyed: JournalRecord = { ...done, operation: "destroy", made: undefined };
  expect(standingOf([begun(1), done, destroyed], "web", false)).toMatchObject({ state: "destroyed", made: undefined });
});

test("counts the time of a machine from its first attempt, and no preview", () => {
  const preview: JournalRecord = { ...done, operation: "preview", made: undefined };
  expect(standingOf([begun(1), begun(5, 2), done, preview], "web", false)).toMatchObject({ state: "done", beganMs: 1, attempt: 1 });
});

test("keeps the time of the move when a later run copies nothing, and counts one that copies a disk again", () => {
  const later = (atMs: number): JournalRecord => ({ ...done, atMs });
  const copied: JournalRecord = {
    record: "step",
    run: "r",
    atMs: 45,
    machine: "web",
    state: "ended",
    kind: "ImportedDisk",
    name: "web-disk0",
    op: "create-replacement",
  };
  const refreshed: JournalRecord = { ...done, operation: "refresh", atMs: 35 };
  const records = [begun(1), done, begun(20), later(25), refreshed];
  expect(standingOf(records, "web", false)).toMatchObject({ state: "done", beganMs: 1, endedMs: 9 });
  expect(standingOf([...records, begun(40), copied, later(50)], "web", false)).toMatchObject({ beganMs: 40, endedMs: 50 });
});
