/** What driver and workers say to each other: plain JSON over the channel that `fork` opens. Holds no secret, only where secrets are. */
import type { MachineDescription } from "../../provider/resources/machine-description.ts";

/** What is done to the stack of one machine. */
export type Operation = "preview" | "up" | "refresh" | "destroy";

/** Where a secret is: in an environment variable, or in a file (its last newline does not count). */
export type SecretPlace = { readonly env: string } | { readonly file: string };

/** A host as the manifest declares it: what `HostSchema` takes, with places in place of secrets. */
export interface DeclaredHost {
  readonly uri: string;
  readonly passphrase?: SecretPlace | undefined;
  readonly password?: SecretPlace | undefined;
  readonly [key: string]: unknown;
}

/** One machine of a batch, its defaults filled in. Arguments are checked by the provider, as those of any program. */
export interface MachineDeclaration {
  readonly source: Readonly<Record<string, unknown>>;
  readonly host: DeclaredHost;
  readonly name?: string | undefined;
  readonly networks?: Readonly<Record<string, unknown>> | undefined;
  readonly pools?: Readonly<Record<string, string>> | undefined;
  readonly disks?: Readonly<Record<string, unknown>> | undefined;
  readonly machine?: Readonly<Record<string, unknown>> | undefined;
  readonly migrationRef?: string | undefined;
}

/** One operation on one stack. The stack and the logical name of its machine are both `stack`. */
export interface Job {
  readonly operation: Operation;
  readonly project: string;
  readonly stack: string;
  /** The folder that relative paths are relative to: the manifest's. */
  readonly programFolder: string;
  /** The stack's own folder; its parents have `node_modules` with the packages. */
  readonly workFolder: string;
  /** URL of Pulumi's backend. */
  readonly backend: string;
  readonly declaration: MachineDeclaration;
  /** What the source's package says; undefined when the source is no package. */
  readonly description?: MachineDescription | undefined;
  /** An earlier operation on the stack was cut off: what the engine remembers as under way is cleared first. */
  readonly recovers: boolean;
  /** Where a preview saves its plan, or an update finds the one that binds it. */
  readonly planFile?: string | undefined;
}

/** What a step of the engine does. Source: @pulumi/pulumi automation/stack.ts OpType. */
export interface Step {
  readonly kind: "ImportedDisk" | "VirtualMachine";
  readonly name: string;
  readonly op: string;
  /** The names of the resource's own properties that differ, sorted. Those of a secret too, but never values. */
  readonly changed: readonly string[];
  /** As checked, on its start; with what was made, at its end. Secrets are masked by the engine. */
  readonly properties: Readonly<Record<string, unknown>>;
}

/** Why an operation failed, for whoever decides whether to try again. */
export type FailureCause =
  /** Something that a human has to mend. */
  | "refused"
  /** It may succeed when tried again as it is. */
  | "passing"
  /** Somebody who is alive, or may be, works on the stack. */
  | "locked"
  /** The engine was killed: what it had under way is to be cleared. */
  | "engine killed"
  /** The driver or the user stopped it. */
  | "cancelled";

export type Outcome =
  | { readonly ok: true; readonly changes: Readonly<Record<string, number>> }
  | { readonly ok: false; readonly cause: FailureCause; readonly reasons: readonly string[] };

/** What a worker says of its job, in order; `outcome` is the last. */
export type WorkerEvent =
  | { readonly event: "line"; readonly level: "info" | "warn" | "error"; readonly text: string }
  | { readonly event: "begun" | "ended" | "failed"; readonly step: Step }
  | { readonly event: "outcome"; readonly outcome: Outcome };
