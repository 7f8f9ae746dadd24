/** The manifest of a batch: its shape, its defaults, and what is wrong with one, by line. */
import { readFileSync } from "node:fs";
import { basename, dirname, extname } from "node:path";
import { type Document, isMap, isPair, isScalar, LineCounter, type Node, parseDocument, visit } from "yaml";
import { z } from "zod";
import { loadProvider } from "../provider.ts";
import type { DeclaredHost, MachineDeclaration } from "./job.ts";
import { parseRate } from "./words.ts";

const MAX_MANIFEST_BYTES = 8 * 1024 * 1024;
/** What aliases may unfold to, times what they are written as: a few lines can ask for more memory than there is. */
const MAX_ALIASES = 1000;

const NameSchema = z
  .string()
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/, "a name is 1 to 100 letters, digits and . _ -, beginning with a letter or digit");

const SecretSchema = z
  .union([z.strictObject({ env: z.string().min(1) }), z.strictObject({ file: z.string().min(1) })], {
    error: "a secret is never written here: give { env: NAME } or { file: path }",
  })
  .meta({ description: "Where a secret is: an environment variable or a file." });

const BandwidthSchema = z
  .union([z.number(), z.string()])
  .refine((rate) => parseRate(rate) !== undefined, 'a rate is a number of bytes per second from 1024 on, or a string such as "50MiB"')
  .meta({
    description:
      'What all copies together may send: bytes per second, or a string such as "50MiB". What a host fetches by itself does not count. Default: no limit.',
  });

const HostSchema = z
  .union([
    z.string().min(1),
    z.looseObject({
      uri: z.string().min(1).describe("A libvirt URI: qemu:///system, qemu+ssh://user@host:port/system."),
      passphrase: SecretSchema.optional(),
      password: SecretSchema.optional(),
      maxConcurrent: z.number().int().min(1).optional().describe("Copies to this host at a time. Default: limits.perHost."),
    }),
  ])
  .describe("A libvirt URI, or an object with what a URI cannot say: identityFile, knownHostsFile, fingerprint, jumpHosts, sudo.");

const HooksSchema = z
  .strictObject({
    before: z
      .array(z.string().min(1))
      .min(1)
      .optional()
      .describe("A program and its arguments, run before; what fails keeps the rest from starting."),
    after: z.array(z.string().min(1)).min(1).optional().describe("A program and its arguments, run after success."),
  })
  .describe("Programs that run on this machine, without a shell. They see VIRTLIFT_BATCH, VIRTLIFT_MACHINE or VIRTLIFT_WAVE.");

const Arguments = z.record(z.string(), z.unknown());

/** What a machine and the defaults both may say. */
const shared = {
  host: z.string().min(1).optional().describe("A name from `hosts`, or a libvirt URI."),
  wave: z.number().int().min(1).max(1000).optional().describe("Waves run one after the other. Default 1."),
  networks: Arguments.optional().describe(
    "What the machine's networks become: by their names, `*` for all others. Default { '*': default }.",
  ),
  pools: z.record(z.string(), z.string()).optional().describe("The pool of each disk: by file name, label or number, `*` for all others."),
  disks: Arguments.optional().describe(
    "Arguments of ImportedDisk: by file name, label or number, `*` for all others; false leaves a disk out.",
  ),
  machine: Arguments.optional().describe("Arguments of VirtualMachine, over what the source says."),
  labels: z.record(z.string(), z.string()).optional().describe("For selection: virtlift up --label team=web."),
  hooks: HooksSchema.optional(),
};

const MachineSchema = z.strictObject({
  source: z
    .looseObject(
      {},
      {
        error:
          "say where the machine comes from: { ova: path }, { vmx: path }, or { file: path } and other sources of a machine of one disk",
      },
    )
    .describe(
      "Where the machine comes from: { ova: path } of an OVA, an OVF or a zip archive of either, { vmx: path } of a VMX beside its VMDKs, or a source of ImportedDisk for a machine of one disk. Relative to the manifest.",
    ),
  name: NameSchema.optional().describe("The machine's name in libvirt. Default: its key here."),
  migrationRef: z.string().max(200).optional().describe("The user's own name for this migration. Default: wave-<wave>/<key>."),
  dependsOn: z.array(NameSchema).optional().describe("Machines that are to be there first."),
  ...shared,
});

