import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { join } from "node:path";
import { expect, test } from "vitest";
import { importDisk } from "../../provider/transfer/import.ts";
import { probe } from "../../provider/transfer/probe.ts";
import { openSource } from "../../provider/transfer/source.ts";
import { openDirectory } from "../bed/directory.ts";
import { mixedGuest, qemuImg, writeRaw } from "../image/qemu.ts";
import { createOwnHosts } from "../host/setup.ts";

/** Runs QEMU with the disk attached and lets it do, as its guest's device would, what the monitor commands say. */
async function runQemu(path: string, commands: readonly string[]): Promise<void> {
  const drive = `if=none,id=disk,format=qcow2,file=${path}`;
  const argv = [
    "-machine",
    "pc,accel=tcg",
    "-nodefaults",
    "-display",
    "none",
    "-S",
    "-drive",
    drive,
    "-device",
    "virtio-blk-pci,drive=disk",
  ];
  const qemu = spawn("qemu-system-x86_64", [...argv, "-qmp", "stdio"], { stdio: ["pipe", "pipe", "inherit"] });
  const ended = new Promise<number | null>((resolve) => qemu.once("exit", resolve));
  const say = (execute: string, more: object = {}): void => void qemu.stdin.write(`${JSON.stringify({ execute, ...more })}\n`);
  say("qmp_capabilities");
  for (const command of commands) say("human-monitor-command", { arguments: { "command-line": command } });
  say("quit");
  for await (const line of createInterface({ input: qemu.stdout })) expect(line).not.toMatch(/"error"|[Ee]rror:|failed/);
  expect(await ended).toBe(0);
}

test("a qcow2's stamp survives what is done to the disk: resize, amend, snapshots, a running QEMU that writes and grows it", async () => {
  await using directory = await openDirectory("stamp");
  const hosts = createOwnHosts();
  const host = hosts.open({ uri: "qemu:///system" });
  const finalPath = join(directory.path, "disk.qcow2");
  const stamp = { importId: "import", origin: "organization/project/stack/web", migrationRef: "wave-3/web" };
  await using source = await openSource({ file: await writeRaw(join(directory.path, "disk.raw"), mixedGuest()) });
  const { sourceDigest, contentDigest } = await importDisk(host, source, {
    id: "import",
    finalPath,
    format: "qcow2",
    layout: "sparse",
    capacityBytes: source.image.virtualSizeBytes,
    stamp,
    signal: new AbortController().signal,
    onProgress: () => {},
  });
  const expectStamp = async (untouched: boolean): Promise<void> => {
    const { file } = await probe(host, finalPath, "import");
    expect(file).toMatchObject({ stamp: { ...stamp, sourceDigest, contentDigest }, untouched });
    await qemuImg("check", "-f", "qcow2", finalPath);
  };
  await expectStamp(true);
  for (const change of [
    ["resize", "-f", "qcow2", finalPath, "1G"],
    ["snapshot", "-c", "before", finalPath],
    ["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", finalPath],
  ]) {
    await qemuImg(...change);
    await expectStamp(false);
  }
  await runQemu(finalPath, ['qemu-io disk "write -P 7 30M 20M"', 'qemu-io disk "flush"', "block_resize disk 2G", "savevm during"]);
  await expectStamp(false);
  await qemuImg("snapshot", "-d", "before", finalPath);
  await expectStamp(false);
  expect(JSON.parse(await qemuImg("info", "--output=json", "-f", "qcow2", finalPath))).toMatchObject({ "virtual-size": 2 * 1024 ** 3 });
  await hosts.close();
});
