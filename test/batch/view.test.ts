import { stderr } from "node:process";
import { afterEach, expect, test, vi } from "vitest";
import type { BatchEvent } from "../../sdk/batch/events.ts";
import { parseManifest } from "../../sdk/batch/manifest.ts";
import { lineOf, openView } from "../../sdk/cli/view.ts";

const { machines } = parseManifest(
  "defaults: { host: 'qemu:///system' }\nmachines: { web: { source: { ova: a } }, db: { source: { ova: b } } }\n",
  "/m.yaml",
);
const copying: BatchEvent = { event: "phase", machine: "web", phase: "copying", attempt: 1 };
const progress: BatchEvent = {
  event: "progress",
  machine: "web",
  disk: "web-disk0",
  percent: 40,
  total: "1.2 GiB",
  rate: "110 MiB/s",
  left: "7 s",
};
const failed: BatchEvent = { event: "ended", machine: "db", state: "failed", seconds: 3, reasons: ["host: \u001b[31mno"] };

/** Makes this process's stderr a terminal of 80 by 24, and keeps what is written to it. */
function captureTerminal(): readonly string[] {
  const written: string[] = [];
  vi.spyOn(stderr, "write").mockImplementation((text) => {
    written.push(String(text));
    return true;
  });
  Object.assign(stderr, { isTTY: true, columns: 80, rows: 24 });
  return written;
}

afterEach(() => {
  Object.assign(stderr, { isTTY: false });
  vi.useRealTimers();
});

test("draws one row a machine, redraws it in place, and leaves the last frame", async () => {
  vi.useFakeTimers();
  const written = captureTerminal();
  {
    await using view = openView(false);
    view.expect(machines);
    view.show(copying);
    view.show(progress);
    vi.advanceTimersByTime(300);
    expect(written.join("")).toContain("web   1  copying  ████░░░░░░ 40 % of 1.2 GiB, 110 MiB/s, 7 s left");
    view.show(failed);
  }
  const frame = written.slice(-1)[0] ?? "";
  expect(written.some((text) => text.startsWith("\u001b[1A"))).toBe(true);
  expect(frame).toContain("db    1  failed in 3 s  host:  [31mno");
  expect(frame.split("\n")).toHaveLength(3);
});

test("lets a settled table stand, and shows what comes below it", async () => {
  const written = captureTerminal();
  await using view = openView(false);
  view.expect(machines);
  view.show(copying);
  view.settle();
  const settled = written.length;
  view.show(failed);
  view.settle();
  const later = written.slice(settled).join("");
  expect(later).not.toContain("\u001b[1A");
  expect(later).toContain("db");
  expect(later).not.toContain("web");
});

test("says as a line what a reader of a log wants to know, and nothing that a terminal would obey", () => {
  const endless: BatchEvent = { event: "progress", machine: "web", disk: "web-disk0", written: "1.2 GiB", rate: "110 MiB/s" };
  expect([copying, progress, endless, failed].map(lineOf)).toEqual([
    "web: copying",
    "web: web-disk0 40 % of 1.2 GiB, 110 MiB/s, 7 s left",
    "web: web-disk0 1.2 GiB written so far, 110 MiB/s",
    "db: failed in 3 s: host:  [31mno",
  ]);
  expect(lineOf({ event: "phase", machine: "web", phase: "previewing", attempt: 1 })).toBeUndefined();
});
