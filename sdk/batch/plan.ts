/** What a batch is going to do, and what stands in its way: the findings of all machines, and those that only show when they are seen together. Pure. */
import type { HostSurvey, SourceMeasure } from "../../provider/toolbox.ts";
import type { Step } from "./job.ts";
import type { BatchMachine } from "./manifest.ts";
import { formatBytes } from "./words.ts";

/** `block`: the machine does not start. `warn`: it may. `info`: good to know. */
export interface Finding {
  readonly level: "block" | "warn" | "info";
  readonly text: string;
  /** The user's reason for giving its rule another level, or none. */
  readonly waiver?: string | undefined;
}

/** What is known of a machine once it was previewed. */
export interface Previewed {
  readonly machine: BatchMachine;
  /** Steps on its disks and itself; empty when the preview failed early. */
  readonly steps: readonly Step[];
  readonly findings: readonly Finding[];
  /** Of the sources of its disks, by the disk's logical name. */
  readonly measures: ReadonlyMap<string, SourceMeasure>;
}

/** One row of a plan. */
export interface MachinePlan {
  readonly machine: BatchMachine;
  /** `create`, `update`, `replace`, `same`, or `blocked` when it may not start. */
  readonly action: "create" | "update" | "replace" | "same" | "blocked";
  /** Of what is there already and will not stay as it is, sorted: `memoryMiB`, and `web-disk0.capacity` of a disk. Empty where nothing is. */
  readonly changes: readonly string[];
  readonly disks: number;
  readonly virtualSizeBytes: number;
  /** An upper bound of what is going to be sent; 0 when nothing is. */
  readonly wireBytes: number;
  /** By the rate that is assumed. */
  readonly estimateSeconds: number;
  readonly findings: readonly Finding[];
}

export interface BatchPlan {
  readonly machines: readonly MachinePlan[];
  /** Whether every machine may start. */
  readonly isClear: boolean;
  /** What the estimates reckon with, and where that is from. */
  readonly bytesPerSecond: number;
  readonly basis: keyof Rates;
}

/** Bytes per second. */
export interface Rates {
  /** What previews assume. */
  readonly assumed: number;
  /** Of the copies that the batch has made, which count in place of what is assumed. */
  readonly seen?: number | undefined;
  /** What all copies together may send. Default: no limit. */
  readonly limit?: number | undefined;
}

/** Puts the machines together. `surveys` are of their hosts, by URI; a host that could not be asked is not in it. */
export function planBatch(
  previewed: readonly Previewed[],
  surveys: ReadonlyMap<string, HostSurvey>,
  { assumed, seen, limit = Number.POSITIVE_INFINITY }: Rates,
): BatchPlan {
  const expected = seen ?? assumed;
  const bytesPerSecond = Math.min(expected, limit);
  const basis = limit < expected ? "limit" : seen === undefined ? "assumed" : "seen";
  const shared = [
    ...collisions(previewed),
    ...macWarnings(previewed),
    ...roomFindings(previewed, surveys),
    ...memoryFindings(previewed, surveys),
  ];
  const machines = previewed.map((each): MachinePlan => {
    const findings = [...each.findings, ...shared.filter(({ machine }) => machine === each.machine.name).map(({ finding }) => finding)];
    const measures = [...each.measures.values()];
    const wireBytes = copiesOf(each).reduce((sum, copy) => sum + copy.wireBytes, 0);
    return {
      machine: each.machine,
      action: findings.some(({ level }) => level === "block") ? "blocked" : actionOf(each.steps),
      changes: changesOf(each.steps),
      disks: measures.length,
      virtualSizeBytes: measures.reduce((sum, { virtualSizeBytes }) => sum + virtualSizeBytes, 0),
      wireBytes,
      estimateSeconds: wireBytes / bytesPerSecond,
      findings,
    };
  });
  return { machines, isClear: machines.every(({ action }) => action !== "blocked"), bytesPerSecond, basis };
}

function actionOf(steps: readonly Step[]): MachinePlan["action"] {
  const ops = steps.map(({ op }) => op);
  if (ops.some((op) => op.includes("replace"))) return "replace";
  if (ops.some((op) => op !== "same" && op !== "create")) return "update";
  if (ops.every((op) => op === "same")) return "same";
  return ops.every((op) => op === "create") ? "create" : "update";
}

function changesOf(steps: readonly Step[]): readonly string[] {
  const places = steps.flatMap(({ kind, name, op, changed }) =>
    op === "update" || op.includes("replace")
      ? changed.map((property) => (kind === "VirtualMachine" ? property : `${name}.${property}`))
      : [],
  );
  return [...new Set(places)].toSorted();
}

/** The disks that are going to be copied. */
function copiesOf({ steps, measures }: Previewed): readonly { readonly pool: string; readonly wireBytes: number }[] {
  return steps.flatMap(({ kind, name, op, properties }) => {
    const measure = measures.get(name);
    if (kind !== "ImportedDisk" || measure === undefined || (op !== "create" && op !== "create-replacement")) return [];
    const sizeBytes = Math.max(measure.virtualSizeBytes, Number(properties["capacity"] ?? 0));
    const wireBytes = properties["layout"] === "full" ? sizeBytes : Math.min(sizeBytes, measure.dataBytes);
    return [{ pool: String(properties["pool"]), wireBytes }];
  });
}

interface SharedFinding {
  readonly machine: string;
  readonly finding: Finding;
}

