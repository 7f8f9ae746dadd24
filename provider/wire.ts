/**
 * Between Pulumi's values and ours: serves a resource to the SDK's dynamic provider process, and lets nothing pass in either direction that would
 * lose a thing which exists. Knows no resource, no host and no process.
 */
import { CommandError, ConnectionError, DiskError, isRetryable, LibvirtError } from "./errors.ts";
import { type Context, Incomplete, type Resource } from "./resources/resource.ts";

/** Where the SDK keeps the text of a dynamic provider, in inputs and outputs both. Source: @pulumi/pulumi cmd/dynamic-provider/index.ts `providerKey`. */
const PROVIDER_KEY = "__provider";

/** The version of a state, in its outputs. A state without one is of version 1. */
const SCHEMA_VERSION_KEY = "schemaVersion";

/**
 * Whether the resource was ever finished, in its outputs. The engine has a mark of its own, which a refresh clears: without ours a half disk
 * would then pass for whole.
 */
const COMPLETE_KEY = "complete";

/** The end of a message about what needs no mending: for people, and for whoever drives many stacks, as codes do not pass the engine. */
const MAY_PASS = " (it may pass: run up again)";

/** A message travels in a gRPC trailer, which peers bound to 8 KiB and more. */
const MAX_MESSAGE_CHARACTERS = 4000;

/** A property bag as the SDK's dynamic provider process gives and takes it. */
export type Properties = Record<string, unknown>;

/** Turns a state of one version into one of the next. It must accept whatever that version ever wrote, unfinished states included. */
export type Migration = (state: Readonly<Properties>) => Properties;

/**
 * Runs one call of the engine with a context made for it. It fails without running `work` once the engine is gone.
 * `config` is what `Context.config` must be.
 */
export type Run = <Result>(config: Context["config"], work: (context: Context) => Promise<Result>) => Promise<Result>;

/** What `exports.handler()` of a provider text returns. Source: @pulumi/pulumi dynamic/index.ts `ResourceProvider`; each is called as the SDK's process calls it. */
export interface Handler {
  /** Stores the stack's configuration before it returns: a second call of the engine does not wait for the first one's configure. */
  configure(request: { readonly config: { get(key: string): string | undefined } }): void;
  /** `olds` is empty on the first check and on the second one of a replacement. */
  check(olds: Properties, news: Properties): Promise<{ inputs: Properties; failures: { property: string; reason: string }[] }>;
  /** `changes: undefined` lets the engine compare the inputs itself and show all of it; `replaces` are names of whole properties. */
  diff(id: string, olds: Properties, news: Properties): Promise<DiffAnswer>;
  create(inputs: Properties): Promise<{ id: string; outs: Properties }>;
  /** An empty `id` says that the thing is gone. */
  read(id: string, outputs: Properties): Promise<{ id: string; props: Properties; inputs?: Properties }>;
  update(id: string, olds: Properties, news: Properties): Promise<{ outs: Properties }>;
  delete(id: string, outputs: Properties): Promise<void>;
}

export interface DiffAnswer {
  changes: boolean | undefined;
  replaces?: string[];
  deleteBeforeReplace?: boolean;
}

/**
 * The shape that the SDK sends as "created, but failed to initialize": `id`, `properties` and `reasons` are its names. The engine shows `reasons`
 * only, stores no mark when they are empty, and stores `properties` as they are, so that they must carry the provider's text.
 * Source: cmd/dynamic-provider/index.ts `grpcResponseFromError`.
 */
class PartialFailure extends Error {
  override readonly name = "PartialFailure";
  readonly id: string;
  readonly properties: Properties;
  readonly reasons: readonly string[];

  constructor(reason: string, id: string, properties: Properties, cause: unknown) {
    super(reason, { cause });
    this.id = id;
    this.properties = properties;
    this.reasons = [reason];
  }
}

/**
 * Serves a resource, which is loaded on its first call.
 *
 * `migrations[n]` brings a state of version n + 1 to n + 2; every state that enters passes through those that it lacks, so a migration is kept for
 * ever. Only outputs carry a version: the old inputs that check gets are those of whatever version stored them.
 * What every method throws is an Error with one line of message and no other field, but for a partial failure.
 */
