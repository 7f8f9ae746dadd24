/** ImportedDisk in an inline Automation program, against a real libvirtd. */
import { readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const PROGRAM = join(import.meta.dirname, "inline-program.ts");

interface Outcome {
  readonly changes: Readonly<Record<string, number>>;
  readonly outputs: { readonly path?: string; readonly sourceDigest?: string };
}

test("an inline program imports a disk once, keeps it, and notices when it is gone", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2");
  const run = async (command: string): Promise<Outcome> => {
    const argv = [process.execPath, PROGRAM, command, libvirtd.uri, guest.path] as const;
    return JSON.parse((await runCommand(argv, { env: pulumi.env, cwd: import.meta.dirname })).stdout) as Outcome;
  };

  expect((await run("preview")).changes).toEqual({ create: 2 });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
  const { changes, outputs } = await run("up");
  expect(changes).toEqual({ create: 2 });
  const path = outputs.path ?? "";
  await runCommand(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", guest.path, path]);
  expect((await run("up")).changes).toEqual({ same: 2 });

  await rm(path);
  expect((await run("refresh")).changes).toEqual({ delete: 1, same: 1 });
  expect((await run("up")).changes).toEqual({ create: 1, same: 1 });
  expect((await run("destroy")).changes).toEqual({ delete: 2 });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 120_000);
