import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { parseTar, type TarMember } from "../../provider/image/tar.ts";
import { drive, fromBytes, fromFile } from "./drive.ts";
import { patched, sealTarHeader, type TarEntry, tarSeed } from "./seeds.ts";

const GIB = 1024 ** 3;
const LONG = `${"long-".repeat(30)}name.vmdk`;
const DEEP = `${"folder/".repeat(18)}${"x".repeat(90)}`;

function read(bytes: Buffer): readonly TarMember[] {
  return drive(parseTar(bytes.length), fromBytes(bytes));
}

function makeFolder(): { readonly folder: string } & Disposable {
  const folder = mkdtempSync(join(tmpdir(), "virtlift-tar-"));
  return { folder, [Symbol.dispose]: () => rmSync(folder, { recursive: true }) };
}

test.each(["ustar", "pax", "gnu", "v7", "oldgnu"])("finds every file in what tar writes as %s", (format) => {
  using made = makeFolder();
  const names = ["web.ovf", "web.mf", "web disk é.vmdk", "empty", "._web.ovf"];
  if (format !== "v7" && format !== "ustar") names.push(LONG);
  if (format !== "v7") names.push(DEEP);
  names.push("inner/._web.vmdk", "inner/other.vmdk");
  for (const [index, name] of names.entries()) {
    mkdirSync(join(made.folder, name, ".."), { recursive: true });
    writeFileSync(join(made.folder, name), name === "empty" ? "" : `${index} ${name}`.repeat(index * 100));
  }
  const path = join(made.folder, "web.ova");
  execFileSync("tar", ["--format", format, "-cf", path, "-C", made.folder, ...names.filter((name) => !name.startsWith("inner/")), "inner"]);
  const source = fromFile(path);
  const members = drive(parseTar(source.size("") ?? 0), source);
  expect(members.map(({ name }) => name)).toEqual(names.filter((name) => !name.includes("._")));
  const differing = members.filter(
    ({ name, offset, sizeBytes }) => Buffer.compare(source.read("", offset, sizeBytes), readFileSync(join(made.folder, name))) !== 0,
  );
  expect(differing).toEqual([]);
});

test.each(["pax", "gnu"])("reads sizes over 8 GiB as tar writes them in %s", (format) => {
  using made = makeFolder();
  const big = join(made.folder, "big.raw");
  writeFileSync(big, "");
  truncateSync(big, 9 * GIB);
  // Only the first header is wanted: the rest of the archive is 9 GiB of zeros.
  const head = execFileSync("sh", ["-c", 'tar --format "$1" -cf - -C "$2" big.raw 2>/dev/null | head -c 4096', "sh", format, made.folder]);
  const source = {
    read: (_: string, offset: number, length: number) =>
      Buffer.concat([head.subarray(offset, offset + length), Buffer.alloc(length)]).subarray(0, length),
    size: () => undefined,
  };
  expect(drive(parseTar(10 * GIB), source)).toEqual([{ name: "big.raw", offset: format === "pax" ? 1536 : 512, sizeBytes: 9 * GIB }]);
});

test("leaves out links, devices and folders, and keeps odd names as data", () => {
  const link = (type: string): TarEntry => ({ name: `type-${type}`, data: Buffer.alloc(0), type });
  const bytes = tarSeed([
    ..."123456".split("").map(link),
    { name: "../../etc/passwd", data: Buffer.from("x") },
    { name: "/absolute", data: Buffer.from("y") },
  ]);
  expect(read(bytes).map(({ name }) => name)).toEqual(["../../etc/passwd", "/absolute"]);
});

test("reads an archive without the blocks of zeros at its end", () => {
  const bytes = tarSeed([{ name: "a", data: Buffer.from("x") }]);
  expect(read(bytes.subarray(0, 1024))).toHaveLength(1);
});

test("takes a global pax header for all that follow it, and a member's own before it", () => {
  const bytes = tarSeed([
    { name: "g", type: "g", data: Buffer.from("16 path=everyone\n") },
    { name: "a", data: Buffer.from("x") },
    { name: "x", type: "x", data: Buffer.from("13 path=mine\n") },
    { name: "b", data: Buffer.from("y") },
  ]);
  expect(() => read(bytes)).toThrow(ImageError);
  const right = tarSeed([
    { name: "g", type: "g", data: Buffer.from("17 path=everyone\n") },
    { name: "a", data: Buffer.from("x") },
    { name: "x", type: "x", data: Buffer.from("13 path=mine\n") },
    { name: "b", data: Buffer.from("y") },
  ]);
  expect(read(right).map(({ name }) => name)).toEqual(["everyone", "mine"]);
});

