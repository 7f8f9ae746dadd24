import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { inflateRawSync } from "node:zlib";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { isZip, locateMember, parseZip, selectMember, type ZipMember } from "../../provider/image/zip.ts";
import { drive, fromBytes, fromFile, type Source } from "./drive.ts";
import { patched } from "./seeds.ts";
import { ZIP_END_BYTES, ZIP_ENTRY_BYTES, ZIP_LOCAL_BYTES, zipSeed } from "./zip-seeds.ts";

/** What a hostile archive may cost before it is refused. */
const BUDGET = { asks: 64, bytes: 8 * 1024 * 1024 };

const DISK = Buffer.alloc(3000, "disk");
const BOTH = [
  { name: "disk.raw", data: DISK, isDeflated: true },
  { name: "read.me", data: Buffer.from("words") },
];

function read(bytes: Buffer): readonly ZipMember[] {
  return drive(parseZip(bytes.length), fromBytes(bytes), BUDGET);
}

function contents(source: Source, member: ZipMember): Buffer {
  const { offset, lengthBytes, isDeflated } = drive(locateMember(member), source, BUDGET);
  const bytes = Buffer.from(source.read("", offset, lengthBytes));
  return isDeflated ? inflateRawSync(bytes) : bytes;
}

function named(...names: readonly string[]): readonly ZipMember[] {
  return read(zipSeed(names.map((name) => ({ name, data: Buffer.alloc(0) }))));
}

function makeFolder(): { readonly folder: string } & Disposable {
  const folder = mkdtempSync(join(tmpdir(), "virtlift-zip-"));
  return { folder, [Symbol.dispose]: () => rmSync(folder, { recursive: true }) };
}

test.each([
  { what: "deflated", options: ["-9"] },
  { what: "stored", options: ["-0"] },
  { what: "as zip64", options: ["-fz"] },
  { what: "with data descriptors", options: ["-fd"] },
  { what: "with a comment", options: ["-z"] },
])("finds every file in what zip packs $what", ({ options }) => {
  using made = makeFolder();
  const names = ["web disk é.vmdk", "empty", "folder/inner.vmdk", "__MACOSX/._inner.vmdk"];
  mkdirSync(join(made.folder, "folder"));
  mkdirSync(join(made.folder, "__MACOSX"));
  for (const [index, name] of names.entries())
    writeFileSync(join(made.folder, name), name === "empty" ? "" : `${index} ${name}`.repeat(500));
  const path = join(made.folder, "web.zip");
  // The comment holds the signature of an end record.
  execFileSync("zip", ["-q", "-r", ...options, path, ...names.slice(0, 2), "folder", "__MACOSX"], {
    cwd: made.folder,
    ...(options[0] === "-z" && { input: "PK\x05\x06 of it\n.\n" }),
  });
  const source = fromFile(path);
  const members = drive(parseZip(source.size("") ?? 0), source, BUDGET);
  expect(members.map(({ name }) => name)).toEqual(names.slice(0, 3));
  for (const member of members) expect(contents(source, member)).toEqual(readFileSync(join(made.folder, member.name)));
  expect(isZip(source.read("", 0, 8))).toBe(true);
});

test("reads what is written to a pipe, where sizes stand behind the data and in 64 bits", () => {
  using made = makeFolder();
  const path = join(made.folder, "piped.zip");
  writeFileSync(join(made.folder, "disk.raw"), DISK);
  execFileSync("sh", [
    "-c",
    'cd "$1" && zip -q -fz- - disk.raw | cat >piped.zip && cat disk.raw | zip -q streamed.zip -',
    "sh",
    made.folder,
  ]);
  for (const [file, name] of [
    [path, "disk.raw"],
    [join(made.folder, "streamed.zip"), "-"],
  ] as const) {
    const source = fromFile(file);
    const [member] = drive(parseZip(source.size("") ?? 0), source, BUDGET);
    expect(member).toMatchObject({ name, sizeBytes: DISK.length });
    expect(contents(source, member!)).toEqual(DISK);
  }
});

test.each([false, true])("reads all numbers from the extra fields of zip64 (%s)", (isLarge) => {
  const bytes = zipSeed(BOTH, isLarge);
  const members = read(bytes);
  expect(members.map((member) => contents(fromBytes(bytes), member))).toEqual(BOTH.map(({ data }) => data));
});

