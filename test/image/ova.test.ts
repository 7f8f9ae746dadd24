import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { openOva, openOvf, type OvfPackage, selectDisk } from "../../provider/image/ova.ts";
import { ImageError } from "../../provider/image/parser.ts";
import { drive, fromBytes, fromFile } from "./drive.ts";
import { ovaSeed, ovfSeed, tarSeed } from "./seeds.ts";

const DISK = Buffer.alloc(3000, 0x5a);
const DESCRIPTOR = Buffer.from(ovfSeed("web-disk1.vmdk", DISK.length));
const VMWARE = readFileSync(new URL("../fixtures/ovf/vmware.ovf", import.meta.url));

/** A package's files by name, as they would lie in one folder. */
type Files = Readonly<Record<string, Uint8Array>>;

const WHOLE: Files = {
  "web.ovf": DESCRIPTOR,
  "web.mf": manifestOf({ "web.ovf": DESCRIPTOR, "web-disk1.vmdk": DISK }),
  "web-disk1.vmdk": DISK,
};

function manifestOf(files: Files, algorithm = "sha256"): Buffer {
  const lines = Object.entries(files).map(
    ([name, bytes]) => `${algorithm.toUpperCase()}(${name})= ${createHash(algorithm).update(bytes).digest("hex")}\n`,
  );
  return Buffer.from(lines.join(""));
}

function ova(files: Files): Buffer {
  return tarSeed(Object.entries(files).map(([name, data]) => ({ name, data })));
}

function open(files: Files): OvfPackage {
  const bytes = ova(files);
  return drive(openOva(bytes.length), fromBytes(bytes));
}

/** Without the file of this name. */
function without(files: Files, name: string): Files {
  return Object.fromEntries(Object.entries(files).filter(([key]) => key !== name));
}

/** The package with a descriptor in which one piece of text is replaced, and no manifest. */
function described(from: string, to: string): Files {
  const text = DESCRIPTOR.toString();
  if (!text.includes(from)) throw new Error(`the descriptor does not hold ${from}`);
  return { "web.ovf": Buffer.from(text.replace(from, to)), "web-disk1.vmdk": DISK };
}