/** The shape of a manifest. The one source of its documentation. */
export const ManifestSchema = z.strictObject({
  $schema: z.string().optional().describe("For editors: the JSON Schema of this file."),
  project: NameSchema.optional().describe(
    "The Pulumi project of all stacks. Default: the manifest's file name. Changing it makes other machines.",
  ),
  backend: z.url().optional().describe("URL of a Pulumi backend. Default: a folder beside the manifest."),
  passphrase: SecretSchema.optional().describe(
    "What secrets in the state are encrypted with. Default: PULUMI_CONFIG_PASSPHRASE or PULUMI_CONFIG_PASSPHRASE_FILE.",
  ),
  hosts: z.record(NameSchema, HostSchema).optional(),
  defaults: z.strictObject(shared).optional(),
  limits: z
    .strictObject({
      total: z
        .number()
        .int()
        .min(1)
        .max(64)
        .optional()
        .describe("Machines at work at a time, each in a process of its own. Default: the number of processors."),
      perHost: z.number().int().min(1).max(64).optional().describe("Of these, to one host. Default 2."),
      perSource: z.number().int().min(1).max(64).optional().describe("Of these, from one folder. Default: no limit but the total."),
      bandwidth: BandwidthSchema.optional(),
    })
    .optional(),
  retry: z
    .strictObject({
      attempts: z.number().int().min(1).max(20).optional().describe("Attempts in all at what may pass by itself. Default 3."),
      delaySeconds: z.number().min(0).max(3600).optional().describe("Before the second attempt; it doubles from then on. Default 5."),
    })
    .optional(),
  onFailure: z
    .enum(["finish-wave", "stop", "continue"])
    .optional()
    .describe(
      "After a machine failed: finish-wave (default) starts no further wave, stop starts nothing more, continue goes on with all that does not depend on it.",
    ),
  waves: z
    .record(z.string().regex(/^[1-9]\d{0,3}$/, "a wave is a number from 1"), z.strictObject({ hooks: HooksSchema.optional() }))
    .optional(),
  machines: z.record(NameSchema, MachineSchema).refine((machines) => Object.keys(machines).length > 0, "there is no machine in it"),
});

type Declared = z.output<typeof ManifestSchema>;
export type Hooks = z.output<typeof HooksSchema>;

/** A machine of the batch, its defaults filled in. */
export interface BatchMachine {
  readonly name: string;
  readonly wave: number;
  readonly dependsOn: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
  readonly hooks: Hooks;
  /** How the manifest calls its host: for people. */
  readonly hostName: string;
  readonly maxPerHost: number;
  readonly declaration: MachineDeclaration;
}

/** A manifest that is right in itself, its defaults filled in. */
export interface Manifest {
  readonly path: string;
  readonly project: string;
  /** Undefined: the folder beside the manifest. */
  readonly backend: string | undefined;
  readonly passphrase: Declared["passphrase"];
  readonly limits: {
    readonly total: number | undefined;
    readonly perSource: number;
    /** Bytes per second of all copies together. */
    readonly bandwidth: number | undefined;
  };
  readonly retry: { readonly attempts: number; readonly delaySeconds: number };
  readonly onFailure: "finish-wave" | "stop" | "continue";
  readonly waveHooks: ReadonlyMap<number, Hooks>;
  /** In the order of the manifest. */
  readonly machines: readonly BatchMachine[];
}

/** One thing that is wrong, and where: line and column from 1. */
export interface ManifestFinding {
  readonly line: number;
  readonly column: number;
  readonly text: string;
}

/** The manifest is wrong, or not to be read. The message has a line for each finding: `<path>:<line>:<column>: <what, and the remedy>`. */
export class ManifestError extends Error {
  override readonly name = "ManifestError";
  readonly findings: readonly ManifestFinding[];

