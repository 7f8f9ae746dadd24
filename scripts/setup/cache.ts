/** What is made once per user and kept outside the clone. */
import { mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { exists } from "./files.ts";

/** `${XDG_CACHE_HOME:-~/.cache}/virtlift/<parts>`. Source: XDG Base Directory Specification. */
export function cachePath(...parts: readonly string[]): string {
  return join(process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"), "virtlift", ...parts);
}

/**
 * Makes the folder `path` with what `fill` puts into it, unless it exists already.
 *
 * `fill` gets a temporary folder beside `path`, which takes its final name only when `fill` has succeeded: a folder that exists is whole.
 * Two processes may do this at the same time: both fill, the first one's folder stays.
 */
export async function fillOnce(path: string, fill: (temporary: string) => Promise<void>): Promise<void> {
  if (await exists(path)) return;
  await mkdir(dirname(path), { recursive: true });
  const temporary = await mkdtemp(`${path}.part-`);
  try {
    await fill(temporary);
    await rename(temporary, path);
  } catch (error) {
    const lostTheRace = error instanceof Error && "syscall" in error && error.syscall === "rename" && (await exists(path));
    if (!lostTheRace) throw error;
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
}
