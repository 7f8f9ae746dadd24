/** What came of a batch, from its journal: as data, and as one HTML file that needs nothing else. */
import { type JournalRecord, type Made, type MachineStanding, standingOf } from "./journal.ts";
import { readBatch } from "./driver.ts";
import type { BatchMachine } from "./manifest.ts";
import type { Finding } from "./plan.ts";
import { formatBytes, formatSeconds } from "./words.ts";

/** A stretch of work on one machine. */
export interface Span {
  /** `copy web-disk0`, `machine web`, `up`, `destroy`; a refresh is none. */
  readonly what: string;
  readonly kind: "operation" | "copy" | "machine";
  readonly run: string;
  readonly beganMs: number;
  /** Undefined when it did not end: it runs, or was killed. */
  readonly endedMs: number | undefined;
  readonly isOk: boolean;
}

export interface MachineReport {
  readonly name: string;
  readonly wave: number;
  /** The host as the manifest calls it, and its URI. */
  readonly target: string;
  readonly uri: string;
  readonly source: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly state: MachineStanding["state"];
  readonly reasons: readonly string[];
  /** Attempts beyond the first of each run. */
  readonly retries: number;
  /** Of the last operation that worked on it: a refresh only reads. */
  readonly beganMs: number | undefined;
  readonly endedMs: number | undefined;
  readonly made: Made | undefined;
  readonly findings: readonly Finding[];
  readonly spans: readonly Span[];
}

export interface BatchReport {
  readonly project: string;
  readonly manifest: string;
  readonly writtenMs: number;
  readonly runs: readonly {
    readonly run: string;
    readonly command: string;
    readonly beganMs: number;
    readonly endedMs: number | undefined;
  }[];
  readonly machines: readonly MachineReport[];
  readonly totals: {
    readonly machines: number;
    readonly done: number;
    readonly failed: number;
    readonly disks: number;
    readonly virtualSizeBytes: number;
    readonly allocatedBytes: number;
    /** From the first beginning to the last end of all work on machines, pauses between runs included. */
    readonly seconds: number;
  };
}

/** Reads the manifest and its journal. Throws ManifestError. */
export function readReport(manifestPath: string): BatchReport {
  const { manifest, records, statuses } = readBatch(manifestPath);
  const machines = statuses.map(({ machine, standing }) => machineReport(machine, standing, records));
  const disks = machines.flatMap(({ made }) => made?.disks ?? []);
  const sum = (key: string): number => disks.reduce((total, disk) => total + Number(disk[key] ?? 0), 0);
  const spans = machines.flatMap((machine) => machine.spans);
  const began = Math.min(...spans.map(({ beganMs }) => beganMs));
  const ended = Math.max(...spans.map(({ beganMs, endedMs }) => endedMs ?? beganMs));
  return {
    project: manifest.project,
    manifest: manifest.path,
    writtenMs: Date.now(),
    runs: runsOf(records),
    machines,
    totals: {
      machines: machines.length,
      done: machines.filter(({ state }) => state === "done").length,
      failed: machines.filter(({ state }) => ["failed", "cancelled", "interrupted"].includes(state)).length,
      disks: disks.length,
      virtualSizeBytes: sum("virtualSizeBytes"),
      allocatedBytes: sum("allocatedBytes"),
      seconds: spans.length === 0 ? 0 : (ended - began) / 1000,
    },
  };
}

function runsOf(records: readonly JournalRecord[]): BatchReport["runs"] {
  const ended = new Map(records.flatMap((record) => (record.record === "run ended" ? [[record.run, record.atMs] as const] : [])));
  return records.flatMap((record) =>
    record.record === "run begun"
      ? [{ run: record.run, command: record.command, beganMs: record.atMs, endedMs: ended.get(record.run) }]
      : [],
  );
}

