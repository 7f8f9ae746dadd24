import { stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { openKvmHost, openLibvirtd } from "./libvirtd.ts";

test("has a pool and a network of its own, and none of the machine's domains", async () => {
  await using libvirtd = await openLibvirtd();
  expect(await libvirtd.virsh("list", "--all", "--name")).toBe("");
  expect(await libvirtd.virsh("pool-list", "--name")).toContain("default");
  expect(await libvirtd.virsh("net-list", "--inactive", "--name")).toContain("default");
  await libvirtd.virsh("vol-create-as", "default", "disk.raw", "1M", "--format", "raw");
  expect((await stat(join(libvirtd.poolPath, "disk.raw"))).size).toBe(1024 * 1024);
});

test("serves libvirt's test driver over the same socket", async () => {
  await using libvirtd = await openLibvirtd();
  const { stdout } = await runCommand(["virsh", "--connect", libvirtd.testUri, "list", "--name"]);
  expect(stdout.trim()).toBe("test");
});

test("comes back when its daemon is killed", async () => {
  await using libvirtd = await openLibvirtd();
  await libvirtd.killDaemon();
  expect(await libvirtd.virsh("pool-list", "--name")).toContain("default");
});

test("gives a pool that runs full", async () => {
  await using libvirtd = await openLibvirtd({ poolMiB: 4 });
  await expect(writeFile(join(libvirtd.poolPath, "big.raw"), Buffer.alloc(5 * 1024 * 1024))).rejects.toThrow("ENOSPC");
});

test("is a whole host that is reached by SSH only, loses its power and boots again", async () => {
  await using host = await openKvmHost({ name: "kvm7", network: true });
  await host.addUser("mover", { sudo: true });
  const ssh = async (user: string, command: string): Promise<string> => {
    const options = [
      "BatchMode=yes",
      "ConnectTimeout=3",
      `UserKnownHostsFile=${host.sshd.knownHostsFile}`,
      "GlobalKnownHostsFile=/dev/null",
    ];
    const argv = options.flatMap((option) => ["-o", option]);
    return (await runCommand(["ssh", "-F", "none", ...argv, "-i", host.sshd.clientKey.path, `${user}@${host.address}`, command])).stdout;
  };
  expect(await ssh("root", "hostname && virsh -q net-list --name")).toBe("kvm7\ndefault\n");
  expect(await ssh("mover", "id -un && sudo -n id -un")).toBe("mover\nroot\n");
  await host.virsh("vol-create-as", "default", "kept.raw", "1M", "--format", "raw");
  await host.cutPower();
  await expect(ssh("root", "true")).rejects.toThrow("exited 255");
  await host.boot();
  expect(await ssh("root", "virsh -q vol-list default")).toContain("kept.raw");
});
