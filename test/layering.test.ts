/** Who may know whom, read from the import statements. */
import { globSync, readFileSync } from "node:fs";
import { dirname, join, posix } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const IMPORT = /(?:^|\n)\s*(import|export)\s+(type\s)?[^;]*?from\s*"([^"]+)"|\bimport\(\s*"([^"]+)"\s*\)|\n\s*import\s+"([^"]+)"/g;

interface Import {
  readonly file: string;
  /** A path from the root, or a package's or module's name. */
  readonly target: string;
  readonly isTypeOnly: boolean;
}

const files = globSync("{provider,sdk}/**/*.ts", { cwd: root }).map((file) => ({ file, text: readFileSync(join(root, file), "utf8") }));
const imports: readonly Import[] = files.flatMap(({ file, text }) =>
  Array.from(text.matchAll(IMPORT), ([, , type, ...specifiers]) => {
    const specifier = specifiers.find((each) => each !== undefined) ?? "";
    const target = specifier.startsWith(".") ? posix.join(posix.dirname(file), specifier) : specifier;
    return { file, target, isTypeOnly: type !== undefined };
  }),
);

/** The offending imports, as lines. */
const offenders = (isOffence: (each: Import) => boolean): readonly string[] =>
  imports.filter(isOffence).map(({ file, target }) => `${file} imports ${target}`);

/** Lower knows nothing of higher. Files of one layer know each other. */
const LAYERS = [
  "provider/errors.ts",
  "provider/image/",
  "provider/libvirt/",
  "provider/host/",
  "provider/transfer/",
  "provider/resources/",
];
const layerOf = (file: string): number => LAYERS.findIndex((layer) => file.startsWith(layer));

/** The contracts that wire and transfer speak of, and no code. */
const isBelow = ({ file, target, isTypeOnly }: Import): boolean => isTypeOnly || layerOf(target) <= layerOf(file);

test("the text of every file was understood", () => {
  expect(imports.length).toBeGreaterThan(files.length);
  expect(
    imports
      .filter(({ target }) => target.startsWith("provider/") || target.startsWith("sdk/"))
      .every(({ target }) => target.endsWith(".ts")),
  ).toBe(true);
});

test("only sdk knows Pulumi", () => {
  expect(offenders(({ file, target }) => target.startsWith("@pulumi/") && !file.startsWith("sdk/"))).toEqual([]);
});

test("sdk finds the provider by name at run time and imports nothing of it but types", () => {
  expect(offenders(({ file, target, isTypeOnly }) => file.startsWith("sdk/") && target.startsWith("provider/") && !isTypeOnly)).toEqual([]);
  expect(offenders(({ file, target }) => file.startsWith("provider/") && target.startsWith("sdk/"))).toEqual([]);
});

test("in the provider code is imported downwards only", () => {
  expect(offenders((each) => layerOf(each.file) >= 0 && each.target.startsWith("provider/") && !isBelow(each))).toEqual([]);
});

test("only hosts know ssh2", () => {
  expect(offenders(({ file, target }) => target === "ssh2" && !file.startsWith("provider/host/"))).toEqual([]);
});

test("images, packets and domain XML are pure", () => {
  const isPure = /^provider\/(image\/|libvirt\/(xdr|packet|procedures|domain)\.ts)/;
  const world = /^(node:)?(fs|fs\/promises|net|child_process|process|os|timers|timers\/promises|http|https|tls)$/;
  expect(offenders(({ file, target }) => isPure.test(file) && world.test(target))).toEqual([]);
});

test("nothing but the door reads the process's environment or arguments", () => {
  const readers = files
    .filter(({ file, text }) => file.startsWith("provider/") && /\bprocess\.(env|argv|cwd)\b/.test(text))
    .map(({ file }) => file);
  expect(readers).toEqual(["provider/index.ts"]);
});

test("nothing in the provider awaits at its top level, for `require` loads it", () => {
  const awaiting = files.filter(({ file, text }) => file.startsWith("provider/") && /^(?:(?:export )?const .* = )?await\b/m.test(text));
  expect(awaiting.map(({ file }) => file)).toEqual([]);
});
