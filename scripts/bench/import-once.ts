/**
 * One import in a process of its own, so that its peak memory is its alone. Argument: an `ImportRequest` as JSON; prints an `ImportReport` as JSON.
 * The clock runs from opening the source, before the login, to the published volume; loading the code is not counted, which a provider does once.
 */
import { homedir, userInfo } from "node:os";
import { argv, env, getuid, resourceUsage, stdout } from "node:process";
import type { HostSpec } from "../../provider/host/hosts.ts";
import { createHosts } from "../../provider/host/open.ts";
import { importDisk } from "../../provider/transfer/import.ts";
import { openSource, type SourceSpec } from "../../provider/transfer/source.ts";

export interface ImportRequest {
  readonly host: HostSpec;
  readonly source: SourceSpec;
  readonly finalPath: string;
  readonly format: "qcow2" | "raw";
  readonly layout: "sparse" | "compressed" | "full";
  readonly verify: "digest" | "content";
  /** Names the part, so that a later run finds it. */
  readonly id: string;
}

export interface ImportReport {
  readonly seconds: number;
  /** User and system time of this process with all its threads. */
  readonly cpuSeconds: number;
  readonly peakRssBytes: number;
  readonly sentBytes: number;
}

const request = JSON.parse(argv[2] ?? "") as ImportRequest;
const hosts = createHosts({
  environment: env,
  homeDirectory: homedir(),
  userName: userInfo().username,
  userId: getuid?.() ?? 0,
});
const startedMs = performance.now();
const cpuBefore = resourceUsage();
await using source = await openSource(request.source);
const { sentBytes } = await importDisk(hosts.open(request.host), source, {
  id: request.id,
  finalPath: request.finalPath,
  format: request.format,
  layout: request.layout,
  verify: request.verify,
  capacityBytes: source.image.virtualSizeBytes,
  stamp: (ends) => ({ importId: request.id, ...ends }),
  signal: new AbortController().signal,
  onProgress: () => {},
});
const seconds = (performance.now() - startedMs) / 1000;
const cpu = resourceUsage();
const cpuMicroseconds = cpu.userCPUTime + cpu.systemCPUTime - cpuBefore.userCPUTime - cpuBefore.systemCPUTime;
const report: ImportReport = { seconds, cpuSeconds: cpuMicroseconds / 1e6, peakRssBytes: cpu.maxRSS * 1024, sentBytes };
stdout.write(`${JSON.stringify(report)}\n`);
await hosts.close();