const ONE = tarSeed([{ name: "disk.vmdk", data: Buffer.alloc(2000, 7) }]);
const PAX = "the tar archive has a pax header that cannot be read: it is damaged";
const SPARSE = "the tar archive holds a GNU sparse file, which is not read: make it again without --sparse";

test.each<{ readonly name: string; readonly bytes: Buffer; readonly sentence: string }>([
  {
    name: "what is no tar",
    bytes: Buffer.alloc(1024, 7),
    sentence: "the file is no tar archive: its first header does not match its checksum",
  },
  { name: "half a header", bytes: ONE.subarray(0, 300), sentence: "the tar archive ends early: 512 bytes expected at offset 0, 300 found" },
  {
    name: "a member that is cut",
    bytes: ONE.subarray(0, 1500),
    sentence: 'the tar archive ends early: "disk.vmdk" should end at offset 2512, but the file has only 1500 bytes',
  },
  {
    name: "a damaged header",
    bytes: patched(
      tarSeed([
        { name: "a", data: Buffer.alloc(0) },
        { name: "b", data: Buffer.alloc(0) },
      ]),
      (copy) => copy.writeUInt8(1, 600),
    ),
    sentence: "the tar header at offset 512 does not match its checksum: the archive is damaged",
  },
  {
    name: "a size in words",
    bytes: header((copy) => copy.write("twelve\0", 124)),
    sentence: "the tar header at offset 0 has no size that can be read: the archive is damaged",
  },
  {
    name: "a negative size",
    bytes: header((copy) => copy.fill(0xff, 124, 136)),
    sentence: "the tar header at offset 0 has no size that can be read: the archive is damaged",
  },
  {
    name: "a size of 2^80",
    bytes: header((copy) => copy.fill(0, 124, 136).writeUInt8(0x80, 124) && copy.writeUInt8(1, 125)),
    sentence: "a size in the tar archive is 1208925819614629174706176: larger than any file or disk, so the header is damaged",
  },
  { name: "a GNU sparse file", bytes: tarSeed([{ name: "a", type: "S", data: Buffer.alloc(0) }]), sentence: SPARSE },
  { name: "a pax sparse file", bytes: pax("22 GNU.sparse.major=1\n"), sentence: SPARSE },
  { name: "a pax record that ends beyond its header", bytes: pax("99 path=a\n"), sentence: PAX },
  { name: "a pax record of no length", bytes: pax("0 path=a\n"), sentence: PAX },
  { name: "a pax header without records", bytes: pax("nothing"), sentence: PAX },
  {
    name: "a pax size that is none",
    bytes: pax("11 size=-1\n"),
    sentence: 'the tar archive has a pax size of "-1", which is no number: it is damaged',
  },
  {
    name: "a huge extension header",
    bytes: tarSeed([{ name: "x", type: "x", data: Buffer.alloc(70_000, 0x61) }]),
    sentence: "the tar archive has an extension header of 70000 bytes at offset 0, more than is read",
  },
  {
    name: "an archive without end",
    bytes: tarSeed(Array.from({ length: 4097 }, (_, index) => ({ name: `f${index}`, data: Buffer.alloc(0) }))),
    sentence: "the tar archive has more than 4096 members: it is no OVA, or has no end",
  },
])("refuses $name", ({ bytes, sentence }) => {
  expect(() => read(bytes)).toThrow(new ImageError(sentence));
});

/** An archive of one file, with its header changed and sealed again. */
function header(change: (copy: Buffer) => unknown): Buffer {
  return patched(ONE, (copy) => {
    change(copy);
    sealTarHeader(copy);
  });
}

/** A file led by a pax header of this text. */
function pax(records: string): Buffer {
  return tarSeed([
    { name: "x", type: "x", data: Buffer.from(records) },
    { name: "a", data: Buffer.alloc(0) },
  ]);
}
