/** A batch of a test's own: a manifest in a folder, beside it its state, and a Pulumi that nobody else uses. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { stringify } from "yaml";
import { type Batch, openBatch } from "../../sdk/batch/driver.ts";
import type { BatchEvent } from "../../sdk/batch/events.ts";
import { findJournal } from "../../sdk/batch/folder.ts";
import { readManifest } from "../../sdk/batch/manifest.ts";
import { openDirectory } from "../bed/directory.ts";
import { openPulumi } from "../bed/pulumi.ts";

const CLI = join(import.meta.dirname, "../../sdk/cli.ts");

export interface CliRun {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunningCli {
  readonly pid: number;
  stderr(): string;
  readonly ended: Promise<CliRun>;
}

export interface BatchBed extends AsyncDisposable {
  readonly directory: string;
  readonly manifestPath: string;
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** What every driver of `openBatch` told, in order. */
  readonly events: BatchEvent[];
  write(manifest: object): void;
  openBatch(): Promise<Batch>;
  /** The command `virtlift`, in a process of its own, with the manifest behind its name. */
  start(command: string, ...rest: readonly string[]): RunningCli;
  cli(command: string, ...rest: readonly string[]): Promise<CliRun>;
  journal(): string;
}

export async function openBatchBed(manifest: object = {}): Promise<BatchBed> {
  await using stack = new AsyncDisposableStack();
  const pulumi = stack.use(await openPulumi());
  const { path: directory } = stack.use(await openDirectory("batch"));
  const manifestPath = join(directory, "migrations.yaml");
  const environment = { ...process.env, ...pulumi.env, NODE_PATH: undefined };
  const events: BatchEvent[] = [];
  const write = (content: object): void => writeFileSync(manifestPath, stringify(content));
  write(manifest);
  const held = stack.move();
  const start = (command: string, ...rest: readonly string[]): RunningCli => {
    const child = spawn(process.execPath, [CLI, command, manifestPath, ...rest], {
      env: environment,
      cwd: directory,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const output = { stdout: "", stderr: "" };
    for (const name of ["stdout", "stderr"] as const)
      child[name].setEncoding("utf8").on("data", (chunk: string) => {
        output[name] += chunk;
      });
    const ended = once(child, "close").then(([code]) => ({ code: code as number | null, ...output }));
    return { pid: child.pid ?? 0, stderr: () => output.stderr, ended };
  };
  return {
    directory,
    manifestPath,
    environment,
    events,
    write,
    openBatch: () => openBatch(manifestPath, { environment, onEvent: (event) => events.push(event) }),
    start,
    cli: (command, ...rest) => start(command, ...rest).ended,
    journal: () => readFileSync(findJournal(directory, readManifest(manifestPath).project).journal, "utf8"),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}