/** What only one machine of a host can have, and more than one asks for. */
function collisions(previewed: readonly Previewed[]): readonly SharedFinding[] {
  const claims = new Map<string, { readonly words: string; readonly machines: Set<string> }>();
  for (const { machine, steps } of previewed) {
    const host = machine.declaration.host.uri;
    for (const { what, value } of steps.flatMap(claimsOf)) {
      const key = JSON.stringify([host, what, value]);
      const claim = claims.get(key) ?? { words: `${what} ${value} on ${machine.hostName}`, machines: new Set() };
      claims.set(key, { ...claim, machines: claim.machines.add(machine.name) });
    }
  }
  return [...claims.values()]
    .filter(({ machines }) => machines.size > 1)
    .flatMap(({ words, machines }) =>
      [...machines].map((machine) => {
        const others = [...machines].filter((other) => other !== machine).join(", ");
        return {
          machine,
          finding: { level: "block", text: `the ${words} is claimed by ${others} of this batch too: give one of them another` } as const,
        };
      }),
    );
}

/** Machines of different hosts may share a network, and then no MAC address: whether they do is known to nobody here. */
function macWarnings(previewed: readonly Previewed[]): readonly SharedFinding[] {
  const owners = previewed.flatMap(({ machine, steps }) =>
    steps.flatMap(claimsOf).flatMap(({ what, value }) => (what === MAC_ADDRESS ? [{ machine, mac: value }] : [])),
  );
  return [...Map.groupBy(owners, ({ mac }) => mac)].flatMap(([mac, users]) =>
    users.flatMap(({ machine }) => {
      const others = users.filter((other) => other.machine.declaration.host.uri !== machine.declaration.host.uri);
      if (others.length === 0) return [];
      const names = others.map((other) => `${other.machine.name} on ${other.machine.hostName}`).join(", ");
      const text = `the MAC address ${mac} is that of ${names} too: where both are on one network neither is reached; give one of them another`;
      return [{ machine: machine.name, finding: { level: "warn", text } as const }];
    }),
  );
}

const MAC_ADDRESS = "MAC address";

function claimsOf({ kind, op, properties }: Step): readonly { readonly what: string; readonly value: string }[] {
  if (op.includes("delete")) return [];
  const claim = (what: string, value: unknown) => (typeof value === "string" && value !== "" ? [{ what, value }] : []);
  if (kind === "ImportedDisk") return claim("path", properties["path"]);
  const macs = Array.isArray(properties["macAddresses"]) ? properties["macAddresses"] : [];
  return [
    ...claim("name", properties["name"]),
    ...claim("UUID", properties["uuid"]),
    ...claim("serial log", properties["serialLog"]),
    ...macs.flatMap((mac) => claim(MAC_ADDRESS, mac)),
  ];
}

/** Whether the disks of all machines together have room, pool by pool. */
function roomFindings(previewed: readonly Previewed[], surveys: ReadonlyMap<string, HostSurvey>): readonly SharedFinding[] {
  return groupByHost(previewed).flatMap(([uri, machines]) =>
    (surveys.get(uri)?.pools ?? []).flatMap(({ name, freeBytes }) => {
      const users = machines.map((each) => ({
        machine: each.machine,
        neededBytes: copiesOf(each)
          .filter(({ pool }) => pool === name)
          .reduce((sum, { wireBytes }) => sum + wireBytes, 0),
      }));
      const neededBytes = users.reduce((sum, each) => sum + each.neededBytes, 0);
      const claimants = users.filter((each) => each.neededBytes > 0);
      // A single machine's own check says it already.
      if (neededBytes <= freeBytes || claimants.length < 2) return [];
      const text = `the pool ${name} of ${claimants[0]!.machine.hostName} has ${formatBytes(freeBytes)} free, and the ${claimants.length} machines of this batch take up to ${formatBytes(neededBytes)}: make room, or choose another pool`;
      return claimants.map(({ machine }) => ({ machine: machine.name, finding: { level: "block", text } as const }));
    }),
  );
}

/** Whether the machines fit into their hosts' memory, beside those that run there: hosts may share it out twice, which is slow at best. */
function memoryFindings(previewed: readonly Previewed[], surveys: ReadonlyMap<string, HostSurvey>): readonly SharedFinding[] {
  return groupByHost(previewed).flatMap(([uri, machines]) => {
    const survey = surveys.get(uri);
    if (survey === undefined) return [];
    const starting = machines.flatMap(({ machine, steps }) =>
      steps
        .filter(({ kind, op, properties }) => kind === "VirtualMachine" && op === "create" && properties["powerState"] === "running")
        .map(({ properties }) => ({ machine, memoryMiB: Number(properties["memoryMiB"] ?? 0) })),
    );
    const neededMiB = starting.reduce((sum, { memoryMiB }) => sum + memoryMiB, 0);
    const freeMiB = survey.memoryMiB - survey.usedMemoryMiB;
    if (neededMiB <= freeMiB) return [];
    const text = `${starting[0]!.machine.hostName} has ${survey.memoryMiB} MiB of memory, of which its machines have ${survey.usedMemoryMiB}, and those of this batch take ${neededMiB}: spread them, or give them less`;
    return starting.map(({ machine }) => ({ machine: machine.name, finding: { level: "warn", text } as const }));
  });
}

function groupByHost(previewed: readonly Previewed[]): readonly (readonly [string, readonly Previewed[]])[] {
  return [...Map.groupBy(previewed, ({ machine }) => machine.declaration.host.uri)];
}
