/** Runs the small commands of the set-up and of the test bed to their end. Bulk bytes do not belong here. */
import { execFile, type ExecFileException } from "node:child_process";
import { CommandError } from "../../provider/errors.ts";

const MAX_OUTPUT_BYTES = 64 * 1024 * 1024;
const STDERR_TAIL_CHARACTERS = 4096;

export interface CommandOptions {
  readonly cwd?: string;
  /** The whole environment of the command. Default: this process's own. */
  readonly env?: NodeJS.ProcessEnv;
  /** Written to the command's stdin, which is then closed. Default: nothing. */
  readonly input?: string | Uint8Array;
  /** Default 60,000. The command is killed when it takes longer. */
  readonly timeoutMs?: number;
}

/**
 * Runs argv without a shell and gives its whole output, decoded as UTF-8.
 * Throws CommandError when it cannot be started, does not exit 0, takes too long, or writes more than 64 MiB.
 */
export function runCommand(
  argv: readonly [string, ...string[]],
  options: CommandOptions = {},
): Promise<{ readonly stdout: string; readonly stderr: string }> {
  const [file, ...rest] = argv;
  return new Promise((resolve, reject) => {
    const child = execFile(
      file,
      rest,
      { cwd: options.cwd, env: options.env, timeout: options.timeoutMs ?? 60_000, killSignal: "SIGKILL", maxBuffer: MAX_OUTPUT_BYTES },
      (error, stdout, stderr) => {
        if (error === null) resolve({ stdout, stderr });
        else reject(describeFailure(argv, error, stdout, stderr));
      },
    );
    // EPIPE when the command ends before it has read all: its exit code says what that means.
    child.stdin?.on("error", () => undefined);
    child.stdin?.end(options.input);
  });
}

function describeFailure(argv: readonly string[], error: ExecFileException, stdout: string, stderr: string): CommandError {
  const exitCode = typeof error.code === "number" ? error.code : undefined;
  const signal = error.signal ?? undefined;
  const outcome = exitCode !== undefined ? `exited ${exitCode}` : signal !== undefined ? `was ended by ${signal}` : "could not run";
  const reason =
    lastLine(stderr) ?? lastLine(stdout) ?? (exitCode === undefined && signal === undefined ? error.message : "it said nothing");
  return new CommandError(`${argv.slice(0, 3).join(" ")} ${outcome}: ${reason}`, {
    argv,
    exitCode,
    signal,
    stderrTail: stderr.slice(-STDERR_TAIL_CHARACTERS),
  });
}

function lastLine(text: string): string | undefined {
  return text.trim().split("\n").at(-1)?.trim() || undefined;
}
