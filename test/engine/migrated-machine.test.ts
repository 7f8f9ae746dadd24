/** MigratedMachine in a program that the CLI runs, against a real libvirtd. */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { MigratedMachine } from "virtlift";
const config = new Config();
const moved = new MigratedMachine("web", {
  source: { ova: config.require("ova") },
  networks: { "VM Network": config.get("network") ?? { type: "user" } },
  machine: { powerState: "stopped", domainType: "qemu" },
});
export const name = moved.machine.name;
export const disks = moved.disks.map((disk) => disk.path);
`;

/** The machine above, and two whose arguments are wrong. */
const BROKEN = `${PROGRAM}
const source = { ova: config.require("ova") };
new MigratedMachine("lost", { source, networks: {} });
new MigratedMachine("typo", { source, pools: { "other.vmdk": "fast" } });
`;

test("copies no disk for a machine that cannot be, also without a preview, previews all that are wrong, brings one out of a zip archive, and has nothing to do the second time", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const { path: ova } = await prepareGuestOva();
  const project = await pulumi.openProject(PROGRAM, { config: { "virtlift:host": libvirtd.uri, ova, network: "none-such" } });
  const refused = await project.run("up", "--yes", "--skip-preview");
  expect(refused.exitCode).not.toBe(0);
  expect(refused.stdout + refused.stderr).toContain(
    "web cannot be made, so none of its disks is copied: networks[0].network: there is no network none-such",
  );
  expect(await readdir(libvirtd.poolPath)).toEqual([]);

  await project.write(BROKEN);
  const previewed = await project.run("preview");
  expect(previewed.exitCode).not.toBe(0);
  const said = previewed.stdout + previewed.stderr;
  for (const sentence of [
    'lost: networks says nothing of "VM Network": give it a libvirt network',
    "typo: pools names other.vmdk, which the machine does not have",
  ])
    expect(said).toContain(sentence);
  // Which of the resources it asks for first, and by whose refusal it ends, is up to the engine.
  expect(said).toMatch(/networks\[0\]\.network: (there is no network none-such|the network default on .* is not active)/);
  expect(said).not.toMatch(/unhandled|^ +at /m);

  await project.write(PROGRAM);
  await project.mustRun("config", "rm", "network");
  const zip = join(libvirtd.directory, "web.zip");
  await runCommand(["zip", "-q", "-0", "-j", zip, ova]);
  await project.mustRun("config", "set", "ova", zip);
  await project.mustRun("up", "--yes", "--skip-preview");
  const outputs = JSON.parse((await project.mustRun("stack", "output", "--json")).stdout) as { name: string; disks: readonly string[] };
  expect(outputs.name).toBe("web");
  expect(outputs.disks).toHaveLength(1);
  await project.mustRun("up", "--yes", "--skip-preview", "--expect-no-changes");
  await project.mustRun("destroy", "--yes", "--skip-preview");
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 120_000);
