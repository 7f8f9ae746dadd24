/** Processes that live as long as a test: started in the foreground, waited for, and gone with all their children afterwards. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

const MAX_LOG_CHARACTERS = 256 * 1024;
const READY_POLL_MS = 20;

export interface DaemonOptions {
  readonly cwd?: string;
  readonly env?: NodeJS.ProcessEnv;
  /** Asked every 20 ms until it says true; a throw counts as "not yet". */
  readonly ready: () => boolean | Promise<boolean>;
  /** Default 15,000. */
  readonly readyTimeoutMs?: number;
}

export interface Daemon extends AsyncDisposable {
  readonly pid: number;
  /** What it has written to stdout and stderr so far: the last 256 Ki characters. */
  log(): string;
  /** Whether it still runs. */
  isRunning(): boolean;
  /** Ends it and all its descendants with SIGKILL and waits until it is gone. May be called twice. */
  kill(): Promise<void>;
}

const running = new Set<ChildProcess>();
process.once("exit", () => {
  for (const child of running) killTree(child);
});

/**
 * Starts argv in the foreground and waits until it is ready.
 * The kernel ends it when this process dies in any way (PR_SET_PDEATHSIG, by setpriv of util-linux).
 * Throws Error with the end of the daemon's log when it ends early or does not become ready in time; nothing is left running then.
 */
export async function openDaemon(argv: readonly string[], options: DaemonOptions): Promise<Daemon> {
  const child = spawn("setpriv", ["--pdeathsig", "KILL", "--", ...argv], {
    cwd: options.cwd,
    env: options.env ?? process.env,
    stdio: ["ignore", "pipe", "pipe"],
  });
  let log = "";
  const keep = (chunk: string): void => {
    log = (log + chunk).slice(-MAX_LOG_CHARACTERS);
  };
  child.stdout.setEncoding("utf8").on("data", keep);
  child.stderr.setEncoding("utf8").on("data", keep);
  child.on("error", (error) => keep(error.message));
  if (child.pid === undefined) {
    await once(child, "error");
    throw new Error(`${argv[0]} cannot be started: ${log}`);
  }
  running.add(child);
  child.once("exit", () => running.delete(child));

  const daemon: Daemon = {
    pid: child.pid,
    log: () => log,
    isRunning: () => running.has(child),
    async kill() {
      if (!running.has(child)) return;
      const exited = once(child, "exit");
      killTree(child);
      await exited;
    },
    [Symbol.asyncDispose]: () => daemon.kill(),
  };
  const timeoutMs = options.readyTimeoutMs ?? 15_000;
  const deadline = performance.now() + timeoutMs;
  while (daemon.isRunning() && performance.now() < deadline) {
    if (await isReady(options.ready)) return daemon;
    await sleep(READY_POLL_MS);
  }
  const complaint = daemon.isRunning() ? `was not ready after ${timeoutMs} ms` : "ended at once";
  await daemon.kill();
  throw new Error(`${argv[0]} ${complaint}: ${log.trim().split("\n").slice(-5).join(" | ")}`);
}

async function isReady(ready: DaemonOptions["ready"]): Promise<boolean> {
  try {
    return await ready();
  } catch {
    // A socket or file that is not there yet: what waiting is for.
    return false;
  }
}

/** Descendants first collected, then killed from the top, so that no parent restarts or outlives its child. */
function killTree(child: ChildProcess): void {
  const { pid } = child;
  if (pid === undefined) return;
  for (const each of [pid, ...descendants(pid)]) {
    try {
      process.kill(each, "SIGKILL");
    } catch {
      // ESRCH: it ended by itself in between.
    }
  }
}

/** What a process was started as, its words ended by NUL; empty for one that has ended meanwhile. */
export function commandLine(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    // ENOENT or ESRCH.
    return "";
  }
}

/** Pids of all children, theirs, and so on. Source: proc(5), /proc/pid/task/tid/children. */
export function descendants(pid: number): readonly number[] {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8");
  } catch {
    // ENOENT: the process is gone, and so its children are init's.
    return [];
  }
  const children = text.split(" ").filter(Boolean).map(Number);
  return children.flatMap((each) => [each, ...descendants(each)]);
}
