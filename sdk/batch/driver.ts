/** Drives a batch: previews its machines together, moves them in waves within the limits, tries again what may pass, and keeps the journal. */
import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { dirname, join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import type { MachineDescription } from "../../provider/resources/machine-description.ts";
import type { HostSurvey, SourceMeasure, Toolbox } from "../../provider/toolbox.ts";
import type { SourceSpec } from "../../provider/transfer/source.ts";
import { diskSource, packageIn, packagePath } from "../package-source.ts";
import { loadProvider } from "../provider.ts";
import { batchOwner, lockBatch } from "./driver-lock.ts";
import { type BatchEvent, parseFinding, parseProgress, type Phase } from "./events.ts";
import { findJournal, openStateFolder, type StateFolder } from "./folder.ts";
import { runHook } from "./hooks.ts";
import type { Job, Operation, Outcome, Step, WorkerEvent } from "./job.ts";
import { Journal, type JournalRecord, type Made, type MachineStanding, type MachineState, readJournal, standingOf } from "./journal.ts";
import { hasRoom } from "./limits.ts";
import { isGone } from "./locks.ts";
import { type BatchMachine, type Manifest, readManifest } from "./manifest.ts";
import { type BatchPlan, type Finding, planBatch, type Previewed } from "./plan.ts";
import { readSecret } from "./secrets.ts";
import { Workers } from "./workers.ts";

const MAX_DELAY_SECONDS = 300;
/** Of a manifest's machines in a refusal. */
const MAX_NAMED = 20;
/** Between the engine's first interrupt, which lets it finish, and the second, which ends it. */
const INTERRUPT_GAP_MS = 1000;

/** Which machines; all that is given must hold. Default: all machines. */
export interface Selection {
  readonly names?: readonly string[];
  /** `team=web`. */
  readonly labels?: readonly string[];
  readonly waves?: readonly number[];
  readonly states?: readonly MachineState[];
}

export interface BatchOptions {
  /** Default: the process's own. It names the Pulumi CLI (PATH), the passphrase, and what secrets of hosts are taken from. */
  readonly environment?: Readonly<Record<string, string | undefined>>;
  /** Told what happens, in order. */
  readonly onEvent?: (event: BatchEvent) => void;
}

/** How a machine of a run ended. `skipped`: it was not started. Done for the reason `unchanged`: there was nothing to do. */
export interface MachineResult {
  readonly machine: string;
  readonly state: MachineState | "skipped";
  readonly reasons: readonly string[];
}

/** What a run came to. */
export interface BatchResult {
  /** Undefined where the run needs none. */
  readonly plan: BatchPlan | undefined;
  readonly machines: readonly MachineResult[];
  readonly isComplete: boolean;
}

/** A machine as it stands, whoever asks. */
export interface MachineStatus {
  readonly machine: BatchMachine;
  readonly standing: MachineStanding;
}

/** A batch as anybody may look at it: reads the manifest and the journal, and changes nothing. Throws ManifestError. */
export function readBatch(manifestPath: string): {
  readonly manifest: Manifest;
  readonly records: readonly JournalRecord[];
  readonly statuses: readonly MachineStatus[];
} {
  const path = resolve(manifestPath);
  const manifest = readManifest(path);
  const { journal, lock } = findJournal(dirname(path), manifest.project);
  const records = readJournal(journal);
  const owner = batchOwner(lock);
  const isRunning = owner !== undefined && !isGone(owner);
  const statuses = manifest.machines.map((machine) => ({ machine, standing: standingOf(records, machine.name, isRunning) }));
  return { manifest, records, statuses };
}

/**
 * Takes a batch to work on it. Close it with `await using`: nothing that it started is left then.
 * Throws ManifestError, and Error when another driver works on it or there is no passphrase.
 */
export async function openBatch(manifestPath: string, options: BatchOptions = {}): Promise<Batch> {
  const path = resolve(manifestPath);
  const manifest = readManifest(path);
  const environment = options.environment ?? process.env;
  await using stack = new AsyncDisposableStack();
  const folder = await openStateFolder(dirname(path), manifest.project);
  stack.use(await lockBatch(folder.lock));
  const journal = stack.use(new Journal(folder.journal));
  const modules = [folder.modules, environment["NODE_PATH"]].filter((each) => each !== undefined && each !== "").join(":");
  const tools = stack.use(await loadProvider().openToolbox());
  const { bandwidth } = manifest.limits;
  const shared = bandwidth === undefined ? undefined : stack.use(await tools.shareBandwidth(bandwidth));
  const workers = stack.use(
    new Workers({
      folder: dirname(path),
      environment: {
        ...environment,
        ...passphraseOf(manifest, environment),
        NODE_PATH: modules,
        // Half of what starting a provider takes is compiling @pulumi/pulumi.
        NODE_COMPILE_CACHE: environment["NODE_COMPILE_CACHE"] ?? folder.compiled,
        ...(shared && { VIRTLIFT_BANDWIDTH: shared.setting }),
      },
    }),
  );
  return new Batch({ manifest, folder, journal, workers, tools, environment, onEvent: options.onEvent ?? (() => undefined) }, stack.move());
}

function passphraseOf(manifest: Manifest, environment: Readonly<Record<string, string | undefined>>): Readonly<Record<string, string>> {
  const { passphrase } = manifest;
  if (passphrase !== undefined)
    return "file" in passphrase
      ? { PULUMI_CONFIG_PASSPHRASE_FILE: resolve(dirname(manifest.path), passphrase.file) }
      : { PULUMI_CONFIG_PASSPHRASE: readSecret(passphrase, { environment, folder: dirname(manifest.path) }) };
  if (
    manifest.backend === undefined &&
    environment["PULUMI_CONFIG_PASSPHRASE"] === undefined &&
    environment["PULUMI_CONFIG_PASSPHRASE_FILE"] === undefined
  )
    throw new Error(
      "the state's secrets are encrypted with a passphrase: set PULUMI_CONFIG_PASSPHRASE or PULUMI_CONFIG_PASSPHRASE_FILE, or give `passphrase` in the manifest",
    );
  return {};
}

interface Parts {
  readonly manifest: Manifest;
  readonly folder: StateFolder;
  readonly journal: Journal;
  readonly workers: Workers;
  readonly tools: Toolbox;
  readonly environment: Readonly<Record<string, string | undefined>>;
  readonly onEvent: (event: BatchEvent) => void;
}

/** A batch that is worked on by this process alone. One operation at a time. */
export class Batch implements AsyncDisposable {
  readonly manifest: Manifest;
  readonly #parts: Parts;
  readonly #held: AsyncDisposable;
  readonly #stop = new AbortController();
  #isCancelling = false;
  #run = "";

  constructor(parts: Parts, held: AsyncDisposable) {
    this.manifest = parts.manifest;
    this.#parts = parts;
    this.#held = held;
  }

  /** Previews the machines and looks at them together. `save` keeps the plans for `up({ usePlans: true })`. Changes nothing anywhere but in the batch's own folder. */
  async plan(selection: Selection = {}, { save = false }: { readonly save?: boolean } = {}): Promise<BatchPlan> {
    return this.#within("plan", selection, (machines) => this.#plan(machines, save));
  }

  /**
   * Previews, then brings every machine to what the manifest says. A machine that may not start keeps all others from starting, unless `skipBlocked`.
   * `usePlans` refuses what is no longer as the saved plan has it. `onPlan` is told what the previews came to, before anything starts.
   */
  async up(
    selection: Selection = {},
    {
      usePlans = false,
      skipBlocked = false,
      onPlan,
    }: { readonly usePlans?: boolean; readonly skipBlocked?: boolean; readonly onPlan?: (plan: BatchPlan) => void } = {},
  ): Promise<BatchResult> {
    return this.#within("up", selection, async (machines) => {
      const unplanned = usePlans ? machines.filter(({ name }) => !existsSync(this.#planPath(name))).map(({ name }) => name) : [];
      const noPlan = `no plan of ${unplanned.join(", ")} was saved: run virtlift plan ${this.manifest.path} --save first`;
      if (unplanned.length > 0 && !skipBlocked) throw new Error(noPlan);
      const plan = await this.#plan(machines, false);
      onPlan?.(plan);
      const blocked = plan.machines.filter(({ action }) => action === "blocked").map(({ machine }) => machine.name);
      const hold = blocked.length > 0 && !skipBlocked;
      const isHeld = (machine: BatchMachine): string | undefined => {
        if (blocked.includes(machine.name)) return "it may not start: see the plan's findings";
        if (unplanned.includes(machine.name)) return noPlan;
        return hold ? "another machine of the batch may not start" : undefined;
      };
      return { ...(await this.#runWaves("up", machines, { isHeld, usePlans })), plan };
    });
  }

  /** Reads what the machines are like now, into their states. */
  async refresh(selection: Selection = {}): Promise<BatchResult> {
    return this.#within("refresh", selection, (machines) => this.#runWaves("refresh", machines));
  }

  /** Removes the machines and their disks, the last wave first. */
  async destroy(selection: Selection = {}): Promise<BatchResult> {
    return this.#within("destroy", selection, (machines) => this.#runWaves("destroy", machines));
  }

  /** At the first call nothing more is started and what runs goes on to its end; at the second what runs is cancelled, and kept for the next `up`. */
  stop(): void {
    if (!this.#stop.signal.aborted) {
      this.#stop.abort();
      this.#tell({
        event: "line",
        machine: undefined,
        level: "warn",
        text: "stopping: what is being copied goes on to its end; interrupt again to cancel it",
      });
      return;
    }
    if (this.#isCancelling) return;
    this.#isCancelling = true;
    this.#tell({ event: "line", machine: undefined, level: "warn", text: "cancelling: the next up goes on with what was copied" });
    this.#parts.workers.interrupt();
    setTimeout(() => this.#parts.workers.interrupt(), INTERRUPT_GAP_MS).unref();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#held[Symbol.asyncDispose]();
  }

  async #within<Result>(
    command: string,
    selection: Selection,
    work: (machines: readonly BatchMachine[]) => Promise<Result>,
  ): Promise<Result> {
    const { journal } = this.#parts;
    const machines = select(this.manifest.machines, selection, journal.records);
    this.#run = randomUUID();
    journal.append({ record: "run begun", run: this.#run, atMs: Date.now(), command, machines: machines.map(({ name }) => name) });
    try {
      return await work(machines);
    } finally {
      journal.append({ record: "run ended", run: this.#run, atMs: Date.now() });
    }
  }

  #tell(event: BatchEvent): void {
    this.#parts.onEvent(event);
  }

  async #plan(machines: readonly BatchMachine[], save: boolean): Promise<BatchPlan> {
    const { tools, journal } = this.#parts;
    const slots = new Slots(this.manifest.limits.total ?? availableParallelism());
    const previewed = await Promise.all(machines.map((machine) => slots.run(() => this.#preview(machine, save))));
    const surveys = new Map<string, HostSurvey>();
    const scope = { environment: this.#parts.environment, folder: dirname(this.manifest.path) };
    await Promise.all(
      [...new Map(machines.map(({ declaration }) => [declaration.host.uri, declaration.host]))].map(
        async ([uri, { passphrase, password, ...host }]) => {
          const secrets = {
            ...(passphrase && { passphrase: readSecret(passphrase, scope) }),
            ...(password && { password: readSecret(password, scope) }),
          };
          // A host that cannot be asked fails the previews of its machines, which say why.
          const survey = await tools.surveyHost({ ...host, ...secrets }).catch(() => undefined);
          if (survey !== undefined) surveys.set(uri, survey);
        },
      ),
    );
    const plan = planBatch(previewed, surveys, {
      assumed: tools.assumedBytesPerSecond,
      seen: seenRate(journal.records),
      limit: this.manifest.limits.bandwidth,
    });
    for (const { machine, findings } of plan.machines)
      journal.append({ record: "planned", run: this.#run, atMs: Date.now(), machine: machine.name, findings });
    return plan;
  }

  async #preview(machine: BatchMachine, save: boolean): Promise<Previewed> {
    const { workers } = this.#parts;
    this.#tell({ event: "phase", machine: machine.name, phase: "previewing", attempt: 1 });
    const findings: Finding[] = [];
    const steps = new Map<string, Step>();
    const block = (text: string): Previewed => ({ machine, steps: [], findings: [{ level: "block", text }], measures: new Map() });
    if (this.#stop.signal.aborted) return block("stopped before it was previewed");
    let job: Job;
    try {
      job = await this.#jobFor(machine, "preview", false);
    } catch (error) {
      return block(messageOf(error));
    }
    const planFile = save ? this.#planPath(machine.name) : undefined;
    const outcome = await workers.run({ ...job, planFile }, (event) => {
      if (event.event === "line")
        findings.push({ level: event.level === "error" ? "block" : event.level, ...parseFinding(withoutName(machine.name, event.text)) });
      else if (event.event === "begun") steps.set(`${event.step.kind} ${event.step.name}`, event.step);
    });
    if (!outcome.ok) {
      const told = findings.map(({ text }) => text);
      const reasons = outcome.reasons.map((reason) => withoutName(machine.name, reason));
      for (const text of reasons) if (!told.includes(text)) findings.push({ level: "block", text });
    }
    const isNew = [...steps.values()].some(({ kind, op }) => kind === "VirtualMachine" && op === "create");
    if (isNew && standingOf(this.#parts.journal.records, machine.name, false).made !== undefined)
      findings.push({ level: "info", text: "the machine is gone from its host, and is made again" });
    return { machine, steps: [...steps.values()], findings, measures: await this.#measure(machine, job.description) };
  }

  /** Of each disk, by its logical name; a source that cannot be read is left out, as the preview says why, or does not need it any more. */
  async #measure(
    { name, declaration }: BatchMachine,
    description: MachineDescription | undefined,
  ): Promise<ReadonlyMap<string, SourceMeasure>> {
    const { source } = declaration;
    const folder = dirname(this.manifest.path);
    const whole = packageIn(source);
    const sources: readonly (readonly [number, SourceSpec | undefined])[] =
      description !== undefined && whole !== undefined
        ? description.disks.map((disk) => [disk.index, diskSource(whole, disk)])
        : typeof source["file"] === "string"
          ? [[0, { file: source["file"] }]]
          : [];
    const measures = new Map<string, SourceMeasure>();
    for (const [index, each] of sources) {
      const found = each === undefined ? undefined : absoluteIn(folder, each);
      const measure = found && (await this.#parts.tools.measureSource(found).catch(() => undefined));
      if (measure !== undefined) measures.set(`${name}-disk${index}`, measure);
    }
    return measures;
  }

  /** Throws Error when the source is a package that cannot be read. */
  async #jobFor(machine: BatchMachine, operation: Operation, recovers: boolean): Promise<Job> {
    const { folder } = this.#parts;
    const { project, backend } = this.manifest;
    const description = operation === "preview" || operation === "up" ? await this.#describe(machine) : undefined;
    return {
      operation,
      project,
      stack: machine.name,
      programFolder: dirname(this.manifest.path),
      workFolder: folder.stack(machine.name),
      backend: backend ?? pathToFileURL(folder.backend).href,
      declaration: machine.declaration,
      description,
      recovers,
    };
  }

  /** What the source's package says: once the machine is there, as it was when it was moved. */
  async #describe({ name, declaration: { source } }: BatchMachine): Promise<MachineDescription | undefined> {
    const whole = packageIn(source);
    if (whole === undefined) return undefined;
    const kept = await readKept(this.#keptPath(name));
    if (kept !== undefined && JSON.stringify(kept.source) === JSON.stringify(source)) return kept.description;
    return loadProvider().describeMachine(resolve(dirname(this.manifest.path), packagePath(whole)));
  }

  #planPath(machine: string): string {
    return join(this.#parts.folder.plans, `${machine}.json`);
  }

  #keptPath(machine: string): string {
    return join(this.#parts.folder.stack(machine), "description.json");
  }

  /** Machines in waves, waves in order; `destroy` goes backwards. */
  async #runWaves(
    operation: Operation,
    machines: readonly BatchMachine[],
    options: { readonly isHeld?: (machine: BatchMachine) => string | undefined; readonly usePlans?: boolean } = {},
  ): Promise<BatchResult> {
    const results = new Map<string, MachineResult>();
    const end = (machine: string, state: MachineResult["state"], reasons: readonly string[], seconds = 0): void => {
      results.set(machine, { machine, state, reasons });
      this.#tell({ event: "ended", machine, state, seconds, reasons });
    };
    const waves = [...Map.groupBy(machines, ({ wave }) => wave)].toSorted(([a], [b]) => (operation === "destroy" ? b - a : a - b));
    let halted: string | undefined;
    for (const [wave, members] of waves) {
      const reason = halted ?? this.#stopReason();
      if (reason !== undefined) {
        for (const { name } of members) end(name, "skipped", [reason]);
        continue;
      }
      this.#tell({ event: "wave", wave, operation, machines: members.map(({ name }) => name) });
      const held = members.filter((machine) => options.isHeld?.(machine) !== undefined);
      for (const machine of held) end(machine.name, "skipped", [options.isHeld?.(machine) ?? ""]);
      const ready = members.filter((machine) => !held.includes(machine));
      if (ready.length > 0) {
        try {
          await this.#waveHook(wave, "before", operation);
          await this.#runWave(operation, ready, { results, end, usePlans: options.usePlans ?? false });
          if (ready.every(({ name }) => isSuccess(results.get(name)))) await this.#waveHook(wave, "after", operation);
        } catch (error) {
          halted = messageOf(error);
          for (const { name } of ready) if (!results.has(name)) end(name, "skipped", [halted]);
        }
      }
      const failed = ready.filter(({ name }) => !isSuccess(results.get(name)));
      if (failed.length > 0 && this.manifest.onFailure !== "continue")
        halted ??= `wave ${wave} did not succeed: ${failed.map(({ name }) => name).join(", ")}`;
    }
    const all = machines.map(({ name }) => results.get(name) ?? { machine: name, state: "skipped" as const, reasons: [] });
    return { plan: undefined, machines: all, isComplete: all.every(isSuccess) };
  }

  #stopReason(): string | undefined {
    return this.#stop.signal.aborted ? "stopped" : undefined;
  }

  async #waveHook(wave: number, when: "before" | "after", operation: Operation): Promise<void> {
    const argv = operation === "up" ? this.manifest.waveHooks.get(wave)?.[when] : undefined;
    if (argv !== undefined) await this.#hook(argv, undefined, { VIRTLIFT_WAVE: String(wave) });
  }

  async #hook(argv: readonly string[], machine: string | undefined, variables: Readonly<Record<string, string>>): Promise<void> {
    const { environment } = this.#parts;
    const said = await runHook(argv, {
      folder: dirname(this.manifest.path),
      environment,
      variables: { VIRTLIFT_BATCH: this.manifest.path, ...variables },
    });
    if (said !== "") this.#tell({ event: "line", machine, level: "info", text: `${argv[0]}: ${said}` });
  }

  /** Starts what may be started whenever something has ended, until nothing is left that may. */
  async #runWave(
    operation: Operation,
    machines: readonly BatchMachine[],
    {
      results,
      end,
      usePlans,
    }: {
      readonly results: ReadonlyMap<string, MachineResult>;
      readonly end: (machine: string, state: MachineResult["state"], reasons: readonly string[], seconds?: number) => void;
      readonly usePlans: boolean;
    },
  ): Promise<void> {
    const { limits, onFailure } = this.manifest;
    const total = limits.total ?? availableParallelism();
    const waiting = new Set(machines);
    const running = new Map<BatchMachine, Promise<void>>();
    while (waiting.size > 0 || running.size > 0) {
      const failed = machines.some(({ name }) => results.has(name) && !isSuccess(results.get(name)));
      const halt = this.#stopReason() ?? (failed && onFailure === "stop" ? "another machine failed" : undefined);
      for (const machine of waiting) {
        const missing = operation === "up" ? this.#missing(machine, results) : this.#dependents(machine, machines, results, operation);
        const reason = halt ?? missing.reason;
        if (reason !== undefined) {
          waiting.delete(machine);
          end(machine.name, "skipped", [reason]);
          continue;
        }
        if (missing.mustWait || !hasRoom(machine, [...running.keys()], { total, perSource: limits.perSource })) continue;
        waiting.delete(machine);
        const beganMs = performance.now();
        const work = this.#runMachine(operation, machine, usePlans).then((outcome) => {
          running.delete(machine);
          const state = outcome.ok
            ? operation === "destroy"
              ? "destroyed"
              : "done"
            : outcome.cause === "cancelled"
              ? "cancelled"
              : "failed";
          const isUnchanged = outcome.ok && operation === "up" && Object.keys(outcome.changes).every((op) => op === "same");
          end(machine.name, state, outcome.ok ? (isUnchanged ? ["unchanged"] : []) : outcome.reasons, (performance.now() - beganMs) / 1000);
        });
        running.set(machine, work);
      }
      if (running.size > 0) await Promise.race(running.values());
    }
  }

  /** Whether what the machine depends on is there, may come yet, or will not. */
  #missing(machine: BatchMachine, results: ReadonlyMap<string, MachineResult>): { readonly mustWait: boolean; readonly reason?: string } {
    for (const name of machine.dependsOn) {
      const result = results.get(name);
      if (isSuccess(result)) continue;
      if (result !== undefined) return { mustWait: false, reason: `it depends on ${name}, which did not succeed` };
      const isInRun = this.#parts.journal.records.findLast((record) => record.record === "run begun")?.machines.includes(name) === true;
      if (isInRun) return { mustWait: true };
      if (standingOf(this.#parts.journal.records, name, false).state !== "done")
        return { mustWait: false, reason: `it depends on ${name}, which is not there: run it first` };
    }
    return { mustWait: false };
  }

  /** For destroy: those that depend on a machine go first. */
  #dependents(
    machine: BatchMachine,
    machines: readonly BatchMachine[],
    results: ReadonlyMap<string, MachineResult>,
    operation: Operation,
  ): { readonly mustWait: boolean; readonly reason?: string } {
    if (operation !== "destroy") return { mustWait: false };
    const first = machines.filter(({ dependsOn }) => dependsOn.includes(machine.name));
    const failed = first.find(({ name }) => results.has(name) && !isSuccess(results.get(name)));
    if (failed !== undefined) return { mustWait: false, reason: `${failed.name}, which depends on it, is still there` };
    return { mustWait: first.some(({ name }) => !results.has(name)) };
  }

  /** All attempts at one machine. Never rejects. */
  async #runMachine(operation: Operation, machine: BatchMachine, usePlans: boolean): Promise<Outcome> {
    const { name, hooks } = machine;
    const { attempts, delaySeconds } = this.manifest.retry;
    const variables = { VIRTLIFT_MACHINE: name };
    try {
      if (operation === "up" && hooks.before !== undefined) await this.#hook(hooks.before, name, variables);
      const standing = standingOf(this.#parts.journal.records, name, false);
      let recovers = standing.state === "interrupted" || standing.state === "cancelled" || standing.cause === "engine killed";
      for (let attempt = 1; ; attempt++) {
        const outcome = await this.#attempt(operation, machine, { attempt, recovers, usePlans });
        if (outcome.ok) {
          if (operation === "up" && hooks.after !== undefined) await this.#hook(hooks.after, name, variables);
          return outcome;
        }
        if (outcome.cause === "refused" || outcome.cause === "cancelled" || attempt >= attempts || this.#stop.signal.aborted)
          return outcome;
        recovers ||= outcome.cause === "engine killed";
        const seconds = Math.min(MAX_DELAY_SECONDS, delaySeconds * 2 ** (attempt - 1)) * (0.75 + Math.random() / 2);
        this.#tell({ event: "phase", machine: name, phase: "trying again", attempt: attempt + 1, text: outcome.reasons.join("; ") });
        // An abort ends the wait: nothing more is started then.
        await sleep(seconds * 1000, undefined, { signal: this.#stop.signal }).catch(() => undefined);
        if (this.#stop.signal.aborted) return outcome;
      }
    } catch (error) {
      return { ok: false, cause: "refused", reasons: [messageOf(error)] };
    }
  }

  async #attempt(
    operation: Operation,
    machine: BatchMachine,
    { attempt, recovers, usePlans }: { readonly attempt: number; readonly recovers: boolean; readonly usePlans: boolean },
  ): Promise<Outcome> {
    const { journal, workers } = this.#parts;
    const { name } = machine;
    const run = this.#run;
    const job = await this.#jobFor(machine, operation, recovers);
    journal.append({ record: "begun", run, atMs: Date.now(), machine: name, operation, attempt });
    this.#tell({ event: "phase", machine: name, phase: "running", attempt });
    const ended = new Map<string, Step>();
    let phase: Phase | undefined;
    const planFile = usePlans && operation === "up" ? this.#planPath(name) : undefined;
    const outcome = await workers.run({ ...job, planFile }, (event) => {
      const begins = event.event === "begun" ? phaseOf(event.step) : undefined;
      if (begins !== undefined && begins !== phase) this.#tell({ event: "phase", machine: name, phase: (phase = begins), attempt });
      this.#relay(name, event);
      if (event.event === "line" || event.event === "outcome") return;
      const { kind, name: resource, op } = event.step;
      journal.append({ record: "step", run, atMs: Date.now(), machine: name, state: event.event, kind, name: resource, op });
      if (operation === "refresh" && event.event === "ended") this.#tellFound(name, event.step);
      if (event.event === "ended" && !op.includes("delete")) ended.set(`${kind} ${resource}`, event.step);
    });
    const made = outcome.ok && operation !== "destroy" ? madeOf([...ended.values()]) : undefined;
    journal.append({ record: "ended", run, atMs: Date.now(), machine: name, operation, attempt, outcome, made });
    if (outcome.ok && operation === "up" && job.description !== undefined) await this.#keep(machine, job.description);
    if (outcome.ok && operation === "destroy") await rm(this.#keptPath(name), { force: true });
    return outcome;
  }

  /** What a refresh found that is not as the state had it. */
  #tellFound(machine: string, { kind, name, op, changed }: Step): void {
    const what = kind === "VirtualMachine" ? "the machine" : `the disk ${name}`;
    const text = op === "delete" ? `${what} is gone from its host` : changed.length > 0 ? `${what} has another ${changed.join(", ")}` : "";
    if (text !== "") this.#tell({ event: "line", machine, level: "warn", text });
  }

  async #keep({ name, declaration: { source } }: BatchMachine, description: MachineDescription): Promise<void> {
    const path = this.#keptPath(name);
    await mkdir(dirname(path), { recursive: true });
    await writeFile(`${path}.new`, JSON.stringify({ source, description }));
    await rename(`${path}.new`, path);
  }

  #relay(machine: string, event: WorkerEvent): void {
    if (event.event !== "line") return;
    const progress = parseProgress(event.text);
    this.#tell(
      progress === undefined
        ? { event: "line", machine, level: event.level, text: withoutName(machine, event.text) }
        : { event: "progress", machine, ...progress },
    );
  }
}

function phaseOf({ kind, op }: Step): Phase | undefined {
  if (op === "same" || op === "refresh") return undefined;
  if (op.includes("delete")) return "removing";
  return kind === "ImportedDisk" ? "copying" : "defining";
}

/** What is worth keeping of what was made; nothing in it is secret. */
const DISK_KEYS = [
  "diskId",
  "path",
  "pool",
  "format",
  "layout",
  "virtualSizeBytes",
  "allocatedBytes",
  "sourceDigest",
  "contentDigest",
  "provenance",
  "migrationRef",
  "source",
];
const MACHINE_KEYS = [
  "name",
  "uuid",
  "vcpus",
  "memoryMiB",
  "firmware",
  "machine",
  "powerState",
  "ipAddresses",
  "macAddresses",
  "networks",
  "diskPaths",
  "serialLog",
];

function madeOf(steps: readonly Step[]): Made {
  const pick = ({ properties }: Step, keys: readonly string[]) =>
    Object.fromEntries(keys.filter((key) => properties[key] !== undefined).map((key) => [key, properties[key]]));
  const machine = steps.find(({ kind }) => kind === "VirtualMachine");
  return {
    machine: machine && pick(machine, MACHINE_KEYS),
    disks: steps.filter(({ kind }) => kind === "ImportedDisk").map((step) => pick(step, DISK_KEYS)),
  };
}

/** The median rate of the copies that the journal knows; undefined when it knows none that took a second. */
function seenRate(records: readonly JournalRecord[]): number | undefined {
  const begun = new Map<string, number>();
  const rates: number[] = [];
  for (const record of records) {
    if (record.record === "step" && record.kind === "ImportedDisk" && record.op.startsWith("create")) {
      const key = `${record.run} ${record.machine} ${record.name}`;
      if (record.state === "begun") begun.set(key, record.atMs);
      else if (record.state === "ended") begun.set(key, record.atMs - (begun.get(key) ?? record.atMs));
    }
    if (record.record !== "ended" || record.made === undefined) continue;
    const copies = [...begun].filter(([key, ms]) => key.startsWith(`${record.run} ${record.machine} `) && ms < 1e9);
    const seconds = copies.reduce((sum, [, ms]) => sum + ms, 0) / 1000;
    const bytes = record.made.disks.reduce((sum, disk) => sum + Number(disk["allocatedBytes"] ?? 0), 0);
    if (seconds >= 1 && bytes > 0) rates.push(bytes / seconds);
    for (const [key] of copies) begun.delete(key);
  }
  return rates.toSorted((a, b) => a - b)[Math.floor(rates.length / 2)];
}

/** What was asked for selects no machine; the message names it, and what there is. */
export class SelectionError extends Error {
  override readonly name = "SelectionError";
}

/** Throws SelectionError when a name or a label's form is wrong, or nothing is selected. */
function select(
  machines: readonly BatchMachine[],
  { names, labels, waves, states }: Selection,
  records: readonly JournalRecord[],
): readonly BatchMachine[] {
  const unknown = names?.find((name) => !machines.some((machine) => machine.name === name));
  if (unknown !== undefined)
    throw new SelectionError(`there is no machine ${unknown} in the manifest: it has ${machines.map(({ name }) => name).join(", ")}`);
  const wanted = (labels ?? []).map((label) => {
    const [, key, value] = /^([^=]+)=(.*)$/.exec(label) ?? [];
    if (key === undefined || value === undefined) throw new SelectionError(`${label} is no label to select by: give key=value`);
    return { key, value };
  });
  const selected = machines.filter(
    (machine) =>
      (names === undefined || names.includes(machine.name)) &&
      wanted.every(({ key, value }) => machine.labels[key] === value) &&
      (waves === undefined || waves.includes(machine.wave)) &&
      (states === undefined || states.includes(standingOf(records, machine.name, false).state)),
  );
  if (selected.length > 0) return selected;
  const asked = [
    ...(names ?? []),
    ...(labels ?? []),
    ...(waves ?? []).map((wave) => `wave ${wave}`),
    ...(states ?? []).map((state) => `state ${state}`),
  ];
  const present = machines.map(({ name, wave, labels: own }) => {
    const facts = [
      `wave ${wave}`,
      ...Object.entries(own).map(([key, value]) => `${key}=${value}`),
      `state ${standingOf(records, name, false).state}`,
    ];
    return `${name} (${facts.join(", ")})`;
  });
  const more = present.length > MAX_NAMED ? `; and ${present.length - MAX_NAMED} more` : "";
  throw new SelectionError(`no machine of the manifest is ${asked.join(" and ")}: it has ${present.slice(0, MAX_NAMED).join("; ")}${more}`);
}

/** A source whose path is relative to the folder. */
function absoluteIn(folder: string, source: SourceSpec): SourceSpec {
  if ("ova" in source) return { ...source, ova: resolve(folder, source.ova) };
  return "file" in source ? { ...source, file: resolve(folder, source.file) } : source;
}

function isSuccess(result: MachineResult | undefined): boolean {
  return result?.state === "done" || result?.state === "destroyed";
}

async function readKept(path: string): Promise<{ readonly source: unknown; readonly description: MachineDescription } | undefined> {
  try {
    return JSON.parse(await readFile(path, "utf8")) as { source: unknown; description: MachineDescription };
  } catch {
    // ENOENT: the machine is not there yet.
    return undefined;
  }
}

/** The provider's lines begin with the resource's name, which the machine's events carry already. */
function withoutName(machine: string, text: string): string {
  return text.startsWith(`${machine}: `) ? text.slice(machine.length + 2) : text;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** So many at a time. */
class Slots {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  async run<Result>(work: () => Promise<Result>): Promise<Result> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resume) => this.#waiting.push(resume));
    try {
      return await work();
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#free++;
      else next();
    }
  }
}
