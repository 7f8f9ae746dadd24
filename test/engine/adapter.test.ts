/** The adapter under the real engine, on a resource so small that every effect can be seen: a file. */
import { existsSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { openPulumi, type PulumiProject } from "../bed/pulumi.ts";

const PROVIDER = `exports.handler = () => require(${JSON.stringify(fileURLToPath(import.meta.resolve("../contract/file-resource.ts")))}).handler;`;

const PROGRAM = `
import * as pulumi from "@pulumi/pulumi";
class File extends pulumi.CustomResource {
  declare readonly sizeBytes: pulumi.Output<number>;
  constructor(name: string, args: Record<string, unknown>) {
    super("pulumi-nodejs:dynamic/virtlift:File", name, { ...args, sizeBytes: undefined, __provider: ${JSON.stringify(PROVIDER)} });
  }
}
const config = new pulumi.Config();
const file = new File("file", { path: config.get("path"), content: config.requireSecret("text"), seal: config.get("seal") });
export const sizeBytes = file.sizeBytes;
`;

const up = (project: PulumiProject) => project.run("up", "--yes", "--skip-preview");

test("a resource lives through failure, resumption, drift, replacement and the end", async () => {
  await using pulumi = await openPulumi();
  const project = await pulumi.openProject(PROGRAM);
  await project.mustRun("config", "set", "--secret", "text", "a secret text");
  const path = join(pulumi.directory, "file.txt");
  const seal = join(pulumi.directory, "seal");

  const refused = await project.run("preview");
  expect(refused.exitCode).not.toBe(0);
  expect(refused.stdout + refused.stderr).toContain("'file' has a problem: path is missing: give the path of the file");

  await project.mustRun("config", "set-all", "--plaintext", `path=${path}`, "--plaintext", `seal=${seal}`);
  const preview = await project.mustRun("preview");
  expect(preview.stdout).toContain("sizeBytes: 13");
  expect(existsSync(path)).toBe(false);

  const half = await up(project);
  expect(half.exitCode).not.toBe(0);
  expect(half.stdout).toContain(`${path} is written, but its seal ${seal} is missing: make it and run pulumi up again`);
  await project.mustRun("refresh", "--yes", "--skip-preview");
  await writeFile(seal, "");
  expect((await project.mustRun("up", "--yes", "--skip-preview")).stdout).toContain("~ 1 updated");
  expect((await project.mustRun("up", "--yes", "--skip-preview", "--expect-no-changes")).stdout).toContain("2 unchanged");

  await writeFile(path, "written by hand");
  expect((await project.mustRun("refresh", "--yes", "--skip-preview")).stdout).toContain("~ 1 updated");
  expect((await project.mustRun("up", "--yes", "--skip-preview")).stdout).toContain("~ 1 updated");
  expect(await readFile(path, "utf8")).toBe("a secret text");
  expect(await pulumi.readState("program")).not.toContain("a secret text");

  await rm(path);
  expect((await project.mustRun("refresh", "--yes", "--skip-preview")).stdout).toContain("- 1 deleted");
  expect((await project.mustRun("up", "--yes", "--skip-preview")).stdout).toContain("+ 1 created");

  await project.mustRun("config", "set", "path", `${path}.moved`);
  expect((await project.mustRun("preview", "--diff")).stdout).toMatch(/~ path\s*: ".*file\.txt" => ".*file\.txt\.moved"/);
  expect((await project.mustRun("up", "--yes", "--skip-preview")).stdout).toContain("+-1 replaced");
  expect([existsSync(path), existsSync(`${path}.moved`)]).toEqual([false, true]);

  await project.mustRun("destroy", "--yes", "--skip-preview");
  expect(existsSync(`${path}.moved`)).toBe(false);
}, 120_000);
