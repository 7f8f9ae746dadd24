/** VirtualMachine under the real engine, against a real libvirtd with emulated machines. */
import { readdir } from "node:fs/promises";
import { expect, test } from "vitest";
import { prepareGuest } from "../../scripts/guest/guest.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { ImportedDisk, VirtualMachine } from "virtlift";
const config = new Config();
const disk = new ImportedDisk("root", { source: { file: config.require("file") } });
const machine = new VirtualMachine("web", {
  importedDisk: disk,
  image: config.get("image"),
  memoryMiB: 256,
  domainType: "qemu",
  title: config.get("title"),
  networks: [{ type: "user" }],
  serialLog: config.get("serialLog"),
  // That the guest boots is seen once; later it is cut off before it could shut down.
  waitFor: config.get("title") ? [] : [{ type: "serial", text: "virtlift-guest done" }],
  shutdownTimeoutSeconds: config.get("title") ? 1 : 60,
});
export const { uuid, macAddresses, powerState } = machine;
`;

const NEITHER = `
import { VirtualMachine } from "virtlift";
new VirtualMachine("web", { vcpus: 1 });
`;

test("a machine lives through updates, a stop and an undefine by hand, and the end", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2", { stay: true, hash: false });
  const project = await pulumi.openProject(PROGRAM, {
    config: { "virtlift:host": libvirtd.uri, file: guest.path, serialLog: `${libvirtd.directory}/web.log` },
  });
  const up = async (...flags: readonly string[]) => (await project.mustRun("up", "--yes", "--skip-preview", ...flags)).stdout;
  const refresh = async () => (await project.mustRun("refresh", "--yes", "--skip-preview")).stdout;
  const state = async () => (await libvirtd.virsh("domstate", "web")).trim();

  const preview = (await project.mustRun("preview")).stdout;
  expect(preview).toMatch(/uuid\s*: "[0-9a-f-]{36}"/);
  expect(await libvirtd.virsh("list", "--all", "--name")).toBe("");
  await up();
  expect(await state()).toBe("running");
  await up("--expect-no-changes");

  await project.mustRun("config", "set", "title", "The web server");
  const titled = (await project.mustRun("preview", "--diff")).stdout;
  expect(titled).toMatch(/\+ title\s*: "The web server"/);
  expect(titled).not.toContain("importedDisk");
  expect(await up()).toContain("~ 1 updated");
  expect(await libvirtd.virsh("desc", "web", "--title")).toContain("The web server");

  await libvirtd.virsh("destroy", "web");
  expect(await refresh()).toContain("~ 1 updated");
  expect(await up()).toContain("~ 1 updated");
  expect(await state()).toBe("running");

  await libvirtd.virsh("destroy", "web");
  await libvirtd.virsh("undefine", "web", "--nvram");
  expect(await refresh()).toContain("- 1 deleted");
  expect(await up()).toContain("+ 1 created");
  expect(await state()).toBe("running");
  await up("--expect-no-changes");

  await project.mustRun("destroy", "--yes", "--skip-preview");
  expect(await libvirtd.virsh("list", "--all", "--name")).toBe("");
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
}, 240_000);

test("neither a disk nor an image, or both, is refused in preview with one sentence", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const guest = await prepareGuest("qcow2");
  const config = { "virtlift:host": libvirtd.uri, file: guest.path, image: "template.qcow2" };
  const project = await pulumi.openProject(PROGRAM, { config });
  const both = await project.run("preview");
  await project.write(NEITHER);
  const neither = await project.run("preview");
  for (const { exitCode, stdout } of [both, neither]) {
    expect(exitCode).not.toBe(0);
    expect(new Set(stdout.match(/'web' has a problem: .*/g)).size).toBe(1);
    expect(stdout).toMatch(/'web' has a problem: .*importedDisk.*image/);
  }
}, 60_000);