function machineReport(machine: BatchMachine, standing: MachineStanding, records: readonly JournalRecord[]): MachineReport {
  const own = records.filter((record) => "machine" in record && record.machine === machine.name);
  const work = own.filter((record) => !("operation" in record && record.operation === "refresh"));
  const { beganMs, endedMs } = standingOf(work, machine.name, false);
  const { ova, vmx, file } = machine.declaration.source;
  const source = ova ?? vmx ?? file;
  return {
    name: machine.name,
    wave: machine.wave,
    target: machine.hostName,
    uri: machine.declaration.host.uri,
    source: typeof source === "string" ? source : JSON.stringify(machine.declaration.source),
    labels: machine.labels,
    state: standing.state,
    reasons: standing.reasons,
    retries: own.filter((record) => record.record === "begun" && record.attempt > 1).length,
    beganMs,
    endedMs,
    made: standing.made,
    findings: own.findLast((record) => record.record === "planned")?.findings ?? [],
    spans: spansOf(work),
  };
}

function spansOf(records: readonly JournalRecord[]): readonly Span[] {
  const spans: Span[] = [];
  const open = new Map<string, number>();
  const begin = (key: string, span: Omit<Span, "endedMs" | "isOk">): void => {
    open.set(key, spans.push({ ...span, endedMs: undefined, isOk: false }) - 1);
  };
  const end = (key: string, endedMs: number, isOk: boolean): void => {
    const index = open.get(key);
    const span = index === undefined ? undefined : spans[index];
    if (index !== undefined && span !== undefined) spans[index] = { ...span, endedMs, isOk };
    open.delete(key);
  };
  for (const record of records) {
    if (record.record === "step") {
      const { run, name, kind, op, state, atMs } = record;
      if (op === "same" || op === "refresh") continue;
      const key = `${run} ${kind} ${name} ${op}`;
      const isDisk = kind === "ImportedDisk";
      const verb = op.startsWith("create") ? (isDisk ? "copy" : "make") : op;
      if (state === "begun") begin(key, { what: `${verb} ${name}`, kind: isDisk ? "copy" : "machine", run, beganMs: atMs });
      else end(key, atMs, state === "ended");
    } else if (record.record === "begun") {
      const { run, operation, attempt, atMs } = record;
      begin(`${run} ${operation}`, {
        what: attempt > 1 ? `${operation}, attempt ${attempt}` : operation,
        kind: "operation",
        run,
        beganMs: atMs,
      });
    } else if (record.record === "ended") {
      end(`${record.run} ${record.operation}`, record.atMs, record.outcome.ok);
      // What was cut off with the operation has no end of its own.
      for (const key of open.keys()) if (key.startsWith(`${record.run} `)) end(key, record.atMs, false);
    }
  }
  return spans;
}

