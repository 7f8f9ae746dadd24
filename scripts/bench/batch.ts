/** What a batch takes: machines together against one by one and against a limit on bandwidth, plans that change nothing, plans of many machines, and memory. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { env, execPath } from "node:process";
import { stringify } from "yaml";
import { descendants } from "../../test/bed/daemon.ts";
import { openDirectory } from "../../test/bed/directory.ts";
import { type KvmHost, openKvmHost, openLibvirtd } from "../../test/bed/libvirtd.ts";
import { openPulumi } from "../../test/bed/pulumi.ts";
import type { BatchReport } from "../../sdk/batch/report.ts";
import { prepareDisk } from "./disks.ts";
import { say, step } from "../setup/steps.ts";

/** The command as users have it: compiled. */
const CLI = join(import.meta.dirname, "../../dist/sdk/cli.js");
const MIB = 2 ** 20;
const SAMPLE_MS = 100;

/** Machines that are moved. */
const MOVED = 4;

/** What their copies alone take at the limit on bandwidth: much less than any real batch, whose fixed costs weigh less. */
const LIMITED_SECONDS = 60;

export interface BatchBenchOptions {
  /** Half of the data. */
  readonly isQuick: boolean;
  /** How many machines the large plan has. */
  readonly planned: number;
}

/** The kinds of processes of a run, and the most memory that one of each kind had resident, in bytes. */
type Peaks = Readonly<Record<Kind, number>>;
const KINDS = {
  driver: "sdk/cli.js",
  worker: "batch/worker.js",
  engine: "pulumi\0",
  provider: "dynamic-provider",
} as const;
type Kind = keyof typeof KINDS;

interface Run {
  readonly seconds: number;
  readonly peaks: Peaks;
  readonly stdout: string;
}

/** Runs `virtlift` in the folder of its manifest. */
type Virtlift = (command: string, ...rest: readonly string[]) => Promise<Run>;

/** Measures and prints. Needs root and a compiled `dist/`, as the other benchmarks do. */
export async function benchBatch({ isQuick, planned }: BatchBenchOptions): Promise<void> {
  say(`\nBatch: ${availableParallelism()} processors for all of it\n`);
  await measureMoves(isQuick ? 125 : 250);
  await measurePlan(planned);
}

/** `MOVED` machines with a disk of their own each, over SSH. */
async function measureMoves(dataMiB: number): Promise<void> {
  const disk = await step(`disk of 8 GiB with ${dataMiB} MiB of files`, async () => prepareDisk(8, dataMiB));
  await using host = await step("private KVM host", async () => openKvmHost({ name: "bench-batch" }));
  const names = Array.from({ length: MOVED }, (_, index) => `machine${index + 1}`);
  const manifest = (limits: object) => ({
    project: "bench",
    hosts: { kvm: hostOf(host) },
    limits: { total: availableParallelism(), perHost: MOVED, ...limits },
    defaults: {
      host: "kvm",
      networks: { "*": { type: "user" } },
      disks: { "*": { layout: "compressed" } },
      machine: { powerState: "stopped", domainType: "qemu" },
    },
    machines: Object.fromEntries(names.map((name) => [name, { source: { ova: disk.ova } }])),
  });

  await withBatch(manifest({}), async (virtlift) => {
    const alone: number[] = [];
    for (const name of names) alone.push((await step(`up ${name} alone`, async () => virtlift("up", "--only", name))).seconds);
    const idle = await step(`plan of ${MOVED} machines that are there`, async () => virtlift("plan"));
    await step("destroy", async () => virtlift("destroy", "--yes"));
    const together = await step(`up ${MOVED} machines together`, async () => virtlift("up"));
    await step("destroy", async () => virtlift("destroy", "--yes"));
    const sum = alone.reduce((total, seconds) => total + seconds, 0);
    say(
      `  ${MOVED} machines together ${together.seconds.toFixed(1)} s, one by one ${sum.toFixed(1)} s: ${(together.seconds / sum).toFixed(2)} of it`,
    );
    say(
      `  a plan of ${MOVED} that changes nothing ${idle.seconds.toFixed(1)} s: ${Math.round((60 * MOVED) / idle.seconds)} stacks a minute`,
    );
    sayPeaks(together.peaks);
  });

  // Copies that wait for the network leave the processors to others.
  const bandwidth = Math.round((MOVED * disk.vmdkBytes) / LIMITED_SECONDS);
  await withBatch(manifest({ bandwidth, total: MOVED }), async (virtlift) => {
    const limited = await step(`up ${MOVED} machines at ${(bandwidth / MIB).toFixed(1)} MiB/s`, async () => virtlift("up"));
    const { totals } = JSON.parse((await virtlift("report")).stdout) as BatchReport;
    // What is stored of a compressed disk is what was sent of it, but for the blocks' last bytes.
    const bound = totals.allocatedBytes / bandwidth;
    const part = bound / limited.seconds;
    say(
      `${part >= 0.85 ? "✓" : "✗"} of the bandwidth bound: ${part.toFixed(2)}, at least 0.85 aimed at (${limited.seconds.toFixed(1)} s, the bytes alone ${bound.toFixed(1)} s)\n`,
    );
  });
}

