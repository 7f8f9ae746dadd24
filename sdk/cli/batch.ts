/** The commands over a manifest: plan, up, status, refresh, destroy, report. */
import { existsSync } from "node:fs";
import { rename, writeFile } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { stderr, stdin, stdout } from "node:process";
import { createInterface } from "node:readline/promises";
import { type Batch, type BatchResult, openBatch, readBatch, type Selection, SelectionError } from "../batch/driver.ts";
import type { MachineState } from "../batch/journal.ts";
import type { BatchPlan } from "../batch/plan.ts";
import { readReport, renderReport } from "../batch/report.ts";
import { formatBytes, formatSeconds, formatTable, printable } from "../batch/words.ts";
import { type Command, parseCommand, UsageError } from "./command.ts";
import { openView, type View } from "./view.ts";

const SELECTION = {
  only: { type: "string", multiple: true },
  label: { type: "string", multiple: true },
  wave: { type: "string", multiple: true },
  state: { type: "string", multiple: true },
  json: { type: "boolean" },
} as const;
const SELECTION_USAGE = "[--only <name>] [--label <key>=<value>] [--wave <n>] [--state <state>] [--json]";
const STATES: readonly MachineState[] = ["waiting", "running", "done", "failed", "cancelled", "interrupted", "destroyed"];

interface Selected {
  readonly only?: readonly string[];
  readonly label?: readonly string[];
  readonly wave?: readonly string[];
  readonly state?: readonly string[];
}

function selectionOf({ only, label, wave, state }: Selected): Selection {
  const bad = wave?.find((each) => !/^\d+$/.test(each)) ?? state?.find((each) => !STATES.includes(each as MachineState));
  if (bad !== undefined) throw new UsageError(`${bad} is no wave's number and no state: states are ${STATES.join(", ")}`);
  return {
    ...(only && { names: only.flatMap((each) => each.split(",")) }),
    ...(label && { labels: label }),
    ...(wave && { waves: wave.map(Number) }),
    ...(state && { states: state as MachineState[] }),
  };
}

/** Opens the batch with a view of it, and lets Ctrl-C stop it. The result of `work` is the exit code, unless it was interrupted. */
async function drive(manifest: string, json: boolean, work: (batch: Batch, view: View) => Promise<number>): Promise<number> {
  await using view = openView(json);
  await using batch = await openBatch(manifest, { onEvent: (event) => view.show(event) });
  view.expect(batch.manifest.machines);
  let isInterrupted = false;
  const onSignal = (): void => {
    isInterrupted = true;
    batch.stop();
  };
  process.on("SIGINT", onSignal).on("SIGTERM", onSignal);
  try {
    const code = await work(batch, view);
    return isInterrupted ? 130 : code;
  } catch (error) {
    throw error instanceof SelectionError ? new UsageError(error.message, { cause: error }) : error;
  } finally {
    process.off("SIGINT", onSignal).off("SIGTERM", onSignal);
  }
}

const plan: Command = {
  name: "plan",
  usage: `plan <manifest> [--save] ${SELECTION_USAGE}`,
  summary: "Previews all machines and looks at them together; changes nothing. --save keeps the plans for `up --plan`.",
  async run(argv) {
    const { values, positionals } = parseCommand(argv, { ...SELECTION, save: { type: "boolean" } }, ["<manifest>"]);
    return drive(positionals[0]!, values.json === true, async (batch, view) => {
      const planned = await batch.plan(selectionOf(values), { save: values.save === true });
      view.settle();
      showPlan(planned, values.json === true);
      if (values.save === true && values.json !== true && planned.machines.some(({ action }) => action !== "blocked"))
        stdout.write(`saved the plans of the machines that may start: virtlift up ${positionals[0]} --plan keeps to them\n`);
      return planned.isClear ? 0 : 1;
    });
  },
};

const up: Command = {
  name: "up",
  usage: `up <manifest> [--plan] [--skip-blocked] ${SELECTION_USAGE}`,
  summary: "Previews, then moves the machines in waves. May be run again at any time: it goes on where it was.",
  async run(argv) {
    const options = { ...SELECTION, plan: { type: "boolean" }, "skip-blocked": { type: "boolean" } } as const;
    const { values, positionals } = parseCommand(argv, options, ["<manifest>"]);
    return drive(positionals[0]!, values.json === true, async (batch, view) => {
      const result = await batch.up(selectionOf(values), {
        usePlans: values.plan === true,
        skipBlocked: values["skip-blocked"] === true,
        onPlan: (planned) => {
          view.settle();
          showPlan(planned, values.json === true);
        },
      });
      view.settle();
      return showResult(result, values.json === true);
    });
  },
};

const refresh: Command = {
  name: "refresh",
  usage: `refresh <manifest> ${SELECTION_USAGE}`,
  summary: "Reads what the machines are like now, so that the next plan shows what was changed by hand.",
  async run(argv) {
    const { values, positionals } = parseCommand(argv, SELECTION, ["<manifest>"]);
    return drive(positionals[0]!, values.json === true, async (batch, view) => {
      const result = await batch.refresh(selectionOf(values));
      view.settle();
      return showResult(result, values.json === true);
    });
  },
};

const destroy: Command = {
  name: "destroy",
  usage: `destroy <manifest> --yes ${SELECTION_USAGE}`,
  summary: "Removes the machines and their disks, the last wave first. Asks on a terminal; elsewhere it needs --yes.",
  async run(argv) {
    const { values, positionals } = parseCommand(argv, { ...SELECTION, yes: { type: "boolean" } }, ["<manifest>"]);
    if (values.yes !== true && !(await isConfirmed())) {
      stderr.write("nothing was destroyed: give --yes\n");
      return 2;
    }
    return drive(positionals[0]!, values.json === true, async (batch, view) => {
      const result = await batch.destroy(selectionOf(values));
      view.settle();
      return showResult(result, values.json === true);
    });
  },
};

