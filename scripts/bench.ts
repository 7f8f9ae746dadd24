/**
 * `npm run bench`: imports a disk of real files over loopback SSH, beside what people do instead, and prints medians and ratios.
 * `--quick` takes a quarter of the data and one round, and leaves out the 200 GiB disk; `--rounds N` says how often each contender runs (default 3).
 * Needs root: the host is a private one, in name spaces of its own. Both ends share this machine's processors, which no real pair of machines does.
 */
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { availableParallelism } from "node:os";
import { argv, execPath, exit, getuid } from "node:process";
import { parseArgs } from "node:util";
import { openKvmHost, type KvmHost } from "../test/bed/libvirtd.ts";
import { type BenchDisk, prepareDisk } from "./bench/disks.ts";
import type { ImportReport, ImportRequest } from "./bench/import-once.ts";
import { benchPreview } from "./bench/preview.ts";
import { quoteCommand } from "../provider/host/quote.ts";
import { runCommand } from "./setup/command.ts";
import { LIBVIRT, preparePackages, SetupError, TESTS } from "./setup/packages.ts";
import { bold, say, step } from "./setup/steps.ts";

const RUN_TIMEOUT_MS = 20 * 60_000;
const VOLUME = "bench";

/** What a run of a contender tells: only an import of ours knows its memory, its processor time and what it sent. */
type Outcome = Pick<ImportReport, "seconds"> & Partial<ImportReport>;

/** Somebody who brings the disk over. Each run starts without the volume, and ends when it is there. */
interface Contender {
  readonly name: string;
  readonly run: () => Promise<Outcome>;
}

/** The medians of a contender's rounds; the peak memory is the largest. */
interface Standing extends Outcome {
  readonly name: string;
}

/** A number that was aimed at: `reached` times what `of` took is `by`'s time. */
interface Aim {
  readonly text: string;
  readonly reached: number;
  readonly isMet: boolean;
}

const { values: options } = parseArgs({
  args: argv.slice(2),
  options: { quick: { type: "boolean", default: false }, rounds: { type: "string" } },
});
const rounds = Number(options.rounds ?? (options.quick ? 1 : 3));

try {
  if (getuid?.() !== 0) throw new SetupError("the benchmark needs root: its host is a private one, in name spaces of its own");
  await preparePackages([...LIBVIRT, ...TESTS, { debian: "e2fsprogs", brings: ["mkfs.ext4"] }]);
  await compare();
  await benchPreview();
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  say(`✗ ${error.message}`);
  exit(1);
}

async function compare(): Promise<void> {
  const sizes = options.quick ? [60, 125, 250] : [250, 500, 1000];
  const disks: BenchDisk[] = [];
  for (const dataMiB of sizes) disks.push(await step(`disk of 8 GiB with ${dataMiB} MiB of files`, async () => prepareDisk(8, dataMiB)));
  const wide = options.quick ? undefined : await step("disk of 200 GiB with 250 MiB of files", async () => prepareDisk(200, 250));
  const disk = disks.at(-1)!;
  await using host = await step("private KVM host", async () => openKvmHost({ name: "bench" }));
  say(`\n${availableParallelism()} processors for both ends, ${rounds} rounds in alternating order, medians\n`);

  const sparse = ours(host, { name: "virtlift, sparse", source: { ova: disk.ova } });
  const compressed = ours(host, { name: "virtlift, compressed", source: { ova: disk.ova }, layout: "compressed" });
  const content = ours(host, { name: "virtlift, sparse, verify: content", source: { ova: disk.ova }, verify: "content" });
  const script = byScript(host, disk);
  const scp = byScp(host, disk.vmdk);
  const cat = byCat(host, disk.vmdk);
  const package_ = await contest(host, `streamOptimized, ${disk.dataMiB} MiB of files in ${megabytes(disk.vmdkBytes)}`, [
    sparse,
    compressed,
    content,
    script,
    scp,
    cat,
  ]);
  const rawOurs = ours(host, { name: "virtlift, raw", source: { file: disk.raw } });
  const rawUpload = byVolumeUpload(host, disk, "raw");
  const raw = await contest(host, `raw, ${disk.virtualGiB} GiB with holes`, [rawOurs, rawUpload]);
  const qcow2Ours = ours(host, { name: "virtlift, qcow2", source: { file: disk.qcow2 } });
  const qcow2Upload = byVolumeUpload(host, disk, "qcow2");
  const qcow2 = await contest(host, "qcow2", [qcow2Ours, qcow2Upload, byScp(host, disk.qcow2), byCat(host, disk.qcow2)]);
  await contest(host, "growth with data", [
    ...disks.map((each) => ours(host, { name: `virtlift, ${each.dataMiB} MiB in 8 GiB`, source: { ova: each.ova } })),
    ...(wide ? [ours(host, { name: `virtlift, ${wide.dataMiB} MiB in 200 GiB`, source: { ova: wide.ova } })] : []),
  ]);

  const all = [...package_, ...raw, ...qcow2];
  const ratio = (slow: Contender, quick: Contender): number => {
    const [a, b] = [slow, quick].map(({ name }) => all.find((each) => each.name === name)!.seconds) as [number, number];
    return a / b;
  };
  sayAims([
    atLeast("sparse is quicker than the script", ratio(script, sparse), 3),
    atLeast("compressed is quicker than the script", ratio(script, compressed), 8),
    atMost("compressed takes of moving the bytes alone", ratio(compressed, cat), 1.3),
    atLeast("raw is quicker than vol-upload", ratio(rawUpload, rawOurs), 2),
    atLeast("qcow2 is quicker than vol-upload", ratio(qcow2Upload, qcow2Ours), 2),
    atMost("peak memory in MB", Math.max(...all.map(({ peakRssBytes = 0 }) => peakRssBytes)) / 1e6, 250),
  ]);
}

