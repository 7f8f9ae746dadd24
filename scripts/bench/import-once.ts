/**
 * One import as the provider does it. Argument: an `ImportRequest` as JSON; prints an `ImportReport` as JSON.
 * The clock runs from the start of the importing process, before the login, to the published volume.
 */
import { homedir, userInfo } from "node:os";
import { argv, env, getuid, stdout } from "node:process";
import type { HostSpec } from "../../provider/host/hosts.ts";
import type * as processModule from "../../provider/transfer/import-process.ts";
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
}

export interface ImportReport {
  readonly seconds: number;
  /** Of the importing process with all its threads. */
  readonly cpuSeconds: number;
  readonly peakRssBytes: number;
  readonly sentBytes: number;
  /** Of `seconds`: until the first read of the data was told, until the last, and until the volume was published. */
  readonly phases: { readonly beginning: number; readonly moving: number; readonly closing: number };
}

const request = JSON.parse(argv[2] ?? "") as ImportRequest;
// The code in dist/, as users run it: that of the sources has a compiler in its memory.
const built = new URL("../../dist/provider/transfer/import-process.js", import.meta.url).href;
const { importInProcess } = (await import(built)) as typeof processModule;

const { host, source, ...options } = request;
const startedMs = performance.now();
let firstReadMs: number | undefined;
let lastReadMs = startedMs;
const { sentBytes, usage } = await importInProcess(
  {
    host,
    hosts: { environment: env, homeDirectory: homedir(), userName: userInfo().username, userId: getuid?.() ?? 0 },
    source,
    sourceOptions: {},
    options: { ...options, capacityBytes: 0, stamp: { importId: request.id } },
  },
  {
    signal: new AbortController().signal,
    onProgress: () => {
      lastReadMs = performance.now();
      firstReadMs ??= lastReadMs;
    },
  },
);
const endedMs = performance.now();
const report: ImportReport = {
  seconds: (endedMs - startedMs) / 1000,
  ...usage,
  sentBytes,
  phases: {
    beginning: ((firstReadMs ?? endedMs) - startedMs) / 1000,
    moving: (lastReadMs - (firstReadMs ?? lastReadMs)) / 1000,
    closing: (endedMs - Math.max(lastReadMs, firstReadMs ?? endedMs)) / 1000,
  },
};
stdout.write(`${JSON.stringify(report)}\n`);