async function isConfirmed(): Promise<boolean> {
  if (!stdin.isTTY || !stderr.isTTY) return false;
  const lines = createInterface({ input: stdin, output: stderr });
  try {
    return (await lines.question("This destroys the machines and their disks. Type yes to go on: ")) === "yes";
  } finally {
    lines.close();
  }
}

const status: Command = {
  name: "status",
  usage: "status <manifest> [--json]",
  summary: "Shows how the machines stand by the journal, also while another process works on them.",
  async run(argv) {
    const { values, positionals } = parseCommand(argv, { json: { type: "boolean" } }, ["<manifest>"]);
    const { statuses } = readBatch(positionals[0]!);
    if (values.json === true) {
      stdout.write(
        `${JSON.stringify(
          statuses.map(({ machine, standing }) => ({ name: machine.name, wave: machine.wave, host: machine.hostName, ...standing })),
          null,
          2,
        )}\n`,
      );
      return 0;
    }
    const rows = statuses.map(({ machine, standing }) => [
      machine.name,
      String(machine.wave),
      machine.hostName,
      standing.state,
      standing.beganMs === undefined ? "" : new Date(standing.beganMs).toISOString().replace(/\.\d+Z$/, "Z"),
      standing.beganMs === undefined || standing.endedMs === undefined ? "" : formatSeconds((standing.endedMs - standing.beganMs) / 1000),
      printable(standing.reasons.join("; ")),
    ]);
    stdout.write(`${formatTable(["machine", "wave", "target", "state", "began", "took", "why"], rows).join("\n")}\n`);
    return 0;
  },
};

const report: Command = {
  name: "report",
  usage: "report <manifest> [--output <file>] [--json]",
  summary: "Writes what was moved, from where to where and how, into one HTML file; --json prints it instead.",
  async run(argv) {
    const { values, positionals } = parseCommand(argv, { output: { type: "string" }, json: { type: "boolean" } }, ["<manifest>"]);
    const path = resolve(positionals[0]!);
    const made = readReport(path);
    if (values.json === true) {
      stdout.write(`${JSON.stringify(made, null, 2)}\n`);
      return 0;
    }
    const output = resolve(values.output ?? join(dirname(path), `${made.project}-report.html`));
    if (!existsSync(dirname(output))) throw new UsageError(`there is no folder ${dirname(output)} to write the report to: make it first`);
    await writeFile(`${output}.new`, renderReport(made));
    await rename(`${output}.new`, output);
    stdout.write(`${output}\n`);
    return 0;
  },
};

export const batchCommands: readonly Command[] = [plan, up, status, refresh, destroy, report];

const BASIS_WORDS: Readonly<Record<BatchPlan["basis"], string>> = {
  assumed: "as is assumed until a copy was seen",
  seen: "as the copies of this batch went",
  limit: "the limit of this batch",
};

function showPlan({ machines, isClear, bytesPerSecond, basis }: BatchPlan, json: boolean): void {
  if (json) {
    for (const { machine, ...rest } of machines)
      stdout.write(`${JSON.stringify({ event: "plan", machine: machine.name, wave: machine.wave, target: machine.hostName, ...rest })}\n`);
    stdout.write(`${JSON.stringify({ event: "planned", isClear, bytesPerSecond, basis })}\n`);
    return;
  }
  const rows = machines.map(({ machine, action, disks, virtualSizeBytes, wireBytes, estimateSeconds, findings }) => {
    const count = (level: string): string => String(findings.filter((finding) => finding.level === level).length);
    return [
      machine.name,
      String(machine.wave),
      machine.hostName,
      action,
      String(disks),
      formatBytes(virtualSizeBytes),
      wireBytes === 0 ? "" : formatBytes(wireBytes),
      wireBytes === 0 ? "" : `~${formatSeconds(Math.max(1, estimateSeconds))}`,
      count("block"),
      count("warn"),
      count("info"),
    ];
  });
  const heading = ["machine", "wave", "target", "action", "disks", "virtual", "to send", "estimate", "block", "warn", "info"];
  stdout.write(`${formatTable(heading, rows).join("\n")}\n`);
  for (const { machine, action, changes } of machines)
    if (changes.length > 0) stdout.write(`${action}  ${machine.name}: ${printable(changes.join(", "))}\n`);
  for (const level of ["info", "warn", "block"] as const)
    for (const { machine, findings } of machines)
      for (const { text, waiver } of findings.filter((finding) => finding.level === level))
        stdout.write(
          `${level.padEnd(5)}  ${machine.name}: ${printable(text)}${waiver === undefined ? "" : `; waived: ${printable(waiver)}`}\n`,
        );
  const wireBytes = machines.reduce((sum, each) => sum + each.wireBytes, 0);
  const copies =
    wireBytes === 0
      ? "nothing is to be copied"
      : `about ${formatBytes(wireBytes)} to send, estimated at ${formatBytes(bytesPerSecond)}/s, ${BASIS_WORDS[basis]}`;
  stdout.write(`${isClear ? "all machines may start" : "not all machines may start"}; ${copies}\n`);
}

function showResult({ machines, isComplete }: BatchResult, json: boolean): number {
  if (json) {
    stdout.write(`${JSON.stringify({ event: "result", isComplete, machines })}\n`);
  } else {
    const states = Map.groupBy(machines, ({ state }) => state);
    stdout.write(`${[...states].map(([state, each]) => `${each.length} ${state}`).join(", ")}\n`);
  }
  return isComplete ? 0 : 1;
}
