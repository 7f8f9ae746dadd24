/** The text that describes a VMDK: its kind and its extents. Source: VMware's Virtual Disk Format 5.0, "The Descriptor File". */
import { Buffer } from "node:buffer";
import { ImageError } from "./parser.ts";
import { quoted } from "./words.ts";

/** How every descriptor begins, in any case. */
export const DESCRIPTOR_START = "# disk descriptorfile";

/** A split disk of 62 TiB in files of 2 GiB needs as much. */
export const MAX_DESCRIPTOR_BYTES = 2 * 1024 * 1024;

const SECTOR_BYTES = 512;

/** The kinds that are read, and the extents that each may have. */
const EXTENT_TYPES = {
  monolithicSparse: ["SPARSE"],
  streamOptimized: ["SPARSE"],
  monolithicFlat: ["FLAT"],
  twoGbMaxExtentSparse: ["SPARSE"],
  twoGbMaxExtentFlat: ["FLAT"],
  vmfs: ["VMFS", "FLAT"],
  vmfsSparse: ["VMFSSPARSE"],
} as const;

export type CreateType = keyof typeof EXTENT_TYPES;
type ExtentType = (typeof EXTENT_TYPES)[CreateType][number];

/** An extent of the disk; its place in the guest's disk is behind those before it. */
export interface DescriptorExtent {
  readonly lengthBytes: number;
  readonly type: ExtentType;
  /** A plain basename. */
  readonly file: string;
  /** Where the extent's data begins in the file; 0 but for flat extents. */
  readonly fileOffset: number;
}

export interface Descriptor {
  readonly createType: CreateType;
  /** At least one. */
  readonly extents: readonly DescriptorExtent[];
}

/**
 * Parses a descriptor; what follows the first NUL is not looked at. Keys other than createType, parentCID and parentFileNameHint are ignored.
 *
 * Throws ImageError on a parent, a kind or an extent that is not read, an extent that is no plain basename (a path would be another file of this
 * machine), and on lines that mean nothing.
 */
export function parseDescriptor(bytes: Uint8Array): Descriptor {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8").split("\0", 1)[0]!;
  if (!text.toLowerCase().startsWith(DESCRIPTOR_START)) throw new ImageError("the VMDK's descriptor does not begin as one: it is damaged");
  const values = new Map<string, string>();
  const extentLines: string[] = [];
  for (const [index, rawLine] of text.split("\n").entries()) {
    const line = rawLine.trim();
    if (line === "" || line.startsWith("#")) continue;
    if (/^(RW|RDONLY|NOACCESS)\s/.test(line)) {
      extentLines.push(line);
      continue;
    }
    const [, key, value] = /^([\w.:-]+)\s*=\s*(.*)$/.exec(line) ?? [];
    if (key === undefined || value === undefined)
      throw new ImageError(`line ${index + 1} of the VMDK's descriptor means nothing: ${quoted(line)}`);
    if (values.has(key) && !key.startsWith("ddb.")) throw new ImageError(`the VMDK's descriptor has ${quoted(key)} twice`);
    values.set(key, unquoted(value));
  }
  refuseParent(values);
  const createType = parseCreateType(values.get("createType"));
  if (extentLines.length === 0) throw new ImageError("the VMDK's descriptor names no extent");
  return { createType, extents: extentLines.map((line) => parseExtent(line, createType)) };
}

function refuseParent(values: ReadonlyMap<string, string>): void {
  const parent = values.get("parentCID")?.toLowerCase() ?? "ffffffff";
  const hint = values.get("parentFileNameHint") ?? "";
  if (parent !== "ffffffff" || hint !== "") {
    throw new ImageError(
      "the VMDK is a delta on a parent disk, which holds part of its data: consolidate the snapshots, or export the machine",
    );
  }
}

function parseCreateType(value: string | undefined): CreateType {
  if (value === undefined) throw new ImageError("the VMDK's descriptor has no createType");
  if (value === "seSparse")
    throw new ImageError("the VMDK is of type seSparse, a snapshot's format: consolidate the snapshots, or export the machine");
  const known = Object.keys(EXTENT_TYPES) as readonly CreateType[];
  const createType = known.find((type) => type.toLowerCase() === value.toLowerCase());
  if (createType === undefined) throw new ImageError(`the VMDK is of type ${quoted(value)}, which is not read; ${known.join(", ")} are`);
  return createType;
}

function parseExtent(line: string, createType: CreateType): DescriptorExtent {
  const [, access, sectors, type, , file, offset] = /^(\w+)\s+(\d{1,15})\s+(\w+)(\s+"([^"]*)"(?:\s+(\d{1,15}))?)?$/.exec(line) ?? [];
  if (access === undefined || sectors === undefined || type === undefined)
    throw new ImageError(`the VMDK's extent line means nothing: ${quoted(line)}`);
  if (access === "NOACCESS") throw new ImageError(`the VMDK has an extent that must not be read: ${quoted(line)}`);
  const allowed: readonly ExtentType[] = EXTENT_TYPES[createType];
  const known = allowed.find((name) => name === type);
  if (known === undefined) throw new ImageError(`the VMDK's extent is of type ${quoted(type)}, which is not read in a ${createType} disk`);
  const lengthBytes = Number(sectors) * SECTOR_BYTES;
  const fileOffset = Number(offset ?? "0") * SECTOR_BYTES;
  if (lengthBytes === 0) throw new ImageError(`the VMDK has an extent of 0 sectors: ${quoted(line)}`);
  if (!Number.isSafeInteger(lengthBytes + fileOffset)) throw new ImageError(`the VMDK's extent is larger than any file: ${quoted(line)}`);
  if (file === undefined || !isPlainName(file)) {
    throw new ImageError(`the VMDK's extent names ${quoted(file ?? "no file")}; only a plain name of a file beside the descriptor is read`);
  }
  return { lengthBytes, type: known, file, fileOffset };
}

function isPlainName(name: string): boolean {
  // oxlint-disable-next-line no-control-regex -- a name with control characters is refused
  return name !== "" && name !== "." && name !== ".." && name.length <= 255 && !/[/\\\u0000-\u001f\u007f]/.test(name);
}

function unquoted(value: string): string {
  return value.length >= 2 && value.startsWith('"') && value.endsWith('"') ? value.slice(1, -1) : value;
}
