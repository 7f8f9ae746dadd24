/**
 * One import in a process of its own, so that its peak memory is its alone. Argument: an `ImportRequest` as JSON; prints an `ImportReport` as JSON.
 * The clock runs from opening the source, before the login, to the published volume; loading the code is not counted, which a provider does once.
 */
import { homedir, userInfo } from "node:os";
import { argv, env, getuid, resourceUsage, stdout } from "node:process";
import type { HostSpec } from "../../provider/host/hosts.ts";
import type * as openModule from "../../provider/host/open.ts";
import type * as importModule from "../../provider/transfer/import.ts";
import type * as sourceModule from "../../provider/transfer/source.ts";
import type { SourceSpec } from "../../provider/transfer/source.ts";

export interface ImportRequest {
  readonly host: HostSpec;
  readonly source: SourceSpec;
  readonly finalPath: string;
  readonly format: "qcow2" | "raw";
  readonly layout: "sparse" | "compressed" | "full";
  readonly verify: "digest" | "content";
  /** Names the part, so that a later run finds it. */
  readonly id: string;
  /** Whether the code in dist/ runs, as for users; else the source, whose compiler takes memory of its own. */
  readonly isCompiled: boolean;
}

export interface ImportReport {
  readonly seconds: number;
  /** User and system time of this process with all its threads. */
  readonly cpuSeconds: number;
  readonly peakRssBytes: number;
  readonly sentBytes: number;
  /** Of `seconds`: until the first read of the data, until the last, and until the volume was published. */
  readonly phases: { readonly beginning: number; readonly moving: number; readonly closing: number };
}

const request = JSON.parse(argv[2] ?? "") as ImportRequest;
const kind = request.isCompiled ? { folder: "dist/provider", extension: "js" } : { folder: "provider", extension: "ts" };
const load = async (name: string): Promise<unknown> =>
  import(new URL(`../../${kind.folder}/${name}.${kind.extension}`, import.meta.url).href);
const { createHosts } = (await load("host/open")) as typeof openModule;
const { importDisk } = (await load("transfer/import")) as typeof importModule;
const { openSource } = (await load("transfer/source")) as typeof sourceModule;

const hosts = createHosts({
  environment: env,
  homeDirectory: homedir(),
  userName: userInfo().username,
  userId: getuid?.() ?? 0,
});
const startedMs = performance.now();
let firstReadMs: number | undefined;
let lastReadMs = startedMs;
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
  onProgress: () => {
    lastReadMs = performance.now();
    firstReadMs ??= lastReadMs;
  },
});
const endedMs = performance.now();
const cpu = resourceUsage();
const cpuMicroseconds = cpu.userCPUTime + cpu.systemCPUTime - cpuBefore.userCPUTime - cpuBefore.systemCPUTime;
const report: ImportReport = {
  seconds: (endedMs - startedMs) / 1000,
  cpuSeconds: cpuMicroseconds / 1e6,
  peakRssBytes: cpu.maxRSS * 1024,
  sentBytes,
  phases: {
    beginning: ((firstReadMs ?? endedMs) - startedMs) / 1000,
    moving: (lastReadMs - (firstReadMs ?? lastReadMs)) / 1000,
    closing: (endedMs - Math.max(lastReadMs, firstReadMs ?? endedMs)) / 1000,
  },
};
stdout.write(`${JSON.stringify(report)}\n`);
await hosts.close();
