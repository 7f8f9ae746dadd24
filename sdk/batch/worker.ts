/**
 * A worker process: does the jobs that its driver sends, one after the other. Programs of several stacks in one process would fail each other.
 * It leads a process group of its own, which the engines that it starts are in: the driver, or the worker when its driver is gone, stops them by it.
 */
import { mkdir } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { type EngineEvent, LocalWorkspace, PulumiCommand, type Stack } from "@pulumi/pulumi/automation/index.js";
import type { FailureCause, Job, Outcome, Step, WorkerEvent } from "./job.ts";
import { isGone, parseLockOwners, removeLockFiles } from "./locks.ts";
import { declareMachine } from "./program.ts";

/** How long an engine may take to end after it was told to for good. It gives its providers 5 s. */
const ENGINE_GRACE_MS = 15_000;

/** Two engines that start at once can refuse each other; nobody holds the lock then. */
const LOCK_ATTEMPTS = 5;

let command: Promise<PulumiCommand> | undefined;
let isCancelled = false;
let running: Promise<unknown> = Promise.resolve();

process.on("message", (job: Job) => {
  running = work(job).then((outcome) => tell({ event: "outcome", outcome }));
});
process.on("disconnect", () => void stopAlone());
// The driver interrupts the whole group: it is meant for the engines.
process.on("SIGINT", () => {
  isCancelled = true;
});

function tell(event: WorkerEvent): void {
  if (process.connected) process.send?.(event);
}

/** Nobody is left to tell: the engine is asked to end, so that nothing goes on unseen. */
async function stopAlone(): Promise<void> {
  const over = running.then(() => true);
  for (const _ of [1, 2]) {
    process.kill(-process.pid, "SIGINT");
    if (await Promise.race([over, sleep(1000, false)])) process.exit(1);
  }
  await Promise.race([over, sleep(ENGINE_GRACE_MS)]);
  process.kill(-process.pid, "SIGKILL");
}

async function work(job: Job): Promise<Outcome> {
  isCancelled = false;
  const errors: string[] = [];
  const onEvent = (event: EngineEvent): void => {
    for (const told of eventsOf(event)) {
      if (told.event === "line" && told.level === "error") errors.push(told.text);
      tell(told);
    }
  };
  try {
    const stack = await openStack(job);
    const changes = await untilUnlocked(stack, () => operate(stack, job, onEvent));
    return { ok: true, changes };
  } catch (error) {
    return failureOf(error, errors);
  }
}

async function openStack({ project, stack, programFolder, workFolder, backend, ...job }: Job): Promise<Stack> {
  command ??= PulumiCommand.get({});
  await mkdir(workFolder, { recursive: true });
  return LocalWorkspace.createOrSelectStack(
    {
      stackName: stack,
      projectName: project,
      program: async () => declareMachine({ project, stack, programFolder, workFolder, backend, ...job }),
    },
    {
      workDir: workFolder,
      pulumiCommand: await command,
      projectSettings: { name: project, runtime: "nodejs", main: programFolder },
      envVars: { PULUMI_BACKEND_URL: backend, PULUMI_SKIP_UPDATE_CHECK: "true" },
    },
  );
}

type Changes = Readonly<Record<string, number>>;

async function operate(stack: Stack, job: Job, onEvent: (event: EngineEvent) => void): Promise<Changes> {
  const quiet = { onEvent, suppressProgress: true, suppressOutputs: true, color: "never" } as const;
  const plan = job.planFile === undefined ? {} : { plan: job.planFile };
  if (job.recovers && (job.operation === "up" || job.operation === "destroy"))
    await stack.refresh({ ...quiet, onEvent: () => undefined, clearPendingCreates: true });
  switch (job.operation) {
    case "preview":
      return (await stack.preview({ ...quiet, ...plan })).changeSummary;
    case "up":
      return (await stack.up({ ...quiet, ...plan })).summary.resourceChanges ?? {};
    case "refresh":
      return (await stack.refresh({ ...quiet, clearPendingCreates: job.recovers })).summary.resourceChanges ?? {};
    case "destroy":
      return (await stack.destroy(quiet)).summary.resourceChanges ?? {};
  }
}

/** Runs `operation`, and again after a lock was taken over from somebody who is gone. Throws LockedError when somebody holds the stack. */
async function untilUnlocked<Result>(stack: Stack, operation: () => Promise<Result>): Promise<Result> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await operation();
    } catch (error) {
      const refusal = error instanceof Error ? error.message : "";
      if (!refusal.includes("the stack is currently locked by")) throw error;
      const owners = parseLockOwners(refusal);
      const alive = owners.filter((owner) => !isGone(owner));
      const [owner] = alive;
      if (owner !== undefined && attempt === LOCK_ATTEMPTS) {
        throw new LockedError(
          `its stack is being worked on since ${new Date(owner.sinceMs).toISOString()} by process ${owner.pid} of ${owner.user} on ${owner.host}: wait for it, or, where it is gone, run pulumi cancel on it`,
          { cause: error },
        );
      }
      if (owners.length === 0) throw error;
      if (alive.length > 0) await sleep(500 + Math.random() * 1000);
      else {
        for (const { pid, user, host } of owners)
          tell({ event: "line", level: "warn", text: `took over the stack from process ${pid} of ${user} on ${host}, which is gone` });
        if (!(await removeLockFiles(owners))) await stack.cancel();
        await stack.refresh({ suppressProgress: true, suppressOutputs: true, color: "never", clearPendingCreates: true });
      }
    }
  }
}