const entryAt = (bytes: Buffer, index = 0): number => {
  let at = bytes.length - ZIP_END_BYTES;
  at = bytes.readUInt32LE(at + 16);
  for (; index > 0; index--)
    at += ZIP_ENTRY_BYTES + bytes.readUInt16LE(at + 28) + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
  return at;
};
const inEntry = (change: (bytes: Buffer, entry: number) => void): Buffer =>
  patched(zipSeed(BOTH), (bytes) => change(bytes, entryAt(bytes)));
const inEnd = (change: (bytes: Buffer, end: number) => void): Buffer =>
  patched(zipSeed(BOTH), (bytes) => change(bytes, bytes.length - ZIP_END_BYTES));
const called = (name: string): Buffer => zipSeed([{ name, data: DISK }]);
const large = (change: (bytes: Buffer) => void): Buffer => patched(zipSeed(BOTH, true), change);

test.each([
  { name: "without an end", bytes: zipSeed(BOTH).subarray(0, -1), says: "no directory at its end" },
  { name: "with bytes behind its end", bytes: Buffer.concat([zipSeed(BOTH), DISK]), says: "no directory at its end" },
  { name: "with bytes before it", bytes: Buffer.concat([DISK, zipSeed(BOTH)]), says: "other bytes before it" },
  { name: "in parts", bytes: inEnd((bytes, end) => bytes.writeUInt16LE(1, end + 4)), says: "one part of several" },
  { name: "in parts by a member", bytes: inEntry((bytes, entry) => bytes.writeUInt16LE(1, entry + 34)), says: "one part of several" },
  {
    name: "in parts by its locator",
    bytes: large((bytes) => bytes.writeUInt32LE(2, bytes.length - ZIP_END_BYTES - 4)),
    says: "one part of several",
  },
  {
    name: "of too many members",
    bytes: inEnd((bytes, end) => (bytes.writeUInt16LE(5000, end + 8), bytes.writeUInt16LE(5000, end + 10))),
    says: "has 5000 members",
  },
  {
    name: "with a directory without bounds",
    bytes: inEnd((bytes, end) => bytes.writeUInt32LE(0xffff_fff0, end + 12)),
    says: "in a directory of 4294967280 bytes",
  },
  {
    name: "with a zip64 record of 2^63 bytes",
    bytes: large((bytes) => bytes.writeBigUInt64LE(1n << 63n, bytes.length - ZIP_END_BYTES - 20 - 16)),
    says: "larger than any file",
  },
  {
    name: "with a zip64 record nowhere",
    bytes: large((bytes) => bytes.writeBigUInt64LE(1n << 40n, bytes.length - ZIP_END_BYTES - 12)),
    says: "not where its locator says",
  },
  {
    name: "with fewer members than it says",
    bytes: inEnd((bytes, end) => (bytes.writeUInt16LE(3, end + 8), bytes.writeUInt16LE(3, end + 10))),
    says: "cannot be read at offset",
  },
  {
    name: "with more members than it says",
    bytes: inEnd((bytes, end) => (bytes.writeUInt16LE(1, end + 8), bytes.writeUInt16LE(1, end + 10))),
    says: "behind its last entry",
  },
  { name: "with a name without bounds", bytes: zipSeed([{ name: "x".repeat(2000), data: DISK }]), says: "a name of 2000 bytes" },
  { name: "with a name that leads up", bytes: called("web/../../disk.raw"), says: "a name that leads out of it" },
  { name: "with a name that leads up as on Windows", bytes: called("..\\disk.raw"), says: "a name that leads out of it" },
  { name: "with an absolute name", bytes: called("/etc/shadow"), says: "a name that leads out of it" },
  { name: "with a drive", bytes: called("C:/disk.raw"), says: "a name that leads out of it" },
  { name: "with one name twice", bytes: zipSeed([BOTH[0]!, BOTH[0]!]), says: 'two files named "disk.raw"' },
  {
    name: "with members that overlap",
    bytes: patched(zipSeed(BOTH), (bytes) => bytes.writeUInt32LE(4, entryAt(bytes, 1) + 42)),
    says: "reaches into what follows it",
  },
  {
    name: "with a member in its directory",
    bytes: inEntry((bytes, entry) => bytes.writeUInt32LE(0x7fff_ffff, entry + 20)),
    says: "reaches into what follows it",
  },
  {
    name: "with zip64's mark and no such number",
    bytes: inEntry((bytes, entry) => bytes.writeUInt32LE(0xffff_ffff, entry + 24)),
    says: "cannot be read at offset",
  },
])("refuses an archive $name", ({ bytes, says }) => {
  expect(() => read(bytes)).toThrow(ImageError);
  expect(() => read(bytes)).toThrow(says);
});

