/** ISO 9660 images against readers that are not ours: xorriso, and the kernel of the proof guest in `test/resources/virtual-machine-live.test.ts`. */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { encodeIso9660 } from "../../provider/image/iso9660.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openDirectory } from "../bed/directory.ts";

const files = {
  "user-data": Buffer.from("#cloud-config\nhostname: ä\n"),
  "meta-data": Buffer.from(""),
  "network-config": Buffer.alloc(5000, "x"),
};
const list = Object.entries(files).map(([name, content]) => ({ name, content }));

test("xorriso finds the label and the files with their names and content", async () => {
  await using directory = await openDirectory("iso");
  const image = join(directory.path, "seed.iso");
  await writeFile(image, encodeIso9660("cidata", list));
  const { stdout } = await runCommand(["xorriso", "-indev", image, "-pvd_info"]);
  expect(stdout).toMatch(/Volume Id {4}: cidata/);
  const out = join(directory.path, "out");
  await runCommand(["xorriso", "-read_fs", "norock", "-osirrox", "on", "-indev", image, "-extract", "/", out]);
  for (const [name, content] of Object.entries(files)) expect((await readFile(join(out, name))).equals(content)).toBe(true);
});

test("the same files make the same bytes, in whatever order they are given, a whole number of sectors", () => {
  const image = encodeIso9660("cidata", list);
  expect(Buffer.from(encodeIso9660("cidata", list.toReversed())).equals(image)).toBe(true);
  expect(image.length % 2048).toBe(0);
});

test("more names than a sector holds are refused", () => {
  const many = Array.from({ length: 60 }, (_, index) => ({ name: `file-${index}`, content: Buffer.of() }));
  expect(() => encodeIso9660("x", many)).toThrow("do not fit into one sector");
});
