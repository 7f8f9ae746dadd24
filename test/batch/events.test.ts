import { expect, test, vi } from "vitest";
import { tellProgress } from "../../provider/transfer/progress.ts";
import { parseProgress } from "../../sdk/batch/events.ts";
import { formatTable, printable } from "../../sdk/batch/words.ts";

test("reads the progress of a copy from the very line that the provider says", () => {
  vi.useFakeTimers({ toFake: ["performance"] });
  try {
    const lines: string[] = [];
    const tell = tellProgress("web-disk0-1a2b", (line) => lines.push(line));
    vi.advanceTimersByTime(130_000);
    tell(42 * 2 ** 30, 100 * 2 ** 30);
    expect(lines.map(parseProgress)).toEqual([
      { disk: "web-disk0-1a2b", percent: 40, total: "100 GiB", rate: "331 MiB/s", left: "3 min 0 s" },
    ]);
  } finally {
    vi.useRealTimers();
  }
});

test("reads what was written of a disk whose end nobody knows, which the provider says each time that it has doubled", () => {
  vi.useFakeTimers({ toFake: ["performance"] });
  try {
    const lines: string[] = [];
    const tell = tellProgress("web-disk0", (line) => lines.push(line));
    for (const mebibytes of [0, 100, 199, 220, 500, 510]) {
      vi.advanceTimersByTime(10_000);
      tell(mebibytes * 2 ** 20, undefined);
    }
    expect(lines.map(parseProgress)).toEqual([
      { disk: "web-disk0", written: "100 MiB", rate: "5.0 MiB/s" },
      { disk: "web-disk0", written: "220 MiB", rate: "5.5 MiB/s" },
      { disk: "web-disk0", written: "500 MiB", rate: "10.0 MiB/s" },
    ]);
  } finally {
    vi.useRealTimers();
  }
});

test("takes no other line for progress", () => {
  for (const line of ["web: 10 % done", "web: arrived as 5 MiB", "", "a b: 10 % of 1 GiB, 1 MiB/s, 1 s left"])
    expect(parseProgress(line)).toBeUndefined();
});

test("lays a table out, numbers to the right, and lets no escape sequence through", () => {
  expect(
    formatTable(
      ["machine", "size"],
      [
        ["web", "10.3 MiB"],
        ["database", "1 MiB"],
      ],
    ),
  ).toEqual(["machine   size", "web       10.3 MiB", "database     1 MiB"]);
  expect(printable("a\u001b[2Jb\nc")).toBe("a [2Jb c");
});
