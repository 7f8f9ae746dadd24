/** A batch against a real libvirtd; its machines are only defined. */
import { readdir } from "node:fs/promises";
import { expect, test } from "vitest";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openBatchBed } from "./bed.ts";

test("moves machines in waves, has nothing to do the second time, and removes them all", async () => {
  await using libvirtd = await openLibvirtd();
  await using bed = await openBatchBed();
  const { path: ova } = await prepareGuestOva();
  const defaults = { host: "here", networks: { "*": { type: "user" } }, machine: { powerState: "stopped", domainType: "qemu" } };
  bed.write({
    project: "move",
    hosts: { here: libvirtd.uri },
    defaults,
    machines: { web: { source: { ova }, wave: 2, dependsOn: ["db"] }, db: { source: { ova } }, cache: { source: { ova } } },
  });

  const planned = await bed.cli("plan");
  expect(planned).toMatchObject({ code: 0, stdout: expect.stringContaining("all machines may start") as string });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);

  const moved = await bed.cli("up");
  expect(moved).toMatchObject({ code: 0, stdout: "3 done\n" });
  expect(moved.stderr.indexOf("cache: done")).toBeLessThan(moved.stderr.indexOf("wave 2: up web"));
  expect((await libvirtd.virsh("list", "--all", "--name")).trim().split("\n").toSorted()).toEqual(["cache", "db", "web"]);

  const again = await bed.cli("plan");
  expect(again.stdout.match(/ same /g)).toHaveLength(3);
  expect(again.stdout).toContain("nothing is to be copied");
  expect((await bed.cli("status")).stdout.match(/ done /g)).toHaveLength(3);

  expect(await bed.cli("destroy", "--yes")).toMatchObject({ code: 0, stdout: "3 destroyed\n" });
  expect(await readdir(libvirtd.poolPath)).toEqual([]);
  expect((await libvirtd.virsh("list", "--all", "--name")).trim()).toBe("");
}, 180_000);