/** An import by this project, in a process of its own. */
function ours(
  host: KvmHost,
  what: Pick<ImportRequest, "source"> & Partial<Pick<ImportRequest, "format" | "layout" | "verify">> & { readonly name: string },
): Contender {
  const { name, source, format = "qcow2", layout = "sparse", verify = "digest" } = what;
  const { clientKey, knownHostsFile } = host.sshd;
  const request: ImportRequest = {
    host: { uri: host.sshUri(), identityFile: clientKey.path, knownHostsFile },
    source,
    finalPath: volumePath(host),
    format,
    layout,
    verify,
    id: VOLUME,
    isCompiled: true,
  };
  return {
    name,
    async run() {
      const program = join(import.meta.dirname, "bench/import-once.ts");
      const { stdout } = await runCommand([execPath, program, JSON.stringify(request)], { timeoutMs: RUN_TIMEOUT_MS });
      return JSON.parse(stdout) as ImportReport;
    },
  };
}

/** What people script: hash here, copy, hash there, convert there. It is spared the unpacking of the OVA. */
function byScript(host: KvmHost, disk: BenchDisk): Contender {
  const copy = `${volumePath(host)}.vmdk`;
  return timed("sha256sum, scp, sha256sum, qemu-img convert", async () => {
    await run(["sha256sum", disk.vmdk]);
    await run(["scp", ...sshOptions(host), disk.vmdk, `root@${host.address}:${copy}`]);
    await onHost(host, ["sha256sum", copy]);
    await onHost(host, ["qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", copy, volumePath(host)]);
    await rm(copy);
  });
}

function byScp(host: KvmHost, path: string): Contender {
  return timed("scp alone", async () => run(["scp", ...sshOptions(host), path, `root@${host.address}:${volumePath(host)}`]));
}

/** Moving the bytes alone: what no import over SSH can be quicker than, unless it moves fewer. */
function byCat(host: KvmHost, path: string): Contender {
  const receive = quoteCommand(["sh", "-c", 'cat > "$1"', "sh", volumePath(host)]);
  const send = quoteCommand(["ssh", ...sshOptions(host), `root@${host.address}`, receive]);
  return timed("ssh cat > file", async () => run(["sh", "-c", `${send} < "$1"`, "sh", path]));
}

/** libvirt's own way, sparse where the source is. */
function byVolumeUpload(host: KvmHost, disk: BenchDisk, format: "raw" | "qcow2"): Contender {
  // libvirt passes neither options nor files on to ssh(1), but lets another program stand for it.
  const ssh = join(host.directory, "ssh");
  const uri = `${host.sshUri()}?command=${encodeURIComponent(ssh)}`;
  const virsh = async (...rest: readonly string[]) => run(["virsh", "--quiet", "--connect", uri, ...rest]);
  return timed(`virsh vol-upload${format === "raw" ? " --sparse" : ""}`, async () => {
    await writeFile(ssh, `#!/bin/sh\nexec ${quoteCommand(["ssh", ...sshOptions(host)])} "$@"\n`, { mode: 0o700 });
    await virsh("vol-create-as", "default", VOLUME, `${disk.virtualGiB}G`, "--format", format);
    await virsh("vol-upload", "--pool", "default", VOLUME, disk[format], ...(format === "raw" ? ["--sparse"] : []));
  });
}

