/** A Pulumi of a test's own: its home, its state and its projects are in one temporary folder, and no process of it outlives the test. */
import { spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { mkdir, readFile, symlink, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { PulumiCommand } from "@pulumi/pulumi/automation/index.js";
import { cachePath } from "../../scripts/setup/cache.ts";
import { findPulumi } from "../../scripts/setup/pulumi.ts";
import { openDirectory } from "./directory.ts";

const REPOSITORY = join(import.meta.dirname, "../..");
const RUN_TIMEOUT_MS = 120_000;
const PIPE_GRACE_MS = 500;

export interface PulumiRun {
  readonly exitCode: number | undefined;
  readonly signal: NodeJS.Signals | undefined;
  readonly stdout: string;
  readonly stderr: string;
}

/** A CLI process that is still at work; its provider and language host are among `descendants(pid)` of `daemon.ts`. */
export interface RunningPulumi {
  readonly pid: number;
  /** stdout and stderr so far, as they came. */
  output(): string;
  readonly ended: Promise<PulumiRun>;
}

export interface PulumiProject {
  readonly directory: string;
  /** Runs the CLI in the project to its end; a failure is in `exitCode`, not thrown. */
  run(...argv: readonly string[]): Promise<PulumiRun>;
  /** As `run`, but throws Error with all output unless it exits 0. */
  mustRun(...argv: readonly string[]): Promise<PulumiRun>;
  start(...argv: readonly string[]): RunningPulumi;
  /** Replaces the program. */
  write(program: string): Promise<void>;
}

export interface Pulumi extends AsyncDisposable {
  readonly directory: string;
  /** The environment of every run: own home, file backend, passphrase, Node of this process; for the Automation API as `envVars` too. */
  readonly env: Readonly<Record<string, string>>;
  /** The CLI for the Automation API; give the one instance to every workspace. */
  command(): Promise<PulumiCommand>;
  /**
   * Makes a project folder from which `virtlift` and `@pulumi/pulumi` resolve, with `program` as its `index.ts` and a stack `test` selected.
   * `config` is keyed as on the command line, such as `virtlift:host`.
   */
  openProject(
    program: string,
    options?: { readonly name?: string; readonly config?: Readonly<Record<string, string>> },
  ): Promise<PulumiProject>;
  /** The state file of a project's stack as plain text, secrets encrypted. */
  readState(project: string, stack?: string): Promise<string>;
}

/** Throws Error when there is no Pulumi CLI on this machine: `npm test` obtains one. */
export async function openPulumi(): Promise<Pulumi> {
  const bin = await findPulumi();
  if (bin === undefined) throw new Error("no Pulumi CLI on PATH nor in the cache; `npm test` obtains one before it runs the tests");
  await using stack = new AsyncDisposableStack();
  const directory = stack.use(await openDirectory("pulumi")).path;
  const home = join(directory, "home");
  const state = join(directory, "state");
  await Promise.all([mkdir(home), mkdir(state)]);
  const env = {
    PATH: [dirname(process.execPath), bin, process.env["PATH"] ?? ""].join(":"),
    HOME: home,
    PULUMI_HOME: home,
    PULUMI_BACKEND_URL: `file://${state}`,
    PULUMI_CONFIG_PASSPHRASE: "a passphrase for tests",
    PULUMI_SKIP_UPDATE_CHECK: "true",
    PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION: "true",
    // Half of what starting a program or a provider takes is compiling @pulumi/pulumi.
    NODE_COMPILE_CACHE: cachePath("compiled"),
    LC_ALL: "C.UTF-8",
  };
  stack.defer(() => killByEnvironment(`PULUMI_HOME=${home}`));
  const held = stack.move();

  return {
    directory,
    env,
    async command() {
      const automation = await import("@pulumi/pulumi/automation/index.js");
      return automation.PulumiCommand.get({ root: dirname(bin) });
    },
    async openProject(program, options = {}) {
      const name = options.name ?? "program";
      const projectDirectory = join(directory, name);
      await mkdir(projectDirectory);
      await symlink(join(REPOSITORY, "node_modules"), join(projectDirectory, "node_modules"));
      await writeFile(join(projectDirectory, "package.json"), JSON.stringify({ name, type: "module" }));
      await writeFile(
        join(projectDirectory, "Pulumi.yaml"),
        `name: ${name}\nmain: index.ts\nruntime:\n  name: nodejs\n  options:\n    typescript: false\n`,
      );
      const project = projectIn(projectDirectory, env);
      await project.write(program);
      await project.mustRun("stack", "init", "test", "--non-interactive");
      const settings = Object.entries(options.config ?? {}).flatMap(([key, value]) => ["--plaintext", `${key}=${value}`]);
      if (settings.length > 0) await project.mustRun("config", "set-all", ...settings, "--non-interactive");
      return project;
    },
    readState: (project, stackName = "test") => readFile(join(state, ".pulumi/stacks", project, `${stackName}.json`), "utf8"),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

function projectIn(directory: string, env: Readonly<Record<string, string>>): PulumiProject {
  const start = (...argv: readonly string[]): RunningPulumi => startPulumi(argv, { directory, env });
  return {
    directory,
    start,
    run: (...argv) => start(...argv).ended,
    async mustRun(...argv) {
      const run = await start(...argv).ended;
      if (run.exitCode !== 0)
        throw new Error(`pulumi ${argv.join(" ")} exited ${run.exitCode ?? run.signal}:\n${run.stdout}\n${run.stderr}`);
      return run;
    },
    write: (program) => writeFile(join(directory, "index.ts"), program),
  };
}

function startPulumi(
  argv: readonly string[],
  place: { readonly directory: string; readonly env: Readonly<Record<string, string>> },
): RunningPulumi {
  const child = spawn("pulumi", [...argv, "--color", "never"], {
    cwd: place.directory,
    env: place.env,
    stdio: ["ignore", "pipe", "pipe"],
    timeout: RUN_TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  if (child.pid === undefined) throw new Error("pulumi cannot be started");
  let stdout = "";
  let stderr = "";
  let output = "";
  child.stdout.setEncoding("utf8").on("data", (chunk: string) => {
    stdout += chunk;
    output += chunk;
  });
  child.stderr.setEncoding("utf8").on("data", (chunk: string) => {
    stderr += chunk;
    output += chunk;
  });
  const ended = new Promise<PulumiRun>((resolve) => {
    child.once("exit", (code, signal) => {
      const end = (): void => resolve({ exitCode: code ?? undefined, signal: signal ?? undefined, stdout, stderr });
      child.once("close", end);
      // A killed engine's provider lives on and holds the pipes open.
      setTimeout(end, PIPE_GRACE_MS);
    });
  });
  return { pid: child.pid, output: () => output, ended };
}

/** Ends every process that was started with this environment entry: an engine that was killed leaves its provider behind, as init's child. */
function killByEnvironment(entry: string): void {
  for (const pid of readdirSync("/proc").map(Number).filter(Boolean)) {
    try {
      if (pid !== process.pid && readFileSync(`/proc/${pid}/environ`, "utf8").split("\0").includes(entry)) process.kill(pid, "SIGKILL");
    } catch {
      // ENOENT, EACCES, ESRCH: it ended by itself, or is not ours.
    }
  }
}
