/** Pools of a private libvirtd that are more than a folder: a file system of their own, and a disk whose volumes are its partitions. Need loop devices. */
import { stat } from "node:fs/promises";
import { basename, join } from "node:path";
import { runCommand } from "../../scripts/setup/command.ts";
import { openDirectory } from "./directory.ts";
import type { Libvirtd } from "./libvirtd.ts";

/** Gives the daemon a pool `fs` of that type on a loop device: it mounts that in its own name space, where commands outside of it do not see it. */
export async function openFsPool(bed: Libvirtd): Promise<AsyncDisposable & { readonly name: string }> {
  await using stack = new AsyncDisposableStack();
  const loop = stack.use(await openLoop());
  await runCommand(["mkfs.ext4", "-q", loop.path]);
  const { rdev } = await stat(loop.path);
  await bed.run("mknod", loop.path, "b", "7", String(rdev & 0xff));
  stack.defer(async () => void (await bed.run("rm", loop.path)));
  const target = join(bed.directory, "fs");
  await bed.virsh("pool-define-as", "fs", "fs", "--source-dev", loop.path, "--target", target);
  stack.defer(async () => void (await bed.virsh("pool-undefine", "fs")));
  await bed.virsh("pool-build", "fs");
  await bed.virsh("pool-start", "fs");
  stack.defer(async () => void (await bed.virsh("pool-destroy", "fs")));
  const held = stack.move();
  return { name: "fs", [Symbol.asyncDispose]: () => held.disposeAsync() };
}

/** Not a devtmpfs over /dev: that would bring KVM back, and what libvirt carries from /dev into a machine's name space would lie below it. */
const SHOW_DEVICES = `
set -e
mkdir -p /run/devices
mount -t devtmpfs devtmpfs /run/devices
for name in "$1" "$1p1" "$1p2" "$1p3"; do ln -s "/run/devices/$name" "/dev/$name"; done
`;
const HIDE_DEVICES = `
set -e
rm -f "/dev/$1" "/dev/$1p1" "/dev/$1p2" "/dev/$1p3"
umount /run/devices
`;

/** Gives the daemon a pool `disk` of that type on a loop device with an empty GPT, and the devices that the kernel makes. `device` is its name below /dev. */
export async function openDiskPool(bed: Libvirtd): Promise<AsyncDisposable & { readonly device: string }> {
  await using stack = new AsyncDisposableStack();
  const loop = stack.use(await openLoop());
  await bed.run("sh", "-c", SHOW_DEVICES, "show", basename(loop.path));
  stack.defer(async () => void (await bed.run("sh", "-c", HIDE_DEVICES, "hide", basename(loop.path))));
  await bed.virsh("pool-define-as", "disk", "disk", "--source-dev", loop.path, "--source-format", "gpt", "--target", "/dev");
  stack.defer(async () => void (await bed.virsh("pool-undefine", "disk")));
  await bed.virsh("pool-build", "disk", "--overwrite");
  await bed.virsh("pool-start", "disk");
  stack.defer(async () => void (await bed.virsh("pool-destroy", "disk")));
  const held = stack.move();
  return { device: loop.path.slice("/dev/".length), [Symbol.asyncDispose]: () => held.disposeAsync() };
}

async function openLoop() {
  const directory = await openDirectory("loop");
  const file = join(directory.path, "disk.img");
  await runCommand(["truncate", "-s", "128M", file]);
  const path = (await runCommand(["losetup", "--find", "--show", "--partscan", file])).stdout.trim();
  return {
    path,
    async [Symbol.asyncDispose]() {
      await runCommand(["losetup", "--detach", path]);
      await directory[Symbol.asyncDispose]();
    },
  };
}
