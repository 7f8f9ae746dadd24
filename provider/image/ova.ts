/** A machine in an OVF package: an OVA, which is a tar archive, or a bare descriptor with its files beside it. Finds the disks; does not read them. */
import { createHash } from "node:crypto";
import { type Digest, type Manifest, MAX_MANIFEST_BYTES, parseManifest } from "./manifest.ts";
import { type OvfDisk, type OvfSystem, parseOvf } from "./ovf.ts";
import { ImageError, type Parser, readExactly, sizeOf } from "./parser.ts";
import { parseTar, type TarMember } from "./tar.ts";
import { quoted } from "./words.ts";
import { decodeText, MAX_XML_BYTES } from "./xml.ts";

/** A stretch of bytes: of the OVA itself (`file` is ""), or of a file beside the descriptor (a plain basename, from offset 0 to its end). */
export interface PackagedFile {
  readonly name: string;
  readonly file: string;
  readonly offset: number;
  readonly sizeBytes: number;
}

/** A disk of the machine and where its bytes lie; without a place it is blank, and only has a capacity. */
export interface PackagedDisk extends OvfDisk {
  /** The position in hardware order, from 0: what `selectDisk` takes as a number. */
  readonly index: number;
  readonly place: PackagedFile | undefined;
  /** What the manifest says about the file; undefined when it says nothing or there is none. */
  readonly digest: Digest | undefined;
}

export interface OvfPackage {
  readonly system: OvfSystem;
  readonly disks: readonly PackagedDisk[];
  /** The descriptor has been compared with it; the disks have not. */
  readonly manifest: Manifest | undefined;
  /** A signature of the manifest is there. It has not been verified. */
  readonly hasCertificate: boolean;
  /** What the user should know, one sentence each, those of the system included. */
  readonly notes: readonly string[];
}

/** What `openOva` and `openOvf` may be told. `system` names one of several machines in the descriptor, by name or id. */
export interface PackageOptions {
  readonly system?: string | undefined;
}

/** Finds a file of the package by its name: in the archive, or beside the descriptor. */
type Locate = (name: string) => Parser<PackagedFile | undefined>;

/**
 * Opens an OVA of `sizeBytes`. The files are those in the descriptor's own folder of the archive.
 *
 * Throws ImageError when it is no tar archive or holds not exactly one descriptor; when the descriptor does not match the manifest or is missing from
 * it; and when a disk's file is missing, of another size than declared, in pieces, or a delta of another disk.
 */
export function* openOva(sizeBytes: number, options: PackageOptions = {}): Parser<OvfPackage> {
  const members = yield* parseTar(sizeBytes);
  const descriptors = members.filter(({ name }) => name.toLowerCase().endsWith(".ovf"));
  const [descriptor] = descriptors;
  if (descriptor === undefined) throw new ImageError("the OVA holds no OVF descriptor (a file named *.ovf)");
  if (descriptors.length > 1)
    throw new ImageError(
      `the OVA holds ${descriptors.length} OVF descriptors (${listed(descriptors.map(({ name }) => name))}); one is expected`,
    );
  const folder = folderOf(descriptor.name);
  const files = new Map<string, TarMember>();
  for (const member of members) {
    const name = baseOf(member.name);
    if (folderOf(member.name) !== folder) continue;
    if (files.has(name)) throw new ImageError(`the OVA holds two files named ${quoted(name)}: it is damaged or crafted`);
    files.set(name, member);
  }
  // oxlint-disable-next-line require-yield -- an archive's members are known already
  function* locate(name: string): Parser<PackagedFile | undefined> {
    const member = files.get(name);
    return member === undefined ? undefined : { name, file: "", offset: member.offset, sizeBytes: member.sizeBytes };
  }
  return yield* openPackage(
    { name: baseOf(descriptor.name), file: "", offset: descriptor.offset, sizeBytes: descriptor.sizeBytes },
    locate,
    options,
  );
}

/**
 * Opens the descriptor of `sizeBytes` that the parser's file "" is; `name` is its own basename (`web.ovf`), by which its manifest is found.
 *
 * Throws ImageError as `openOva` does, and when the descriptor refers to a file by a path or a URL.
 */
export function* openOvf(name: string, sizeBytes: number, options: PackageOptions = {}): Parser<OvfPackage> {
  function* locate(file: string): Parser<PackagedFile | undefined> {
    const found = yield* sizeOf(file);
    return found === undefined ? undefined : { name: file, file, offset: 0, sizeBytes: found };
  }
  return yield* openPackage({ name, file: "", offset: 0, sizeBytes }, locate, options);
}

/**
 * The disk that a user means: by its index in hardware order, or by its file's name, its id or its name in the descriptor. Without a choice, the only one that has a file.
 *
 * Throws ImageError listing the disks when there is no such disk or more than one, or when the one that is meant is blank.
 */
