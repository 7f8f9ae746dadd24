/** The rules without a program: what they say of an image or a package, were it brought to a host as it is. Changes nothing anywhere. */
import { basename, dirname, join } from "node:path";
import { DiskError } from "../../errors.ts";
import type { z } from "zod";
import { importedDisk } from "../imported-disk.ts";
import { describeMachine, type MachineDescription } from "../machine-description.ts";
import type { CheckFailure, Context } from "../resource.ts";
import type { HostSchema } from "../schema.ts";
import { virtualMachine } from "../virtual-machine.ts";
import { deploymentOf } from "./deployment.ts";
import { PACKAGE_RULES } from "./package-rules.ts";
import { type Judgement, judge, type Level } from "./rule.ts";

export interface CheckRequest {
  /** Path of an image, an OVA, an OVF or a VMX on this machine, or of a zip archive of one of the first three. */
  readonly path: string;
  readonly host: z.input<typeof HostSchema>;
  /** Default `default`. */
  readonly pool?: string | undefined;
  /** The network that the machine's interfaces are connected to. Default `default`. */
  readonly network?: string | undefined;
}

/** Something that was found, in plain JSON. */
export interface CheckFinding {
  /** `disk 0`, `machine`. */
  readonly resource: string;
  /** undefined where an argument is none at all. */
  readonly rule?: string | undefined;
  readonly level: Level;
  readonly property: string;
  readonly reason: string;
}

export interface CheckReport {
  readonly path: string;
  /** The worst level among the findings; `ok` when there is none above `info`. */
  readonly verdict: "ok" | "warn" | "block";
  /** What would be done: from where, in what form, where to, how much, how long. */
  readonly plan: readonly string[];
  readonly findings: readonly CheckFinding[];
}

/** Who asks: no resource of any stack. */
const ORIGIN = "virtlift/check/check";

/** Throws nothing that a rule knows; what else the host or the file system throws. */
export async function checkSource(
  context: Context,
  { path, host, pool = "default", network = "default" }: CheckRequest,
): Promise<CheckReport> {
  const plan: string[] = [];
  const findings: CheckFinding[] = [];
  const listening: Context = { ...context, log: (_level, line) => void (line.includes(" -> ") && plan.push(line)) };
  const tell = (resource: string, judgements: readonly Judgement[]) =>
    void findings.push(...judgements.map(({ rule, level, property, reason }) => ({ resource, rule, level, property, reason })));
  const note = (resource: string, origin: string, failures: readonly CheckFailure[]) => {
    const judgements = deploymentOf(context.hosts).judgementsOf(origin);
    tell(resource, judgements);
    const others = failures.filter(({ reason }) => !judgements.some((judgement) => judgement.reason === reason));
    findings.push(...others.map((failure) => ({ resource, level: "block" as const, ...failure })));
  };

  let machine: MachineDescription | undefined;
  try {
    machine = isPackage(path) ? describeMachine(path) : undefined;
  } catch (error) {
    if (!(error instanceof DiskError)) throw error;
    // Of an archive and an OVF the check of the disk in it says why; a zip archive may be one of a disk alone.
    if (isVmx(path)) note("machine", ORIGIN, [{ property: "source", reason: error.message }]);
  }
  if (machine !== undefined) tell("machine", judge(PACKAGE_RULES, machine, {}));
  const name = machine?.name ?? basename(path).replace(/\.[^.]*$/, "");
  const disks: object[] = [];
  for (const source of sourcesOf(path, machine)) {
    const origin = `${ORIGIN}/${name}-disk${disks.length}`;
    const { inputs, failures } = await importedDisk.check(listening, undefined, { origin, host, pool, source });
    note(`disk ${disks.length}`, origin, failures);
    disks.push({ diskId: inputs.diskId, path: inputs.path, format: inputs.format, pool });
  }
  if (machine !== undefined) {
    const origin = `${ORIGIN}/${name}`;
    const [boot, ...further] = disks;
    const networks = machine.networks.map(({ mac, model, link }) => ({ network, model, mac, link }));
    const blanks = machine.disks.flatMap(({ file, sizeBytes, index }) =>
      file === undefined && sizeBytes !== undefined ? [{ size: sizeBytes, name: `disk${index}`, pool }] : [],
    );
    const declared = {
      origin,
      host,
      ...machine.hardware,
      networks,
      importedDisk: boot,
      disks: [...further.map((disk) => ({ disk })), ...blanks, ...(machine.cdroms ?? []).map(() => ({ device: "cdrom" }))],
    };
    note("machine", origin, (await virtualMachine.check(listening, undefined, present(declared))).failures);
  }
  const levels = new Set(findings.map(({ level }) => level));
  return { path, verdict: levels.has("block") ? "block" : levels.has("warn") ? "warn" : "ok", plan, findings };
}

function sourcesOf(path: string, machine: MachineDescription | undefined): readonly object[] {
  if (!isPackage(path)) return [{ file: path }];
  if (machine === undefined) return isVmx(path) ? [] : [isZipName(path) ? { file: path } : { ova: path }];
  const sourceOf = (file: string, index: number) =>
    isVmx(path) ? { file: join(dirname(path), file), vmx: path } : { ova: path, disk: index };
  return machine.disks.flatMap(({ file, index }) => (file === undefined ? [] : [sourceOf(file, index)]));
}

function isPackage(path: string): boolean {
  return /\.(ova|ovf)$/i.test(path) || isVmx(path) || isZipName(path);
}

/** It may hold a machine, or a disk alone. */
function isZipName(path: string): boolean {
  return /\.zip$/i.test(path);
}

function isVmx(path: string): boolean {
  return /\.vmx$/i.test(path);
}

/** A copy without what is undefined, at any depth. */
function present(value: object): unknown {
  return JSON.parse(JSON.stringify(value));
}
