/** What a resource of the provider is: six functions over plain JSON. Knows no Pulumi. */
import type { Hosts } from "../host/hosts.ts";
import type { Throttle } from "../transfer/throttle.ts";

/** The plain JSON that inputs and states are made of. */
export type Json = string | number | boolean | null | readonly Json[] | { readonly [key: string]: Json | undefined };

/** What the adapter gives to every call. */
export interface Context {
  /** A value of the stack's configuration by its full key, such as `virtlift:host`; undefined when unset. */
  readonly config: (key: string) => string | undefined;
  /** Shows one line to the user; it should name the resource. */
  readonly log: (level: "info" | "warn", text: string) => void;
  /** Aborted when the engine is gone: stop what runs, leave what can be resumed. */
  readonly signal: AbortSignal;
  /** The hosts that are open in this process, one for each declaration. */
  readonly hosts: Hosts;
  /** What keeps the bytes that are sent under a rate; absent where nothing does. */
  readonly throttle?: Throttle | undefined;
}

/** One thing that is wrong with an input. `property` is the user's own name with its path (`networks[0].mac`); `reason` is one sentence that names it too. */
export interface CheckFailure {
  readonly property: string;
  readonly reason: string;
}

/** A changed property and what it takes: `live` in place, `restart` of the guest, `replace` of the resource. `why` is for the user. */
export interface PropertyChange {
  readonly property: string;
  readonly effect: "live" | "restart" | "replace";
  readonly why?: string;
}

/**
 * The contract. `Inputs` is what check returns and what is stored; `State` is inputs and outputs together.
 * Where preview does not know a value yet, it is `UNKNOWN` (see `unknown.ts`), anywhere in the tree, and only `check` and `diff` may meet it.
 */
export interface Resource<Inputs, State> {
  /** Canonicalises and validates. Deterministic; changes nothing anywhere. `olds` are the last checked inputs, undefined on the first check. */
  check(
    context: Context,
    olds: Inputs | undefined,
    news: unknown,
  ): Promise<{ readonly inputs: Inputs; readonly failures: readonly CheckFailure[] }>;
  /** Compares. Never throws; an unknown value may change but never replaces. `deleteBeforeReplace` says the order of a replacement. */
  diff(
    context: Context,
    id: string,
    olds: State,
    news: Inputs,
  ): Promise<{ readonly changes: readonly PropertyChange[]; readonly deleteBeforeReplace?: boolean }>;
  /** Makes it, or goes on with what an interrupted create left. Throws `Incomplete` when the thing exists but is not finished. */
  create(context: Context, inputs: Inputs): Promise<{ readonly id: string; readonly state: State }>;
  /** What is there now; undefined only when it is proven gone. `inputs` are the declared ones with drift written into them. */
  read(
    context: Context,
    id: string,
    state: State,
  ): Promise<{ readonly id: string; readonly state: State; readonly inputs: Inputs } | undefined>;
  update(context: Context, id: string, olds: State, news: Inputs): Promise<State>;
  /** Removes what we made and only that; gone already is success. */
  delete(context: Context, id: string, state: State): Promise<void>;
}

/** Creation or update got so far and no further: the thing exists, and the next update goes on with it. `reason` is the sentence the user sees. */
export class Incomplete extends Error {
  override readonly name = "Incomplete";
  readonly resourceId: string;
  readonly state: object;

  constructor(reason: string, detail: { readonly id: string; readonly state: object; readonly cause?: unknown }) {
    super(reason, detail.cause === undefined ? undefined : { cause: detail.cause });
    this.resourceId = detail.id;
    this.state = detail.state;
  }
}
