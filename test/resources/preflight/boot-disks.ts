/** Small disks that one kind of firmware starts, partitioned by the tools that installers use. Need loop devices for sectors of 4096 bytes. */
import { open } from "node:fs/promises";
import { prepareGuest } from "../../../scripts/guest/guest.ts";
import { runCommand } from "../../../scripts/setup/command.ts";

const MIB = 1024 * 1024;

/** What the disk of `writeBiosDisk` says on the first serial port when BIOS runs it. */
export const BIOS_WORDS = "BIOS runs the boot code";

/** Real mode code at 0x7c00 that sends what follows it, up to a zero, to the first serial port, and halts. */
const BOOT_CODE = Buffer.from("31c08ed8be157cbaf803ac84c07403eeebf8f4ebfd", "hex");

/** Writes a GPT with the proof guest's EFI system partition and no boot code, as UEFI installers do: of sectors of 512 or of 4096 bytes. Gives the path back. */
export async function writeEfiDisk(path: string, sectorBytes: 512 | 4096): Promise<string> {
  const guest = await prepareGuest("raw", { hash: false });
  const partitionBytes = guest.virtualSizeBytes - MIB;
  await runCommand(["truncate", "--size", String(partitionBytes + 2 * MIB), path]);
  const copy = ["dd", `if=${guest.path}`, `of=${path}`, "bs=1M", "skip=1", "seek=1", "conv=notrunc,sparse", "status=none"] as const;
  await runCommand(copy);
  const loop = (await runCommand(["losetup", "--find", "--show", "--sector-size", String(sectorBytes), path])).stdout.trim();
  try {
    const partition = `start=${MIB / sectorBytes}, size=${partitionBytes / sectorBytes}, type=U`;
    await runCommand(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", loop], { input: `label: gpt\n${partition}\n` });
  } finally {
    await runCommand(["losetup", "--detach", loop]);
  }
  return path;
}

/** Writes an MBR with boot code and one Linux partition, which holds nothing. Gives the path back. */
export async function writeBiosDisk(path: string): Promise<string> {
  await runCommand(["truncate", "--size", String(2 * MIB), path]);
  await runCommand(["sfdisk", "--quiet", path], { input: "label: dos\nstart=2048, type=83, bootable\n" });
  const file = await open(path, "r+");
  try {
    await file.write(Buffer.concat([BOOT_CODE, Buffer.from(`${BIOS_WORDS}\r\n\0`)]), 0, undefined, 0);
  } finally {
    await file.close();
  }
  return path;
}
