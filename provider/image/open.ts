/** Tells the format of an image from its bytes, never from its name, and hands it to that format's parser. */
import { latin1, viewOf } from "./bytes.ts";
import type { DiskImage, ImageFormat } from "./image.ts";
import { ImageError, type Parser, readUpTo } from "./parser.ts";
import { parseQcow2, QCOW_MAGIC } from "./qcow2.ts";
import { rawImage } from "./raw.ts";
import { parseVdi, VDI_SIGNATURE, VDI_SIGNATURE_OFFSET } from "./vdi.ts";
import { parseVhd, VHD_COOKIE } from "./vhd.ts";
import { parseVhdx, VHDX_MAGIC } from "./vhdx.ts";
import { DESCRIPTOR_START } from "./vmdk-descriptor.ts";
import { COWD_MAGIC, parseVmdk, SPARSE_MAGIC } from "./vmdk.ts";

const SNIFF_BYTES = 512;
const TAR_MAGIC_OFFSET = 257;

/** What is no disk image, or one that is not read: how it begins, what it is, and what to do. */
const OTHERS: readonly { readonly start: string; readonly words: string }[] = [
  { start: "\x1f\x8b", words: "is compressed with gzip: decompress it first (gunzip)" },
  { start: "\xfd7zXZ\0", words: "is compressed with xz: decompress it first (unxz)" },
  { start: "\x28\xb5\x2f\xfd", words: "is compressed with zstd: decompress it first (zstd -d)" },
  { start: "BZh", words: "is compressed with bzip2: decompress it first (bunzip2)" },
  { start: "\x04\x22\x4d\x18", words: "is compressed with lz4: decompress it first (lz4 -d)" },
  { start: "PK\x03\x04", words: "is a zip archive: name the image inside after unpacking it" },
  { start: "7z\xbc\xaf\x27\x1c", words: "is a 7-Zip archive: name the image inside after unpacking it" },
  {
    start: "\xbe\xba\xfe\xca\0\0\0\0",
    words: "is a VMDK extent of type seSparse, a snapshot's format: consolidate the snapshots, or export the machine",
  },
  { start: "QED\0", words: "is a QED image, which is not read: convert it first (qemu-img convert -f qed)" },
  { start: "Bochs Virtual HD Image", words: "is a Bochs image, which is not read: convert it first (qemu-img convert -f bochs)" },
  { start: "WithoutFreeSpace", words: "is a Parallels image, which is not read: convert it first (qemu-img convert -f parallels)" },
  { start: "WithouFreSpacExt", words: "is a Parallels image, which is not read: convert it first (qemu-img convert -f parallels)" },
  { start: "VMA\0", words: "is a Proxmox backup, not a disk: extract it first (vma extract)" },
  { start: "MSWIM\0\0\0", words: "is a Windows imaging archive (WIM), not a disk" },
  { start: "<?xml", words: "is XML, not a disk: an OVF descriptor is imported as an OVA" },
];

/** How a macOS disk image ends: its trailer's magic. */
const DMG_MAGIC = "koly";

/**
 * Opens an image of `sizeBytes`. Without `format` its magic decides, and what has none is taken for raw. With `raw` no byte is looked at, so that
 * a guest which wrote a foreign header into its first sector gains nothing; any other format must be what the bytes say.
 *
 * Throws ImageError when the bytes are of another format than declared, or of a kind that is not read, and as the format's own parser does.
 */
export function* openImage(input: { readonly sizeBytes: number; readonly format?: ImageFormat }): Parser<DiskImage> {
  const { sizeBytes, format } = input;
  if (format === "raw") return rawImage(sizeBytes);
  const found = yield* sniff(sizeBytes);
  if (format !== undefined && format !== found) {
    const words = found === "raw" ? "they carry the magic of no known format" : `they are ${found}`;
    throw new ImageError(`the image is declared as ${format}, but its bytes are not: ${words}`);
  }
  switch (found) {
    case "raw":
      return rawImage(sizeBytes);
    case "qcow2":
      return yield* parseQcow2(sizeBytes);
    case "vmdk":
      return yield* parseVmdk(sizeBytes);
    case "vhd":
      return yield* parseVhd(sizeBytes);
    case "vhdx":
      return yield* parseVhdx(sizeBytes);
    case "vdi":
      return yield* parseVdi(sizeBytes);
  }
}

function* sniff(sizeBytes: number): Parser<ImageFormat> {
  const start = yield* readUpTo("", 0, SNIFF_BYTES);
  const text = latin1(start);
  if (text.startsWith(QCOW_MAGIC)) return "qcow2";
  if (text.startsWith(SPARSE_MAGIC) || text.startsWith(COWD_MAGIC) || text.toLowerCase().startsWith(DESCRIPTOR_START)) return "vmdk";
  if (text.startsWith(VHDX_MAGIC)) return "vhdx";
  if (text.startsWith(VHD_COOKIE)) return "vhd";
  if (start.length >= VDI_SIGNATURE_OFFSET + 4 && viewOf(start).getUint32(VDI_SIGNATURE_OFFSET, true) === VDI_SIGNATURE) return "vdi";
  const other = OTHERS.find((candidate) => text.startsWith(candidate.start));
  if (other !== undefined) throw new ImageError(`the file ${other.words}`);
  if (text.startsWith("ustar", TAR_MAGIC_OFFSET))
    throw new ImageError("the file is a tar archive: when it is an OVA, declare it as one (source: { ova })");
  if (sizeBytes < SNIFF_BYTES) return "raw";
  const end = latin1(yield* readUpTo("", sizeBytes - SNIFF_BYTES, SNIFF_BYTES));
  // A fixed VHD has nothing but its footer; Virtual PC before 2004 wrote one of 511 bytes.
  if (end.startsWith(VHD_COOKIE) || end.startsWith(VHD_COOKIE, 1)) return "vhd";
  if (end.startsWith(DMG_MAGIC))
    throw new ImageError("the file is a macOS disk image (DMG), which is not read: convert it first (qemu-img convert -f dmg)");
  return "raw";
}
