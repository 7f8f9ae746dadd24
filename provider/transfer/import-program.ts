/** The program behind `importInProcess`: does one import, and ends when it is done or when whoever asked for it is gone. */
import { resourceUsage } from "node:process";
import { packError } from "../errors.ts";
import { createHosts } from "../host/open.ts";
import { capacityOf, importDisk } from "./import.ts";
import type { Command, ImportOrder, Report } from "./import-process.ts";
import { openSource } from "./source.ts";
import { type Throttle, unlessAborted } from "./throttle.ts";

/** More often nobody looks. */
const PROGRESS_MS = 100;

const abort = new AbortController();
const waiting: (() => void)[] = [];

process.on("disconnect", () => process.exit());
process.on("uncaughtException", (error) => tell({ failure: packError(error) }));
process.on("message", (command: Command) => {
  if (command === "abort") abort.abort();
  else if ("granted" in command) waiting.shift()?.();
  else void work(command.order, command.bytesPerSecond);
});

async function work(order: ImportOrder, bytesPerSecond: number | undefined): Promise<void> {
  try {
    const result = await carryOut(order, bytesPerSecond);
    const { userCPUTime, systemCPUTime, maxRSS } = resourceUsage();
    tell({ result, usage: { cpuSeconds: (userCPUTime + systemCPUTime) / 1e6, peakRssBytes: maxRSS * 1024 } });
  } catch (error) {
    tell({ failure: packError(error) });
  }
}

async function carryOut(
  { host, hosts: surroundings, source: spec, sourceOptions, options }: ImportOrder,
  bytesPerSecond: number | undefined,
) {
  const { signal } = abort;
  const hosts = createHosts(surroundings);
  try {
    await using source = await openSource(spec, { ...sourceOptions, signal });
    const capacityBytes = capacityOf(source, options.capacityBytes);
    const throttle = bytesPerSecond === undefined ? undefined : askingThrottle(bytesPerSecond);
    return await importDisk(hosts.open(host), source, { ...options, capacityBytes, throttle, signal, onProgress: teller() });
  } finally {
    await hosts.close();
  }
}

/** The limit is kept by whoever asked for the import. */
function askingThrottle(bytesPerSecond: number): Throttle {
  return {
    bytesPerSecond,
    async take(bytes, signal) {
      signal?.throwIfAborted();
      tell({ wantedBytes: bytes });
      await unlessAborted(new Promise<void>((resolve) => waiting.push(resolve)), signal);
    },
  };
}

function teller(): (doneBytes: number, totalBytes: number) => void {
  let toldMs = 0;
  return (doneBytes, totalBytes) => {
    const nowMs = performance.now();
    if (doneBytes < totalBytes && nowMs - toldMs < PROGRESS_MS) return;
    toldMs = nowMs;
    tell({ doneBytes, totalBytes });
  };
}

function tell(report: Report): void {
  process.send?.(report);
}
