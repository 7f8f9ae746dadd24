/** A machine from its package, whole: reads an OVA, an OVF or a VMX and declares the disks and the machine that it describes. */
import * as pulumi from "@pulumi/pulumi";
import type { DescribedDisk, DescribedNetwork, MachineDescription } from "../provider/resources/machine-description.ts";
import { ImportedDisk, type ImportedDiskArgs } from "./imported-disk.ts";
import { diskSource, packagePath, type PackageSource } from "./package-source.ts";
import { loadProvider } from "./provider.ts";
import { type Host, type Later, originOf, withSecrets } from "./values.ts";
import { VirtualMachine, type VirtualMachineArgs } from "./virtual-machine.ts";

const TYPE = "virtlift:MigratedMachine";

/** What takes the place of one of the machine's networks: a libvirt network's name, or an interface as `VirtualMachine` takes it. `false` leaves the interface out. */
export type NetworkTarget = string | NonNullable<VirtualMachineArgsNetworks>[number] | false;
type VirtualMachineArgsNetworks = Extract<VirtualMachineArgs["networks"], readonly unknown[]>;

/** What may be said of a disk, over what the package says. `false` leaves the disk out. */
export type DiskOverride = Omit<ImportedDiskArgs, "source" | "host"> | false;

/**
 * Values by what they are for. Keys of `disks` and `pools`: a disk's file name, its label (`Hard disk 1`) or its number from 0; of `networks`: a network's
 * name, or the interface's label. `*` stands for all that have no key of their own.
 */
type ByName<Value> = Readonly<Record<string, Value>>;

/** Which machine to bring home, and what to make of it. */
export interface MigratedMachineArgs {
  /**
   * Path of an OVA, an OVF or a zip archive of either (`ova`), or of a VMX (`vmx`), on the machine that runs Pulumi; the disks of an OVF and of a VMX lie
   * beside it. Relative to the program's folder. Not an output: what is declared depends on it.
   */
  readonly source: PackageSource;
  /** The host that gets the machine: a libvirt URI, or an object with what a URI cannot say. Default: the stack's configuration `virtlift:host`. */
  readonly host?: Later<Host>;
  /** The machine's name in libvirt. Default: the logical name. */
  readonly name?: pulumi.Input<string>;
  /** What the machine's networks become. Default: `{ "*": "default" }`. A network without an entry is refused. */
  readonly networks?: ByName<NetworkTarget>;
  /** The pool of each disk. Default: `{ "*": "default" }`; a disk without an entry goes to `default`. */
  readonly pools?: ByName<pulumi.Input<string>>;
  /** Arguments of disks, over what the package says. `false` under the label of a CD-ROM drive leaves the drive out. */
  readonly disks?: ByName<DiskOverride>;
  /**
   * Arguments of the machine, over what the package says: `{ memoryMiB: 8192, bus: "virtio" }`. Another number of CPUs comes without the package's
   * topology, and a CD-ROM drive of your own in place of all of the package's.
   */
  readonly machine?: Omit<VirtualMachineArgs, "host" | "name" | "importedDisk" | "image">;
  /** The user's own name for this migration. */
  readonly migrationRef?: pulumi.Input<string>;
  /** What `describeMachine` said of the package: then it is not read again, and may be gone once its disks are imported. Default: it is read. */
  readonly description?: MachineDescription;
}

/**
 * A machine as its package describes it: processors, memory, firmware, disks in the hardware's order, blank disks, network interfaces with their addresses.
 * What cannot come along is said in log lines. What is wrong with the arguments is said in one sentence and without a stack: in preview as an error that
 * lets the program go on, so that all machines are looked at; else, and where the package cannot be read, it throws pulumi.RunError.
 */
export class MigratedMachine extends pulumi.ComponentResource {
  /** The machine over its disks. */
  readonly machine: VirtualMachine;
  /** The imported disks in the hardware's order, the boot disk first. Blank disks are the machine's own. */
  readonly disks: readonly ImportedDisk[];
  /** What the package says. */
  readonly description: MachineDescription;