test.each(["ustar", "pax", "gnu"])("finds the disk in an OVA that tar wrote as %s", (format) => {
  const folder = mkdtempSync(join(tmpdir(), "virtlift-ova-"));
  try {
    for (const [name, bytes] of Object.entries(WHOLE)) writeFileSync(join(folder, name), bytes);
    const path = join(folder, "web.ova");
    execFileSync("tar", ["--format", format, "-cf", path, "-C", folder, ...Object.keys(WHOLE)]);
    const source = fromFile(path);
    const { disks, system, notes } = drive(openOva(source.size("") ?? 0), source);
    const { place, digest } = selectDisk(disks, undefined);
    expect(system.name).toBe("seed");
    expect(notes).toEqual([]);
    expect(Buffer.compare(source.read(place.file, place.offset, place.sizeBytes), DISK)).toBe(0);
    expect(digest).toEqual({ algorithm: "sha256", hex: createHash("sha256").update(DISK).digest("hex") });
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("finds the disk beside a bare descriptor", () => {
  const source = fromBytes(DESCRIPTOR, WHOLE);
  const { disks, manifest } = drive(openOvf("web.ovf", DESCRIPTOR.length), source);
  expect(manifest?.size).toBe(2);
  expect(selectDisk(disks, undefined).place).toEqual({ name: "web-disk1.vmdk", file: "web-disk1.vmdk", offset: 0, sizeBytes: DISK.length });
});

test("finds a package in a folder of the archive, and one that begins with a dot", () => {
  for (const folder of ["web/", "./", "./web/"]) {
    const files = Object.fromEntries(Object.entries(WHOLE).map(([name, bytes]) => [`${folder}${name}`, bytes]));
    expect(selectDisk(open(files).disks, undefined).place.sizeBytes).toBe(DISK.length);
  }
});

test("lists disks in hardware order, blank ones too, and selects by index, file, id and name", () => {
  const files = { "app01.ovf": VMWARE, "app01-2.vmdk": Buffer.alloc(524_288), "app01-1.vmdk": Buffer.alloc(1_048_576) };
  const { disks } = open(files);
  expect(disks.map(({ index, place }) => [index, place?.name])).toEqual([
    [0, "app01-1.vmdk"],
    [1, "app01-2.vmdk"],
    [2, undefined],
  ]);
  for (const wanted of [1, "app01-2.vmdk", "vmdisk2", "Hard disk 2"]) expect(selectDisk(disks, wanted).index).toBe(1);
  const offer = '0: "app01-1.vmdk", 1: "app01-2.vmdk", 2: "Hard disk 3" (blank)';
  expect(() => selectDisk(disks, undefined)).toThrow(new ImageError(`the machine has 2 disks: say which one is meant (${offer})`));
  expect(() => selectDisk(disks, 7)).toThrow(new ImageError(`the machine has no disk "7" (its disks: ${offer})`));
  expect(() => selectDisk(disks, 2)).toThrow(new ImageError('disk 2 of the machine, "Hard disk 3", is blank: there is nothing to import'));
  expect(() => selectDisk([], undefined)).toThrow(new ImageError("the machine has no disk with a file (its disks: none)"));
});

test("tells what no manifest speaks of by its absence, and says what is compressed, and what is signed", () => {
  expect(open(without(WHOLE, "web.mf"))).toMatchObject({ manifest: undefined, notes: [] });
  const unlisted = open({ ...WHOLE, "web.mf": manifestOf({ "web.ovf": DESCRIPTOR }) });
  expect(unlisted.notes).toEqual([]);
  expect(unlisted.disks.map(({ digest }) => digest)).toEqual(unlisted.disks.map(() => undefined));
  const signed = open({ ...WHOLE, "web.cert": Buffer.from("certificate") });
  expect(signed).toMatchObject({ hasCertificate: true, notes: ["the package is signed; the signature is not verified"] });
  expect(open(described("ovf:size=", 'ovf:compression="gzip" ovf:size=')).notes).toContain(
    '"web-disk1.vmdk" is compressed (gzip) in the package',
  );
});

test.each(["sha1", "sha512"])("compares the descriptor with a manifest in %s", (algorithm) => {
  const files = { ...WHOLE, "web.mf": manifestOf({ "web.ovf": DESCRIPTOR, "web-disk1.vmdk": DISK }, algorithm) };
  expect(open(files).disks[0]?.digest?.algorithm).toBe(algorithm);
});

test("reads a descriptor in UTF-16", () => {
  const text = Buffer.from(`\uFEFF${DESCRIPTOR.toString().replace("UTF-8", "UTF-16")}`, "utf16le");
  expect(open({ "web.ovf": text, "web-disk1.vmdk": DISK }).system.name).toBe("seed");
});

test.each<{ readonly name: string; readonly files: Files; readonly sentence: string }>([
  {
    name: "an archive without descriptor",
    files: without(WHOLE, "web.ovf"),
    sentence: "the OVA holds no OVF descriptor (a file named *.ovf)",
  },
  {
    name: "two descriptors",
    files: { ...WHOLE, "other.ovf": DESCRIPTOR },
    sentence: 'the OVA holds 2 OVF descriptors ("web.ovf", "other.ovf"); one is expected',
  },
  {
    name: "two files of one name",
    files: { "./web-disk1.vmdk": DISK, ...WHOLE },
    sentence: 'the OVA holds two files named "web-disk1.vmdk": it is damaged or crafted',
  },
  {
    name: "a descriptor that was changed",
    files: { ...WHOLE, "web.ovf": Buffer.from(`${DESCRIPTOR.toString()} `) },
    sentence:
      'the OVF descriptor "web.ovf" does not match its SHA256 digest in the manifest: it was changed after the export, or is damaged',
  },
  {
    name: "a manifest without the descriptor",
    files: { ...WHOLE, "web.mf": manifestOf({ "web-disk1.vmdk": DISK }) },
    sentence: 'the manifest does not list the OVF descriptor "web.ovf": it belongs to another package',
  },
  {
    name: "a manifest of nonsense",
    files: { ...WHOLE, "web.mf": Buffer.from("nonsense") },
    sentence: 'line 1 of the manifest is no digest of a file: "nonsense"',
  },
  {
    name: "a manifest of bytes",
    files: { ...WHOLE, "web.mf": Buffer.alloc(9, 0xc0) },
    sentence: "the manifest is not text in UTF-8: it is damaged",
  },
  {
    name: "a huge descriptor",
    files: { "web.ovf": Buffer.alloc(5_000_000, 0x20) },
    sentence: "the OVF descriptor has 5000000 bytes; at most 4194304 are read",
  },
  {
    name: "a huge manifest",
    files: { ...WHOLE, "web.mf": Buffer.alloc(2_000_000) },
    sentence: "the manifest has 2000000 bytes; at most 1048576 are read",
  },
  {
    name: "a disk without its file",
    files: without(WHOLE, "web-disk1.vmdk"),
    sentence: 'the package lacks "web-disk1.vmdk", the file of disk "item 2": it is incomplete',
  },
  {
    name: "a disk of another size",
    files: { ...without(WHOLE, "web.mf"), "web-disk1.vmdk": DISK.subarray(1) },
    sentence: '"web-disk1.vmdk" has 2999 bytes, but the descriptor declares 3000: the package is truncated or was changed',
  },
  ...[
    "/etc/passwd",
    "../web-disk1.vmdk",
    "..",
    "folder/disk.vmdk",
    "C:\\disk.vmdk",
    "http://example.org/disk.vmdk",
    "file:disk.vmdk",
    "",
  ].map((href) => ({
    name: `a disk at ${JSON.stringify(href)}`,
    files: described('ovf:href="web-disk1.vmdk"', `ovf:href="${href}"`),
    sentence: `disk "item 2" lies at ${JSON.stringify(href)}: only files of the package itself are read`,
  })),
  {
    name: "a disk in pieces",
    files: described("ovf:size=", 'ovf:chunkSize="1000" ovf:size='),
    sentence: '"web-disk1.vmdk" is cut in pieces of 1000 bytes, which are not read: export the machine again without chunkSize',
  },
  {
    name: "a delta",
    files: described("<Disk ", '<Disk ovf:parentRef="base" '),
    sentence: 'disk "item 2" holds only the changes to disk "base": export the machine without snapshots',
  },
])("refuses $name", ({ files, sentence }) => {
  expect(() => open(files)).toThrow(new ImageError(sentence));
});

test("refuses an OVA that is cut at any block", () => {
  const bytes = ovaSeed();
  const end = bytes.length - 1024;
  for (let length = 0; length < end; length += 512)
    expect(() => drive(openOva(length), fromBytes(bytes.subarray(0, length)))).toThrow(ImageError);
  expect(drive(openOva(bytes.length), fromBytes(bytes)).disks).toHaveLength(1);
});
