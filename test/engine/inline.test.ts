/** A disk and its machine in an inline Automation program, against a real libvirtd with emulated machines. */
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
  readonly outputs: { readonly path?: string; readonly uuid?: string };
}

test("an inline program owns its disk and machine through preview, up, update, drift and destroy", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2", { stay: true, hash: false });
  const run = async (command: string, title = "first"): Promise<Outcome> => {
    const argv = [process.execPath, PROGRAM, command, libvirtd.uri, guest.path, `${libvirtd.directory}/web.log`, title] as const;
    return JSON.parse((await runCommand(argv, { env: pulumi.env, cwd: import.meta.dirname })).stdout) as Outcome;
  };

  expect((await run("preview")).changes).toEqual({ create: 3 });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
  const { changes, outputs } = await run("up");
  expect(changes).toEqual({ create: 3 });
  expect((await run("up")).changes).toEqual({ same: 3 });
  expect((await run("up", "second")).changes).toEqual({ same: 2, update: 1 });

  await libvirtd.virsh("destroy", "web");
  expect((await run("refresh", "second")).changes).toEqual({ same: 2, update: 1 });
  expect((await run("up", "second")).changes).toEqual({ same: 2, update: 1 });

  await libvirtd.virsh("destroy", "web");
  await libvirtd.virsh("undefine", "web");
  await rm(outputs.path ?? "");
  expect((await run("refresh", "second")).changes).toEqual({ delete: 2, same: 1 });
  const again = await run("up", "second");
  expect(again.changes).toEqual({ create: 2, same: 1 });
  expect(again.outputs).toEqual(outputs);

  expect((await run("destroy", "second")).changes).toEqual({ delete: 3 });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 240_000);
