/**
 * What a preview costs: calls of libvirt's, commands on the host, and seconds for each resource, of disks and machines on one host that are checked one
 * after the other as the engine does it, by socket and over SSH; and the whole preview by the engine, of what is new and of what is there already.
 */
import { writeFile } from "node:fs/promises";
import { createServer, connect } from "node:net";
import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import { env } from "node:process";
import { createHosts } from "../../provider/host/open.ts";
import { importedDisk } from "../../provider/resources/imported-disk.ts";
import type { Context } from "../../provider/resources/resource.ts";
import { virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { openKvmHost, type KvmHost } from "../../test/bed/libvirtd.ts";
import { openPulumi } from "../../test/bed/pulumi.ts";
import { countingHosts } from "../../test/resources/preflight/counting-hosts.ts";
import { bold, say, step } from "../setup/steps.ts";

const COUNTS = [1, 10, 100] as const;

/** A row of the table. `commands` is undefined where nobody counted them. */
interface Cost {
  readonly name: string;
  readonly resources: number;
  readonly calls: number;
  readonly commands: number | undefined;
  readonly seconds: number;
}

/** Measures on a private host, and prints the table. Needs root and a Pulumi CLI; takes about two minutes. */
export async function benchPreview(): Promise<void> {
  await using host = await step("private KVM host", async () => openKvmHost({ name: "preview", network: true }));
  const file = join(host.directory, "disk.raw");
  await writeFile(file, Buffer.alloc(1024 * 1024, "content"));
  const costs: Cost[] = [];
  const { clientKey, knownHostsFile } = host.sshd;
  const ways = { socket: host.uri, SSH: { uri: host.sshUri(), identityFile: clientKey.path, knownHostsFile } };
  for (const [way, declared] of Object.entries(ways)) {
    for (const count of COUNTS) costs.push(await step(`checks by ${way}, ${count}`, async () => checkPairs(way, declared, file, count)));
  }
  costs.push(...(await previewByEngine(host, file)));
  sayCosts(costs);
}

/** Checks as many disks, each with its machine, over hosts that were not asked before. */
async function checkPairs(way: string, host: unknown, file: string, count: number): Promise<Cost> {
  const { username, uid } = userInfo();
  const opened = createHosts({ environment: env, homeDirectory: homedir(), userName: username, userId: uid });
  try {
    const counting = countingHosts(opened);
    const context: Context = {
      config: () => undefined,
      log: () => undefined,
      signal: new AbortController().signal,
      hosts: counting.hosts,
    };
    const startedMs = performance.now();
    for (let index = 0; index < count; index++) {
      const origin = `bench/preview/test/web-${index}`;
      const disk = await importedDisk.check(context, undefined, { host, origin: `${origin}-root`, source: { file } });
      const { diskId, path } = disk.inputs;
      const machine = { host, origin, importedDisk: { diskId, path }, memoryMiB: 16, networks: [{ network: "default" }] };
      const { failures } = await virtualMachine.check(context, undefined, machine);
      const [failure] = [...disk.failures, ...failures];
      if (failure) throw new Error(failure.reason);
    }
    const seconds = (performance.now() - startedMs) / 1000;
    const { calls, commands } = counting.count;
    return { name: `checks by ${way}`, resources: 2 * count, calls, commands, seconds };
  } finally {
    await opened.close();
  }
}

const PROGRAM = `
import { ImportedDisk, VirtualMachine } from "virtlift";
import { Config } from "@pulumi/pulumi";
const config = new Config();
for (let index = 0; index < config.requireNumber("count"); index++) {
  const importedDisk = new ImportedDisk("web-" + index + "-root", { source: { file: config.require("file") } });
  new VirtualMachine("web-" + index, { importedDisk, memoryMiB: 16, networks: [{ network: "default" }], powerState: "stopped", domainType: "qemu" });
}
`;

/** The engine's own previews: of no resource, of all of them new, and of all of them made. */
async function previewByEngine(host: KvmHost, file: string): Promise<readonly Cost[]> {
  await using relay = await openRelay(host.socketPath, join(host.directory, "relay.sock"));
  await using pulumi = await openPulumi();
  const config = { "virtlift:host": `qemu+unix:///system?socket=${relay.path}`, file, count: "0" };
  const project = await pulumi.openProject(PROGRAM, { config });
  const measure = async (name: string, count: number, ...argv: readonly string[]): Promise<Cost> =>
    step(`engine: ${name}, ${count}`, async () => {
      await project.mustRun("config", "set", "count", String(count));
      const before = relay.packets();
      const startedMs = performance.now();
      await project.mustRun(...argv);
      const seconds = (performance.now() - startedMs) / 1000;
      return { name: `engine: ${name}`, resources: 2 * count, calls: relay.packets() - before, commands: undefined, seconds };
    });
  const count = Math.max(...COUNTS);
  const costs = [await measure("preview of nothing", 0, "preview"), await measure("preview of what is new", count, "preview")];
  await step("engine: up", async () => project.mustRun("up", "--yes", "--skip-preview"));
  costs.push(await measure("preview of what is there", count, "preview", "--expect-no-changes"));
  await step("engine: destroy", async () => project.mustRun("destroy", "--yes", "--skip-preview"));
  return costs;
}

/** A socket that passes everything on to libvirt's, and counts the packets that clients send: each begins with its length, which counts itself. */
async function openRelay(to: string, path: string): Promise<AsyncDisposable & { readonly path: string; packets(): number }> {
  let packets = 0;
  const server = createServer((client) => {
    const daemon = connect(to);
    let pending = Buffer.alloc(0);
    client.on("data", (chunk) => {
      pending = Buffer.concat([pending, chunk]);
      for (; pending.length >= 4 && pending.length >= pending.readUInt32BE(0); packets++)
        pending = pending.subarray(pending.readUInt32BE(0));
    });
    client.pipe(daemon).pipe(client);
    client.on("error", () => daemon.destroy());
    daemon.on("error", () => client.destroy());
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  return {
    path,
    packets: () => packets,
    [Symbol.asyncDispose]: () => new Promise((resolve) => server.close(() => resolve())),
  };
}

function sayCosts(costs: readonly Cost[]): void {
  const each = ({ seconds, resources }: Cost): number => (1000 * seconds) / Math.max(1, resources);
  const cheapest = Math.min(...costs.filter(({ resources }) => resources > 0).map(each));
  const rows = costs.map((cost) => [
    cost.name,
    String(cost.resources),
    String(cost.calls),
    String(cost.commands ?? ""),
    `${cost.seconds.toFixed(2)} s`,
    ...(cost.resources === 0
      ? ["", "", ""]
      : [(cost.calls / cost.resources).toFixed(2), `${each(cost).toFixed(1)} ms`, `${(each(cost) / cheapest).toFixed(1)} x`]),
  ]);
  const table = [["", "resources", "calls", "commands", "time", "calls each", "time each", "ratio"], ...rows];
  const widths = table[0]!.map((_, column) => Math.max(...table.map((row) => row[column]!.length)));
  for (const [index, row] of table.entries()) {
    const line = row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!))).join("   ");
    say(`  ${index === 0 ? bold(line) : line}`);
  }
  say();
}
