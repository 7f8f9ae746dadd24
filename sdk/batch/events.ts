/** What a driver tells while it works, for whoever shows it: plain JSON. */
import type { Operation } from "./job.ts";
import type { MachineState } from "./journal.ts";

/** What is being done to a machine right now. */
export type Phase = "previewing" | "waiting" | "running" | "copying" | "defining" | "removing" | "trying again";

/** How far the copy of a disk is: `40 %` of `1.2 GiB` at `110 MiB/s` with `7 s` left; where nobody knows its end, how much is `written`. */
export type CopyProgress = { readonly disk: string; readonly rate: string } & (
  | { readonly percent: number; readonly total: string; readonly left: string }
  | { readonly written: string }
);

export type BatchEvent =
  /** `text` says why, where there is something to say. */
  | {
      readonly event: "phase";
      readonly machine: string;
      readonly phase: Phase;
      readonly attempt: number;
      readonly text?: string | undefined;
    }
  | ({ readonly event: "progress"; readonly machine: string } & CopyProgress)
  | { readonly event: "line"; readonly machine: string | undefined; readonly level: "info" | "warn" | "error"; readonly text: string }
  | { readonly event: "wave"; readonly wave: number; readonly operation: Operation; readonly machines: readonly string[] }
  | {
      readonly event: "ended";
      readonly machine: string;
      readonly state: MachineState | "skipped";
      readonly seconds: number;
      readonly reasons: readonly string[];
    };

/** What the preview says of a rule, and the user's reason where the rule was changed for it. Source: `conclude` in provider/resources/preflight/preflight.ts. */
export function parseFinding(line: string): { readonly text: string; readonly waiver?: string } {
  const [, text, waiver] = /^(.* \(virtlift\/[a-z0-9-]+\)); (?:waived|no block): (.+)$/.exec(line) ?? [];
  return text === undefined || waiver === undefined ? { text: line } : { text, waiver };
}

const WRITTEN = /^(\S+): ([\d.]+ \w+) written so far, ([\d.]+ \w+\/s)$/;
const PROGRESS = /^(\S+): (\d{1,3}) % of ([\d.]+ \w+), ([\d.]+ \w+\/s), (.{1,30}) left$/;

/** A copy's progress from the line that the provider logs of it; undefined when the line says something else. Source: `tellProgress` in provider/transfer/progress.ts. */
export function parseProgress(line: string): CopyProgress | undefined {
  const [, writer, written, writtenRate] = WRITTEN.exec(line) ?? [];
  if (writer !== undefined && written !== undefined && writtenRate !== undefined) return { disk: writer, written, rate: writtenRate };
  const [, disk, percent, total, rate, left] = PROGRESS.exec(line) ?? [];
  if (disk === undefined || total === undefined || rate === undefined || left === undefined) return undefined;
  return { disk, percent: Number(percent), total, rate, left };
}
