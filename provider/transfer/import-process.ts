/**
 * An import in a process of its own. What a transfer throws away, a few megabytes for each that it moves, is collected there at once and by itself: beside
 * the packages of its caller that costs twice the processors' time and half as much memory again.
 */
import { type ChildProcess, fork } from "node:child_process";
import { availableParallelism } from "node:os";
import { extname } from "node:path";
import { fileURLToPath } from "node:url";
import { type PackedError, unpackError } from "../errors.ts";
import type { HostsOptions, HostSpec } from "../host/hosts.ts";
import type { ImportOptions, ImportResult } from "./import.ts";
import type { PumpOptions } from "./pump.ts";
import type { SourceOptions, SourceSpec } from "./source.ts";
import type { Throttle } from "./throttle.ts";

/** Beside this file, in the form that this file has: compiled or not. */
const PROGRAM = fileURLToPath(new URL(`./import-program${extname(import.meta.filename)}`, import.meta.url));

/**
 * Most of what is thrown away is young: with a small nursery it never grows old, where only a full collection finds it, and 48 MiB of the rest may gather
 * before one. And Node 24 makes, with their stacks, two errors that nobody sees for each cipher that it opens, which is one for each packet. Measured, a
 * sparse import of 1 GiB: 8.4 instead of 12.6 processor seconds, 200 instead of 260 MB.
 */
const NODE_OPTIONS: readonly string[] = ["--max-semi-space-size=1", "--initial-old-space-size=48", "--stack-trace-limit=0"];

/**
 * libuv's threads inflate and pack. glibc gives large buffers back to the system when they are freed, and keeps few heaps of small ones: 25 MB less,
 * measured, for nothing. Source: mallopt(3).
 */
const ENVIRONMENT = {
  UV_THREADPOOL_SIZE: String(Math.max(4, availableParallelism())),
  MALLOC_ARENA_MAX: "2",
  MALLOC_MMAP_THRESHOLD_: "524288",
};

const MAX_STDERR_CHARACTERS = 4096;

/** How long a process may take to end that was told to. */
const END_GRACE_MS = 10_000;

/** What is to be imported: plain data. */
export interface ImportOrder {
  readonly host: HostSpec;
  readonly hosts: HostsOptions;
  readonly source: SourceSpec;
  readonly sourceOptions: Pick<SourceOptions, "checksum" | "scratchFolder">;
  /** The capacity is the source's where it is larger. */
  readonly options: Omit<ImportOptions, keyof PumpOptions | "throttle">;
}

/** What the process hears: the order, once; that so many bytes may leave; that nobody wants the disk any more. */
export type Command = { readonly order: ImportOrder; readonly bytesPerSecond: number | undefined } | { readonly granted: number } | "abort";

/** What it tells. */
export type Report =
  | { readonly doneBytes: number; readonly totalBytes: number }
  | { readonly wantedBytes: number }
  | { readonly result: ImportResult; readonly usage: Usage }
  | { readonly failure: PackedError };

/** What the process took. */
export interface Usage {
  /** User and system time of all its threads. */
  readonly cpuSeconds: number;
  readonly peakRssBytes: number;
}

export interface ImportSettings extends PumpOptions {
  /** What leaves waits for it. Default: nothing. */
  readonly throttle?: Throttle | undefined;
}

/** Imports a source as a volume file, and throws, as `importDisk` and `openSource` do; an aborted signal's reason when it was. The process ends with the import. */
export async function importInProcess(order: ImportOrder, settings: ImportSettings): Promise<ImportResult & { readonly usage: Usage }> {
  settings.signal.throwIfAborted();
  const child = fork(PROGRAM, [], {
    execArgv: [...NODE_OPTIONS],
    env: { ...ENVIRONMENT, ...order.hosts.environment },
    // A terminal's Ctrl-C is for whoever asked, who says what it means.
    detached: true,
    serialization: "advanced",
    stdio: ["ignore", "ignore", "pipe", "ipc"],
  });
  let killer: NodeJS.Timeout | undefined;
  const killLater = (): void => void (killer ??= setTimeout(() => child.kill("SIGKILL"), END_GRACE_MS));
  const abort = (): void => {
    tell(child, "abort");
    killLater();
  };
  settings.signal.addEventListener("abort", abort, { once: true });
  const ended = new Promise<void>((resolve) => child.once("exit", () => resolve()).once("error", () => resolve()));
  try {
    return await converse(child, order, settings);
  } catch (error) {
    settings.signal.throwIfAborted();
    throw error;
  } finally {
    settings.signal.removeEventListener("abort", abort);
    if (child.connected) child.disconnect();
    killLater();
    await ended;
    clearTimeout(killer);
  }
}

async function converse(child: ChildProcess, order: ImportOrder, { throttle, signal, onProgress }: ImportSettings) {
  return new Promise<ImportResult & { readonly usage: Usage }>((resolve, reject) => {
    let stderr = "";
    child.stderr?.on("data", (chunk: Buffer) => (stderr = (stderr + chunk.toString("utf8")).slice(-MAX_STDERR_CHARACTERS)));
    child.on("error", (error) => reject(new Error(`the process that imports cannot be started: ${error.message}`)));
    child.on("close", (code, killed) => {
      const how = killed === null ? `exited ${code}` : `was killed by ${killed}`;
      const lines = stderr.trim().split("\n");
      const said = (lines.find((line) => /error|cannot/i.test(line)) ?? lines.at(-1) ?? "").trim();
      reject(new Error(`the process that imports ${how}${said === "" ? "" : `: ${said}`}; what it brought over is kept for the next up`));
    });
    child.on("message", (report: Report) => {
      if ("result" in report) resolve({ ...report.result, usage: report.usage });
      else if ("failure" in report) reject(unpackError(report.failure));
      else if ("wantedBytes" in report)
        throttle?.take(report.wantedBytes, signal).then(
          () => tell(child, { granted: report.wantedBytes }),
          (error: unknown) => reject(error instanceof Error ? error : new Error(String(error))),
        );
      else onProgress(report.doneBytes, report.totalBytes);
    });
    tell(child, { order, bytesPerSecond: throttle?.bytesPerSecond });
  });
}

/** To a process that may have ended: its exit tells of that. */
function tell(child: ChildProcess, command: Command): void {
  if (child.connected) child.send(command, () => {});
}
