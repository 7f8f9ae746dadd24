import { expect, test } from "vitest";
import { openPulumi } from "./pulumi.ts";

test("runs a TypeScript program by the CLI, from preview to destroy", async () => {
  await using pulumi = await openPulumi();
  const project = await pulumi.openProject(
    `import * as pulumi from "@pulumi/pulumi";
     const config = new pulumi.Config("virtlift");
     const greeting: string = "from " + config.require("host");
     export const said = greeting;`,
    { config: { "virtlift:host": "test:///default" } },
  );
  expect((await project.mustRun("preview")).stdout).toContain('said: "from test:///default"');
  await project.mustRun("up", "--yes", "--skip-preview");
  expect(JSON.parse((await project.mustRun("stack", "output", "--json")).stdout)).toEqual({ said: "from test:///default" });
  expect(await pulumi.readState("program")).toContain("from test:///default");
  await project.mustRun("destroy", "--yes", "--skip-preview");
});

test("reports a failing program by its exit code and words", async () => {
  await using pulumi = await openPulumi();
  const project = await pulumi.openProject(`throw new Error("this program is broken");`);
  const run = await project.run("preview");
  expect(run.exitCode).not.toBe(0);
  expect(run.stdout + run.stderr).toContain("this program is broken");
});

test("serves the Automation API with an inline program", async () => {
  await using pulumi = await openPulumi();
  const { LocalWorkspace } = await import("@pulumi/pulumi/automation/index.js");
  const stack = await LocalWorkspace.createStack(
    { stackName: "test", projectName: "inline", program: async () => ({ answer: 42 }) },
    { pulumiCommand: await pulumi.command(), envVars: pulumi.env },
  );
  const { outputs } = await stack.up({ color: "never" });
  expect(outputs["answer"]?.value).toBe(42);
});