class LockedError extends Error {
  override readonly name = "LockedError";
}

/**
 * What passes by itself: a provider that died (grpc-go's status texts), an earlier provider that has not ended yet (its import's lock), and what the
 * provider says may pass; the preview before let the host pass, so that it failing now is of the same kind. Sources: provider/transfer, provider/wire.ts.
 */
const PASSING = /error reading from server|transport is closing|code = Unavailable|another import is writing|\(it may pass: |^host: /;
const KILLED = /was killed with SIG/;

function failureOf(error: unknown, told: readonly string[]): Outcome {
  const message = error instanceof Error ? error.message : String(error);
  const reasons = told.length > 0 ? [...new Set(told)] : [summaryOf(message)];
  const cause: FailureCause = isCancelled
    ? "cancelled"
    : error instanceof LockedError
      ? "locked"
      : [message, ...told].some((text) => PASSING.test(text))
        ? "passing"
        : KILLED.test(message)
          ? "engine killed"
          : "refused";
  if (cause === "cancelled") return { ok: false, cause, reasons: ["what was done stays, and the next run goes on from there"] };
  return { ok: false, cause, reasons: cause === "engine killed" ? ["Pulumi's engine was killed", ...told] : reasons };
}

/** Of all that a command printed, the lines that say what is wrong. */
function summaryOf(message: string): string {
  const lines = message.split("\n").map((line) => line.trim());
  const errors = lines.filter((line) => /^error:|^Error:/.test(line));
  return (errors.length > 0 ? errors : lines.filter((line) => line !== "")).slice(0, 5).join(" ").slice(0, 2000);
}

const OURS = /^pulumi-nodejs:dynamic\/virtlift:(ImportedDisk|VirtualMachine)$/;

/** The engine's severities that are for people; there is `debug` besides. */
const LEVELS: Readonly<Record<string, "info" | "warn" | "error">> = { info: "info", "info#err": "warn", warning: "warn", error: "error" };

/** What the engine and its language host say at the end of everything that failed, or that was cancelled: the reason is told before. */
const ENGINE_SUMMARY =
  /^(update|preview|refresh|destroy) (failed|cancell?ed)$|(^|: )One or more errors occurred\. Check logs for more details\.?$/;

function eventsOf({ diagnosticEvent, resourcePreEvent, resOutputsEvent, resOpFailedEvent }: EngineEvent): readonly WorkerEvent[] {
  if (diagnosticEvent !== undefined) {
    const text = plain(diagnosticEvent.message);
    const level = LEVELS[diagnosticEvent.severity];
    return level === undefined || ENGINE_SUMMARY.test(text) || diagnosticEvent.ephemeral === true || text === ""
      ? []
      : [{ event: "line", level, text }];
  }
  if (resourcePreEvent !== undefined) return stepOf("begun", resourcePreEvent.metadata);
  if (resOutputsEvent !== undefined) return stepOf("ended", resOutputsEvent.metadata);
  return resOpFailedEvent === undefined ? [] : stepOf("failed", resOpFailedEvent.metadata);
}

type Metadata = NonNullable<EngineEvent["resourcePreEvent"]>["metadata"];

function stepOf(event: "begun" | "ended" | "failed", metadata: Metadata): readonly WorkerEvent[] {
  const [, kind] = OURS.exec(metadata.type) ?? [];
  if (kind !== "ImportedDisk" && kind !== "VirtualMachine") return [];
  const state = metadata.new ?? metadata.old;
  const { __provider, ...properties } = { ...state?.inputs, ...(event === "ended" ? state?.outputs : {}) } as Record<string, unknown>;
  const step: Step = {
    kind,
    name: metadata.urn.slice(metadata.urn.lastIndexOf("::") + 2),
    op: metadata.op,
    changed: changedOf(metadata),
    properties,
  };
  return [{ event, step }];
}

/** What we keep beside a resource's own properties: it follows from them. */
const NOT_DECLARED: ReadonlySet<string> = new Set(["__provider", "origin", "declared", "declaration", "importId"]);

/** Names of whole properties: the engine names places in them, such as `networks[0].mac`. */
function changedOf({ detailedDiff, diffs }: Metadata): readonly string[] {
  // The engine writes null where it has none.
  const places = [...Object.keys(detailedDiff ?? {}), ...(diffs ?? [])];
  const names = new Set(places.map((place) => /^[^.[]*/.exec(place)?.[0] ?? ""));
  return [...names].filter((name) => name !== "" && !NOT_DECLARED.has(name)).toSorted();
}

/** Without the engine's colour marks and line ends. */
function plain(message: string): string {
  return message
    .replaceAll(/<\{%[^%]*%\}>/g, "")
    .replaceAll(/\s*\n\s*/g, " ")
    .trim();
}
