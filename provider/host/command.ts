/** A command on a host, wherever it runs: its streams as one Duplex, its end as one promise, its failure as one sentence. */
import { Duplex, type Readable, type Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { CommandError, ConnectionError } from "../errors.ts";
import type { HostStream, RunOptions } from "./hosts.ts";

const MAX_STDOUT_BYTES = 16 * 1024 * 1024;
const MAX_STDERR_CHARACTERS = 64 * 1024;
const STDERR_TAIL_CHARACTERS = 4096;
const IO_BUFFER_BYTES = 256 * 1024;
const DEFAULT_TIMEOUT_MS = 60_000;

/** How long a killed command may take to be gone before its end is taken for granted. */
const KILL_GRACE_MS = 5000;

/** How a process ended: by itself, or by a signal's name such as `SIGKILL`. Both absent: nobody knows. */
export interface ProcessEnd {
  readonly exitCode?: number | undefined;
  readonly signal?: string | undefined;
}

/** A process as a host starts it. All three streams are consumed by whoever gets it. */
export interface HostProcess {
  readonly stdin: Writable;
  readonly stdout: Readable;
  readonly stderr: Readable;
  /** Settles after stdout and stderr have ended; rejects with ConnectionError as soon as the way to the process is lost, or when it cannot start. */
  readonly ended: Promise<ProcessEnd>;
  /** Starts to end the process and all that it started. May be called twice. */
  kill(): void;
}

/** Who runs what where: what a failure's sentence needs. */
export interface CommandContext {
  /** The command without `sudo -n`. */
  readonly argv: readonly string[];
  /** The host's label. */
  readonly label: string;
  readonly sudo: boolean;
}

/**
 * A process as a HostStream.
 *
 * `io` ends cleanly only when the command exited 0; otherwise it is destroyed with the error that `done` rejects with. So a cut stream never passes
 * for a whole one. Its writing side fails with code EPIPE when the command exited 0 without reading all.
 */
export class Command implements HostStream {
  readonly done: Promise<void>;
  readonly #io: CommandIo;
  readonly #process: HostProcess;
  readonly #context: CommandContext;
  #stderr = "";
  #hasEnded = false;
  #killReason: Error | undefined;
  #giveUp: (error: Error) => void = () => {};

  constructor(process: HostProcess, context: CommandContext, signal?: AbortSignal) {
    this.#process = process;
    this.#context = context;
    const io = new CommandIo(process, () => this.kill());
    this.#io = io;
    // `done` carries the same error: without a listener here, whoever only awaits `done` would crash.
    io.on("error", () => {});
    process.stderr.setEncoding("utf8");
    process.stderr.on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-MAX_STDERR_CHARACTERS);
    });
    const abandoned = new Promise<never>((_resolve, reject) => (this.#giveUp = reject));
    const onAbort = (): void =>
      this.end(
        new ConnectionError(`${describeCommand(context.argv)} was stopped (on ${context.label})`, {
          host: context.label,
          phase: "aborted",
        }),
      );
    this.done = Promise.race([process.ended, abandoned])
      .then((end) => this.#judge(end))
      .then(
        () => io.succeed(),
        (error: unknown) => {
          const failure = this.#killReason ?? (error instanceof Error ? error : new Error(String(error)));
          io.fail(failure);
          throw failure;
        },
      )
      .finally(() => {
        this.#hasEnded = true;
        signal?.removeEventListener("abort", onAbort);
      });
    // Whoever wants the reason awaits `done`; a stream that is dropped on purpose must not end the program.
    this.done.catch(() => {});
    signal?.addEventListener("abort", onAbort, { once: true });
    if (signal?.aborted) onAbort();
  }

  get io(): Duplex {
    return this.#io;
  }

  /** What the command wrote to stderr so far: at most the last 64 Ki characters. */
  get stderr(): string {
    return this.#stderr;
  }

  kill(): void {
    const { argv, label } = this.#context;
    this.end(
      new CommandError(`${describeCommand(argv)} was killed (on ${label})`, { argv, signal: "SIGKILL", stderrTail: tail(this.#stderr) }),
    );
  }

  /** Kills the command; `done` rejects with this reason, at the latest after 5 seconds. */
  end(reason: Error): void {
    if (this.#hasEnded || this.#killReason !== undefined) return;
    this.#killReason = reason;
    this.#process.kill();
    // What is still on its way is thrown away: a process is not over before its output has been read.
    this.#io.fail(reason);
    const grace = setTimeout(() => this.#giveUp(reason), KILL_GRACE_MS);
    this.done.catch(() => {}).finally(() => clearTimeout(grace));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    await this.done.catch(() => {
      // Killed on purpose, or failed before: either way it has ended.
    });
  }

  #judge(end: ProcessEnd): void {
    if (this.#killReason !== undefined) throw this.#killReason;
    if (end.exitCode !== 0) throw commandFailure(this.#context, end, this.#stderr);
  }
}

/**
 * Gives the command its input, collects its output and waits for its end.
 *
 * Throws what `done` rejects with; ConnectionError (phase "timeout") after `timeoutMs`; CommandError on more than 16 MiB of stdout. The command is gone then.
 */
export async function runToEnd(
  command: Command,
  context: CommandContext,
  options: Pick<RunOptions, "input" | "timeoutMs"> = {},
): Promise<{ readonly stdout: Buffer; readonly stderr: string }> {
  const { argv, label } = context;
  const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
  const timer = setTimeout(() => {
    command.end(
      new ConnectionError(`${describeCommand(argv)} did not end within ${timeoutMs / 1000} s (on ${label})`, {
        host: label,
        phase: "timeout",
      }),
    );
  }, timeoutMs);
  const chunks: Buffer[] = [];
  let size = 0;
  command.io.on("data", (chunk: Buffer) => {
    size += chunk.length;
    if (size <= MAX_STDOUT_BYTES) {
      chunks.push(chunk);
      return;
    }
    chunks.length = 0;
    const message = `${describeCommand(argv)} wrote more than ${MAX_STDOUT_BYTES} bytes (on ${label})`;
    command.end(new CommandError(message, { argv, stderrTail: tail(command.stderr) }));
  });
  command.io.end(options.input);
  try {
    await command.done;
  } finally {
    clearTimeout(timer);
  }
  return { stdout: Buffer.concat(chunks), stderr: command.stderr };
}

/** Waits for a promise no longer than `timeoutMs`; true when it settled in time. */
export async function settlesWithin(promise: Promise<unknown>, timeoutMs: number): Promise<boolean> {
  const timer = new AbortController();
  const settled = promise.then(
    () => true,
    () => true,
  );
  try {
    return await Promise.race([settled, sleep(timeoutMs, false, { signal: timer.signal })]);
  } finally {
    timer.abort();
  }
}

/** One sentence for a command that did not exit 0. */
function commandFailure(context: CommandContext, end: ProcessEnd, stderr: string): CommandError {
  const { argv, label } = context;
  const error = (message: string): CommandError => new CommandError(message, { argv, ...end, stderrTail: tail(stderr) });
  const name = describeCommand(argv);
  const reason = lastLine(stderr);
  if (context.sudo) {
    if (
      /^sudo: .*(password is required|terminal is required|not allowed|may not run|not in the sudoers)/m.test(stderr) ||
      /is not in the sudoers file|is not allowed to execute/.test(stderr)
    ) {
      return error(
        `sudo does not allow ${argv[0]} without a password on ${label}: add a NOPASSWD rule for it to sudoers, or log in as root`,
      );
    }
    const missing = /^sudo: (.+): command not found$/m.exec(stderr)?.[1];
    if (missing !== undefined) return error(`${missing} is not installed on ${label}, or not on the path that sudo uses`);
    if (end.exitCode === 127 && /\bsudo: .*not found/.test(stderr))
      return error(`sudo is not installed on ${label}: install it, or log in as root`);
  }
  if (end.exitCode === 127 && argv[0] !== "sh") return error(`${argv[0]} is not installed on ${label}, or not on the login's path`);
  if (end.exitCode === 126 && argv[0] !== "sh") return error(`${argv[0]} cannot be executed on ${label}: ${reason}`);
  const outcome =
    end.exitCode !== undefined
      ? `exited ${end.exitCode}`
      : end.signal !== undefined
        ? `was ended by ${end.signal}`
        : "ended without saying how";
  const own = reason.startsWith(`${baseName(argv)}: `) ? reason.slice(baseName(argv).length + 2) : reason;
  return error(`${name} ${outcome}${own === "" ? "" : `: ${own}`} (on ${label})`);
}

/** A command's name for a sentence: the program, and the verb where it has one: `qemu-img convert`. No further argument: those can be long. */
function describeCommand(argv: readonly string[]): string {
  const verb = argv[1] !== undefined && /^[a-z][a-z-]+$/.test(argv[1]) ? ` ${argv[1]}` : "";
  return baseName(argv) + verb;
}

function baseName(argv: readonly string[]): string {
  return argv[0]?.split("/").at(-1) ?? "";
}

function tail(stderr: string): string {
  return stderr.slice(-STDERR_TAIL_CHARACTERS);
}

/** The last line that says something: programs end with the reason. */
export function lastLine(text: string): string {
  return (
    text
      .split(/[\r\n]+/)
      .findLast((line) => line.trim() !== "")
      ?.trim()
      .slice(0, 500) ?? ""
  );
}

/** stdin and stdout of a process, with back-pressure both ways; its end is told by `succeed` or `fail`. */
class CommandIo extends Duplex {
  readonly #process: HostProcess;
  readonly #kill: () => void;
  #waitingWrite: ((error?: Error) => void) | undefined;
  #hasEnded = false;

  constructor(process: HostProcess, kill: () => void) {
    super({ readableHighWaterMark: IO_BUFFER_BYTES, writableHighWaterMark: IO_BUFFER_BYTES });
    this.#process = process;
    this.#kill = kill;
    process.stdout.on("data", (chunk: Buffer) => {
      if (!this.destroyed && !this.push(chunk)) process.stdout.pause();
    });
    process.stdout.on("error", () => {
      // The process's end says why.
    });
    process.stdin.on("error", () => {
      // EPIPE: the process has closed its stdin; its end says why.
    });
  }

  /** The command exited 0. */
  succeed(): void {
    this.#hasEnded = true;
    if (this.destroyed) return;
    this.push(null);
    this.#refuseWrite();
  }

  /** The command failed, was killed, or is out of reach. */
  fail(error: Error): void {
    this.#hasEnded = true;
    this.destroy(error);
  }

  override _read(): void {
    this.#process.stdout.resume();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: (error?: Error) => void): void {
    this.#waitingWrite = callback;
    if (this.#hasEnded) {
      this.#refuseWrite();
      return;
    }
    // A failed write is answered when the process has ended, with the reason of its end.
    this.#process.stdin.write(chunk, (error) => {
      if (error) return;
      const waiting = this.#waitingWrite;
      this.#waitingWrite = undefined;
      waiting?.();
    });
  }

  override _final(callback: () => void): void {
    this.#process.stdin.end();
    callback();
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    if (!this.#hasEnded) this.#kill();
    this.#process.stdout.resume();
    callback(error);
  }

  #refuseWrite(): void {
    const waiting = this.#waitingWrite;
    this.#waitingWrite = undefined;
    waiting?.(Object.assign(new Error("the command ended before it read all of its input"), { code: "EPIPE" }));
  }
}
