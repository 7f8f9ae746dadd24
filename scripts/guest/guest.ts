/**
 * The proof guest: a small disk that boots by BIOS and by UEFI, on virtio, SATA, IDE and SCSI, and says on its serial console what it runs on
 * and the SHA-256 of its own disk. It is made once and kept in the user's cache; nothing is mounted and nothing is run as root.
 */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdtemp, open, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { cachePath, fillOnce } from "../setup/cache.ts";
import { runCommand } from "../setup/command.ts";
import { encodeInitramfs } from "./initramfs.ts";
import { downloadGuestParts } from "./packages.ts";

const SECTOR_BYTES = 512;
const MIB = 1024 * 1024;
const PARTITION_START_SECTOR = 2048;
/** EFI system partition. Firmware of both kinds reads it: BIOS boot code asks for the active flag only. */
const PARTITION_TYPE_EFI_SYSTEM = 0xef;
const PARTITION_ACTIVE = 0x80;
/** Cylinder, head and sector of a partition beyond what they can say: readers then use the sector numbers. */
const CHS_OVERFLOW = [0xfe, 0xff, 0xff];
const BOOT_CODE_BYTES = 440;
const SYSLINUX_BOOT_CODE = "/usr/lib/syslinux/mbr/mbr.bin";

/** What a machine of ours may offer as disk, network and power button. Names as in the kernel's tree, with `_` for `-`. */
const DRIVERS = [
  "virtio_pci",
  "virtio_blk",
  "virtio_scsi",
  "virtio_net",
  "ahci",
  "ata_piix",
  "sd_mod",
  "e1000",
  "e1000e",
  "button",
  "evdev",
  "virtio_balloon",
  "virtio_console",
  "sr_mod",
  "isofs",
];

const DRIVE_FORMATS = {
  raw: [],
  qcow2: ["-O", "qcow2"],
  vmdk: ["-O", "vmdk", "-o", "subformat=monolithicSparse"],
  "vmdk-stream": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
} as const;

/** `vmdk` is monolithicSparse, `vmdk-stream` is streamOptimized, both as qemu-img writes them. */
export type GuestFormat = keyof typeof DRIVE_FORMATS;

export interface GuestOptions {
  /** Default 64. At least 32. */
  readonly sizeMiB?: number;
  /**
   * What the guest does when it has told all: power off (default), or stay. A guest that stays asks for an address by DHCP on each interface,
   * tells of interfaces and disks that appear later or go, of their links and sizes, of CPUs, memory and the seed in its CD-ROM drive, whenever these
   * change, and powers off when the power button (ACPI) is pressed.
   */
  readonly stay?: boolean;
  /**
   * Of a guest that stays: whether it answers as QEMU's guest agent would to a ping, for its name, which is `proof`, and for its addresses, one of which
   * is 2001:db8::77. Default false.
   */
  readonly agent?: boolean;
  /** Whether it tells the SHA-256 of each disk up to 256 MiB. Default true; costs about 0.1 s a MiB where the CPU is emulated. */
  readonly hash?: boolean;
}

export interface GuestImage {
  /** In the cache, shared by all: copy it before a machine runs on it. */
  readonly path: string;
  readonly format: GuestFormat;
  readonly virtualSizeBytes: number;
  /** Hexadecimal SHA-256 of the guest's disk as the guest reads it, and of the raw file; the same for every format. */
  readonly contentSha256: string;
}

/**
 * The guest's disk in one format, made on the first call and taken from the cache later.
 * Needs apt-get, dpkg-deb, mkfs.vfat, mcopy, mmd, syslinux and qemu-img. Throws CommandError with the words of the one that failed.
 */
export async function prepareGuest(format: GuestFormat = "raw", options: GuestOptions = {}): Promise<GuestImage> {
  const sizeMiB = options.sizeMiB ?? 64;
  const parts = await prepareParts();
  const flags = [
    options.stay === true ? "virtlift.stay" : [],
    options.agent === true ? "virtlift.agent" : [],
    options.hash === false ? [] : "virtlift.hash",
  ].flat();
  const directory = join(parts, ["disk", String(sizeMiB), ...flags].join("-"));
  const raw = join(directory, "disk.raw");
  await fillOnce(directory, async (temporary) => {
    await writeDisk(join(temporary, "disk.raw"), { parts, sizeBytes: sizeMiB * MIB, flags });
    await writeFile(join(temporary, "sha256"), await hashFile(join(temporary, "disk.raw")));
  });
  const contentSha256 = await readFile(join(directory, "sha256"), "utf8");
  const image = { format, virtualSizeBytes: sizeMiB * MIB, contentSha256 };
  if (format === "raw") return { ...image, path: raw };
  const converted = join(directory, format);
  const name = `disk.${format === "qcow2" ? "qcow2" : "vmdk"}`;
  await fillOnce(converted, async (temporary) => {
    await runCommand(["qemu-img", "convert", "-f", "raw", ...DRIVE_FORMATS[format], raw, join(temporary, name)]);
  });
  return { ...image, path: join(converted, name) };
}

