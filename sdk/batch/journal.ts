/** What happened to a batch, in a file that only grows: it survives a kill at any moment, but for its last line. */
import { closeSync, existsSync, fstatSync, fsyncSync, openSync, readSync, writeSync } from "node:fs";
import type { FailureCause, Operation, Outcome } from "./job.ts";
import type { Finding } from "./plan.ts";

const MAX_JOURNAL_BYTES = 256 * 1024 * 1024;

/** What a machine has become, without anything secret. */
export interface Made {
  readonly machine: Readonly<Record<string, unknown>> | undefined;
  readonly disks: readonly Readonly<Record<string, unknown>>[];
}

/** One line. Times are milliseconds since 1970. */
export type JournalRecord =
  | {
      readonly record: "run begun";
      readonly run: string;
      readonly atMs: number;
      readonly command: string;
      readonly machines: readonly string[];
    }
  | { readonly record: "run ended"; readonly run: string; readonly atMs: number }
  | {
      readonly record: "begun";
      readonly run: string;
      readonly atMs: number;
      readonly machine: string;
      readonly operation: Operation;
      readonly attempt: number;
    }
  | {
      readonly record: "step";
      readonly run: string;
      readonly atMs: number;
      readonly machine: string;
      readonly state: "begun" | "ended" | "failed";
      readonly kind: string;
      readonly name: string;
      readonly op: string;
    }
  | {
      readonly record: "planned";
      readonly run: string;
      readonly atMs: number;
      readonly machine: string;
      readonly findings: readonly Finding[];
    }
  | {
      readonly record: "ended";
      readonly run: string;
      readonly atMs: number;
      readonly machine: string;
      readonly operation: Operation;
      readonly attempt: number;
      readonly outcome: Outcome;
      readonly made?: Made | undefined;
    };

/** How a machine stands, as the journal tells. */
export type MachineState = "waiting" | "running" | "done" | "failed" | "cancelled" | "interrupted" | "destroyed";

export interface MachineStanding {
  readonly state: MachineState;
  /** The last operation that changed something or tried to; undefined when there was none. */
  readonly operation: Operation | undefined;
  readonly attempt: number;
  /** Of a machine that is done: of the last `up` that made it or copied a disk. Of any other: of the last operation. */
  readonly beganMs: number | undefined;
  readonly endedMs: number | undefined;
  readonly cause: FailureCause | undefined;
  readonly reasons: readonly string[];
  /** What the last successful `up` or `refresh` made of it. */
  readonly made: Made | undefined;
}

/** What a journal holds so far, for whoever only looks; nothing where there is none. */
export function readJournal(path: string): readonly JournalRecord[] {
  if (!existsSync(path)) return [];
  const file = openSync(path, "r");
  try {
    return readAll(file, path).split("\n").flatMap(parseRecord);
  } finally {
    closeSync(file);
  }
}

/** The journal of one batch, for the one driver that works on it. Close it with `using`. */
export class Journal implements Disposable {
  readonly records: JournalRecord[];
  readonly #file: number;

  /** Makes the file when there is none. Throws Error when it cannot be read, or is not a journal. */
  constructor(path: string) {
    this.#file = openSync(path, "a+", 0o600);
    const text = readAll(this.#file, path);
    const lines = text.split("\n");
    const torn = lines.pop() ?? "";
    this.records = lines.flatMap((line) => parseRecord(line));
    // A line that was cut off by a kill ends here, and counts for nothing.
    if (torn !== "") writeSync(this.#file, "\n");
  }

  /** On disk when it returns. */
  append(record: JournalRecord): void {
    this.records.push(record);
    writeSync(this.#file, `${JSON.stringify(record)}\n`);
    fsyncSync(this.#file);
  }

  [Symbol.dispose](): void {
    closeSync(this.#file);
  }
}

/** How a machine stands by the records. `isRunning`: a driver works on the batch, so that what has not ended is under way. Previews change nothing and do not count. */
export function standingOf(records: readonly JournalRecord[], machine: string, isRunning: boolean): MachineStanding {
  let standing: MachineStanding = {
    state: "waiting",
    operation: undefined,
    attempt: 0,
    beganMs: undefined,
    endedMs: undefined,
    cause: undefined,
    reasons: [],
    made: undefined,
  };
  let move: Pick<MachineStanding, "beganMs" | "endedMs"> | undefined;
  let hasCopied = false;
  for (const record of records) {
    if (record.record === "step" && record.machine === machine)
      hasCopied ||= record.kind === "ImportedDisk" && record.state === "ended" && record.op.startsWith("create");
    if (!("machine" in record) || record.machine !== machine || !("operation" in record) || record.operation === "preview") continue;
    const { operation, attempt, atMs } = record;
    if (record.record === "begun") {
      const state = isRunning ? "running" : "interrupted";
      const beganMs = attempt === 1 ? atMs : (standing.beganMs ?? atMs);
      standing = { ...standing, state, operation, attempt, beganMs, endedMs: undefined, cause: undefined, reasons: [] };
      continue;
    }
    const { outcome } = record;
    const ended = { operation, attempt, endedMs: atMs };
    if (!outcome.ok) {
      standing = {
        ...standing,
        ...ended,
        state: outcome.cause === "cancelled" ? "cancelled" : "failed",
        cause: outcome.cause,
        reasons: outcome.reasons,
      };
    } else if (operation === "destroy") {
      standing = { ...standing, ...ended, state: "destroyed", cause: undefined, reasons: [], made: undefined };
      move = undefined;
      hasCopied = false;
    } else {
      if (operation === "up" && (move === undefined || hasCopied)) {
        move = { beganMs: standing.beganMs, endedMs: atMs };
        hasCopied = false;
      }
      standing = { ...standing, ...ended, ...move, state: "done", cause: undefined, reasons: [], made: record.made ?? standing.made };
    }
  }
  return standing;
}

function readAll(file: number, path: string): string {
  const { size } = fstatSync(file);
  if (size > MAX_JOURNAL_BYTES)
    throw new Error(`${path} has ${size} bytes; at most ${MAX_JOURNAL_BYTES} are read: move it away to begin a new one`);
  const buffer = Buffer.alloc(size);
  for (let filled = 0; filled < size;) {
    const count = readSync(file, buffer, filled, size - filled, filled);
    if (count === 0) break;
    filled += count;
  }
  return buffer.toString("utf8");
}

function parseRecord(line: string): readonly JournalRecord[] {
  try {
    const record: unknown = JSON.parse(line);
    return typeof record === "object" && record !== null && "record" in record ? [record as JournalRecord] : [];
  } catch {
    // SyntaxError: the last line of a driver that was killed while it wrote.
    return [];
  }
}
