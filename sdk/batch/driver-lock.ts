/** One driver a batch: a file that names who works on it. */
import { readFileSync } from "node:fs";
import { rm, writeFile } from "node:fs/promises";
import { hostname, userInfo } from "node:os";
import { isGone, type LockOwner } from "./locks.ts";

/** Takes the batch for this process; released on dispose. Throws Error naming whoever works on it, unless that process is provably gone. */
export async function lockBatch(path: string): Promise<AsyncDisposable> {
  const own: LockOwner = { url: path, user: userInfo().username, host: hostname(), pid: process.pid, sinceMs: Date.now() };
  for (let attempt = 1; ; attempt++) {
    try {
      await writeFile(path, JSON.stringify(own), { flag: "wx", mode: 0o600 });
      return { [Symbol.asyncDispose]: () => rm(path, { force: true }) };
    } catch (error) {
      if (!(error instanceof Error && "code" in error && error.code === "EEXIST")) throw error;
      const owner = batchOwner(path);
      if (owner !== undefined && !isGone(owner))
        throw new Error(
          `process ${owner.pid} of ${owner.user} on ${owner.host} works on this batch since ${new Date(owner.sinceMs).toISOString()}: wait for it, or, where it is gone, remove ${path}`,
          { cause: error },
        );
      if (attempt === 3) throw error;
      await rm(path, { force: true });
    }
  }
}

/** Who works on the batch, or did so when it was killed; undefined when nobody does. */
export function batchOwner(path: string): LockOwner | undefined {
  try {
    return JSON.parse(readFileSync(path, "utf8")) as LockOwner;
  } catch {
    // ENOENT: nobody does. SyntaxError: whoever took it was killed before it was written.
    return undefined;
  }
}