  constructor(name: string, args: MigratedMachineArgs, options?: pulumi.ComponentResourceOptions) {
    super(TYPE, name, {}, options);
    const description = args.description ?? describe(name, args.source);
    this.description = description;
    // Without an engine nobody reads them.
    if (hasEngine()) for (const note of description.notes) void pulumi.log.info(`${name}: ${note}`, this);

    const plan = planMachine(name, args, description);
    this.#refuse(plan.problems);
    const isChecked = this.#check(name, args, plan);
    const imported = plan.disks.flatMap(({ disk, logicalName, args: own }) => {
      const source = diskSource(args.source, disk);
      if (source === undefined) return [];
      const declared = { ...own, source, ...hostOf(args) };
      return [new ImportedDisk(logicalName, declared, { parent: this, dependsOn: isChecked })];
    });
    this.disks = imported;
    const [boot, ...further] = imported;
    if (boot === undefined)
      throw new pulumi.RunError(`${name}: every disk with content is left out, and a machine boots from one: keep it in \`disks\``);
    this.machine = new VirtualMachine(
      name,
      {
        ...plan.machine,
        ...hostOf(args),
        importedDisk: boot,
        disks: [...further.map((disk) => ({ disk })), ...plan.blanks, ...plan.given, ...plan.drives],
      },
      { parent: this },
    );
    this.registerOutputs({ machine: this.machine.name, uuid: this.machine.uuid });
  }

  /** A preview fails with it once the program has ended. */
  #refuse(problems: readonly string[]): void {
    if (problems.length === 0) return;
    const sentence = problems.join("; ");
    if (!pulumi.runtime.isDryRun() || !hasEngine()) throw new pulumi.RunError(sentence);
    void pulumi.log.error(sentence, this);
  }

  /**
   * Resolves to no resources once the machine may be made on its host, and rejects with everything that is wrong else: its disks wait for it, so that
   * nothing is copied for a machine that cannot be. In preview, and without an engine, the engine's own order does.
   */
  #check(name: string, args: MigratedMachineArgs, plan: MachinePlan): pulumi.Output<pulumi.Resource[]> {
    if (pulumi.runtime.isDryRun() || !hasEngine()) return pulumi.output([]);
    const config = new pulumi.Config("virtlift");
    const inputs = {
      ...plan.machine,
      host: withSecrets(args.host) ?? config.get("host"),
      // The disk's real name is made by its own check; no machine can use one that is not there yet.
      importedDisk: { diskId: `${name}-unchecked` },
      disks: [...plan.blanks, ...plan.given, ...plan.drives],
      origin: originOf(name),
    };
    return pulumi.unsecret(pulumi.output(inputs as pulumi.Unwrap<typeof inputs>)).apply(async (known) => {
      await using tools = await loadProvider().openToolbox((key) => config.get(key.replace(/^virtlift:/, "")));
      const findings = await tools.checkMachine(known);
      if (findings.length > 0) throw new pulumi.RunError(`${name} cannot be made, so none of its disks is copied: ${findings.join("; ")}`);
      return [];
    });
  }
}

/** Throws pulumi.RunError when the package cannot be read: no more of the machine is known then. */
function describe(name: string, source: PackageSource): MachineDescription {
  try {
    return loadProvider().describeMachine(packagePath(source));
  } catch (error) {
    throw new pulumi.RunError(`${name}: ${error instanceof Error ? error.message : String(error)}`);
  }
}

/** False in a test with mocks. Pulumi's own `hasEngine` is false in every inline program too. */
function hasEngine(): boolean {
  return pulumi.runtime.getEngine() !== undefined;
}

function hostOf({ host }: MigratedMachineArgs): { readonly host?: Later<Host> } {
  return host === undefined ? {} : { host };
}

interface MachinePlan {
  /** The disks that come along. */
  readonly disks: readonly {
    readonly disk: DescribedDisk;
    readonly logicalName: string;
    readonly args: Omit<ImportedDiskArgs, "source" | "host">;
  }[];
  readonly blanks: VirtualMachineDisks;
  /** Empty CD-ROM drives. */
  readonly drives: VirtualMachineDisks;
  /** Further disks of the program's own. */
  readonly given: VirtualMachineDisks;
  readonly machine: Omit<VirtualMachineArgs, "host" | "importedDisk" | "image" | "disks">;
  /** What is wrong with the arguments, one sentence each; what they are about is left out above. */
  readonly problems: readonly string[];
}
type VirtualMachineDisks = Extract<VirtualMachineArgs["disks"], readonly unknown[]>;