export function serve<Inputs extends object, State extends object>(
  load: () => Promise<Resource<Inputs, State>>,
  run: Run,
  migrations: readonly Migration[] = [],
): Handler {
  let config: Context["config"] = () => undefined;

  async function call<Result>(work: (resource: Resource<Inputs, State>, context: Context) => Promise<Result>): Promise<Result> {
    try {
      return await run(config, async (context) => work(await load(), context));
    } catch (error) {
      throw presentable(error);
    }
  }

  const inputsOf = (properties: Properties): Inputs => fromWire(properties) as Inputs;
  const stateOf = (properties: Properties): State => migrate(fromWire(properties), migrations) as State;

  /** Outputs as they are stored. Throws TypeError on what cannot be. */
  const stored = (state: object, isComplete: boolean): Properties => ({
    ...toWire(state, "outputs"),
    [COMPLETE_KEY]: isComplete,
    [SCHEMA_VERSION_KEY]: migrations.length + 1,
  });

  /** `known` is what is stored beside what the resource says, or alone where that cannot be stored. */
  function partial(reason: string, id: string, state: object, known: Properties, cause: unknown): PartialFailure {
    let properties: Properties;
    try {
      properties = stored({ ...fromWire(known), ...state }, false);
    } catch {
      // A value without a wire form must not cost the id of a thing that exists.
      properties = stored(fromWire(known), false);
    }
    return new PartialFailure(oneLine(reason), id, { ...properties, [PROVIDER_KEY]: known[PROVIDER_KEY] }, cause);
  }

  /** From here on the thing exists, so whatever goes wrong must carry its id. */
  function finished(id: string, state: object, known: Properties): Properties {
    try {
      return stored(state, true);
    } catch (error) {
      throw partial(messageOf(error), id, {}, known, error);
    }
  }

  return {
    configure(request) {
      const stackConfig = request.config;
      config = (key) => stackConfig.get(key);
    },

    check: (olds, news) =>
      call(async (resource, context) => {
        const oldInputs = Object.keys(olds).length === 0 ? undefined : inputsOf(olds);
        const { inputs, failures } = await resource.check(context, oldInputs, fromWire(news));
        if (failures.length === 0) return { inputs: declared(inputs), failures: [] };
        // With a property's name the engine would print its value too, `{}` or a password; the reason names the property in any case.
        return { inputs: news, failures: failures.map(({ reason }) => ({ property: "", reason: oneLine(reason) })) };
      }),

    diff: (id, olds, news) =>
      call(async (resource, context) => {
        try {
          const state = stateOf(olds);
          const { changes, deleteBeforeReplace } = await resource.diff(context, id, state, inputsOf(news));
          const replacing = changes.filter(({ effect }) => effect === "replace").map(({ property }) => wholeProperty(property));
          const answer = { replaces: [...new Set(replacing)], deleteBeforeReplace: deleteBeforeReplace ?? false };
          if (!isComplete(state)) return { changes: true, ...answer };
          return changes.length === 0 ? { changes: false } : { changes: undefined, ...answer };
        } catch (error) {
          // The engine also asks as a probe and in a refresh, where a throw ends everything.
          context.log("warn", `${id}: the old and the new state cannot be compared, so their inputs are: ${messageOf(error)}`);
          return { changes: undefined };
        }
      }),

    create: (inputs) =>
      call(async (resource, context) => {
        try {
          const { id, state } = await resource.create(context, inputsOf(inputs));
          if (id === "") throw new Error("the resource was created, but without an id; it cannot be stored");
          return { id, outs: finished(id, state, inputs) };
        } catch (error) {
          if (error instanceof Incomplete) throw partial(messageOf(error), error.resourceId, error.state, inputs, error);
          throw error;
        }
      }),

    read: (id, outputs) =>
      call(async (resource, context) => {
        const state = stateOf(outputs);
        const found = await resource.read(context, id, state);
        if (found === undefined) return { id: "", props: {} };
        // What was never finished does not become whole by being looked at.
        const props = stored(found.state, isComplete(state) && (!(COMPLETE_KEY in found.state) || isComplete(found.state)));
        return { id: found.id, props, inputs: declared(found.inputs) };
      }),

    update: (id, olds, news) =>
      call(async (resource, context) => {
        const state = stateOf(olds);
        try {
          return { outs: finished(id, await resource.update(context, id, state, inputsOf(news)), news) };
        } catch (error) {
          const known = { ...state, [PROVIDER_KEY]: news[PROVIDER_KEY] };
          if (error instanceof Incomplete) throw partial(messageOf(error), id, error.state, known, error);
          throw error;
        }
      }),

    delete: (id, outputs) => call((resource, context) => resource.delete(context, id, stateOf(outputs))),
  };
}

/** What came from the engine as our code wants it: without the provider's text, and absent where Pulumi says null (an output that resolved to nothing). */
function fromWire(properties: Readonly<Properties>): Properties {
  const { [PROVIDER_KEY]: _provider, ...own } = properties;
  return withoutNulls(own) as Properties;
}

