/** What is published: the packed package as a stranger installs it. */
import { execFile } from "node:child_process";
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";
import { openDirectory } from "./bed/directory.ts";

const run = promisify(execFile);
const root = join(import.meta.dirname, "..");

/** Packs the package as it is built, and unpacks it into `node_modules/virtlift` of an empty program; its dependencies are ours. */
async function openInstalled() {
  const directory = await openDirectory("package");
  await run("npm", ["pack", "--silent", "--ignore-scripts", "--pack-destination", directory.path], { cwd: root });
  const [tarball] = (await readdir(directory.path)).filter((name) => name.endsWith(".tgz"));
  const program = join(directory.path, "program");
  const modules = join(program, "node_modules");
  await mkdir(join(modules, "virtlift"), { recursive: true });
  await run("tar", ["-xzf", join(directory.path, tarball!), "--strip-components=1", "-C", join(modules, "virtlift")]);
  for (const name of await readdir(join(root, "node_modules"))) {
    if (name !== "virtlift" && !name.startsWith(".")) await symlink(join(root, "node_modules", name), join(modules, name));
  }
  return { tarball: join(directory.path, tarball!), program, [Symbol.asyncDispose]: () => directory[Symbol.asyncDispose]() };
}

describe("the package", () => {
  it("passes the checks of publint and of arethetypeswrong", async () => {
    await using installed = await openInstalled();
    await expect(run("publint", ["run", installed.tarball, "--strict"])).resolves.toMatchObject({ stderr: "" });
    await expect(run("attw", [installed.tarball, "--profile", "esm-only", "--no-emoji"])).resolves.toMatchObject({ stderr: "" });
  }, 120_000);

  it("documents its arguments, where an editor looks", async () => {
    const declarations = await readFile(join(root, "dist/provider/resources/virtual-machine-schema.d.ts"), "utf8");
    const arguments_ = declarations.slice(declarations.indexOf("VirtualMachineSchema"));
    for (const key of ["memoryMiB", "vcpus", "networks", "mac", "onShutdownTimeout"])
      expect(arguments_).toMatch(new RegExp(`\\*/\\s*${key}: `));
  });

  it("gives its provider to the text that states hold, from a program's folder, by require", async () => {
    await using installed = await openInstalled();
    const text = 'exports.handler = () => require("virtlift/provider").importedDisk;';
    const code = `console.log(typeof require("require-from-string")(${JSON.stringify(text)}).handler().create)`;
    const { stdout } = await run(process.execPath, ["-e", code], { cwd: installed.program });
    expect(stdout.trim()).toBe("function");
  });

  it("is imported by an ES module program, and shows only its classes", async () => {
    await using installed = await openInstalled();
    await writeFile(
      join(installed.program, "program.mjs"),
      'import * as virtlift from "virtlift"; console.log(Object.keys(virtlift).toSorted().join());',
    );
    const { stdout } = await run(process.execPath, [join(installed.program, "program.mjs")], { cwd: installed.program });
    expect(stdout.trim().split(",")).toEqual(expect.arrayContaining(["ImportedDisk", "VirtualMachine"]));
  });

  it("holds what runs and what is read, and nothing else", async () => {
    await using installed = await openInstalled();
    const { stdout } = await run("tar", ["-tzf", installed.tarball]);
    const tops = new Set(
      stdout
        .trim()
        .split("\n")
        .map((path) => path.split("/").slice(1, 3).join("/")),
    );
    expect([...tops].filter((path) => !/^dist\/(provider|sdk)$|^(package\.json|README\.md|CHANGELOG\.md|LICENSE)$/.test(path))).toEqual([]);
  });
});
