/** What a command of `virtlift` is. */
import { parseArgs, type ParseArgsOptionsConfig } from "node:util";

export interface Command {
  readonly name: string;
  /** Behind `virtlift`, with its arguments. */
  readonly usage: string;
  readonly summary: string;
  /** Does it, and gives the exit code. Throws UsageError on arguments that are wrong; any other error's message is shown as it is. */
  run(argv: readonly string[]): Promise<number>;
}

/** The arguments are wrong; the message says how. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** `parseArgs` of node:util, strict, with so many words that are no options. Throws UsageError. */
export function parseCommand<Options extends ParseArgsOptionsConfig>(argv: readonly string[], options: Options, words: readonly string[]) {
  let parsed: ReturnType<typeof parseArgs<{ args: string[]; options: Options; allowPositionals: true }>>;
  try {
    parsed = parseArgs({ args: [...argv], options, allowPositionals: true });
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error), { cause: error });
  }
  if (parsed.positionals.length !== words.length)
    throw new UsageError(words.length === 0 ? `it takes no ${parsed.positionals.join(" ")}` : `give exactly ${words.join(" ")}`);
  return parsed;
}