function withoutNulls(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, each]) => each !== null)
      .map(([key, each]) => [key, withoutNulls(each)]),
  );
}

/**
 * A state of any version as the newest has it, without its version.
 * Throws Error when it was written by a newer virtlift.
 */
function migrate(properties: Readonly<Properties>, migrations: readonly Migration[]): Properties {
  const { [SCHEMA_VERSION_KEY]: version = 1, ...state } = properties;
  if (typeof version !== "number" || !Number.isInteger(version) || version < 1)
    throw new Error(`the state has no version that is known: ${String(version)}`);
  if (version > migrations.length + 1)
    throw new Error(
      `the state was written by a newer virtlift (version ${version}, this one knows ${migrations.length + 1}): update the package virtlift`,
    );
  return migrations.slice(version - 1).reduce<Properties>((older, migration) => migration(older), state);
}

function isComplete(state: object): boolean {
  return COMPLETE_KEY in state && state[COMPLETE_KEY] === true;
}

/** `networks[0].mac` -> `networks`: the engine knows replacements by whole properties. */
function wholeProperty(path: string): string {
  return path.split(/[.[]/, 1)[0] ?? path;
}

/** Inputs as they are stored, without the marks of outputs: a resource that made them from its state does not turn those into a change. */
function declared(inputs: object): Properties {
  const { [COMPLETE_KEY]: _complete, [SCHEMA_VERSION_KEY]: _version, ...own } = toWire(inputs, "inputs");
  return own;
}

/**
 * A copy that google.protobuf.Struct keeps as it is: no undefined (it fails the call after the work was done), bigint as a decimal string,
 * Date as ISO text. Throws TypeError naming the place, which begins with `place`, where a value has no such form.
 */
function toWire(value: object, place: string): Properties {
  return encode(value, place) as Properties;
}

function encode(value: unknown, place: string): unknown {
  if (value === null || typeof value === "string" || typeof value === "boolean") return value;
  if (typeof value === "number" && Number.isFinite(value)) return value;
  if (typeof value === "bigint") return value.toString();
  if (value instanceof Date && Number.isFinite(value.getTime())) return value.toISOString();
  // Dropping an element would move those behind it.
  if (Array.isArray(value)) return value.map((each, index) => (each === undefined ? null : encode(each, `${place}[${index}]`)));
  if (isPlainObject(value))
    return Object.fromEntries(
      Object.entries(value)
        .filter(([, each]) => each !== undefined)
        .map(([key, each]) => [key, encode(each, `${place}.${key}`)]),
    );
  const kind = typeof value === "object" ? value.constructor.name : typeof value === "number" ? String(value) : `a ${typeof value}`;
  throw new TypeError(`${place} cannot be stored: it is ${kind}`);
}

function isPlainObject(value: unknown): value is object {
  if (typeof value !== "object" || value === null) return false;
  const prototype: unknown = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

/**
 * The error as the SDK's process may have it: a real Error, whose fields say nothing by accident. A field `id` would mean a partial failure, and
 * grpc-js takes a number in `code` for a status of its own (a libvirt error 12 would read as UNIMPLEMENTED).
 * The process prints the stack of whatever check, diff, read and delete throw: only what nobody foresaw keeps one.
 */
function presentable(error: unknown): Error {
  if (error instanceof PartialFailure) return error;
  const shown = new Error(messageOf(error), { cause: error });
  shown.stack = isForeseen(error) || !(error instanceof Error) ? "" : (error.stack ?? "");
  return shown;
}

function isForeseen(error: unknown): boolean {
  return [LibvirtError, CommandError, ConnectionError, DiskError, Incomplete].some((kind) => error instanceof kind);
}

/** Never empty. Node's own AggregateError (several addresses refused) has its sentences inside only. */
function messageOf(error: unknown): string {
  if (!(error instanceof Error)) return oneLine(String(error));
  const inner = error instanceof AggregateError ? error.errors.map(messageOf).join("; ") : "";
  return `${oneLine(error.message || inner || error.name)}${mayPass(error) ? MAY_PASS : ""}`;
}

/** An unfinished resource says by its cause whether it may pass. */
function mayPass(error: Error): boolean {
  return isRetryable(error) || (error instanceof Incomplete && isRetryable(error.cause));
}

function oneLine(text: string): string {
  const line = text.replaceAll(/\s*\n\s*/g, " ").trim();
  return line.length > MAX_MESSAGE_CHARACTERS ? `${line.slice(0, MAX_MESSAGE_CHARACTERS)}...` : line;
}
