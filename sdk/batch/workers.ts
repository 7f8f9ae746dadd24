/** The worker processes of a driver: as many as are wanted at a time, each with one job, and none that outlives the driver's will. */
import { type ChildProcess, fork } from "node:child_process";
import { extname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Job, Outcome, WorkerEvent } from "./job.ts";

/** How long the engines of a dead worker may take to end by themselves. */
const GROUP_GRACE_MS = 15_000;
const POLL_MS = 100;
const MAX_STDERR_CHARACTERS = 16_384;

/** Beside this file, in the form that this file has: compiled or not. */
const WORKER = fileURLToPath(new URL(`./worker${extname(import.meta.filename)}`, import.meta.url));

export interface WorkersOptions {
  /** The workers' environment: it holds the passphrase, or the path of its file. */
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** Where the workers run: relative paths of sources are relative to it. */
  readonly folder: string;
}

/** Starts processes as jobs need them and keeps them for the next job. Close it with `await using`. */
export class Workers implements AsyncDisposable {
  readonly #options: WorkersOptions;
  readonly #idle: ChildProcess[] = [];
  readonly #busy = new Set<ChildProcess>();

  constructor(options: WorkersOptions) {
    this.#options = options;
  }

  /** Resident processes, busy or not. */
  get pids(): readonly number[] {
    return [...this.#busy, ...this.#idle].flatMap(({ pid }) => pid ?? []);
  }

  /**
   * Does the job in a process of its own and tells what happens. A worker that dies gives the outcome "engine killed", after its engine has ended.
   * Never rejects for what happens to the job.
   */
  async run(job: Job, onEvent: (event: WorkerEvent) => void): Promise<Outcome> {
    const worker = this.#idle.pop() ?? this.#start();
    this.#busy.add(worker);
    try {
      return await this.#converse(worker, job, onEvent);
    } finally {
      this.#busy.delete(worker);
      if (worker.connected && worker.exitCode === null && worker.signalCode === null) this.#idle.push(worker);
    }
  }

  /** Interrupts every engine that is at work: at the first time it ends after what it is doing, at the second at once. */
  interrupt(): void {
    for (const { pid } of this.#busy) if (pid !== undefined) signalGroup(pid, "SIGINT");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const all = [...this.#idle.splice(0), ...this.#busy];
    await Promise.all(
      all.map(async (worker) => {
        if (worker.connected) worker.disconnect();
        if (worker.pid !== undefined) await endGroup(worker.pid);
      }),
    );
  }

  #start(): ChildProcess {
    return fork(WORKER, [], {
      cwd: this.#options.folder,
      env: this.#options.environment,
      // A terminal's Ctrl-C is for the driver, which decides what it means.
      detached: true,
      stdio: ["ignore", "ignore", "pipe", "ipc"],
    });
  }

  #converse(worker: ChildProcess, job: Job, onEvent: (event: WorkerEvent) => void): Promise<Outcome> {
    return new Promise((resolve) => {
      let stderr = "";
      const onStderr = (chunk: Buffer): void => {
        stderr = (stderr + chunk.toString("utf8")).slice(-MAX_STDERR_CHARACTERS);
      };
      const onMessage = (event: WorkerEvent): void => {
        if (event.event !== "outcome") return onEvent(event);
        end(event.outcome);
      };
      const onExit = (): void => {
        const how = worker.signalCode === null ? `exited ${worker.exitCode}` : `was killed by ${worker.signalCode}`;
        const said = stderr.trim().split("\n").at(-1) ?? "";
        void endGroup(worker.pid ?? 0).then(() =>
          end({ ok: false, cause: "engine killed", reasons: [`the worker process ${how}${said === "" ? "" : `: ${said}`}`] }),
        );
      };
      const end = (outcome: Outcome): void => {
        worker.off("message", onMessage).off("exit", onExit);
        worker.stderr?.off("data", onStderr);
        resolve(outcome);
      };
      worker.on("message", onMessage).once("exit", onExit);
      worker.stderr?.on("data", onStderr);
      worker.send(job, (error) => {
        if (error !== null && worker.exitCode === null && worker.signalCode === null)
          end({ ok: false, cause: "engine killed", reasons: [`the worker process cannot be reached: ${error.message}`] });
      });
    });
  }
}

/** Ends what is left in the group of a worker: asked twice, as a user would, and by force when that does not help. */
async function endGroup(pid: number): Promise<void> {
  const deadline = performance.now() + GROUP_GRACE_MS;
  for (let polls = 0; performance.now() < deadline; polls++) {
    if (!signalGroup(pid, polls === 2 || polls === 12 ? "SIGINT" : 0)) return;
    await sleep(POLL_MS);
  }
  signalGroup(pid, "SIGKILL");
}

/** False when the group has no process any more. */
function signalGroup(pid: number, signal: NodeJS.Signals | 0): boolean {
  try {
    process.kill(-pid, signal);
    return true;
  } catch {
    // ESRCH: all of them have ended.
    return false;
  }
}
