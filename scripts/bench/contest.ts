/** Contenders for the same work, run in rounds, and the tables and aims that come of it. Knows no work. */
import { bold, say, step } from "../setup/steps.ts";

/** What one run tells. Times in seconds, sizes in bytes; absent what nobody measured. */
export interface Outcome {
  readonly seconds: number;
  /** Of the processors of the client and of the host, each with all its processes. */
  readonly clientCpuSeconds?: number;
  readonly hostCpuSeconds?: number;
  readonly peakRssBytes?: number;
  readonly sentBytes?: number;
  /** Parts of `seconds` by their names, in their order. */
  readonly phases?: Readonly<Record<string, number>>;
}

/** Somebody who does the work. Each run starts from the same state. */
export interface Contender {
  readonly name: string;
  readonly run: () => Promise<Outcome>;
}

/** The medians of a contender's rounds; the peak memory is the largest, the phases are those of the median round. */
export interface Standing extends Outcome {
  readonly name: string;
}

/** A number that was aimed at. `explanation` is said when it was missed. */
export interface Aim {
  readonly text: string;
  readonly isMet: boolean;
  readonly explanation?: string | undefined;
}

/** Runs all contenders `rounds` times, every other round backwards, `clear` after each, and prints their table. */
export async function contest(
  title: string,
  contenders: readonly Contender[],
  options: { readonly rounds: number; readonly clear: () => Promise<void> },
): Promise<readonly Standing[]> {
  const outcomes = new Map<Contender, Outcome[]>(contenders.map((each) => [each, []]));
  await step(title, async (note) => {
    for (let round = 0; round < options.rounds; round++) {
      for (const contender of round % 2 === 0 ? contenders : contenders.toReversed()) {
        note(contender.name);
        outcomes.get(contender)!.push(await contender.run());
        await options.clear();
      }
    }
    note("");
  });
  const standings = contenders.map((each) => standing(each.name, outcomes.get(each)!));
  sayTable(standings);
  return standings;
}

/** How many times as long `slow` took as `quick`. */
export function ratio(standings: readonly Standing[], slow: Contender, quick: Contender): number {
  return standingOf(standings, slow).seconds / standingOf(standings, quick).seconds;
}

/**
 * Where a contender's time goes, in one line: its phases, the processors' time at both ends, and of that what `parts` take by themselves, in seconds
 * of one processor by their names.
 */
export function timeOf(
  standings: readonly Standing[],
  contender: Contender,
  partsOf: (standing: Standing) => Readonly<Record<string, number>> = () => ({}),
): string {
  const standing = standingOf(standings, contender);
  const { name, phases = {}, clientCpuSeconds, hostCpuSeconds } = standing;
  const parts = Object.entries(phases).map(([phase, seconds]) => `${phase} ${seconds.toFixed(2)} s`);
  const cpu = [
    ...(clientCpuSeconds === undefined ? [] : [`${clientCpuSeconds.toFixed(1)} s here`]),
    ...(hostCpuSeconds === undefined ? [] : [`${hostCpuSeconds.toFixed(1)} s on the host`]),
  ];
  const costs = Object.entries(partsOf(standing));
  const rest = (clientCpuSeconds ?? 0) + (hostCpuSeconds ?? 0) - costs.reduce((sum, [, seconds]) => sum + seconds, 0);
  const named = [...costs, ["all else", rest] as const].map(([part, seconds]) => `${part} ${seconds.toFixed(1)} s`);
  const shares = costs.length === 0 ? "" : `, in it ${named.join(", ")}`;
  return `${name}: ${parts.join(", ")}; processors ${cpu.join(" and ")}${shares}`;
}

export function atLeast(text: string, reached: number, wanted: number, explanation?: string): Aim {
  return { text: `${text}: ${reached.toFixed(1)} times, at least ${wanted} aimed at`, isMet: reached >= wanted, explanation };
}

export function atMost(text: string, reached: number, wanted: number, explanation?: string): Aim {
  return { text: `${text}: ${reached.toFixed(reached < 10 ? 2 : 0)}, at most ${wanted} aimed at`, isMet: reached <= wanted, explanation };
}

export function sayAims(aims: readonly Aim[]): void {
  for (const { text, isMet, explanation } of aims) {
    say(`${isMet ? "✓" : "✗"} ${text}`);
    if (!isMet && explanation !== undefined) say(`  ${explanation}`);
  }
}

export function standingOf(standings: readonly Standing[], contender: Contender): Standing {
  const found = standings.find(({ name }) => name === contender.name);
  if (found === undefined) throw new Error(`${contender.name} did not run`);
  return found;
}

function standing(name: string, outcomes: readonly Outcome[]): Standing {
  const seconds = median(outcomes.map((each) => each.seconds));
  const nearest = outcomes.toSorted((a, b) => Math.abs(a.seconds - seconds) - Math.abs(b.seconds - seconds))[0];
  const all = (key: "clientCpuSeconds" | "hostCpuSeconds" | "peakRssBytes" | "sentBytes") => outcomes.flatMap((each) => each[key] ?? []);
  const [client, host, peaks, sent] = [all("clientCpuSeconds"), all("hostCpuSeconds"), all("peakRssBytes"), all("sentBytes")];
  return {
    name,
    seconds,
    ...(client.length > 0 && { clientCpuSeconds: median(client) }),
    ...(host.length > 0 && { hostCpuSeconds: median(host) }),
    ...(peaks.length > 0 && { peakRssBytes: Math.max(...peaks) }),
    ...(sent.length > 0 && { sentBytes: median(sent) }),
    ...(nearest?.phases && { phases: nearest.phases }),
  };
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

function sayTable(standings: readonly Standing[]): void {
  const quickest = Math.min(...standings.map(({ seconds }) => seconds));
  const time = (seconds: number | undefined): string => (seconds === undefined ? "" : `${seconds.toFixed(1)} s`);
  const size = (bytes: number | undefined): string => (bytes === undefined ? "" : megabytes(bytes));
  const rows = standings.map((each) => [
    each.name,
    `${each.seconds.toFixed(2)} s`,
    `${(each.seconds / quickest).toFixed(2)} x`,
    size(each.sentBytes),
    time(each.clientCpuSeconds),
    time(each.hostCpuSeconds),
    size(each.peakRssBytes),
  ]);
  const table = [["", "time", "ratio", "sent", "CPU here", "CPU there", "peak"], ...rows];
  const widths = table[0]!.map((_, column) => Math.max(...table.map((row) => row[column]!.length)));
  for (const [index, row] of table.entries()) {
    const line = row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!))).join("   ");
    say(`  ${index === 0 ? bold(line) : line}`);
  }
  say();
}

export function megabytes(bytes: number): string {
  return `${Math.round(bytes / 1e6)} MB`;
}