  /** `problem` where there is no text that a finding could be in. */
  constructor(path: string, findings: readonly ManifestFinding[], problem?: string) {
    super(problem ?? findings.map(({ line, column, text }) => `${path}:${line}:${column}: ${text}`).join("\n"));
    this.findings = findings;
  }
}

/** Reads the manifest at a path. Throws ManifestError with everything that is wrong. */
export function readManifest(path: string): Manifest {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    const isMissing = error instanceof Error && "code" in error && error.code === "ENOENT";
    throw new ManifestError(path, [], isMissing ? `there is no manifest at ${path}` : `cannot read the manifest at ${path}: ${reason}`);
  }
  return parseManifest(text, path);
}

/** Reads a manifest's text; `path` is for messages and defaults. Throws ManifestError with everything that is wrong. */
export function parseManifest(text: string, path: string): Manifest {
  if (Buffer.byteLength(text) > MAX_MANIFEST_BYTES)
    throw new ManifestError(path, [{ line: 1, column: 1, text: `the manifest is larger than ${MAX_MANIFEST_BYTES} bytes` }]);
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
  const at = (offset: number, problem: string): ManifestFinding => {
    const { line, col } = lines.linePos(offset);
    return { line, column: col, text: problem };
  };
  if (document.errors.length > 0)
    throw new ManifestError(
      path,
      document.errors.map(({ pos, code, message }) =>
        at(pos[0], (code === "DUPLICATE_KEY" ? duplicateSentence(document, pos[0], lines) : undefined) ?? message),
      ),
    );
  const parsed = ManifestSchema.safeParse(valuesOf(document, path));
  if (!parsed.success)
    throw new ManifestError(
      path,
      parsed.error.issues.flatMap(innermost).map((issue) => at(offsetOf(document, issue), sentenceOf(issue))),
    );
  const findings = [...referenceFindings(parsed.data), ...argumentFindings(parsed.data)].map(({ keys, text: problem }) =>
    at(offsetAt(document, keys), problem),
  );
  if (findings.length > 0) throw new ManifestError(path, findings);
  return resolve(parsed.data, path);
}

/** Of the key that begins at the offset; undefined where no other of its map is equal to it. */
function duplicateSentence(document: Document, offset: number, lines: LineCounter): string | undefined {
  let sentence: string | undefined;
  visit(document, {
    Map(_, { items }) {
      const keys = items.map(({ key }) => key).filter(isScalar);
      const second = keys.find(({ range }) => range?.[0] === offset);
      const first = keys.find((key) => key.value === second?.value);
      if (second === undefined || !first?.range || first === second) return undefined;
      sentence = `the key ${String(second.value)} is there already, in line ${lines.linePos(first.range[0]).line}: remove one of them or give it another name`;
      return visit.BREAK;
    },
  });
  return sentence;
}

function valuesOf(document: Document, path: string): unknown {
  try {
    return document.toJS({ maxAliasCount: MAX_ALIASES });
  } catch (error) {
    // ReferenceError: too many aliases, or one of nothing.
    throw new ManifestError(path, [{ line: 1, column: 1, text: error instanceof Error ? error.message : String(error) }]);
  }
}

/** The JSON Schema of a manifest, for editors. */
export function manifestJsonSchema(): object {
  return { ...z.toJSONSchema(ManifestSchema, { io: "input" }), title: "A batch of virtual machines for virtlift" };
}

type Issue = z.core.$ZodIssue;
type Keys = readonly PropertyKey[];

/** Of a value that may be one of several shapes, what is wrong with it as the shape that it comes closest to: the one whose issues lie deepest. */
function innermost(issue: Issue): readonly Issue[] {
  if (issue.code !== "invalid_union" || issue.message !== "Invalid input") return [issue];
  const depth = (issues: readonly Issue[]): number => Math.max(0, ...issues.map(({ path }) => path.length));
  const [closest] = issue.errors.toSorted((a, b) => depth(b) - depth(a));
  if (closest === undefined || depth(closest) === 0) return [issue];
  return closest.flatMap((inner) => innermost({ ...inner, path: [...issue.path, ...inner.path] }));
}