/** The arguments of the disks and of the machine. A map without an entry that is needed is a problem, and so is an entry for nothing. */
function planMachine(name: string, args: MigratedMachineArgs, description: MachineDescription): MachinePlan {
  const networks = new NamedValues<NetworkTarget>(name, "networks", args.networks ?? { "*": "default" });
  const pools = new NamedValues<pulumi.Input<string>>(name, "pools", args.pools ?? {});
  const overrides = new NamedValues<DiskOverride>(name, "disks", args.disks ?? {});
  const { disks: declared = [], ...machine } = args.machine ?? {};
  const problems: string[] = [];
  if (!Array.isArray(declared)) problems.push(`${name}: machine.disks must be a plain list: what is declared depends on it`);
  const given: readonly unknown[] = Array.isArray(declared) ? declared : [];

  const kept = description.disks.flatMap((disk): MachinePlan["disks"] => {
    const keys = [disk.file, disk.label, String(disk.index)];
    const pool = pools.find(keys) ?? "default";
    const override = overrides.find(keys) ?? {};
    return override === false
      ? []
      : [{ disk, logicalName: `${name}-disk${disk.index}`, args: { pool, ...migrationOf(args), ...override } }];
  });
  const blanks = kept.flatMap(({ disk: { file, sizeBytes, index }, args: { pool } }): VirtualMachineDisks =>
    file === undefined && sizeBytes !== undefined ? [{ size: sizeBytes, name: `disk${index}`, pool: pool as pulumi.Input<string> }] : [],
  );
  const cdroms = (description.cdroms ?? []).filter(({ label }) => overrides.find([label]) !== false);
  const hasOwnDrive = given.some((disk) => isCdrom(disk));
  const interfaces = description.networks.flatMap((network) => {
    const target = networks.find([network.network, network.label]);
    if (target === undefined) problems.push(unmapped(name, network, description));
    return target === undefined || target === false ? [] : [interfaceOf(network, target)];
  });
  problems.push(...[networks, pools, overrides].flatMap((values) => values.unusedProblem() ?? []));
  return {
    disks: kept,
    blanks,
    drives: hasOwnDrive ? [] : cdroms.map(() => ({ device: "cdrom" })),
    given: given as VirtualMachineDisks,
    machine: { ...hardwareOf(description, machine), networks: interfaces, ...(args.name !== undefined && { name: args.name }), ...machine },
    problems,
  };
}

/** The topology is one of the package's CPUs: it fits no other number. */
function hardwareOf({ hardware }: MachineDescription, own: NonNullable<MigratedMachineArgs["machine"]>) {
  const { cpuTopology, ...rest } = present(hardware);
  const isSameCpus = own.vcpus === undefined && own.maxVcpus === undefined;
  return { ...rest, ...(cpuTopology !== undefined && isSameCpus && { cpuTopology }) };
}

function isCdrom(disk: unknown): boolean {
  return typeof disk === "object" && disk !== null && "device" in disk && disk.device === "cdrom";
}

function migrationOf({ migrationRef }: MigratedMachineArgs): { readonly migrationRef?: pulumi.Input<string> } {
  return migrationRef === undefined ? {} : { migrationRef };
}

function interfaceOf({ mac, model, link }: DescribedNetwork, target: Exclude<NetworkTarget, false>) {
  const own = typeof target === "string" ? { network: target } : target;
  return { model, ...(mac !== undefined && { mac }), ...(link !== undefined && { link }), ...(own as object) };
}

function unmapped(name: string, { network, label }: DescribedNetwork, { networks }: MachineDescription): string {
  const names = [...new Set(networks.map((each) => each.network ?? each.label))].map((each) => JSON.stringify(each)).join(", ");
  return `${name}: networks says nothing of ${JSON.stringify(network ?? label)}: give it a libvirt network, or all of them by "*" (the machine has ${names})`;
}

/** What is there of a value's fields. */
function present<Value extends object>(value: Value): { [Key in keyof Value]?: Exclude<Value[Key], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined)) as {
    [Key in keyof Value]?: Exclude<Value[Key], undefined>;
  };
}

/** A map by names, which remembers what was asked for: an entry that nobody asks for is a typo. */
class NamedValues<Value> {
  readonly #machine: string;
  readonly #property: string;
  readonly #values: ByName<Value>;
  readonly #known = new Set<string>(["*"]);

  constructor(machine: string, property: string, values: ByName<Value>) {
    this.#machine = machine;
    this.#property = property;
    this.#values = values;
  }

  /** The value under the first key that has one, else that for all. */
  find(keys: readonly (string | undefined)[]): Value | undefined {
    const named = keys.filter((key) => key !== undefined);
    for (const key of named) this.#known.add(key);
    const found = named.find((key) => Object.hasOwn(this.#values, key)) ?? "*";
    return Object.hasOwn(this.#values, found) ? this.#values[found] : undefined;
  }

  /** Names the keys that are for nothing; undefined when there are none. */
  unusedProblem(): string | undefined {
    const unused = Object.keys(this.#values).filter((key) => !this.#known.has(key));
    if (unused.length === 0) return undefined;
    const known = [...this.#known].map((key) => JSON.stringify(key)).join(", ");
    return `${this.#machine}: ${this.#property} names ${unused.join(", ")}, which the machine does not have: it has ${known}`;
  }
}
