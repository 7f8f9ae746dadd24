import { appendFile, link, stat, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, it } from "vitest";
import { HostFolder, watchFile } from "../../provider/transfer/on-host.ts";
import type { OnProgress } from "../../provider/transfer/progress.ts";
import { openHosts } from "../host/setup.ts";

const MIB = 1024 * 1024;

/** A work that the test ends. */
function openWork() {
  let finish: (words: string) => void = () => {};
  let fail: (error: Error) => void = () => {};
  const work = new Promise<string>((resolve, reject) => {
    finish = resolve;
    fail = reject;
  });
  return { work, finish, fail };
}

it("tells how far a work on the host is, as its file grows, and settles as the work does", async () => {
  await using opened = await openHosts();
  const host = opened.hosts.open({ uri: "qemu:///session" });
  const path = join(opened.home, "part");
  await writeFile(path, Buffer.alloc(MIB, 1));
  const told: number[] = [];
  const { work, finish, fail } = openWork();
  const onProgress: OnProgress = (doneBytes, totalBytes) => {
    expect(totalBytes).toBe(2 * MIB);
    if (told.at(-1) !== doneBytes) told.push(doneBytes);
    if (told.length === 1) void appendFile(path, Buffer.alloc(4 * MIB, 1)).then(() => finish("done"), fail);
  };
  expect(await watchFile(host, path, { totalBytes: 2 * MIB, onProgress, everyMs: 1 }, work)).toBe("done");
  expect(told[0]).toBeGreaterThanOrEqual(MIB);
  expect(told[0]).toBeLessThan(2 * MIB);

  const late = openWork();
  const whole = (doneBytes: number): void => {
    expect(doneBytes).toBe(2 * MIB);
    late.fail(new Error("no space left"));
  };
  // More than was thought is no more than all.
  await expect(watchFile(host, path, { totalBytes: 2 * MIB, onProgress: whole, everyMs: 1 }, late.work)).rejects.toThrow("no space left");
  // Where nobody knows the end, what is there is told all the same.
  const endless = openWork();
  const written: OnProgress = (doneBytes, totalBytes) => {
    expect(totalBytes).toBeUndefined();
    if (doneBytes >= 5 * MIB) endless.finish("done");
  };
  expect(await watchFile(host, path, { totalBytes: undefined, onProgress: written, everyMs: 1 }, endless.work)).toBe("done");
  // A host that cannot tell keeps no work from its end.
  const blind = host.run(["sleep", "0.1"]).then(() => "done");
  const untold = { totalBytes: MIB, onProgress: () => expect.unreachable(), everyMs: 1 };
  expect(await watchFile(host, "/nowhere", untold, blind)).toBe("done");
});

it("notices a file on the host that was written and had its time set back, and minds no other link to it", async () => {
  await using opened = await openHosts();
  const host = opened.hosts.open({ uri: "qemu:///session" });
  const path = join(opened.home, "disk.raw");
  const write = async () => {
    await writeFile(path, "bytes");
    await utimes(path, 1_700_000_000, 1_700_000_000);
  };
  await write();
  const folder = new HostFolder(host, path);
  await folder.file("");
  await link(path, join(opened.home, "backup.raw"));
  await expect(folder.assertUnchanged()).resolves.toBeUndefined();

  const linked = new HostFolder(host, path);
  await linked.file("");
  const { ctimeNs } = await stat(path, { bigint: true });
  // The kernel's clock of file times goes in steps of some milliseconds.
  while ((await stat(path, { bigint: true })).ctimeNs === ctimeNs) await write();
  await expect(linked.assertUnchanged()).rejects.toThrow(/disk\.raw on this machine changed while it was read/);
});