/** Where the issue is: the key that is too much, the value that is wrong, or what holds the one that is missing. */
function offsetOf(document: Document, issue: Issue): number {
  return offsetAt(document, issue.code === "unrecognized_keys" ? [...issue.path, issue.keys[0] ?? ""] : issue.path);
}

function offsetAt(document: Document, keys: Keys): number {
  for (let length = keys.length; length > 0; length--) {
    const key = keyNode(document, keys.slice(0, length));
    if (key?.range) return key.range[0];
  }
  return 0;
}

/** The node that names the value: a map's key, or a list's element itself. */
function keyNode(document: Document, keys: Keys): Node | undefined {
  const parent = document.getIn(keys.slice(0, -1), true);
  const last = keys.at(-1);
  if (isMap(parent)) {
    const pair = parent.items.find((each) => isPair(each) && isScalar(each.key) && String(each.key.value) === String(last));
    return pair?.key as Node | undefined;
  }
  return document.getIn(keys, true) as Node | undefined;
}

function sentenceOf(issue: Issue): string {
  const place = issue.path.map(String).join(".");
  if (issue.code === "unrecognized_keys")
    return `${[...issue.path, issue.keys[0]].map(String).join(".")} is nothing that a manifest has: remove it or mend its name`;
  return place === "" ? issue.message : `${place}: ${issue.message}`;
}

/** Something that is wrong, and the keys that lead to it. */
interface KeyedFinding {
  readonly keys: Keys;
  readonly text: string;
}

/** Of the arguments of a machine those that the manifest has keys of its own for. */
const KEYS_BESIDE: ReadonlyMap<string, string> = new Map([
  ["name", "a machine's name is the key `name` beside `machine`"],
  ["host", "a machine's host is the key `host` beside `machine`"],
  ["importedDisk", "what a machine boots from is the key `source` beside `machine`"],
  ["image", "what a machine boots from is the key `source` beside `machine`"],
]);

/** What no source is, and what no `ImportedDisk` and no `VirtualMachine` takes, in the defaults and in each machine. */
function argumentFindings({ machines, defaults = {} }: Declared): readonly KeyedFinding[] {
  const { argumentProblems } = loadProvider();
  const problems = (resource: Parameters<typeof argumentProblems>[0], given: unknown, place: Keys, skipped = 0): readonly KeyedFinding[] =>
    argumentProblems(resource, given).map(({ path, message }) => keyedFinding([...place, ...path.slice(skipped)], message));
  const sources = Object.entries(machines).flatMap(([name, { source }]) => problems("MachineSource", source, ["machines", name, "source"]));
  const machineProblems = (machine: Readonly<Record<string, unknown>>, place: Keys): readonly KeyedFinding[] => [
    ...[...KEYS_BESIDE].flatMap(([key, sentence]) => (Object.hasOwn(machine, key) ? [keyedFinding([...place, key], sentence)] : [])),
    ...problems("VirtualMachine", Object.fromEntries(Object.entries(machine).filter(([key]) => !KEYS_BESIDE.has(key))), place),
  ];
  const others = [
    [["defaults"], defaults] as const,
    ...Object.entries(machines).map(([name, each]) => [["machines", name], each] as const),
  ].flatMap(([place, { machine = {}, disks = {}, networks = {} }]) => [
    ...machineProblems(machine, [...place, "machine"]),
    ...Object.entries(disks).flatMap(([key, disk]) => (disk === false ? [] : problems("ImportedDisk", disk, [...place, "disks", key]))),
    ...Object.entries(networks).flatMap(([key, target]) =>
      // A network's name needs no look, nor does an interface that is left out.
      target === false || typeof target === "string"
        ? []
        : problems("VirtualMachine", { networks: [target] }, [...place, "networks", key], 2),
    ),
  ]);
  return [...sources, ...others];
}

function keyedFinding(keys: Keys, message: string): KeyedFinding {
  return { keys, text: `${keys.map(String).join(".")}: ${message}` };
}

