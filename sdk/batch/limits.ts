/** How many machines may be worked on at a time. Pure. */
import { dirname } from "node:path";
import type { BatchMachine } from "./manifest.ts";

export interface Limits {
  readonly total: number;
  readonly perSource: number;
}

/** Whether a machine may start beside those that are worked on: in all, on its host by the host's own limit, and from its source's folder. */
export function hasRoom(machine: BatchMachine, running: readonly BatchMachine[], { total, perSource }: Limits): boolean {
  const onHost = running.filter(({ declaration }) => declaration.host.uri === machine.declaration.host.uri).length;
  const fromSource = running.filter((other) => sourceFolder(other) === sourceFolder(machine)).length;
  return running.length < total && onHost < machine.maxPerHost && fromSource < perSource;
}

/** The folder of a file, which tells the disk or the share that it is read from; any other source is one by itself. */
function sourceFolder({ declaration: { source } }: BatchMachine): string {
  const path = source["ova"] ?? source["vmx"] ?? source["file"];
  return typeof path === "string" ? dirname(path) : JSON.stringify(source);
}
