/** A batch against a real libvirtd; its machines are only defined. */
import { mkdir, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { vmxSeed } from "../image/seeds.ts";
import { sparseVmdkSeed } from "../image/sparse-seeds.ts";
import type { BatchReport } from "../../sdk/batch/report.ts";
import { openBatchBed } from "./bed.ts";

/** Hooks that say when they ran, and about what. */
const hooksOf = (what: string): object =>
  Object.fromEntries(["before", "after"].map((when) => [when, ["sh", "-c", `echo "${when} ${what}" >> hooks.log`]]));

test("moves machines in waves, has nothing to do the second time though the source is gone, and removes them all", async () => {
  await using libvirtd = await openLibvirtd();
  await using bed = await openBatchBed();
  const { path } = await prepareGuestOva();
  const sources = join(bed.directory, "sources");
  await mkdir(sources);
  await symlink(path, join(sources, "web.ova"));
  await runCommand(["tar", "--extract", `--file=${path}`, `--directory=${sources}`]);
  const descriptor = (await readdir(sources)).find((name) => name.endsWith(".ovf")) ?? "";
  await writeFile(join(sources, "cache.vmx"), vmxSeed());
  await writeFile(join(sources, "a.vmdk"), sparseVmdkSeed());
  const defaults = { host: "here", networks: { "*": { type: "user" } }, machine: { powerState: "stopped", domainType: "qemu" } };
  const manifest = (web: object) => ({
    project: "move",
    hosts: { here: libvirtd.uri },
    defaults: { ...defaults, hooks: hooksOf("machine $VIRTLIFT_MACHINE") },
    limits: { perSource: 1 },
    waves: { 1: { hooks: hooksOf("wave $VIRTLIFT_WAVE") }, 2: { hooks: hooksOf("wave $VIRTLIFT_WAVE") } },
    machines: {
      web: { source: { ova: "sources/web.ova" }, wave: 2, dependsOn: ["db"], ...web },
      db: { source: { ova: `sources/${descriptor}` } },
      cache: { source: { vmx: "sources/cache.vmx" }, disks: { "0": { preflight: { "virtlift/no-checksum": { reason: "made here" } } } } },
    },
  });
  bed.write(manifest({}));

  const moved = await bed.cli("up");
  expect(moved).toMatchObject({ code: 0, stdout: expect.stringMatching(/^3 done$/m) as string });
  expect(moved.stdout).toContain("all machines may start");
  expect(moved.stdout).toMatch(/^warn +cache: .* the boot entries of the package's machine do not come along/m);
  expect(moved.stderr.indexOf("cache: done")).toBeLessThan(moved.stderr.indexOf("wave 2: up web"));
  expect((await libvirtd.virsh("list", "--all", "--name")).trim().split("\n").toSorted()).toEqual(["cache", "db", "web"]);

  const hooks = (await readFile(join(bed.directory, "hooks.log"), "utf8")).trim().split("\n");
  // One at a time, as all come from one folder.
  expect(hooks).toEqual([
    "before wave 1",
    "before machine db",
    "after machine db",
    "before machine cache",
    "after machine cache",
    "after wave 1",
    "before wave 2",
    "before machine web",
    "after machine web",
    "after wave 2",
  ]);
  const report = JSON.parse((await bed.cli("report", "--json")).stdout) as BatchReport;
  expect(report.machines.find(({ name }) => name === "cache")?.findings).toContainEqual({
    level: "info",
    text: expect.stringContaining("(virtlift/no-checksum)") as string,
    waiver: "made here",
  });
  expect(await libvirtd.virsh("dumpxml", "cache")).toMatch(
    /topology sockets='2' dies='1' cores='2'[\s\S]*device='cdrom'[\s\S]*00:0c:29:aa:bb:cc/,
  );

  // Once imported, the source is history.
  await rm(sources, { recursive: true });
  await libvirtd.virsh("undefine", "--nvram", "cache");
  expect(await bed.cli("refresh", "--only", "cache")).toMatchObject({
    code: 0,
    stdout: "1 done\n",
    stderr: expect.stringContaining("cache: the machine is gone from its host") as string,
  });
  bed.write(manifest({ machine: { memoryMiB: 640, description: "new words" } }));
  const again = await bed.cli("plan");
  expect(again.stdout.match(/ same /g)).toHaveLength(1);
  expect(again.stdout).toMatch(/^cache .* update /m);
  expect(again.stdout).toMatch(/^info +cache: the machine is gone from its host, and is made again$/m);
  expect(again.stdout).toMatch(/^web .* update /m);
  expect(again.stdout).toMatch(/^update {2}web: description, memoryMiB$/m);
  expect(again.stdout).toContain("nothing is to be copied");
  expect((await bed.cli("status")).stdout.match(/ done /g)).toHaveLength(3);

  expect(await bed.cli("destroy")).toEqual({ code: 2, stdout: "", stderr: "nothing was destroyed: give --yes\n" });
  expect(await bed.cli("destroy", "--yes", "--wave", "7")).toMatchObject({
    code: 2,
    stderr: expect.stringContaining("no machine of the manifest is wave 7: it has web (wave 2, state done)") as string,
  });
  expect(await bed.cli("report", "--output", "none/report.html")).toMatchObject({
    code: 2,
    stderr: expect.stringContaining(`there is no folder ${bed.directory}/none`) as string,
  });
  const destroyed = await bed.cli("destroy", "--yes");
  expect(destroyed).toMatchObject({ code: 0, stdout: "3 destroyed\n" });
  expect(destroyed.stderr.match(/^web: removing$/gm)).toHaveLength(1);
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
  expect((await libvirtd.virsh("list", "--all", "--name")).trim()).toBe("");
}, 180_000);

test("finds what machines claim together, starts nothing then, and binds an update to its saved plan", async () => {
  await using libvirtd = await openLibvirtd();
  await using bed = await openBatchBed();
  const { path: ova } = await prepareGuestOva();
  const manifest = (db: object, cache: object) => ({
    project: "shared",
    retry: { attempts: 1 },
    defaults: { host: libvirtd.uri, networks: { "*": { type: "user" } }, machine: { powerState: "stopped", domainType: "qemu" } },
    machines: { db: { source: { ova }, ...db }, cache: { source: { ova }, ...cache } },
  });

  bed.write(manifest({ name: "same" }, { name: "same" }));
  {
    await using batch = await bed.openBatch();
    const { plan, machines, isComplete } = await batch.up();
    expect(plan?.machines.map(({ action }) => action)).toEqual(["blocked", "blocked"]);
    expect(plan?.machines[0]?.findings).toContainEqual({
      level: "block",
      text: `the name same on ${libvirtd.uri} is claimed by cache of this batch too: give one of them another`,
    });
    expect(machines.map(({ state }) => state)).toEqual(["skipped", "skipped"]);
    expect(isComplete).toBe(false);
  }

  bed.write(manifest({}, { source: { ova: "gone.ova" } }));
  {
    await using batch = await bed.openBatch();
    const { isClear, machines } = await batch.plan({}, { save: true });
    expect(isClear).toBe(false);
    expect(machines.map(({ action }) => action)).toEqual(["create", "blocked"]);
    expect(await readdir(libvirtd.poolPath)).toEqual([]);
    expect(machines[1]?.findings.map(({ text }) => text)).toEqual([`there is no file ${bed.directory}/gone.ova`]);
  }

  bed.write(manifest({ machine: { memoryMiB: 512 } }, {}));
  {
    await using batch = await bed.openBatch();
    const { machines } = await batch.up({ names: ["db"] }, { usePlans: true });
    expect(machines).toEqual([{ machine: "db", state: "failed", reasons: [expect.stringContaining("violates plan") as string] }]);
  }
  // Its disk is as planned; the machine is not, and is not made.
  expect((await libvirtd.virsh("list", "--all", "--name")).trim()).toBe("");

  bed.write(manifest({}, {}));
  await using batch = await bed.openBatch();
  expect((await batch.up({ names: ["db"] }, { usePlans: true })).machines).toMatchObject([{ state: "done", reasons: [] }]);
  expect((await batch.up({ names: ["db"] })).machines).toEqual([{ machine: "db", state: "done", reasons: ["unchanged"] }]);
}, 180_000);
