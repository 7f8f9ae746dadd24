/** The rules under the real engine: what stops a preview, what is only said, and what the state keeps of a user's word. */
import { join } from "node:path";
import { expect, test } from "vitest";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";
import { qemuImg } from "../image/qemu.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { ImportedDisk } from "virtlift";
const config = new Config();
const args = { source: { file: config.require("file") }, preflight: config.getObject("preflight") };
for (const name of ["root", "spare"]) new ImportedDisk(name, args);
`;

test("a preview fails with all findings of the first resource that is blocked, goes on where they are waived, and the reason is in the state", async () => {
  await using pulumi = await openPulumi();
  await using libvirtd = await openLibvirtd();
  const file = join(libvirtd.directory, "plain.qcow2");
  await qemuImg("create", "-q", "-f", "qcow2", file, "1M");
  const stack = JSON.stringify({
    "virtlift/no-checksum": { level: "block", reason: "our policy" },
    "virtlift/empty-image": { level: "block", reason: "our policy" },
  });
  const config = { "virtlift:host": libvirtd.uri, "virtlift:preflight": stack, file };
  const project = await pulumi.openProject(PROGRAM, { config });
  const refused = await project.run("preview");
  expect(refused.exitCode).not.toBe(0);
  const told = [...refused.stdout.matchAll(/resource '(\w+)' has a problem: .*\((virtlift\/[a-z-]+)\)/g)];
  // The engine asks for no other resource once one has failed; which one is first, it does not promise.
  expect(new Set(told.map(([, name]) => name)).size).toBe(1);
  expect(new Set(told.map(([, , rule]) => rule))).toEqual(new Set(["virtlift/no-checksum", "virtlift/empty-image"]));

  const reason = "a template without content";
  await project.mustRun(
    "config",
    "set",
    "preflight",
    JSON.stringify({ "virtlift/no-checksum": { reason }, "virtlift/empty-image": { level: "warn", reason } }),
  );
  const preview = await project.mustRun("preview");
  expect(preview.stdout).toContain(`(virtlift/empty-image); no block: ${reason}`);
  expect(preview.stdout).toMatch(/plain\.qcow2 \(qcow2 v3, 1\.0 MiB virtual\) -> this machine:/);
  await project.mustRun("up", "--yes", "--skip-preview");
  expect(await pulumi.readState("program")).toContain(`"reason":"${reason}"`);
  // What changes from run to run is no input.
  await project.mustRun("up", "--yes", "--skip-preview", "--expect-no-changes");
  await project.mustRun("destroy", "--yes", "--skip-preview");
}, 120_000);
