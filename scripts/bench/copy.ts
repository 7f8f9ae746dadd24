/** What a copy takes: a disk of real files over loopback SSH, beside what people do instead. Both ends share this machine's processors, which no real pair of machines does. */
import { existsSync, readFileSync } from "node:fs";
import { rm, writeFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { execPath } from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { quoteCommand } from "../../provider/host/quote.ts";
import { descendants } from "../../test/bed/daemon.ts";
import { openKvmHost, type KvmHost } from "../../test/bed/libvirtd.ts";
import { runCommand } from "../setup/command.ts";
import { say, step } from "../setup/steps.ts";
import {
  atLeast,
  atMost,
  type Contender,
  contest,
  megabytes,
  type Outcome,
  ratio,
  sayAims,
  type Standing,
  standingOf,
  timeOf,
} from "./contest.ts";
import { measureCosts } from "./costs.ts";
import { type BenchDisk, prepareDisk } from "./disks.ts";
import type { ImportReport, ImportRequest } from "./import-once.ts";

const RUN_TIMEOUT_MS = 20 * 60_000;
const VOLUME = "bench";

/** A link that is slower than both ends: what most copies cross. */
const LINK_MEGABITS = 200;

/** How long sshd's processes may take to be gone when their client is. */
const GONE_TIMEOUT_MS = 5000;

/** A second has so many clock ticks in /proc. Source: proc(5), sysconf(_SC_CLK_TCK), 100 on every Linux of the last decades. */
const TICKS_PER_SECOND = 100;

export interface CopyOptions {
  /** A quarter of the data, and no disk of 200 GiB. */
  readonly isQuick: boolean;
  readonly rounds: number;
}

/** Measures on a private host, and prints tables and aims. Needs root. */
export async function benchCopy({ isQuick, rounds }: CopyOptions): Promise<void> {
  const sizes = isQuick ? [60, 125, 250] : [250, 500, 1000];
  const disks: BenchDisk[] = [];
  for (const dataMiB of sizes) disks.push(await step(`disk of 8 GiB with ${dataMiB} MiB of files`, async () => prepareDisk(8, dataMiB)));
  const wide = isQuick ? [] : [await step("disk of 200 GiB with 250 MiB of files", async () => prepareDisk(200, 250))];
  const disk = disks.at(-1)!;
  await using host = await step("private KVM host", async () => openKvmHost({ name: "bench" }));
  say(`\n${availableParallelism()} processors for both ends, ${rounds} rounds in alternating order, medians\n`);
  const clear = async (): Promise<void> => {
    await host.run("rm", "-rf", volumePath(host));
    await host.virsh("pool-refresh", "default");
  };

  const sparse = ours(host, { name: "virtlift, sparse", source: { ova: disk.ova } });
  const compressed = ours(host, { name: "virtlift, compressed", source: { ova: disk.ova }, layout: "compressed" });
  const content = ours(host, { name: "virtlift, sparse, verify: content", source: { ova: disk.ova }, verify: "content" });
  const script = byScript(host, disk);
  const cat = byCat(host, disk.vmdk);
  const packed = await contest(
    `streamOptimized, ${disk.dataMiB} MiB of files in ${megabytes(disk.vmdkBytes)}`,
    [sparse, compressed, content, script, byScp(host, disk.vmdk), cat],
    { rounds, clear },
  );
  const rawOurs = ours(host, { name: "virtlift, raw", source: { file: disk.raw } });
  const rawUpload = byVolumeUpload(host, disk, "raw");
  const raw = await contest(`raw, ${disk.virtualGiB} GiB with holes`, [rawOurs, rawUpload], { rounds, clear });
  const qcow2Ours = ours(host, { name: "virtlift, qcow2", source: { file: disk.qcow2 } });
  const qcow2Upload = byVolumeUpload(host, disk, "qcow2");
  const qcow2 = await contest("qcow2", [qcow2Ours, qcow2Upload, byScp(host, disk.qcow2), byCat(host, disk.qcow2)], { rounds, clear });
  const narrow = disks.at(-2)!;
  const narrowSparse = ours(host, { name: "virtlift, sparse", source: { ova: narrow.ova } });
  const narrowCompressed = ours(host, { name: "virtlift, compressed", source: { ova: narrow.ova }, layout: "compressed" });
  const narrowCat = byCat(host, narrow.vmdk);
  const narrowRaw = ours(host, { name: "virtlift, raw", source: { file: narrow.raw } });
  const narrowUpload = byVolumeUpload(host, narrow, "raw");
  await host.limitLink(LINK_MEGABITS);
  const linked = await contest(
    `over a link of ${LINK_MEGABITS} Mbit/s, ${narrow.dataMiB} MiB of files`,
    [narrowSparse, narrowCompressed, byScript(host, narrow), narrowCat, narrowRaw, narrowUpload],
    { rounds: Math.min(rounds, 2), clear },
  );
  await host.limitLink(undefined);
  const growing = [
    ...[...disks, ...wide].map((each) =>
      ours(host, { name: `virtlift, ${each.dataMiB} MiB in ${each.virtualGiB} GiB`, source: { ova: each.ova } }),
    ),
    ...wide.map((each) => ours(host, { name: `virtlift, the same as raw`, source: { file: each.raw } })),
  ];
  const growth = await contest("growth with data", growing, { rounds, clear });

  const { inflateSeconds, sha256SecondsPerByte } = await step("what the parts cost by themselves", async () => measureCosts(disk));
  const { clientCpuSeconds = 0, hostCpuSeconds = 0 } = standingOf(packed, cat);
  const moveSecondsPerByte = (clientCpuSeconds + hostCpuSeconds) / disk.vmdkBytes;
  const partsOf =
    (sourceBytes: number, isInflated: boolean) =>
    ({ sentBytes = 0 }: Standing): Readonly<Record<string, number>> => ({
      ...(isInflated && { inflating: inflateSeconds }),
      // Of the source, and of what is written frame by frame, as a whole, and on the host.
      "SHA-256": (sourceBytes + 3 * sentBytes) * sha256SecondsPerByte,
      "moving by ssh(1)": sentBytes * moveSecondsPerByte,
    });
  const [ofSparse, ofCompressed, ofPlain] = [
    partsOf(disk.vmdkBytes, true),
    partsOf(disk.vmdkBytes, false),
    partsOf(disk.dataMiB * 2 ** 20, false),
  ];
  const all = [...packed, ...raw, ...qcow2, ...linked, ...growth];
  const peaks = all.flatMap(({ peakRssBytes }) => peakRssBytes ?? []);
  const bytesAlone = ratio(packed, compressed, cat);
  sayAims([
    atLeast("sparse is quicker than the script", ratio(packed, script, sparse), 3, timeOf(packed, sparse, ofSparse)),
    atLeast("compressed is quicker than the script", ratio(packed, script, compressed), 8, timeOf(packed, compressed, ofCompressed)),
    atMost("compressed takes of moving the bytes alone", bytesAlone, 1.3, timeOf(packed, compressed, ofCompressed)),
    atLeast("raw is quicker than vol-upload", ratio(raw, rawUpload, rawOurs), 2, timeOf(raw, rawOurs, ofPlain)),
    atLeast("qcow2 is quicker than vol-upload", ratio(qcow2, qcow2Upload, qcow2Ours), 2, timeOf(qcow2, qcow2Ours, ofPlain)),
    atMost(`compressed, over ${LINK_MEGABITS} Mbit/s, takes of moving the bytes alone`, ratio(linked, narrowCompressed, narrowCat), 1.3),
    atLeast(`raw, over ${LINK_MEGABITS} Mbit/s, is quicker than vol-upload`, ratio(linked, narrowUpload, narrowRaw), 2),
    atMost("peak memory in MB", Math.max(...peaks) / 1e6, 250),
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
  };
  return {
    name,
    run: () =>
      withProcessors(host, async () => {
        const program = join(import.meta.dirname, "import-once.ts");
        const { stdout } = await runCommand([execPath, program, JSON.stringify(request)], { timeoutMs: RUN_TIMEOUT_MS });
        const { cpuSeconds, ...report } = JSON.parse(stdout) as ImportReport;
        return { ...report, clientCpuSeconds: cpuSeconds };
      }),
  };
}

/** What people script: hash here, copy, hash there, convert there. It is spared the unpacking of the OVA. */
function byScript(host: KvmHost, disk: BenchDisk): Contender {
  const copy = `${volumePath(host)}.vmdk`;
  return timed(host, "sha256sum, scp, sha256sum, qemu-img convert", async () => {
    await run(["sha256sum", disk.vmdk]);
    await run(["scp", ...sshOptions(host), disk.vmdk, `root@${host.address}:${copy}`]);
    await onHost(host, ["sha256sum", copy]);
    await onHost(host, ["qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", copy, volumePath(host)]);
    await rm(copy);
  });
}

function byScp(host: KvmHost, path: string): Contender {
  return timed(host, "scp alone", async () => run(["scp", ...sshOptions(host), path, `root@${host.address}:${volumePath(host)}`]));
}

/** Moving the bytes alone: what no import over SSH can be quicker than, unless it moves fewer. */
function byCat(host: KvmHost, path: string): Contender {
  const receive = quoteCommand(["sh", "-c", 'cat > "$1"', "sh", volumePath(host)]);
  const send = quoteCommand(["ssh", ...sshOptions(host), `root@${host.address}`, receive]);
  return timed(host, "ssh cat > file", async () => run(["sh", "-c", `${send} < "$1"`, "sh", path]));
}

/** libvirt's own way, sparse where the source is. */
function byVolumeUpload(host: KvmHost, disk: BenchDisk, format: "raw" | "qcow2"): Contender {
  // libvirt passes neither options nor files on to ssh(1), but lets another program stand for it.
  const ssh = join(host.directory, "ssh");
  const uri = `${host.sshUri()}?command=${encodeURIComponent(ssh)}`;
  const virsh = async (...rest: readonly string[]) => run(["virsh", "--quiet", "--connect", uri, ...rest]);
  return timed(host, `virsh vol-upload${format === "raw" ? " --sparse" : ""}`, async () => {
    await writeFile(ssh, `#!/bin/sh\nexec ${quoteCommand(["ssh", ...sshOptions(host)])} "$@"\n`, { mode: 0o700 });
    await virsh("vol-create-as", "default", VOLUME, `${disk.virtualGiB}G`, "--format", format);
    await virsh("vol-upload", "--pool", "default", VOLUME, disk[format], ...(format === "raw" ? ["--sparse"] : []));
  });
}

function timed(host: KvmHost, name: string, work: () => Promise<unknown>): Contender {
  return {
    name,
    run: () =>
      withProcessors(host, async () => {
        const startedMs = performance.now();
        await work();
        return { seconds: (performance.now() - startedMs) / 1000 };
      }),
  };
}

/** Adds the processors' time that the work took: of our own children, where the work does not say, and of all that the host's sshd started. */
async function withProcessors(host: KvmHost, work: () => Promise<Outcome>): Promise<Outcome> {
  const { pid } = host.sshd.daemon;
  const listeners = new Set([pid, ...descendants(pid)]);
  const hostCpuSeconds = (): number => [...listeners].reduce((sum, each) => sum + childrenCpuSeconds(each), 0);
  const [clientBefore, hostBefore] = [childrenCpuSeconds("self"), hostCpuSeconds()];
  const outcome = await work();
  const clientCpuSeconds = childrenCpuSeconds("self") - clientBefore;
  // The time of a connection's processes counts when they have ended.
  const areGone = (): boolean => descendants(pid).every((each) => listeners.has(each));
  for (const deadline = performance.now() + GONE_TIMEOUT_MS; !areGone() && performance.now() < deadline;) await sleep(10);
  return { clientCpuSeconds, hostCpuSeconds: hostCpuSeconds() - hostBefore, ...outcome };
}

/**
 * User and system time of a process's children that have ended, theirs included; 0 of one that has ended itself, as its parent then has it.
 * Source: proc(5), /proc/pid/stat, cutime and cstime.
 */
function childrenCpuSeconds(pid: number | "self"): number {
  const path = `/proc/${pid}/stat`;
  if (!existsSync(path)) return 0;
  const stat = readFileSync(path, "latin1");
  // The name, in parentheses, may hold anything; behind it comes the third field.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const [user, system] = [fields[16 - 3], fields[17 - 3]];
  return (Number(user) + Number(system)) / TICKS_PER_SECOND;
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
