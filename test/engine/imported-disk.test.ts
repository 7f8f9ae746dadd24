/** ImportedDisk under the real engine, against a real libvirtd. */
import { existsSync } from "node:fs";
import { readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { ImportedDisk } from "virtlift";
const config = new Config();
const disk = new ImportedDisk("root", {
  source: { file: config.require("file") },
  layout: config.get("layout"),
  migrationRef: config.get("migrationRef"),
});
export const { path, virtualSizeBytes, sourceDigest } = disk;
`;

test("a program run by the CLI imports a disk once, keeps it, and notices when it is gone", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("vmdk-stream");
  const project = await pulumi.openProject(PROGRAM, { config: { "virtlift:host": libvirtd.uri, file: guest.path } });
  const outputs = async () => JSON.parse((await project.mustRun("stack", "output", "--json")).stdout) as { path: string };
  const up = (...flags: readonly string[]) => project.mustRun("up", "--yes", "--skip-preview", ...flags);

  const preview = await project.mustRun("preview", "--diff");
  expect(preview.stdout).toMatch(/path\s*: ".*\/root-[0-9a-f]{8}\.qcow2"/);
  expect(await readdir(libvirtd.poolPath)).toEqual([]);

  await up();
  const { path } = await outputs();
  await runCommand(["qemu-img", "compare", "-f", "vmdk", "-F", "qcow2", guest.path, path]);
  expect((await libvirtd.virsh("vol-list", "default")).includes(path)).toBe(true);
  await up("--expect-no-changes");
  await project.mustRun("config", "set", "migrationRef", "wave-1/root");
  expect((await up()).stdout).toContain("~ 1 updated");

  await rm(path);
  expect((await project.mustRun("refresh", "--yes", "--skip-preview")).stdout).toContain("- 1 deleted");
  await up();
  expect(existsSync(path)).toBe(true);

  await project.mustRun("config", "set", "layout", "full");
  expect((await project.mustRun("preview")).stdout).toContain("+-1 to replace");
  await up();
  expect((await outputs()).path).not.toBe(path);
  expect(await readdir(libvirtd.poolPath)).toEqual([(await outputs()).path.slice(libvirtd.poolPath.length + 1)]);

  await project.mustRun("destroy", "--yes", "--skip-preview");
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 180_000);

test("what a disk must not be is refused in preview, in a sentence, and nothing is left on the host", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2");
  const image = join(libvirtd.directory, "overlay.qcow2");
  await runCommand(["qemu-img", "create", "-q", "-f", "qcow2", "-b", guest.path, "-F", "qcow2", image]);
  const project = await pulumi.openProject(PROGRAM, { config: { "virtlift:host": libvirtd.uri, file: image } });
  const preview = await project.run("preview");
  expect(preview.exitCode).not.toBe(0);
  expect(preview.stdout).toMatch(/ImportedDisk resource 'root' has a problem: source: .*backing file/);
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 60_000);
