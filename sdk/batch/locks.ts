/**
 * Locks of Pulumi's own backends, told from the refusal that names them, and removed only where whoever holds them is provably gone.
 * Source: pulumi/pulumi pkg/backend/diy/lock.go: `  <url of the lock file>: created by <user>@<host> (pid <pid>) at <RFC 3339>`.
 */
import { readFileSync, statSync } from "node:fs";
import { rm } from "node:fs/promises";
import { hostname } from "node:os";
import { fileURLToPath } from "node:url";

/** Who holds a stack. */
export interface LockOwner {
  /** The lock's own file, as the backend names it. */
  readonly url: string;
  readonly user: string;
  readonly host: string;
  readonly pid: number;
  /** When it was taken, in milliseconds since 1970. */
  readonly sinceMs: number;
}

const OWNER = /^\s*(\S+): created by (\S*?)@(\S+) \(pid (\d{1,10})\) at (\S+)\s*$/gm;

/** The owners that a refusal names. Empty when it names none, or in words that are not known. */
export function parseLockOwners(refusal: string): readonly LockOwner[] {
  // A command's error repeats what the command printed.
  const owners = new Map<string, LockOwner>();
  for (const [, url = "", user = "", host = "", pid = "", since = ""] of refusal.matchAll(OWNER))
    owners.set(url, { url, user, host, pid: Number(pid), sinceMs: Date.parse(since) });
  return [...owners.values()];
}

/**
 * Whether the owner cannot be at work any more: it ran on this machine, and its process has ended, or is one that began after the lock was taken.
 * Of another machine nothing is known.
 */
export function isGone({ host, pid, sinceMs }: LockOwner): boolean {
  if (host !== hostname() || Number.isNaN(sinceMs)) return false;
  const began = processBeganMs(pid);
  // A process begins before it takes a lock; the margin is for clocks that were set and for coarse time stamps.
  return began === undefined || began > sinceMs + 60_000;
}

/** When a process of this machine began; undefined when it does not run, or has ended and only waits to be reaped. Source: proc_pid_stat(5). */
function processBeganMs(pid: number): number | undefined {
  try {
    const state = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /s, "")[0];
    if (state === "Z" || state === "X") return undefined;
    return statSync(`/proc/${pid}`).ctimeMs;
  } catch {
    // ENOENT: no such process. Where there is no /proc, the signal 0 tells.
    return isSignalled(pid) ? 0 : undefined;
  }
}

function isSignalled(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error instanceof Error && "code" in error && error.code === "EPERM";
  }
}

/** Removes the lock files of owners that are gone, where the backend is a folder; false when they are elsewhere and only `pulumi cancel` can. */
export async function removeLockFiles(owners: readonly LockOwner[]): Promise<boolean> {
  if (!owners.every(({ url }) => url.startsWith("file://"))) return false;
  for (const { url } of owners) await rm(fileURLToPath(url), { force: true });
  return true;
}
