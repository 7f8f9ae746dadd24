/** The report, as text and in a real browser. */
import { appendFileSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { type JournalRecord } from "../../sdk/batch/journal.ts";
import { type BatchReport, readReport, renderReport } from "../../sdk/batch/report.ts";
import { openDirectory } from "../bed/directory.ts";

const BROWSER = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find((path) => existsSync(path));
const HOSTILE = `<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>`;

/** A batch of two machines by its manifest and journal: `web` moved at its second attempt, `db` failed with words that would be markup. */
async function openMoved() {
  await using stack = new AsyncDisposableStack();
  const { path: folder } = stack.use(await openDirectory("report"));
  const manifest = join(folder, "autumn.yaml");
  writeFileSync(
    manifest,
    JSON.stringify({
      hosts: { kvm1: "qemu:///system" },
      defaults: { host: "kvm1" },
      machines: {
        web: { source: { ova: "exports/web & more.ova" }, labels: { team: HOSTILE } },
        db: { source: { ova: "db.ova" }, wave: 2 },
      },
    }),
  );
  await runCommand(["mkdir", join(folder, ".virtlift")]);
  const run = "r1";
  const step = (atMs: number, state: "begun" | "ended", kind: string, name: string): JournalRecord => ({
    record: "step",
    run,
    atMs,
    machine: "web",
    state,
    kind,
    name,
    op: "create",
  });
  const records: readonly JournalRecord[] = [
    { record: "run begun", run, atMs: 0, command: "up", machines: ["web", "db"] },
    {
      record: "planned",
      run,
      atMs: 1,
      machine: "web",
      findings: [{ level: "warn", text: `its TPM does not come along ${HOSTILE}`, waiver: `agreed ${HOSTILE}` }],
    },
    { record: "begun", run, atMs: 1000, machine: "web", operation: "up", attempt: 1 },
    step(2000, "begun", "ImportedDisk", "web-disk0"),
    {
      record: "ended",
      run,
      atMs: 4000,
      machine: "web",
      operation: "up",
      attempt: 1,
      outcome: { ok: false, cause: "passing", reasons: ["EOF"] },
    },
    { record: "begun", run, atMs: 9000, machine: "web", operation: "up", attempt: 2 },
    step(10_000, "begun", "ImportedDisk", "web-disk0"),
    step(70_000, "ended", "ImportedDisk", "web-disk0"),
    step(70_100, "begun", "VirtualMachine", "web"),
    step(75_000, "ended", "VirtualMachine", "web"),
    {
      record: "ended",
      run,
      atMs: 76_000,
      machine: "web",
      operation: "up",
      attempt: 2,
      outcome: { ok: true, changes: { create: 4 } },
      made: {
        machine: {
          name: "web",
          uuid: "00000000-0000-5000-8000-000000000001",
          vcpus: 2,
          memoryMiB: 2048,
          machine: "q35",
          firmware: "uefi",
          macAddresses: ["52:54:00:00:00:01"],
        },
        disks: [
          {
            path: "/images/web.qcow2",
            virtualSizeBytes: 40 * 2 ** 30,
            allocatedBytes: 7 * 2 ** 30,
            sourceDigest: "sha256:abc",
            contentDigest: "sha256:def",
            provenance: "migration",
            migrationRef: HOSTILE,
          },
        ],
      },
    },
    { record: "begun", run, atMs: 77_000, machine: "db", operation: "up", attempt: 1 },
    {
      record: "ended",
      run,
      atMs: 80_000,
      machine: "db",
      operation: "up",
      attempt: 1,
      outcome: { ok: false, cause: "refused", reasons: [HOSTILE] },
    },
    { record: "run ended", run, atMs: 81_000 },
  ];
  writeFileSync(join(folder, ".virtlift/journal.ndjson"), records.map((record) => `${JSON.stringify(record)}\n`).join(""));
  const held = stack.move();
  return { folder, manifest, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

test("tells what was moved, how long each phase took, what was tried again and what failed", async () => {
  await using moved = await openMoved();
  const report = readReport(moved.manifest);
  expect(report.totals).toEqual({
    machines: 2,
    done: 1,
    failed: 1,
    disks: 1,
    virtualSizeBytes: 40 * 2 ** 30,
    allocatedBytes: 7 * 2 ** 30,
    seconds: 79,
  });
  const [web, db] = report.machines;
  expect(web).toMatchObject({ state: "done", retries: 1, target: "kvm1", uri: "qemu:///system", source: "exports/web & more.ova" });
  expect(web?.spans.map(({ what, beganMs, endedMs, isOk }) => [what, beganMs, endedMs, isOk])).toEqual([
    ["up", 1000, 4000, false],
    ["copy web-disk0", 2000, 4000, false],
    ["up, attempt 2", 9000, 76_000, true],
    ["copy web-disk0", 10_000, 70_000, true],
    ["make web", 70_100, 75_000, true],
  ]);
  expect(db).toMatchObject({ state: "failed", reasons: [HOSTILE] });
});

test("a refresh later changes nothing of when a machine was moved, and how long it took", async () => {
  await using moved = await openMoved();
  const before = readReport(moved.manifest);
  const run = "r2";
  const records: readonly JournalRecord[] = [
    { record: "run begun", run, atMs: 9_000_000, command: "refresh", machines: ["web"] },
    { record: "begun", run, atMs: 9_000_001, machine: "web", operation: "refresh", attempt: 1 },
    { record: "ended", run, atMs: 9_000_500, machine: "web", operation: "refresh", attempt: 1, outcome: { ok: true, changes: {} } },
    { record: "run ended", run, atMs: 9_001_000 },
  ];
  appendFileSync(join(moved.folder, ".virtlift/journal.ndjson"), records.map((record) => `${JSON.stringify(record)}\n`).join(""));
  const after = readReport(moved.manifest);
  expect(after.machines).toEqual(before.machines);
  expect(after.totals).toEqual(before.totals);
  expect(after.runs.map(({ command }) => command)).toEqual(["up", "refresh"]);
});

test("is one file: it loads nothing, runs nothing, and every word from outside is escaped", async () => {
  await using moved = await openMoved();
  const html = renderReport(readReport(moved.manifest));
  expect(html).not.toMatch(/<script|<link|<img|<iframe|@import|url\(|\bsrc=(?!x)/i);
  expect(html).toContain("&lt;script&gt;");
  expect(html).toContain("waived: agreed &lt;img");
  expect(html).toContain("web &amp; more.ova");
  expect(html).toContain("default-src 'none'");
});

test("has something to say of a batch that was never run", () => {
  const empty: BatchReport = {
    project: "none",
    manifest: "/none.yaml",
    writtenMs: 0,
    runs: [],
    machines: [],
    totals: { machines: 0, done: 0, failed: 0, disks: 0, virtualSizeBytes: 0, allocatedBytes: 0, seconds: 0 },
  };
  expect(renderReport(empty)).toContain("0 of 0");
});

test.skipIf(BROWSER === undefined)(
  "a browser shows it, light and dark, and obeys nothing in it (skipped where there is no chromium)",
  async () => {
    await using moved = await openMoved();
    const page = join(moved.folder, "report.html");
    writeFileSync(page, renderReport(readReport(moved.manifest)));
    const flags = [
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-background-networking",
      "--disable-dev-shm-usage",
      `--user-data-dir=${join(moved.folder, "profile")}`,
      "--window-size=1180,1600",
    ];
    const browse = (...argv: readonly string[]) => runCommand([BROWSER ?? "", ...flags, ...argv, `file://${page}`], { timeoutMs: 60_000 });
    const { stdout: dom } = await browse("--dump-dom");
    expect(dom).toContain("<title>autumn: migration report</title>");
    expect(dom).not.toMatch(/<img|<script/i);
    expect(dom.match(/<rect/g)).toHaveLength(6);
    for (const [name, ...scheme] of [["light"], ["dark", "--blink-settings=preferredColorScheme=0"]] as const) {
      const picture = join(moved.folder, `${name}.png`);
      await browse(`--screenshot=${picture}`, ...scheme);
      const png = readFileSync(picture);
      expect([png.readUInt32BE(16), png.readUInt32BE(20)]).toEqual([1180, 1600]);
      // A blank page of this size takes a few KB.
      expect(png.length).toBeGreaterThan(40_000);
    }
  },
  120_000,
);