/** What names something that is not there, and orders that cannot be kept. */
function referenceFindings({ machines, hosts = {}, defaults = {} }: Declared): readonly KeyedFinding[] {
  const names = Object.keys(machines);
  const waveOf = (name: string): number => machines[name]?.wave ?? defaults.wave ?? 1;
  return names.flatMap((name) => {
    const { host = defaults.host, dependsOn = [] } = machines[name]!;
    const found: KeyedFinding[] = [];
    const keys = ["machines", name];
    if (host === undefined) found.push({ keys, text: `machines.${name} has no host: give it one, or all of them in defaults.host` });
    else if (!Object.hasOwn(hosts, host) && !host.includes("://"))
      found.push({
        keys: [...keys, "host"],
        text: `machines.${name}.host: there is no host ${host} in \`hosts\`: it has ${Object.keys(hosts).join(", ") || "none"}; a libvirt URI will do, too`,
      });
    for (const [index, other] of dependsOn.entries()) {
      const place = [...keys, "dependsOn", index];
      if (!names.includes(other))
        found.push({ keys: place, text: `machines.${name}.dependsOn: there is no machine ${other}: mend its name` });
      else if (waveOf(other) > waveOf(name))
        found.push({
          keys: place,
          text: `machines.${name}.dependsOn: ${other} comes in wave ${waveOf(other)}, after ${name} in wave ${waveOf(name)}: move one of them`,
        });
    }
    if (reaches(name, name, machines, new Set()))
      found.push({ keys: [...keys, "dependsOn"], text: `machines.${name}.dependsOn leads back to ${name}: no order satisfies it` });
    return found;
  });
}

function reaches(from: string, target: string, machines: Declared["machines"], seen: Set<string>): boolean {
  return (machines[from]?.dependsOn ?? []).some((next) => {
    if (next === target) return true;
    if (seen.has(next)) return false;
    seen.add(next);
    return reaches(next, target, machines, seen);
  });
}

function resolve(declared: Declared, path: string): Manifest {
  const { hosts = {}, defaults = {}, limits = {}, retry = {} } = declared;
  const perHost = limits.perHost ?? 2;
  const machines = Object.entries(declared.machines).map(([name, machine]): BatchMachine => {
    const hostName = machine.host ?? defaults.host ?? "";
    const wave = machine.wave ?? defaults.wave ?? 1;
    const { maxConcurrent, ...host } = hostOf(hosts[hostName] ?? hostName);
    return {
      name,
      wave,
      dependsOn: machine.dependsOn ?? [],
      labels: { ...defaults.labels, ...machine.labels },
      hooks: { ...defaults.hooks, ...machine.hooks },
      hostName,
      maxPerHost: maxConcurrent ?? perHost,
      declaration: {
        source: machine.source,
        host,
        name: machine.name ?? name,
        networks: machine.networks ?? defaults.networks,
        pools: machine.pools ?? defaults.pools,
        disks: machine.disks ?? defaults.disks,
        machine: { ...defaults.machine, ...machine.machine },
        migrationRef: machine.migrationRef ?? `wave-${wave}/${name}`,
      },
    };
  });
  return {
    path,
    project: declared.project ?? projectName(path),
    backend: declared.backend,
    passphrase: declared.passphrase,
    limits: {
      total: limits.total,
      perSource: limits.perSource ?? Number.POSITIVE_INFINITY,
      bandwidth: limits.bandwidth === undefined ? undefined : parseRate(limits.bandwidth),
    },
    retry: { attempts: retry.attempts ?? 3, delaySeconds: retry.delaySeconds ?? 5 },
    onFailure: declared.onFailure ?? "finish-wave",
    waveHooks: new Map(
      Object.entries(declared.waves ?? {}).flatMap(([wave, { hooks }]) => (hooks ? [[Number(wave), hooks] as const] : [])),
    ),
    machines,
  };
}

function hostOf(host: z.output<typeof HostSchema>): DeclaredHost & { readonly maxConcurrent?: number | undefined } {
  return typeof host === "string" ? { uri: host } : host;
}

/** The file's name, or its folder's where the file is called as most are. */
function projectName(path: string): string {
  const stem = basename(path, extname(path));
  const name = /^(migrations?|manifest|batch|virtlift)$/i.test(stem) ? `${basename(dirname(path))}-${stem}` : stem;
  return name.replaceAll(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "") || "batch";
}