/** Machines that are not there yet, all on one host, as a preview of a whole site has them. */
async function measurePlan(count: number): Promise<void> {
  await using libvirtd = await openLibvirtd();
  const image = join(libvirtd.directory, "small.raw");
  await writeFile(image, Buffer.alloc(MIB, 1));
  const machines = Object.fromEntries(Array.from({ length: count }, (_, index) => [`machine${index + 1}`, { source: { file: image } }]));
  const defaults = { host: libvirtd.uri, machine: { powerState: "stopped", domainType: "qemu" } };
  await withBatch({ project: "many", limits: { perHost: 64 }, defaults, machines }, async (virtlift) => {
    const run = await step(`plan of ${count} machines`, async () => virtlift("plan"));
    say(`  ${count} machines ${run.seconds.toFixed(1)} s: ${Math.round((60 * count) / run.seconds)} stacks a minute`);
    sayPeaks(run.peaks);
  });
}

function hostOf(host: KvmHost): object {
  const { clientKey, knownHostsFile } = host.sshd;
  return { uri: host.sshUri(), identityFile: clientKey.path, knownHostsFile };
}

/** A batch in a folder of its own, whose Pulumi nobody else uses. */
async function withBatch(manifest: object, work: (virtlift: Virtlift) => Promise<void>): Promise<void> {
  await using pulumi = await openPulumi();
  await using folder = await openDirectory("bench-batch");
  const path = join(folder.path, "batch", "migrations.yaml");
  await mkdir(join(folder.path, "batch"));
  await writeFile(path, stringify(manifest));
  await work((command, ...rest) => runCli([command, path, ...rest, "--json"], { ...env, ...pulumi.env }));
}

/** Throws Error with the end of what it wrote when it fails. */
async function runCli(argv: readonly string[], environment: NodeJS.ProcessEnv): Promise<Run> {
  const beganMs = performance.now();
  const child = spawn(execPath, [CLI, ...argv], { env: environment, stdio: ["ignore", "pipe", "pipe"] });
  const peaks = { driver: 0, worker: 0, engine: 0, provider: 0 };
  const timer = setInterval(() => {
    for (const pid of [child.pid ?? 0, ...descendants(child.pid ?? 0)]) notePeak(pid, peaks);
  }, SAMPLE_MS);
  const output = { stdout: "", stderr: "" };
  for (const name of ["stdout", "stderr"] as const)
    child[name].setEncoding("utf8").on("data", (text: string) => {
      output[name] += text;
    });
  const [code] = (await once(child, "close")) as [number | null];
  clearInterval(timer);
  if (code !== 0) throw new Error(`virtlift ${argv.join(" ")} exited ${code}: ${`${output.stdout}${output.stderr}`.slice(-2000)}`);
  return { seconds: (performance.now() - beganMs) / 1000, peaks, stdout: output.stdout };
}

function notePeak(pid: number, peaks: Record<Kind, number>): void {
  let line: string;
  let status: string;
  try {
    line = readFileSync(`/proc/${pid}/cmdline`, "utf8");
    status = readFileSync(`/proc/${pid}/status`, "utf8");
  } catch {
    // ENOENT, ESRCH: it has ended.
    return;
  }
  const kind = (Object.keys(KINDS) as readonly Kind[]).findLast((each) => line.includes(KINDS[each]));
  const peak = Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) * 1024;
  if (kind !== undefined) peaks[kind] = Math.max(peaks[kind], peak);
}

function sayPeaks(peaks: Peaks): void {
  const words = (Object.keys(KINDS) as readonly Kind[]).map((kind) => `${kind} ${Math.round(peaks[kind] / 1e6)} MB`);
  say(`  peak memory of one process: ${words.join(", ")}\n`);
}
