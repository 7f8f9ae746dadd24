/** Shows the steps of a long command: what is being done, for how long, and how it ended. Plain lines where the output is no terminal. */
import { env, stdout } from "node:process";

const FRAMES = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"] as const;
const FRAME_MS = 100;
/** Without a terminal a step is announced when it takes longer than this, and again after each such time. */
const ANNOUNCE_MS = 15_000;

/** Sets the text after the step's title: while it runs what it is at, at its end what came of it. */
export type Note = (text: string) => void;

/**
 * Runs one step and prints one line about it, with its duration: `✓ title  note  1.2 s`, or `✗ ...` when it throws; the error goes on to the caller.
 * In a terminal the line is alive while the step runs.
 */
export async function step<T>(title: string, work: (note: Note) => Promise<T>): Promise<T> {
  const started = performance.now();
  let noted = "";
  const elapsed = (): string => renderDuration(performance.now() - started);
  const line = (mark: string): string => `${mark} ${title}${noted === "" ? "" : `  ${dim(noted)}`}  ${dim(elapsed())}`;
  let frame = 0;
  const timer = setInterval(
    () => {
      if (stdout.isTTY) stdout.write(`\r\u001b[2K${clip(line(FRAMES[frame++ % FRAMES.length] ?? ""))}`);
      else stdout.write(`  ${title} ... ${noted === "" ? "" : `${noted}, `}${elapsed()} so far\n`);
    },
    stdout.isTTY ? FRAME_MS : ANNOUNCE_MS,
  );
  const end = (mark: string): void => {
    clearInterval(timer);
    stdout.write(`${stdout.isTTY ? "\r\u001b[2K" : ""}${line(mark)}\n`);
  };
  try {
    const result = await work((text) => {
      noted = text;
    });
    end(paint("32", "✓"));
    return result;
  } catch (error) {
    end(paint("31", "✗"));
    throw error;
  }
}

/** Prints a line that is no step. */
export function say(text = ""): void {
  stdout.write(`${text}\n`);
}

/** `0.4 s`, `12 s`, `3 min 5 s`. */
export function renderDuration(milliseconds: number): string {
  const seconds = milliseconds / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Bold where the terminal can. */
export function bold(text: string): string {
  return paint("1", text);
}

function dim(text: string): string {
  return paint("2", text);
}

/** Select Graphic Rendition of ECMA-48. Source of NO_COLOR: https://no-color.org */
function paint(code: string, text: string): string {
  return stdout.isTTY && !env["NO_COLOR"] ? `\u001b[${code}m${text}\u001b[0m` : text;
}

/** A line longer than the terminal would wrap, and a wrapped line cannot be rewritten. Counts invisible codes too, so it clips early rather than late. */
function clip(text: string): string {
  return text.length > stdout.columns ? `${text.slice(0, stdout.columns - 1)}\u001b[0m` : text;
}
