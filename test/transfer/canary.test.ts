import { chmod, mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { readsFarReferences } from "../../provider/transfer/canary.ts";
import { openDirectory } from "../bed/directory.ts";
import { createOwnHosts } from "../host/setup.ts";

/** This machine as a host with these variables in its commands' environment. */
function openHosts(environment: Readonly<Record<string, string>>) {
  return createOwnHosts({ ...process.env, ...environment });
}

test("this machine's qemu-img follows a reference of 32,000 bytes back, and nothing of the trial is left", async () => {
  await using directory = await openDirectory("canary");
  const hosts = openHosts({ TMPDIR: directory.path });
  expect(await readsFarReferences(hosts.open({ uri: "qemu:///system" }))).toBe(true);
  await hosts.close();
  expect(await readdir(directory.path)).toEqual([]);
});

test("a host without qemu-img, and one whose qemu-img reads something else, are not trusted with foreign streams", async () => {
  await using directory = await openDirectory("canary");
  const wrong = join(directory.path, "wrong");
  const bare = join(directory.path, "bare");
  await mkdir(wrong);
  await mkdir(bare);
  await writeFile(join(wrong, "qemu-img"), '#!/bin/sh\nfor last; do :; done\nhead -c 65536 /dev/zero > "$last"\n');
  await chmod(join(wrong, "qemu-img"), 0o755);
  await writeFile(join(bare, "sh"), '#!/bin/sh\nPATH=/nowhere exec /bin/sh "$@"\n');
  await chmod(join(bare, "sh"), 0o755);
  for (const path of [wrong, bare]) {
    const hosts = openHosts({ PATH: `${path}:${process.env["PATH"]}` });
    expect(await readsFarReferences(hosts.open({ uri: "qemu:///system" }))).toBe(false);
    await hosts.close();
  }
});
