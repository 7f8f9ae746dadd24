/** Shows what a batch does: a live table on a terminal, plain lines elsewhere, NDJSON where it is asked for. */
import { stderr, stdout } from "node:process";
import type { BatchEvent, CopyProgress } from "../batch/events.ts";
import type { BatchMachine } from "../batch/manifest.ts";
import { formatSeconds, printable } from "../batch/words.ts";

const FRAME_MS = 250;

/** Close it with `await using`: the last frame stays. */
export interface View extends AsyncDisposable {
  /** The machines there are, in the order in which they are shown. */
  expect(machines: readonly BatchMachine[]): void;
  show(event: BatchEvent): void;
  /** Lets what is shown stay as it is, so that other output may follow it; what comes is shown below. */
  settle(): void;
}

/** For this process's terminal. */
export function openView(json: boolean): View {
  if (json) return new LineView((event) => stdout.write(`${JSON.stringify({ atMs: Date.now(), ...event })}\n`));
  if (stderr.isTTY && process.env["TERM"] !== "dumb") return new TableView();
  return new LineView((event) => {
    const text = lineOf(event);
    if (text !== undefined) stderr.write(`${text}\n`);
  });
}

class LineView implements View {
  readonly show: (event: BatchEvent) => void;

  constructor(show: (event: BatchEvent) => void) {
    this.show = show;
  }

  expect(): void {
    // Lines name their machine.
  }

  settle(): void {
    // Lines stay anyway.
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Nothing is held.
  }
}

/** An event in one line; undefined where it says nothing new to a reader of lines. */
export function lineOf(event: BatchEvent): string | undefined {
  switch (event.event) {
    case "phase":
      return event.phase === "previewing" || event.phase === "running"
        ? undefined
        : `${event.machine}: ${phaseOf(event)}${event.text === undefined ? "" : `: ${printable(event.text)}`}`;
    case "progress":
      return `${event.machine}: ${event.disk} ${progressOf(event)}`;
    case "line":
      return event.level === "info" ? undefined : `${event.machine === undefined ? "" : `${event.machine}: `}${printable(event.text)}`;
    case "wave":
      return `wave ${event.wave}: ${event.operation} ${event.machines.join(", ")}`;
    case "ended":
      return `${event.machine}: ${endOf(event)}`;
  }
}

function phaseOf({ phase, attempt }: Extract<BatchEvent, { event: "phase" }>): string {
  return attempt > 1 ? `${phase} (attempt ${attempt})` : phase;
}

function progressOf(progress: CopyProgress): string {
  return "written" in progress
    ? `${progress.written} written so far, ${progress.rate}`
    : `${progress.percent} % of ${progress.total}, ${progress.rate}, ${progress.left} left`;
}

/** Nothing where the end is not known. */
function barOf(progress: CopyProgress): string {
  if ("written" in progress) return "";
  const filled = Math.round(progress.percent / 10);
  return `${"█".repeat(filled)}${"░".repeat(10 - filled)} `;
}

function endOf({ state, seconds, reasons }: Extract<BatchEvent, { event: "ended" }>): string {
  return `${state}${seconds > 0 ? ` in ${formatSeconds(seconds)}` : ""}${reasons.length === 0 ? "" : `: ${printable(reasons.join("; "))}`}`;
}

/** A row of the table. */
interface Row {
  phase: string;
  progress: string;
  said: string;
  colour: number;
}

/** Source: ECMA-48, as every terminal does: 31 red, 32 green, 33 yellow, 36 cyan, 90 grey. */
const COLOURS = { failed: 31, done: 32, warned: 33, busy: 36, quiet: 90 } as const;

/** A machine that nothing was done to yet: it is not shown. */
const EMPTY_ROW: Readonly<Row> = { phase: "", progress: "", said: "", colour: COLOURS.quiet };

/** One row a machine, redrawn in place; more rows than the terminal has are cut to those that matter. */
class TableView implements View {
  readonly #rows = new Map<string, Row>();
  readonly #waves = new Map<string, number>();
  readonly #timer = setInterval(() => this.#draw(), FRAME_MS);
  #drawnLines = 0;
  #isDirty = false;

  constructor() {
    this.#timer.unref();
  }

  expect(machines: readonly BatchMachine[]): void {
    for (const { name, wave } of machines) {
      this.#waves.set(name, wave);
      this.#rows.set(name, { ...EMPTY_ROW });
    }
  }

  show(event: BatchEvent): void {
    this.#isDirty = true;
    if (event.event === "wave") return;
    if (event.machine === undefined) {
      if (event.event === "line") this.#say(printable(event.text));
      return;
    }
    const row = this.#rows.get(event.machine);
    if (row === undefined) return;
    switch (event.event) {
      case "phase":
        Object.assign(row, { phase: phaseOf(event), progress: "", colour: event.phase === "trying again" ? COLOURS.warned : COLOURS.busy });
        if (event.text !== undefined) row.said = printable(event.text);
        return;
      case "progress":
        row.progress = `${barOf(event)}${progressOf(event)}`;
        return;
      case "line":
        if (event.level !== "info") row.said = printable(event.text);
        return;
      case "ended":
        Object.assign(row, {
          phase: `${event.state}${event.seconds > 0 ? ` in ${formatSeconds(event.seconds)}` : ""}`,
          progress: "",
          said: printable(event.reasons.join("; ")),
          colour:
            event.state === "done" || event.state === "destroyed"
              ? COLOURS.done
              : event.state === "skipped"
                ? COLOURS.quiet
                : COLOURS.failed,
        });
    }
  }

  settle(): void {
    this.#draw();
    this.#drawnLines = 0;
    for (const row of this.#rows.values()) Object.assign(row, EMPTY_ROW);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#timer);
    this.#draw();
  }

  /** Above the table, where it stays. */
  #say(text: string): void {
    this.#erase();
    stderr.write(`${text}\n`);
    this.#isDirty = true;
  }

  #erase(): void {
    if (this.#drawnLines > 0) stderr.write(`\u001b[${this.#drawnLines}A\u001b[0J`);
    this.#drawnLines = 0;
  }

  #draw(): void {
    const started = [...this.#rows].filter(([, { phase }]) => phase !== "");
    if (!this.#isDirty || started.length === 0) return;
    this.#isDirty = false;
    const columns = Math.max(40, stderr.columns);
    const most = Math.max(3, stderr.rows - 2);
    // Those at work come first when not all have room.
    const shown = started.length <= most ? started : started.toSorted(([, a], [, b]) => rank(a) - rank(b)).slice(0, most - 1);
    const nameWidth = Math.max(...shown.map(([name]) => name.length));
    const phaseWidth = Math.max(...shown.map(([, { phase }]) => phase.length));
    const lines = shown.map(([name, { phase, progress, said, colour }]) => {
      const text = `${name.padEnd(nameWidth)}  ${String(this.#waves.get(name) ?? "").padStart(2)}  ${phase.padEnd(phaseWidth)}  ${progress === "" ? said : progress}`;
      return `\u001b[${colour}m${text.slice(0, columns - 1)}\u001b[0m`;
    });
    if (shown.length < started.length) lines.push(`and ${started.length - shown.length} more`);
    this.#erase();
    stderr.write(`${lines.join("\n")}\n`);
    this.#drawnLines = lines.length;
  }
}

function rank({ colour }: Row): number {
  return [COLOURS.busy, COLOURS.warned, COLOURS.failed, COLOURS.done, COLOURS.quiet].indexOf(colour as never);
}