/** Path of the guest's kernel, for a trial without a disk. */
export async function prepareGuestKernel(): Promise<string> {
  return join(await prepareParts(), "vmlinuz");
}

/** Hexadecimal SHA-256 of a file, read as a stream. */
export async function hashFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  await pipeline(createReadStream(path), hash);
  return hash.digest("hex");
}

/** The folder with kernel, initramfs and boot loader, made once for each version of this recipe. */
async function prepareParts(): Promise<string> {
  const sources = ["guest.ts", "packages.ts", "initramfs.ts", "init.sh", "dhcp.sh"].map((name) =>
    readFile(join(import.meta.dirname, name)),
  );
  const recipe = createHash("sha256");
  for (const source of await Promise.all(sources)) recipe.update(source);
  const directory = cachePath("guest", recipe.digest("hex").slice(0, 16));
  await fillOnce(directory, async (temporary) => {
    const downloads = await mkdtemp(join(tmpdir(), "virtlift-guest-"));
    try {
      const { kernel, busybox, bootLoader } = await downloadGuestParts(downloads, DRIVERS);
      const initramfs = encodeInitramfs([
        { path: "init", content: await readFile(join(import.meta.dirname, "init.sh")), mode: 0o755 },
        { path: "dhcp", content: await readFile(join(import.meta.dirname, "dhcp.sh")), mode: 0o755 },
        { path: "bin/busybox", content: busybox, mode: 0o755 },
        ...kernel.modules.map((module) => ({ path: `modules/${module.name}`, content: module.content })),
        { path: "modules/order", content: kernel.modules.map((module) => `${module.name}\n`).join("") },
      ]);
      await writeFile(join(temporary, "vmlinuz"), kernel.image);
      await writeFile(join(temporary, "initrd.gz"), initramfs);
      await writeFile(join(temporary, "bootx64.efi"), bootLoader);
    } finally {
      await rm(downloads, { recursive: true, force: true });
    }
  });
  return directory;
}

/** One FAT partition with a boot loader for each firmware, the kernel and the initramfs. */
async function writeDisk(
  path: string,
  guest: { readonly parts: string; readonly sizeBytes: number; readonly flags: readonly string[] },
): Promise<void> {
  const sectors = guest.sizeBytes / SECTOR_BYTES - PARTITION_START_SECTOR;
  const offsetBytes = PARTITION_START_SECTOR * SECTOR_BYTES;
  const commandLine = ["console=ttyS0", "quiet", ...guest.flags].join(" ");
  const file = await open(path, "w");
  try {
    await file.truncate(guest.sizeBytes);
    await file.write(await encodeMasterBootRecord(sectors), 0, SECTOR_BYTES, 0);
  } finally {
    await file.close();
  }

  await runCommand([
    "mkfs.vfat",
    "--invariant",
    "-n",
    "VIRTLIFT",
    "--offset",
    String(PARTITION_START_SECTOR),
    path,
    String((sectors * SECTOR_BYTES) / 1024),
  ]);
  const volume = `${path}@@${offsetBytes}`;
  const put = async (name: string, source: string | Uint8Array): Promise<void> => {
    if (typeof source === "string") await runCommand(["mcopy", "-i", volume, source, `::${name}`]);
    else await runCommand(["mcopy", "-i", volume, "-", `::${name}`], { input: source });
  };
  await put("/vmlinuz", join(guest.parts, "vmlinuz"));
  await put("/initrd.gz", join(guest.parts, "initrd.gz"));
  await put("/syslinux.cfg", Buffer.from(`DEFAULT virtlift\nLABEL virtlift\nKERNEL /vmlinuz\nINITRD /initrd.gz\nAPPEND ${commandLine}\n`));
  await runCommand(["mmd", "-i", volume, "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"]);
  await put("/EFI/BOOT/BOOTX64.EFI", join(guest.parts, "bootx64.efi"));
  await put("/loader/loader.conf", Buffer.from("default virtlift.conf\ntimeout 0\n"));
  await put("/loader/entries/virtlift.conf", Buffer.from(`title virtlift\nlinux /vmlinuz\ninitrd /initrd.gz\noptions ${commandLine}\n`));
  await runCommand(["syslinux", "--install", "--offset", String(offsetBytes), path]);
}

/** Boot code of syslinux and one active partition. Source of the layout: UEFI Specification 2.10, 5.2.1 Legacy Master Boot Record. */
async function encodeMasterBootRecord(sectors: number): Promise<Buffer> {
  const record = Buffer.alloc(SECTOR_BYTES);
  (await readFile(SYSLINUX_BOOT_CODE)).copy(record, 0, 0, BOOT_CODE_BYTES);
  record.set([PARTITION_ACTIVE, ...CHS_OVERFLOW, PARTITION_TYPE_EFI_SYSTEM, ...CHS_OVERFLOW], 446);
  record.writeUInt32LE(PARTITION_START_SECTOR, 454);
  record.writeUInt32LE(sectors, 458);
  record.writeUInt16BE(0x55aa, 510);
  return record;
}