function timed(name: string, work: () => Promise<unknown>): Contender {
  return {
    name,
    async run() {
      const startedMs = performance.now();
      await work();
      return { seconds: (performance.now() - startedMs) / 1000 };
    },
  };
}

async function run(command: readonly [string, ...string[]]): Promise<void> {
  await runCommand(command, { timeoutMs: RUN_TIMEOUT_MS });
}

async function onHost(host: KvmHost, command: readonly string[]): Promise<void> {
  await run(["ssh", ...sshOptions(host), `root@${host.address}`, quoteCommand(command)]);
}

/** Of ssh(1) and scp(1) alike: the bed's key and known_hosts file, and nobody's configuration. */
function sshOptions(host: KvmHost): readonly string[] {
  const { clientKey, knownHostsFile } = host.sshd;
  return ["-F", "none", "-q", "-i", clientKey.path, "-o", `UserKnownHostsFile=${knownHostsFile}`, "-o", "BatchMode=yes"];
}

function volumePath(host: KvmHost): string {
  return join(host.poolPath, VOLUME);
}

/** Runs all contenders `rounds` times, every other round backwards, and prints their table. */
async function contest(host: KvmHost, title: string, contenders: readonly Contender[]): Promise<readonly Standing[]> {
  const outcomes = new Map<Contender, Outcome[]>(contenders.map((each) => [each, []]));
  await step(title, async (note) => {
    for (let round = 0; round < rounds; round++) {
      for (const contender of round % 2 === 0 ? contenders : contenders.toReversed()) {
        note(contender.name);
        outcomes.get(contender)!.push(await contender.run());
        await host.run("rm", "-rf", volumePath(host));
        await host.virsh("pool-refresh", "default");
      }
    }
    note("");
  });
  const standings = contenders.map((each) => standing(each.name, outcomes.get(each)!));
  sayTable(standings);
  return standings;
}

function standing(name: string, outcomes: readonly Outcome[]): Standing {
  const sentBytes = outcomes[0]?.sentBytes;
  const peaks = outcomes.flatMap(({ peakRssBytes }) => peakRssBytes ?? []);
  const cpu = outcomes.flatMap(({ cpuSeconds }) => cpuSeconds ?? []);
  return {
    name,
    seconds: median(outcomes.map(({ seconds }) => seconds)),
    ...(cpu.length > 0 && { cpuSeconds: median(cpu) }),
    ...(peaks.length > 0 && { peakRssBytes: Math.max(...peaks) }),
    ...(sentBytes !== undefined && { sentBytes }),
  };
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

function sayTable(standings: readonly Standing[]): void {
  const quickest = Math.min(...standings.map(({ seconds }) => seconds));
  const rows = standings.map(({ name, seconds, cpuSeconds, peakRssBytes, sentBytes }) => [
    name,
    `${seconds.toFixed(2)} s`,
    `${(seconds / quickest).toFixed(2)} x`,
    sentBytes === undefined ? "" : megabytes(sentBytes),
    cpuSeconds === undefined ? "" : `${cpuSeconds.toFixed(1)} s`,
    peakRssBytes === undefined ? "" : megabytes(peakRssBytes),
  ]);
  const table = [["", "time", "ratio", "sent", "our CPU", "our peak"], ...rows];
  const widths = table[0]!.map((_, column) => Math.max(...table.map((row) => row[column]!.length)));
  for (const [index, row] of table.entries()) {
    const line = row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!))).join("   ");
    say(`  ${index === 0 ? bold(line) : line}`);
  }
  say();
}

function megabytes(bytes: number): string {
  return `${Math.round(bytes / 1e6)} MB`;
}

function atLeast(text: string, reached: number, wanted: number): Aim {
  return { text: `${text}: ${reached.toFixed(1)}, at least ${wanted} aimed at`, reached, isMet: reached >= wanted };
}

function atMost(text: string, reached: number, wanted: number): Aim {
  return { text: `${text}: ${reached.toFixed(reached < 10 ? 2 : 0)}, at most ${wanted} aimed at`, reached, isMet: reached <= wanted };
}

function sayAims(aims: readonly Aim[]): void {
  for (const { text, isMet } of aims) say(`${isMet ? "✓" : "✗"} ${text}`);
}
