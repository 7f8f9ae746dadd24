/** A changed declaration makes a new disk beside the old one, moves the machine over, and only then lets the old one go. */
import { readdir } from "node:fs/promises";
import { basename } from "node:path";
import { expect, test } from "vitest";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { ImportedDisk, VirtualMachine } from "virtlift";
const config = new Config();
const disk = new ImportedDisk("root", {
  source: { file: config.require("file") },
  layout: config.get("layout"),
  replaceWritten: config.getBoolean("replaceWritten"),
});
const machine = new VirtualMachine("web", {
  importedDisk: disk,
  memoryMiB: 256,
  domainType: "qemu",
  networks: [],
  waitFor: [{ type: "serial", text: "virtlift-guest done" }],
  onRestartRequired: config.get("onRestartRequired"),
  serialLog: config.require("serialLog"),
});
export const { path } = disk;
export const { uuid } = machine;
`;

test("a running machine is moved to its new disk with consent, keeps its UUID, and the old disk goes last", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2", { stay: true, hash: false });
  const project = await pulumi.openProject(PROGRAM, {
    config: { "virtlift:host": libvirtd.uri, file: guest.path, serialLog: `${libvirtd.directory}/web.log` },
  });
  const up = async () => (await project.mustRun("up", "--yes", "--skip-preview")).stdout;
  const outputs = async () => JSON.parse((await project.mustRun("stack", "output", "--json")).stdout) as { path: string; uuid: string };
  await up();
  const before = await outputs();

  await project.mustRun("config", "set-all", "--plaintext", "layout=full", "--plaintext", "replaceWritten=true");
  const refused = await project.run("preview");
  expect(refused.exitCode).not.toBe(0);
  expect(refused.stdout).toMatch(/'web' has a problem: importedDisk: web is running, .*onRestartRequired/);

  await project.mustRun("config", "set", "onRestartRequired", "restart");
  const moved = await up();
  expect(moved).toContain("+-1 replaced");
  expect(moved).toContain("~ 1 updated");
  const after = await outputs();
  expect(after.path).not.toBe(before.path);
  expect(after.uuid).toBe(before.uuid);
  expect(await readdir(libvirtd.poolPath)).toEqual([basename(after.path)]);
  expect(await libvirtd.virsh("domblklist", "web")).toContain(after.path);
  expect((await libvirtd.virsh("domstate", "web")).trim()).toBe("running");
}, 240_000);
