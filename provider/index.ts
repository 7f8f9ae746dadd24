/**
 * The only door to the provider: one handler for each resource, under the names by which every state that was ever stored asks for it.
 * Only this file reads the process's environment and arguments. It is loaded by `require`, so nothing below it may await at its top level.
 */
import { createRequire } from "node:module";
import { homedir, userInfo } from "node:os";
import { extname } from "node:path";
import { Calls, engineGone, parseEngineAddress } from "./engine.ts";
import type { Hosts } from "./host/hosts.ts";
import type * as problems from "./resources/argument-problems.ts";
import type * as descriptions from "./resources/machine-description.ts";
import type { Context } from "./resources/resource.ts";
import type { Toolbox } from "./toolbox.ts";
import { openThrottle, type Throttle } from "./transfer/throttle.ts";
import { type Handler, serve } from "./wire.ts";

/** The handler of `pulumi-nodejs:dynamic/virtlift:ImportedDisk`. */
export const importedDisk: Handler = serve(async () => (await import("./resources/imported-disk.ts")).importedDisk, run);

/** The handler of `pulumi-nodejs:dynamic/virtlift:VirtualMachine`. */
export const virtualMachine: Handler = serve(async () => (await import("./resources/virtual-machine.ts")).virtualMachine, run);

/** Reads the machine in an OVA or OVF of this machine, at once: see `resources/machine-description.ts`. */
export function describeMachine(path: string): descriptions.MachineDescription {
  return load<typeof descriptions>("machine-description").describeMachine(path);
}

/** What is wrong with arguments by themselves, at once: see `resources/argument-problems.ts`. */
export const argumentProblems: typeof problems.argumentProblems = (resource, given) =>
  load<typeof problems>("argument-problems").argumentProblems(resource, given);

/** By require, so that readers and their packages are loaded by those only who ask for them. */
function load<Module>(name: string): Module {
  return createRequire(import.meta.url)(`./resources/${name}${extname(import.meta.filename)}`) as Module;
}

/** Answers without an engine, on hosts of the caller's own: see `toolbox.ts`. `config` is the stack's configuration by full key; default: none. */
export async function openToolbox(config: Context["config"] = () => undefined): Promise<Toolbox> {
  const { createToolbox } = await import("./toolbox.ts");
  return createToolbox(await openHosts(), config);
}

const calls = new Calls();
let hosts: Promise<Hosts> | undefined;
/** VIRTLIFT_BANDWIDTH, see `openThrottle`: a setting of the run, not of any resource, so that it is in no state. */
let throttle: Throttle | undefined;

async function run<Result>(config: Context["config"], work: (context: Context) => Promise<Result>): Promise<Result> {
  hosts ??= open();
  const opened = await hosts;
  const bandwidth = process.env["VIRTLIFT_BANDWIDTH"];
  if (bandwidth !== undefined && bandwidth !== "") throttle ??= openThrottle(bandwidth);
  return calls.run(() => work({ config, log, signal: calls.signal, hosts: opened, throttle }));
}

/** What the first call needs; nothing of it happens when the package is only loaded. */
async function open(): Promise<Hosts> {
  const engine = parseEngineAddress(process.argv.at(-1));
  if (engine !== undefined)
    void engineGone(engine).then(() => shutDown("Pulumi's engine is gone: stopped, and what was copied so far is kept"));
  // The engine interrupts its providers at every end, also a normal one, and kills them 5 s later.
  process.once("SIGINT", () => void shutDown("Pulumi's engine stopped this update"));
  return openHosts();
}

async function openHosts(): Promise<Hosts> {
  const { createHosts } = await import("./host/open.ts");
  return createHosts({
    environment: process.env,
    homeDirectory: homedir(),
    // An account without an entry in passwd, as in some containers, has no other name.
    userName: process.env["USER"] ?? userInfo().username,
    userId: process.geteuid?.() ?? -1,
  });
}

async function shutDown(reason: string): Promise<void> {
  await calls.end(reason);
  process.exit(1);
}

/** The engine shows both streams under the Stack, stderr marked as such. */
function log(level: "info" | "warn", text: string): void {
  (level === "info" ? process.stdout : process.stderr).write(`${text.replaceAll(/\s*\n\s*/g, " ")}\n`);
}