test.each([
  { name: "encrypted", bytes: inEntry((bytes, entry) => bytes.writeUInt16LE(1, entry + 8)), says: "is encrypted" },
  {
    name: "packed by Deflate64",
    bytes: inEntry((bytes, entry) => bytes.writeUInt16LE(9, entry + 10)),
    says: "packed by Deflate64, which is not read",
  },
  { name: "packed by who knows what", bytes: inEntry((bytes, entry) => bytes.writeUInt16LE(77, entry + 10)), says: "packed by method 77" },
  { name: "stored in another size", bytes: inEntry((bytes, entry) => bytes.writeUInt16LE(0, entry + 10)), says: "is stored in" },
  { name: "without a header", bytes: patched(zipSeed(BOTH), (bytes) => bytes.write("none")), says: "another header" },
  {
    name: "of another name in its header",
    bytes: patched(zipSeed(BOTH), (bytes) => bytes.write("desk.raw", ZIP_LOCAL_BYTES)),
    says: "another header",
  },
  {
    name: "with a header that reaches into the next",
    bytes: patched(zipSeed(BOTH), (bytes) => bytes.writeUInt16LE(9, 28)),
    says: "reaches into what follows it",
  },
])("refuses a member $name, and only that", ({ bytes, says }) => {
  const [disk, other] = read(bytes);
  expect(() => drive(locateMember(disk!), fromBytes(bytes), BUDGET)).toThrow(says);
  expect(contents(fromBytes(bytes), other!)).toEqual(BOTH[1]!.data);
});

test("refuses an archive that is cut anywhere", () => {
  for (const whole of [zipSeed(BOTH), zipSeed(BOTH, true)]) {
    for (let length = 1; length < whole.length; length++)
      expect(() => read(whole.subarray(0, length)), `cut at ${length}`).toThrow(ImageError);
  }
});

test("bounds what it reads of an archive of any size", () => {
  using made = makeFolder();
  const path = join(made.folder, "vast.zip");
  writeFileSync(path, "PK\x03\x04");
  truncateSync(path, 2 ** 40);
  const source = fromFile(path);
  expect(() => drive(parseZip(2 ** 40), source, BUDGET)).toThrow("no directory at its end");
});

test("means the only disk, whatever lies beside it, and the descriptor of a machine before its disks", () => {
  const one = (...names: readonly string[]) => selectMember(named(...names), undefined).name;
  expect(one("disk.bin")).toBe("disk.bin");
  expect(one("vm/web.vmx", "vm/web.vmdk", "vm/web.nvram", "notes.txt")).toBe("vm/web.vmdk");
  expect(one("web.vmdk", "web-flat.vmdk")).toBe("web.vmdk");
  expect(one("web.vmdk", "web-s001.vmdk", "web-s002.vmdk")).toBe("web.vmdk");
  expect(one("web-disk1.vmdk", "web-disk2.vmdk", "web.ovf", "web.mf")).toBe("web.ovf");
});

test("takes one of several disks by its name or its index, and else lists them", () => {
  const disks = named("a/one.qcow2", "a/two.vhdx", "b/two.vhdx", "read.me");
  expect(selectMember(disks, "one.qcow2").name).toBe("a/one.qcow2");
  expect(selectMember(disks, "b/two.vhdx").name).toBe("b/two.vhdx");
  expect(selectMember(disks, 1).name).toBe("a/two.vhdx");
  const offer = '(0: "a/one.qcow2", 1: "a/two.vhdx", 2: "b/two.vhdx")';
  expect(() => selectMember(disks, undefined)).toThrow(`3 disks: declare it as { ova, disk } or { url, disk } and say which one ${offer}`);
  expect(() => selectMember(disks, "three")).toThrow('holds no disk "three"');
  expect(() => selectMember(disks, "two.vhdx")).toThrow('holds several disks "two.vhdx"');
  expect(() => selectMember(named("one.txt", "two.txt"), undefined)).toThrow("holds no disk image among its 2 files");
  expect(() => selectMember(named("a.ovf", "b.ovf", "a.vmdk", "b.vmdk"), undefined)).toThrow("2 OVF descriptors");
  expect(selectMember(named("web.ova"), 3).name).toBe("web.ova");
});
