import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { expect, test } from "vitest";
import { lockBatch } from "../../sdk/batch/driver-lock.ts";
import { isGone, parseLockOwners, removeLockFiles } from "../../sdk/batch/locks.ts";
import { openDirectory } from "../bed/directory.ts";

/** As the engine prints it, once in its output and once in the command's error. */
const refusal = (owner: string): string =>
  `error: the stack is currently locked by 1 lock(s). Either wait for the other process(es) to end or delete the lock file with \`pulumi cancel\`.\n  ${owner}\n stderr: error: ...\n  ${owner}\n`;
const lineOf = (url: string, pid: number, host = hostname()): string =>
  `${url}: created by root@${host} (pid ${pid}) at 2026-11-23T14:00:00Z`;

async function deadPid(): Promise<number> {
  const child = spawn("true");
  await once(child, "exit");
  return child.pid ?? 0;
}

test("reads the owner from the engine's refusal, once", () => {
  expect(parseLockOwners(refusal(lineOf("file:///state/lock.json", 42, "kvm1")))).toEqual([
    { url: "file:///state/lock.json", user: "root", host: "kvm1", pid: 42, sinceMs: Date.parse("2026-11-23T14:00:00Z") },
  ]);
  expect(parseLockOwners("the stack is currently locked by somebody")).toEqual([]);
});

test("takes an owner for gone only when its process on this machine has ended, or is another one by now", async () => {
  const [owner] = parseLockOwners(lineOf("file:///l", await deadPid()));
  expect(isGone(owner!)).toBe(true);
  expect(isGone({ ...owner!, host: "elsewhere" })).toBe(false);
  expect(isGone({ ...owner!, pid: process.pid, sinceMs: Date.now() })).toBe(false);
  expect(isGone({ ...owner!, pid: process.pid, sinceMs: 0 })).toBe(true);
  expect(isGone({ ...owner!, sinceMs: Number.NaN })).toBe(false);
});

test("removes lock files of a folder, and leaves other backends to pulumi cancel", async () => {
  await using folder = await openDirectory("locks");
  const path = join(folder.path, "a lock.json");
  writeFileSync(path, "{}");
  const owner = { user: "root", host: hostname(), pid: 1, sinceMs: 0 };
  expect(await removeLockFiles([{ ...owner, url: "s3://bucket/lock.json" }])).toBe(false);
  expect(await removeLockFiles([{ ...owner, url: pathToFileURL(path).href }])).toBe(true);
  expect(existsSync(path)).toBe(false);
});

test("lets one driver at a time work on a batch, and takes over from one that is gone", async () => {
  await using folder = await openDirectory("locks");
  const path = join(folder.path, "lock");
  {
    await using _held = await lockBatch(path);
    await expect(lockBatch(path)).rejects.toThrow(`process ${process.pid} of`);
  }
  expect(existsSync(path)).toBe(false);
  writeFileSync(path, JSON.stringify({ url: path, user: "root", host: hostname(), pid: await deadPid(), sinceMs: Date.now() }));
  await using held = await lockBatch(path);
  expect(held).toBeDefined();
  writeFileSync(path, "");
});