export function selectDisk(
  disks: readonly PackagedDisk[],
  wanted: number | string | undefined,
): PackagedDisk & { readonly place: PackagedFile } {
  const candidates = disks.filter((disk) => {
    if (wanted === undefined) return disk.place !== undefined;
    return typeof wanted === "number" ? disk.index === wanted : [disk.place?.name, disk.id, disk.name].includes(wanted);
  });
  const offer =
    disks.map(({ index, place, name }) => `${index}: ${place === undefined ? `${quoted(name)} (blank)` : quoted(place.name)}`).join(", ") ||
    "none";
  const [disk] = candidates;
  if (disk === undefined)
    throw new ImageError(
      wanted === undefined
        ? `the machine has no disk with a file (its disks: ${offer})`
        : `the machine has no disk ${quoted(`${wanted}`)} (its disks: ${offer})`,
    );
  if (candidates.length > 1)
    throw new ImageError(
      wanted === undefined
        ? `the machine has ${candidates.length} disks: say which one is meant (${offer})`
        : `several disks are named ${quoted(`${wanted}`)}: say which one by its number (${offer})`,
    );
  const { place } = disk;
  if (place === undefined)
    throw new ImageError(`disk ${disk.index} of the machine, ${quoted(disk.name)}, is blank: there is nothing to import`);
  return { ...disk, place };
}

function* openPackage(descriptor: PackagedFile, locate: Locate, options: PackageOptions): Parser<OvfPackage> {
  if (descriptor.sizeBytes > MAX_XML_BYTES)
    throw new ImageError(`the OVF descriptor has ${descriptor.sizeBytes} bytes; at most ${MAX_XML_BYTES} are read`);
  const xml = yield* readExactly("", descriptor.offset, descriptor.sizeBytes, "the OVF descriptor");
  const stem = descriptor.name.replace(/\.ovf$/i, "");
  const manifest = yield* readManifest(yield* locate(`${stem}.mf`));
  if (manifest !== undefined) compareDescriptor(descriptor.name, xml, manifest);
  const certificate = yield* locate(`${stem}.cert`);
  const system = parseOvf(decodeText(xml, "the OVF descriptor"), options);
  const disks: PackagedDisk[] = [];
  const notes = [...system.notes];
  for (const [index, disk] of system.disks.entries()) {
    const place = yield* placeOf(disk, locate);
    const digest = place === undefined ? undefined : manifest?.get(place.name);
    if (disk.file?.compression !== undefined)
      notes.push(`${quoted(disk.file.href)} is compressed (${disk.file.compression}) in the package`);
    disks.push({ ...disk, index, place, digest });
  }
  if (certificate !== undefined) notes.push("the package is signed; the signature is not verified");
  return { system, disks, manifest, hasCertificate: certificate !== undefined, notes };
}

function* readManifest(file: PackagedFile | undefined): Parser<Manifest | undefined> {
  if (file === undefined) return undefined;
  if (file.sizeBytes > MAX_MANIFEST_BYTES)
    throw new ImageError(`the manifest has ${file.sizeBytes} bytes; at most ${MAX_MANIFEST_BYTES} are read`);
  const bytes = yield* readExactly(file.file, file.offset, file.sizeBytes, "the manifest");
  return parseManifest(decodeText(bytes, "the manifest"));
}

function compareDescriptor(name: string, xml: Uint8Array, manifest: Manifest): void {
  const digest = manifest.get(name);
  if (digest === undefined)
    throw new ImageError(`the manifest does not list the OVF descriptor ${quoted(name)}: it belongs to another package`);
  if (createHash(digest.algorithm).update(xml).digest("hex") !== digest.hex)
    throw new ImageError(
      `the OVF descriptor ${quoted(name)} does not match its ${digest.algorithm.toUpperCase()} digest in the manifest: it was changed after the export, or is damaged`,
    );
}

function* placeOf(disk: OvfDisk, locate: Locate): Parser<PackagedFile | undefined> {
  if (disk.parentId !== undefined)
    throw new ImageError(
      `disk ${quoted(disk.name)} holds only the changes to disk ${quoted(disk.parentId)}: export the machine without snapshots`,
    );
  const { file } = disk;
  if (file === undefined) return undefined;
  if (!isBasename(file.href))
    throw new ImageError(`disk ${quoted(disk.name)} lies at ${quoted(file.href)}: only files of the package itself are read`);
  if (file.chunkBytes !== undefined)
    throw new ImageError(
      `${quoted(file.href)} is cut in pieces of ${file.chunkBytes} bytes, which are not read: export the machine again without chunkSize`,
    );
  const place = yield* locate(file.href);
  if (place === undefined)
    throw new ImageError(`the package lacks ${quoted(file.href)}, the file of disk ${quoted(disk.name)}: it is incomplete`);
  if (file.sizeBytes !== undefined && file.sizeBytes !== place.sizeBytes)
    throw new ImageError(
      `${quoted(file.href)} has ${place.sizeBytes} bytes, but the descriptor declares ${file.sizeBytes}: the package is truncated or was changed`,
    );
  return place;
}

/** Whether an href is the plain name of a file beside the descriptor: no folder, no drive, no URL. */
function isBasename(href: string): boolean {
  return href !== "" && href !== "." && href !== ".." && !/[/\\\0]/.test(href) && !/^[a-z][a-z0-9+.-]*:/i.test(href);
}

/** The folder of an archive's member with its slash; tar of `./web.ovf` keeps the dot. */
function folderOf(name: string): string {
  return name.replace(/^\.\//, "").slice(0, -baseOf(name).length);
}

function baseOf(name: string): string {
  return name.slice(name.lastIndexOf("/") + 1);
}

/** The first few names. */
function listed(names: readonly string[]): string {
  return names.slice(0, 5).map(quoted).join(", ");
}
