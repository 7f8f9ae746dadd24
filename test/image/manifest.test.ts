import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { expect, test } from "vitest";
import { parseDigest, parseManifest } from "../../provider/image/manifest.ts";
import { ImageError } from "../../provider/image/parser.ts";

const SHA1 = createHash("sha1").update("x").digest("hex");
const SHA256 = createHash("sha256").update("x").digest("hex");
const SHA512 = createHash("sha512").update("x").digest("hex");

test.each([
  { by: "VMware", line: `SHA256(disk 1.vmdk)= ${SHA256}`, name: "disk 1.vmdk", digest: { algorithm: "sha256", hex: SHA256 } },
  { by: "VirtualBox", line: `SHA1 (web.ovf) = ${SHA1}`, name: "web.ovf", digest: { algorithm: "sha1", hex: SHA1 } },
  {
    by: "others, in capitals",
    line: `sha512(web.ovf)=${SHA512.toUpperCase()}`,
    name: "web.ovf",
    digest: { algorithm: "sha512", hex: SHA512 },
  },
  { by: "those who write a dash", line: `SHA-256(web.ovf)= ${SHA256}`, name: "web.ovf", digest: { algorithm: "sha256", hex: SHA256 } },
  { by: "names with brackets", line: `SHA1(web (copy).vmdk)= ${SHA1}`, name: "web (copy).vmdk", digest: { algorithm: "sha1", hex: SHA1 } },
  { by: "sha256sum", line: `${SHA256}  web.img`, name: "web.img", digest: { algorithm: "sha256", hex: SHA256 } },
  { by: "sha512sum --binary", line: `${SHA512} *./web.img`, name: "web.img", digest: { algorithm: "sha512", hex: SHA512 } },
])("reads a line as written by $by", ({ line, name, digest }) => {
  expect([...parseManifest(`\n${line}\r\n\n`)]).toEqual([[name, digest]]);
});

test("reads what the real tools print", () => {
  const commands = [
    ["sha256sum", "-"],
    ["sha256sum", "--tag", "-"],
    ["sha1sum", "-b", "-"],
    ["openssl", "dgst", "-sha512"],
  ];
  const read = commands.map(
    ([command, ...argv]) =>
      parseManifest(execFileSync(command!, argv, { input: "x", encoding: "utf8" }).replace("(stdin)", "(-)")).get("-")?.hex,
  );
  expect(read).toEqual([SHA256, SHA256, SHA1, SHA512]);
});

test("keeps the stronger of two digests of a file", () => {
  const manifest = parseManifest(`SHA1(a)= ${SHA1}\nSHA256(a)= ${SHA256}\nSHA1(a)= ${SHA1}\n`);
  expect(manifest.get("a")?.algorithm).toBe("sha256");
});

test.each([
  {
    name: "another kind of line",
    text: `SHA256(a)= ${SHA256}\nhello\n`,
    sentence: 'line 2 of the manifest is no digest of a file: "hello"',
  },
  {
    name: "a digest that is too short",
    text: `SHA256(a)= ${SHA1}`,
    sentence: `line 1 of the manifest is no digest of a file: "SHA256(a)= ${SHA1}"`,
  },
  {
    name: "an algorithm that proves nothing",
    text: `MD5(a)= ${SHA1.slice(0, 32)}`,
    sentence: `line 1 of the manifest is no digest of a file: "MD5(a)= ${SHA1.slice(0, 32)}"`,
  },
  {
    name: "two digests that contradict each other",
    text: `SHA1(a)= ${SHA1}\nSHA1(a)= ${"0".repeat(40)}`,
    sentence: 'line 2 of the manifest contradicts an earlier one about "a"',
  },
  {
    name: "a manifest without end",
    text: " ".repeat(1_048_577),
    sentence: "the manifest has 1048577 characters; at most 1048576 are read",
  },
])("refuses $name", ({ text, sentence }) => {
  expect(() => parseManifest(text)).toThrow(new ImageError(sentence));
});

test("reads a digest as a user writes it", () => {
  expect(parseDigest(`sha256:${SHA256}`)).toEqual({ algorithm: "sha256", hex: SHA256 });
  expect(parseDigest(` SHA512:${SHA512.toUpperCase()}`)).toEqual({ algorithm: "sha512", hex: SHA512 });
});

test.each(["", SHA256, "md5:00", `sha256:${SHA1}`, "sha256:xyz"])("refuses %j as a user's digest", (text) => {
  expect(() => parseDigest(text)).toThrow("is not of the form sha256:<64 hex digits>, sha1:<40> or sha512:<128>");
});
