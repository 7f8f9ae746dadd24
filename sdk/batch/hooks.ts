/** Programs of the user's own, run before and after machines and waves. */
import { spawn } from "node:child_process";
import { once } from "node:events";

const TIMEOUT_MS = 600_000;
const MAX_OUTPUT_CHARACTERS = 4096;

/**
 * Runs argv on this machine without a shell and resolves with the end of what it wrote. `variables` come on top of `environment`.
 * Throws Error when it cannot be started, does not exit 0, or takes more than ten minutes: it is killed then.
 */
export async function runHook(
  argv: readonly string[],
  place: {
    readonly folder: string;
    readonly environment: Readonly<Record<string, string | undefined>>;
    readonly variables: Readonly<Record<string, string>>;
  },
): Promise<string> {
  const [program = "", ...rest] = argv;
  const child = spawn(program, rest, {
    cwd: place.folder,
    env: { ...place.environment, ...place.variables },
    stdio: ["ignore", "pipe", "pipe"],
    timeout: TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding("utf8").on("data", (chunk: string) => {
      output = (output + chunk).slice(-MAX_OUTPUT_CHARACTERS);
    });
  let code: number | null, signal: string | null;
  try {
    [code, signal] = (await once(child, "close")) as [number | null, string | null];
  } catch (error) {
    throw new Error(`the hook ${program} cannot be started: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
  }
  const said = output.trim().replaceAll(/\s*\n\s*/g, " ");
  if (code !== 0)
    throw new Error(
      `the hook ${program} ${signal === null ? `exited ${code}` : `was killed by ${signal}`}${said === "" ? "" : `: ${said}`}`,
    );
  return said;
}