/** The report as one HTML document: no script, no resource from elsewhere, every word from outside escaped. */
export function renderReport(report: BatchReport): string {
  const { project, totals, machines, runs } = report;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>${escape(project)}: migration report</title>
<style>${STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Migration report</p>
<h1>${escape(project)}</h1>
<p class="muted">${escape(report.manifest)} · written ${time(report.writtenMs)}</p>
</header>
<section class="tiles" aria-label="Totals">
${tile(`${totals.done} of ${totals.machines}`, "machines done", totals.failed === 0 ? "good" : "")}
${tile(String(totals.failed), totals.failed === 1 ? "machine needs attention" : "machines need attention", totals.failed > 0 ? "bad" : "")}
${tile(String(totals.disks), totals.disks === 1 ? "disk" : "disks")}
${tile(formatBytes(totals.virtualSizeBytes), "virtual size")}
${tile(formatBytes(totals.allocatedBytes), "stored")}
${tile(formatSeconds(totals.seconds), "from first to last")}
</section>
<section>
<h2>Machines</h2>
<div class="scroll"><table>
<thead><tr><th>Machine</th><th>State</th><th class="number">Wave</th><th>Target</th><th class="number">Virtual</th><th class="number">Stored</th><th class="number">Took</th><th class="number">Retries</th></tr></thead>
<tbody>
${machines.map(summaryRow).join("\n")}
</tbody></table></div>
</section>
${timeline(machines, runs)}
${machines.map(details).join("\n")}
<footer class="muted">Made by virtlift. Digests are SHA-256 of the bytes that were read and of the volume as it was published.</footer>
</body>
</html>
`;
}

function tile(value: string, label: string, tone = ""): string {
  return `<div class="tile ${tone}"><strong>${escape(value)}</strong><span>${escape(label)}</span></div>`;
}

function summaryRow(machine: MachineReport): string {
  const { name, state, wave, target, made, beganMs, endedMs, retries } = machine;
  const sum = (key: string): string => {
    const bytes = made?.disks.reduce((total, disk) => total + Number(disk[key] ?? 0), 0);
    return bytes === undefined ? "–" : formatBytes(bytes);
  };
  const took = beganMs === undefined || endedMs === undefined ? "–" : formatSeconds((endedMs - beganMs) / 1000);
  return `<tr><td><a href="#${anchor(name)}">${escape(name)}</a></td><td>${badge(state)}</td><td class="number">${wave}</td><td>${escape(target)}</td><td class="number">${sum("virtualSizeBytes")}</td><td class="number">${sum("allocatedBytes")}</td><td class="number">${took}</td><td class="number">${retries}</td></tr>`;
}

function badge(state: string): string {
  const tone = state === "done" ? "good" : ["failed", "cancelled", "interrupted"].includes(state) ? "bad" : "";
  return `<span class="badge ${tone}">${escape(state)}</span>`;
}

const LABEL_WIDTH = 150;
const CHART_WIDTH = 850;
const ROW_HEIGHT = 26;

/** The last run that worked on machines, one row a machine. */
function timeline(machines: readonly MachineReport[], runs: BatchReport["runs"]): string {
  const run = runs.findLast((each) => machines.some(({ spans }) => spans.some((span) => span.run === each.run)));
  if (run === undefined) return "";
  const rows = machines
    .map(({ name, spans }) => ({ name, spans: spans.filter((span) => span.run === run.run) }))
    .filter(({ spans }) => spans.length > 0);
  const all = rows.flatMap(({ spans }) => spans);
  const began = Math.min(...all.map(({ beganMs }) => beganMs));
  const ended = Math.max(began + 1, ...all.map(({ beganMs, endedMs }) => endedMs ?? beganMs));
  const x = (atMs: number): number => LABEL_WIDTH + ((atMs - began) / (ended - began)) * CHART_WIDTH;
  const height = rows.length * ROW_HEIGHT + 24;
  const marks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const at = LABEL_WIDTH + part * CHART_WIDTH;
    const anchorWord = part === 0 ? "start" : part === 1 ? "end" : "middle";
    return `<line class="grid" x1="${at}" y1="0" x2="${at}" y2="${height - 20}"/><text class="axis" x="${at}" y="${height - 6}" text-anchor="${anchorWord}">${escape(formatSeconds(((ended - began) / 1000) * part))}</text>`;
  });
  const bars = rows.flatMap(({ name, spans }, row) => {
    const top = row * ROW_HEIGHT;
    const bar = ({ what, kind, beganMs, endedMs, isOk }: Span): string => {
      const width = Math.max(2, x(endedMs ?? ended) - x(beganMs));
      const inset = kind === "operation" ? 4 : 8;
      const took = endedMs === undefined ? "did not end" : formatSeconds((endedMs - beganMs) / 1000);
      return `<rect class="${kind}${isOk ? "" : " bad"}" x="${x(beganMs).toFixed(1)}" y="${top + inset}" width="${width.toFixed(1)}" height="${ROW_HEIGHT - 2 * inset}" rx="3"><title>${escape(`${what}: ${took}`)}</title></rect>`;
    };
    const label = name.length > 20 ? `${name.slice(0, 19)}…` : name;
    return [`<text class="label" x="${LABEL_WIDTH - 10}" y="${top + 17}" text-anchor="end">${escape(label)}</text>`, ...spans.map(bar)];
  });
  return `<section>
<h2>Timeline of the last run</h2>
<p class="muted">${escape(run.command)}, begun ${time(run.beganMs)}</p>
<p class="legend"><span class="key copy"></span>copying disks <span class="key machine"></span>making the machine <span class="key operation"></span>checking and other work <span class="key bad"></span>failed or cut off</p>
<div class="scroll"><svg viewBox="0 0 ${LABEL_WIDTH + CHART_WIDTH + 4} ${height}" role="img" aria-label="When each machine was worked on">${marks.join("")}${bars.join("")}</svg></div>
</section>`;
}

function details(machine: MachineReport): string {
  const { name, state, source, target, uri, made, reasons, findings, labels, spans, wave } = machine;
  const hardware = made?.machine;
  const facts: readonly (readonly [string, string])[] = [
    ["From", source],
    ["To", target === uri ? uri : `${target} (${uri})`],
    ["Wave", String(wave)],
    ...Object.entries(labels).map(([key, value]): readonly [string, string] => [key, value]),
    ...(hardware === undefined
      ? []
      : ([
          ["Name", text(hardware["name"])],
          ["UUID", text(hardware["uuid"])],
          [
            "Hardware",
            `${text(hardware["vcpus"])} CPU, ${text(hardware["memoryMiB"])} MiB, ${text(hardware["machine"])}, ${text(hardware["firmware"])}`,
          ],
          ["MAC", list(hardware["macAddresses"])],
          ["Addresses", list(hardware["ipAddresses"])],
        ] as const)),
  ];
  const shown = facts.filter(([, value]) => value !== "");
  const disks = (made?.disks ?? []).map(
    (
      disk,
    ) => `<tr><td><code>${escape(text(disk["path"]))}</code><br><span class="muted">${escape(`${text(disk["format"])}, ${text(disk["layout"])}, ${text(disk["provenance"])} ${text(disk["migrationRef"])}`)}</span></td>
<td class="number">${formatBytes(Number(disk["virtualSizeBytes"] ?? 0))}</td><td class="number">${formatBytes(Number(disk["allocatedBytes"] ?? 0))}</td>
<td><code class="digest">source ${escape(text(disk["sourceDigest"]))}</code><code class="digest">volume ${escape(text(disk["contentDigest"]))}</code></td></tr>`,
  );
  const worked = spans.filter(({ kind }) => kind !== "operation");
  return `<section class="machine" id="${anchor(name)}">
<h3>${escape(name)} ${badge(state)}</h3>
${reasons.map((reason) => `<p class="reason">${escape(reason)}</p>`).join("\n")}
<dl>${shown.map(([key, value]) => `<div><dt>${escape(key)}</dt><dd>${escape(value)}</dd></div>`).join("")}</dl>
${disks.length === 0 ? "" : `<div class="scroll"><table><thead><tr><th>Disk</th><th class="number">Virtual</th><th class="number">Stored</th><th>Digests</th></tr></thead><tbody>${disks.join("\n")}</tbody></table></div>`}
${worked.length === 0 ? "" : `<p class="phases">${worked.map(({ what, beganMs, endedMs, isOk }) => `<span${isOk ? "" : ' class="bad"'}>${escape(what)} <b>${endedMs === undefined ? "did not end" : formatSeconds((endedMs - beganMs) / 1000)}</b></span>`).join(" ")}</p>`}
${findings.length === 0 ? "" : `<details${findings.some(({ level }) => level === "block") ? " open" : ""}><summary>${findings.length} ${findings.length === 1 ? "finding" : "findings"} of the last plan</summary><ul>${findings.map((finding) => `<li class="${finding.level}"><b>${finding.level}</b> ${escape(finding.text)}${finding.waiver === undefined ? "" : ` <span class="waiver">waived: ${escape(finding.waiver)}</span>`}</li>`).join("")}</ul></details>`}
</section>`;
}

function text(value: unknown): string {
  return typeof value === "string" || typeof value === "number" ? String(value) : "";
}

function list(value: unknown): string {
  return Array.isArray(value)
    ? value
        .map(text)
        .filter((each) => each !== "")
        .join(", ")
    : "";
}

function time(atMs: number): string {
  const iso = new Date(atMs).toISOString();
  return `<time datetime="${iso}">${iso.replace("T", " ").replace(/\.\d+Z$/, " UTC")}</time>`;
}

/** Names of machines are letters, digits and . _ -, and need no escape; the prefix keeps them from other ids. */
function anchor(name: string): string {
  return `machine-${escape(name)}`;
}

const ENTITIES: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

function escape(value: string): string {
  return value.replaceAll(/[&<>"']/g, (character) => ENTITIES[character] ?? "").replaceAll(/\p{Cc}/gu, " ");
}

const STYLE = `
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5d6878; --line: #dfe3e9; --copy: #2f6fde; --make: #8a4fd3; --work: #c3cbd8; --good: #1a7f4b; --bad: #c33131; --warn: #a86400; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --card: #1b212a; --ink: #e7ebf1; --soft: #98a3b3; --line: #2d3541; --copy: #6ea2ff; --make: #bb8cf5; --work: #475264; --good: #4cc58a; --bad: #ff7b76; --warn: #e5a94b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 2rem; letter-spacing: -.02em; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; }
h3 { margin: 0 0 .75rem; font-size: 1.05rem; display: flex; align-items: center; gap: .6rem; }
header { margin-bottom: 1.5rem; }
.kicker { margin: 0; color: var(--copy); font-weight: 600; letter-spacing: .06em; text-transform: uppercase; font-size: .75rem; }
.muted { color: var(--soft); }
header .muted, section > .muted { margin: .25rem 0 .75rem; font-size: .875rem; }
section:not(.tiles) { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.4rem; margin: 0 0 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .8rem; margin-bottom: 1.1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem; }
.tile strong { display: block; font-size: 1.25rem; letter-spacing: -.02em; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.tile.good strong { color: var(--good); } .tile.bad strong { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .78rem; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: .5rem .7rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px; }
.badge { font-size: .75rem; font-weight: 600; padding: .1rem .55rem; white-space: nowrap; border-radius: 99px; border: 1px solid var(--line); color: var(--soft); }
.badge.good { color: var(--good); border-color: currentColor; } .badge.bad { color: var(--bad); border-color: currentColor; }
.reason { color: var(--bad); margin: 0 0 .75rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: .5rem 1.5rem; margin: 0 0 .9rem; }
dt { color: var(--soft); font-size: .78rem; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.digest { display: block; color: var(--soft); }
.phases { margin: .75rem 0 0; display: flex; flex-wrap: wrap; gap: .4rem .9rem; font-size: .875rem; color: var(--soft); } .phases b { color: var(--ink); font-weight: 600; }
.phases .bad { color: var(--bad); }
details { margin-top: .8rem; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
ul { margin: .5rem 0 0; padding-left: 1.1rem; } li { overflow-wrap: anywhere; margin: .2rem 0; }
li.block b { color: var(--bad); } li.warn b { color: var(--warn); } li.info b { color: var(--soft); } .waiver { color: var(--copy); }
svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .label { fill: var(--ink); }
.grid { stroke: var(--line); } rect.operation { fill: var(--work); } rect.copy { fill: var(--copy); } rect.machine { fill: var(--make); } rect.bad { fill: var(--bad); }
.legend { margin: 0 0 .6rem; font-size: .8rem; color: var(--soft); } .key { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; margin: 0 .35rem 0 .9rem; vertical-align: -1px; } .key:first-child { margin-left: 0; }
.key.copy { background: var(--copy); } .key.machine { background: var(--make); } .key.operation { background: var(--work); } .key.bad { background: var(--bad); }
footer { font-size: .8rem; margin-top: 1.5rem; }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; } }
`;
