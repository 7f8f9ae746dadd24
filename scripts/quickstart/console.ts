/** Follows what a guest writes to its serial port, as its host keeps it in a file. */
import { stripVTControlCharacters } from "node:util";
import { setTimeout as sleep } from "node:timers/promises";
import type { Host } from "../../provider/host/hosts.ts";

const POLL_MS = 300;
const MAX_LOG_BYTES = 1024 * 1024;

/**
 * Calls `onLine` with each line as it comes, control sequences taken out, until `isEnough` says so of the whole text, `isOver` says that
 * nothing more comes, or the time is over.
 * Gives the whole text, of which the first MiB is read. Throws CommandError when the host does not let this user read the file.
 */
export async function followConsole(
  host: Host,
  path: string,
  options: {
    readonly timeoutMs: number;
    readonly isEnough: (text: string) => boolean;
    readonly isOver?: () => Promise<boolean>;
    readonly onLine: (line: string) => void;
  },
): Promise<string> {
  const deadline = performance.now() + options.timeoutMs;
  let shown = 0;
  for (;;) {
    const isOver = (await options.isOver?.()) ?? false;
    const { stdout } = await host.run(["head", "-c", String(MAX_LOG_BYTES), path]);
    const text = stripVTControlCharacters(stdout.toString("utf8")).replaceAll("\r", "");
    const isLast = isOver || options.isEnough(text) || performance.now() > deadline;
    const lines = text.split("\n");
    const whole = isLast ? lines : lines.slice(0, -1);
    for (const line of whole.slice(shown)) if (line.trim() !== "") options.onLine(line);
    shown = whole.length;
    if (isLast) return text;
    await sleep(POLL_MS);
  }
}
