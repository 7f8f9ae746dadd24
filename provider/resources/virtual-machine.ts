/** VirtualMachine: a libvirt machine that boots from an imported disk or from a template, and stays the user's own for life. */
import { posix } from "node:path";
import { isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_METADATA, DOMAIN_UNDEFINE, DOMAIN_XML } from "../libvirt/constants.ts";
import {
  type DomainSpec,
  MACHINE_NAMESPACE,
  MACHINE_PREFIX,
  type MachineMetadata,
  type ObservedDomain,
  type ObservedInterface,
  type OwnVolume,
  parseDomain,
  parsePlacement,
  type Placement,
  renderDomain,
  renderMetadata,
} from "../libvirt/domain.ts";
import type { Domain } from "../libvirt/procedures.ts";
import { configuredHost, daemonOf, type DeclaredHost, openHost } from "./connect.ts";
import { parseArgs } from "./parse.ts";
import { BOOT_RULES, COMBINATION_RULES } from "./preflight/argument-rules.ts";
import { MACHINE_CHANGE_RULES, type MachineChange, restartRefusal } from "./preflight/change-rules.ts";
import { deploymentOf } from "./preflight/deployment.ts";
import { changing } from "./preflight/host-facts.ts";
import { declaredMachine, gatherMachine } from "./preflight/machine-facts.ts";
import { MACHINE_RULES } from "./preflight/machine-rules.ts";
import { conclude, failuresOf, judgeTrouble, settingsOf, tell } from "./preflight/preflight.ts";
import { judge, type Judgement, type PreflightSettings } from "./preflight/rule.ts";
import { type Context, Incomplete, type PropertyChange, type Resource } from "./resource.ts";
import { hasUnknown, UNKNOWN } from "./unknown.ts";
import {
  addressesOf,
  type Guest,
  GuestTimeout,
  type PowerState,
  powerStateOf,
  startGuest,
  stopGuest,
  waitForGuest,
} from "./virtual-machine-guest.ts";
import { defaultDomainType, placeDisk, placeDiskRef, placeImage } from "./virtual-machine-host.ts";
import { type VirtualMachineArgs, VirtualMachineSchema } from "./virtual-machine-schema.ts";
import {
  domainSpec,
  hasHardware,
  isSame,
  keepSnapshots,
  macOf,
  type MachineInputs,
  nameOf,
  ownVolumes,
  type PlacedImage,
  type PlacedNetwork,
  uuidOf,
} from "./virtual-machine-spec.ts";
import { deleteVolume, makeVolume } from "./virtual-machine-volumes.ts";

/** VIR_DOMAIN_AFFECT_LIVE and VIR_DOMAIN_AFFECT_CONFIG of libvirt-domain.h. */
const AFFECT_LIVE = 1;
const AFFECT_CONFIG = 2;

export interface MachineState extends Omit<MachineInputs, "powerState"> {
  /** As it was when virtlift last looked. */
  readonly powerState: PowerState;
  /** Addresses that others can reach it at; empty when neither a lease nor the agent tells one. */
  readonly ipAddresses: readonly string[];
  /** Whether the guest runs on older hardware than is defined, until its next start. */
  readonly restartPending: boolean;
  /** Whether it showed all that `waitFor` asks for since virtlift started it. */
  readonly ready: boolean;
  /** Absolute paths of the volumes that were made for the machine, also of blank disks that it no longer has. They are deleted with it. */
  readonly ownVolumes: readonly string[];
}

/** Every key of the inputs and what its change takes; `diff` knows the cases where it takes less or more. */
export const MACHINE_CHANGES: Readonly<Record<keyof MachineInputs, PropertyChange["effect"]>> = {
  host: "live",
  name: "replace",
  uuid: "replace",
  importedDisk: "restart",
  image: "replace",
  disks: "restart",
  vcpus: "restart",
  memoryMiB: "restart",
  machine: "restart",
  firmware: "restart",
  secureBoot: "restart",
  cpu: "restart",
  domainType: "restart",
  bus: "restart",
  networks: "restart",
  powerState: "live",
  autostart: "live",
  title: "live",
  description: "live",
  tags: "live",
  waitFor: "live",
  onRestartRequired: "live",
  shutdownTimeoutSeconds: "live",
  onShutdownTimeout: "live",
  preflight: "live",
  origin: "live",
  macAddresses: "restart",
  diskPaths: "restart",
  serialLog: "restart",
  declared: "live",
};

export const virtualMachine: Resource<MachineInputs, MachineState> = {
  check,
  diff,
  create: (context, inputs) => changing(openHost(context, inputs.host), () => create(context, inputs)),
  read,
  update: (context, id, olds, news) => changing(openHost(context, news.host), () => update(context, id, olds, news)),
  delete: (context, id, state) => changing(openHost(context, state.host), () => remove(context, id, state)),
};

async function check(context: Context, olds: MachineInputs | undefined, declared: unknown) {
  const news: Record<string, unknown> = Object.fromEntries(
    Object.entries(declared as Record<string, unknown>).filter(([, value]) => value !== undefined),
  );
  const given = Object.keys(news).filter((key) => key !== "origin");
  const host = news["host"] ?? diskHost(news) ?? configuredHost(context);
  if (host !== undefined) news["host"] = host;
  const unknown = Object.fromEntries(Object.entries(news).filter(([, value]) => hasUnknown(value)));
  const known = Object.fromEntries(Object.entries(news).filter(([key]) => !(key in unknown)));
  const { args, failures: parsed } = parseArgs(VirtualMachineSchema, known);
  const boot = judge(BOOT_RULES, { host, importedDisk: news["importedDisk"], image: news["image"] }, {});
  const unfit = [...parsed, ...failuresOf(boot)];
  if (!args || unfit.length > 0) return { inputs: news as never, failures: unfit };

  const identified = {
    ...args,
    name: args.name ?? nameOf(args.origin),
    uuid: args.uuid ?? olds?.uuid ?? uuidOf(args.origin),
    declared: given,
  };
  const { settings, failures: unset } = settingsOf(context, args.preflight);
  const combined = [...unset, ...failuresOf(judge(COMBINATION_RULES, identified, settings))];
  if (combined.length > 0) return { inputs: identified as never, failures: combined };
  if (args.host === undefined || Object.keys(unknown).length > 0) {
    return { inputs: { ...identified, ...unplaced(identified, olds), ...unknown } as never, failures: [] };
  }
  try {
    const opened = openHost(context, args.host);
    const inputs = await place(opened, { ...identified, host: args.host }, olds);
    return { inputs, failures: conclude(context, inputs, await judgeInputs(context, opened, inputs, { olds, settings })) };
  } catch (error) {
    return { inputs: identified as never, failures: conclude(context, identified, judgeTrouble(error)) };
  }
}

/** The host that an imported disk or a template names. */
function diskHost({ importedDisk, image }: Readonly<Record<string, unknown>>): unknown {
  return [importedDisk, image]
    .map((disk) => (typeof disk === "object" && disk !== null && "host" in disk ? disk.host : undefined))
    .find((host) => host !== undefined);
}

type Identified = VirtualMachineArgs & Pick<MachineInputs, "name" | "uuid" | "declared">;

/** What only the host can tell, in a preview that cannot ask it yet: as it was, or unknown. */
function unplaced(args: Identified, olds: MachineInputs | undefined): Partial<Record<keyof MachineInputs, unknown>> {
  const networks = placeNetworks(args, olds);
  const { domainType = UNKNOWN, diskPaths = UNKNOWN, serialLog = UNKNOWN, cpu = UNKNOWN } = olds ?? {};
  return {
    networks,
    macAddresses: networks.map(({ mac }) => mac),
    domainType: args.domainType ?? domainType,
    diskPaths,
    serialLog: args.serialLog ?? serialLog,
    cpu: args.cpu ?? cpu,
  };
}

/** Throws PlacementError, and what the host throws. */
async function place(
  host: Host,
  args: Identified & { readonly host: DeclaredHost },
  olds: MachineInputs | undefined,
): Promise<MachineInputs> {
  const { name, importedDisk, image } = args;
  const isSameHost = olds !== undefined && daemonOf(olds.host) === daemonOf(args.host);
  const domainType = args.domainType ?? (isSameHost ? olds.domainType : await defaultDomainType(host));
  const placedDisk = importedDisk && (await placeDiskRef(host, "importedDisk", importedDisk));
  const kept = isSameHost && olds.name === name && olds.image && isSame(declaredImage(olds.image), image) ? olds.image : undefined;
  const placedImage = image && (kept ?? (await placeImage(host, image, name)));
  const disks = await Promise.all(args.disks.map((disk, index) => placeDisk(host, `disks[${index}]`, disk, args)));
  const networks = placeNetworks(args, olds);
  const cpu = args.cpu ?? DEFAULT_CPU[domainType];
  return {
    ...args,
    domainType,
    ...(cpu && { cpu }),
    importedDisk: placedDisk,
    image: placedImage,
    disks,
    networks,
    macAddresses: networks.map(({ mac }) => mac),
    diskPaths: [placedDisk?.path ?? placedImage?.volumePath ?? "", ...disks.map(({ path }) => path)],
    serialLog: args.serialLog ?? (await serialLogPath(host, name)),
  };
}

const DEFAULT_CPU: Readonly<Record<MachineInputs["domainType"], MachineInputs["cpu"]>> = {
  kvm: { mode: "host-passthrough" },
  qemu: { mode: "maximum" },
  test: undefined,
};

function declaredImage({ template: _template, volumeName: _name, volumePath: _path, ...declared }: PlacedImage) {
  return declared;
}

function placeNetworks(args: Identified, olds: MachineInputs | undefined): readonly PlacedNetwork[] {
  const model = args.bus === "virtio" ? "virtio" : args.machine === "q35" ? "e1000e" : "e1000";
  return args.networks.map((network, index) => ({
    ...network,
    mac: network.mac ?? olds?.networks[index]?.mac ?? macOf(args.origin, index),
    model: network.model ?? model,
  }));
}

/** Where libvirt keeps the logs of machines, and virtlogd may write: for a user's own daemon in that user's cache. Source: virQEMUDriverConfigNew in qemu_conf.c. */
async function serialLogPath(host: Host, name: string): Promise<string> {
  const file = `${name}-serial0.log`;
  if (!isSession(host)) return `/var/log/libvirt/qemu/${file}`;
  const { stdout } = await host.run(["sh", "-c", 'printf %s "${XDG_CACHE_HOME:-$HOME/.cache}"']);
  return `${stdout.toString("utf8")}/libvirt/qemu/log/${file}`;
}

/** Whether the daemon is a user's own. It finds its folder for logs only when a package or an earlier machine made it. */
function isSession(host: Host): boolean {
  return /\/session(?:[?#]|$)/.test(host.spec.uri);
}

/** Throws what the host throws. */
async function judgeInputs(
  context: Context,
  host: Host,
  inputs: MachineInputs,
  { olds, settings }: { readonly olds: MachineInputs | undefined; readonly settings: PreflightSettings },
): Promise<readonly Judgement[]> {
  const deployment = deploymentOf(context.hosts);
  const isSameHost = olds !== undefined && daemonOf(olds.host) === daemonOf(inputs.host);
  if (olds && olds.origin !== inputs.origin) deployment.withdraw(olds.origin);
  const facts = await gatherMachine(host, inputs, { deployment, ownUuid: isSameHost ? olds.uuid : undefined });
  deployment.declareMachine(declaredMachine(inputs));
  if (context.config("virtlift:showXml") === "true") showXml(context, inputs);
  const judgements = judge(MACHINE_RULES, facts, settings);
  if (!isSameHost || olds.name !== inputs.name || olds.uuid !== inputs.uuid) return judgements;
  const restart = await restartsOf(context, await host.libvirt(), inputs, olds);
  return [...judgements, ...judge(MACHINE_CHANGE_RULES, { name: inputs.name, resized: resizedDisks(inputs, olds), restart }, settings)];
}

/** The definition as it will be sent, but for what libvirt fills in; one line of it a line. */
function showXml(context: Context, inputs: MachineInputs): void {
  const volumes = ownVolumes(inputs).map(({ path }) => ({ path, isUnfinished: false }));
  for (const line of renderDomain(domainSpec(inputs, volumes)).trimEnd().split("\n")) tell(context, "info", `${inputs.name}: ${line}`);
}

function resizedDisks(inputs: MachineInputs, olds: MachineInputs): MachineChange["resized"] {
  return inputs.disks.flatMap((disk, index) => {
    const old = olds.disks.find(({ path, size }) => path === disk.path && size !== undefined);
    if (old?.size === undefined || old.size === disk.size || disk.size === undefined) return [];
    return [{ property: `disks[${index}].size`, path: disk.path, madeBytes: old.size }];
  });
}

/** The properties whose change needs a restart that the user did not consent to. What is going to happen with consent is said. */
async function restartsOf(context: Context, libvirt: Libvirt, inputs: MachineInputs, olds: MachineInputs): Promise<readonly string[]> {
  const properties = changesOf(olds, inputs)
    .filter(({ effect }) => effect === "restart")
    .map(({ property }) => property);
  if (properties.length === 0 || inputs.powerState === "stopped") return [];
  const domain = await findDomain(libvirt, inputs.uuid);
  if (!domain || (await powerStateOf({ libvirt, domain })) === "stopped") return [];
  switch (inputs.onRestartRequired) {
    case "restart":
      tell(context, "info", `${inputs.name}: the guest is restarted for ${properties.join(", ")}`);
      return [];
    case "defer":
      tell(context, "info", `${inputs.name}: ${properties.join(", ")} will change at the guest's next start`);
      return [];
    case "fail":
      return properties;
  }
}

async function diff(_context: Context, _id: string, olds: MachineState, news: MachineInputs) {
  const changes = changesOf(olds, news);
  // A definition that waits for the guest's next start is done, unless the user now wants the restart.
  const restart =
    olds.restartPending && news.onRestartRequired === "restart" && news.powerState === "running" && olds.powerState !== "stopped";
  const pending: readonly PropertyChange[] =
    restart && !changes.some(({ effect }) => effect === "restart")
      ? [{ property: "onRestartRequired", effect: "restart", why: "the guest still runs on its old definition" }]
      : [];
  // Name, UUID and volumes of the old machine are those of the new one.
  return { changes: [...changes, ...pending], deleteBeforeReplace: true };
}

/** What differs, of what a machine is made of. Unknown values may differ, and never replace. */
function changesOf(olds: MachineInputs | MachineState, news: MachineInputs): readonly PropertyChange[] {
  return (Object.keys(MACHINE_CHANGES) as (keyof MachineInputs)[])
    .filter((property) => !DERIVED.has(property) && !isSame(olds[property], news[property]))
    .map((property) => ({ property, ...effectOf(property, olds, news) }));
}

/** What follows from other properties, and would only repeat them. */
const DERIVED: ReadonlySet<keyof MachineInputs> = new Set(["macAddresses", "diskPaths", "declared"]);

function effectOf(
  property: keyof MachineInputs,
  olds: MachineInputs | MachineState,
  news: MachineInputs,
): Omit<PropertyChange, "property"> {
  const effect = MACHINE_CHANGES[property];
  if (hasUnknown(news[property])) return { effect: effect === "replace" ? "live" : effect };
  if (property === "host") {
    return daemonOf(olds.host) === daemonOf(news.host)
      ? { effect: "live" }
      : { effect: "replace", why: "another host runs another machine" };
  }
  if (property === "importedDisk" && olds.importedDisk && news.importedDisk) {
    const { path, format } = news.importedDisk;
    return { effect: olds.importedDisk.path === path && olds.importedDisk.format === format ? "live" : effect };
  }
  if (property === "image") return { effect, why: "the boot disk is made anew from the template, and what the guest wrote goes" };
  if (effect === "replace") return { effect, why: "another name or UUID is another machine" };
  return { effect, ...(effect === "restart" && { why: "a running guest sees it at its next start" }) };
}

async function findDomain(libvirt: Libvirt, uuid: string): Promise<Domain | undefined> {
  try {
    return await libvirt.domainLookupByUUID(uuid);
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

/** A machine of ours as it is defined. */
interface Existing {
  readonly domain: Domain;
  readonly xml: string;
  readonly defined: ObservedDomain;
}

async function findExisting(libvirt: Libvirt, uuid: string): Promise<Existing | undefined> {
  const domain = await findDomain(libvirt, uuid);
  if (!domain) return undefined;
  const xml = await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive | DOMAIN_XML.secure);
  return { domain, xml, defined: parseDomain(xml) };
}

async function create(context: Context, inputs: MachineInputs) {
  const host = openHost(context, inputs.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, inputs.uuid);
  if (existing && existing.defined.metadata?.origin !== inputs.origin) {
    throw new Error(
      `the machine ${existing.defined.name} on ${host.label} has the UUID ${inputs.uuid} and is not ours: nothing was changed`,
    );
  }
  const volumes = existing?.defined.metadata?.volumes ?? [];
  const domain = await define({ context, host, inputs, existing, volumes, declaredPaths: inputs.diskPaths });
  const state = await settle({ context, host, libvirt, domain }, inputs, { mustWait: true });
  return { id: inputs.uuid, state };
}

interface Definition {
  readonly context: Context;
  readonly host: Host;
  readonly inputs: MachineInputs;
  readonly existing: Existing | undefined;
  /** The machine's own volumes that are there already, or half there. */
  readonly volumes: readonly OwnVolume[];
  /** Where the disks lay by the last definition of ours. */
  readonly declaredPaths: readonly string[];
}

/**
 * Makes the machine's own volumes and defines it over what is defined. Which volumes are being made stands in the definition first, so that a kill at
 * any time leaves nothing that is not known to be ours. When it fails, what was there before is there again.
 */
async function define({ context, host, inputs, existing, volumes, declaredPaths }: Definition): Promise<Domain> {
  const libvirt = await host.libvirt();
  const missing = ownVolumes(inputs).filter(({ path }) => !volumes.some((volume) => volume.path === path && !volume.isUnfinished));
  const others = volumes.filter(({ path }) => !missing.some((plan) => plan.path === path));
  const wanted = (isUnfinished: boolean): DomainSpec =>
    withSnapshots(
      context,
      domainSpec(inputs, [...others, ...missing.map(({ path }) => ({ path, isUnfinished }))]),
      existing,
      declaredPaths,
    );
  const placement = existing && parsePlacement(existing.xml);
  if (missing.length === 0) return defineOver(libvirt, wanted(false), existing, placement);

  const marked = existing?.domain ?? (await libvirt.domainDefineXMLFlags(renderDomain(wanted(true))));
  if (existing) await writeMetadata(libvirt, marked, wanted(true).metadata, AFFECT_CONFIG);
  const made: string[] = [];
  try {
    for (const plan of missing) {
      if (volumes.some(({ path }) => path === plan.path)) await deleteVolume(libvirt, plan.path);
      context.log("info", `${inputs.name}: making ${plan.path} on ${host.label}`);
      await makeVolume(host, plan, context.signal);
      made.push(plan.path);
    }
    return await defineOver(libvirt, wanted(false), existing, placement);
  } catch (error) {
    try {
      for (const path of made) await deleteVolume(libvirt, path);
      if (existing?.defined.metadata) await writeMetadata(libvirt, marked, existing.defined.metadata, AFFECT_CONFIG);
      else if (!existing) await undefine(libvirt, marked);
    } catch (failure) {
      // What made it fail is what the user is to know of; what stays is known to be ours, and the next try goes on with it.
      context.log("warn", `${inputs.name}: what was begun on ${host.label} could not be taken back: ${messageOf(failure)}`);
    }
    throw error;
  }
}

/** Writes the definition, unless nothing in it would change. */
async function defineOver(
  libvirt: Libvirt,
  spec: DomainSpec,
  existing: Existing | undefined,
  placement: Placement | undefined,
): Promise<Domain> {
  if (existing && isSame(existing.defined, spec)) return existing.domain;
  return libvirt.domainDefineXMLFlags(renderDomain(spec, placement));
}

function withSnapshots(context: Context, spec: DomainSpec, existing: Existing | undefined, declaredPaths: readonly string[]): DomainSpec {
  if (!existing) return spec;
  const kept = keepSnapshots(spec, existing.defined, declaredPaths);
  for (const [index, { path }] of kept.disks.entries()) {
    const declared = spec.disks[index]?.path;
    if (path !== declared)
      context.log("warn", `${spec.name}: a snapshot put ${path} on top of ${declared}; the machine keeps running on it`);
  }
  return kept;
}

async function writeMetadata(libvirt: Libvirt, domain: Domain, metadata: MachineMetadata, flags: number): Promise<void> {
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.element, renderMetadata(metadata), MACHINE_PREFIX, MACHINE_NAMESPACE, flags);
}

/** Brings autostart and power to what is declared, and waits for the guest. Throws Incomplete when the machine is defined but that did not happen. */
async function settle(
  guest: Guest,
  inputs: MachineInputs,
  { mustWait, restart = false }: { readonly mustWait: boolean; readonly restart?: boolean },
): Promise<MachineState> {
  const { libvirt, domain } = guest;
  const policy = { timeoutSeconds: inputs.shutdownTimeoutSeconds, onTimeout: inputs.onShutdownTimeout };
  try {
    if ((await libvirt.domainGetAutostart(domain)) !== inputs.autostart) await libvirt.domainSetAutostart(domain, inputs.autostart);
    if (restart || inputs.powerState === "stopped") await stopGuest(guest, policy);
    if (inputs.powerState === "running") {
      if (isSession(guest.host)) await guest.host.run(["mkdir", "-p", "--", posix.dirname(inputs.serialLog)]);
      const started = await startGuest(guest);
      if (started || mustWait) await waitForGuest(guest, inputs.waitFor, inputs.serialLog);
    }
    // As declared: a guest that powers itself off is found by the next refresh, not taken for a change of the program's.
    return { ...(await stateOf(guest, inputs, true)), powerState: inputs.powerState };
  } catch (error) {
    const reason =
      error instanceof GuestTimeout ? error.message : `${inputs.name} is defined on ${guest.host.label}, but ${messageOf(error)}`;
    throw new Incomplete(reason, { id: inputs.uuid, state: await unfinishedState(guest, inputs), cause: error });
  }
}

/** As far as the host still tells: a machine that exists is never lost with its connection. */
async function unfinishedState(guest: Guest, inputs: MachineInputs): Promise<MachineState> {
  try {
    return await stateOf(guest, inputs, false);
  } catch {
    // The error that led here is what the user is told.
    const volumes = ownVolumes(inputs).map(({ path }) => path);
    return { ...inputs, powerState: "stopped", ipAddresses: [], restartPending: false, ready: false, ownVolumes: volumes };
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

async function stateOf(guest: Guest, inputs: MachineInputs, ready: boolean): Promise<MachineState> {
  const { libvirt, domain } = guest;
  const powerState = await powerStateOf(guest);
  const defined = parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive));
  const volumes = defined.metadata?.volumes ?? [];
  return {
    ...inputs,
    powerState,
    ipAddresses: powerState === "stopped" ? [] : await addressesOf(guest),
    restartPending: powerState !== "stopped" && !hasHardware(parseDomain(await libvirt.domainGetXMLDesc(domain)), defined),
    ready,
    ownVolumes: volumes.map(({ path }) => path),
  };
}

async function update(context: Context, _id: string, olds: MachineState, news: MachineInputs): Promise<MachineState> {
  const host = openHost(context, news.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, news.uuid);
  const volumes = existing?.defined.metadata?.volumes ?? olds.ownVolumes.map((path) => ({ path, isUnfinished: false }));
  const isRunning = existing !== undefined && (await powerStateOf({ libvirt, domain: existing.domain })) !== "stopped";
  const live = isRunning ? parseDomain(await libvirt.domainGetXMLDesc(existing.domain)) : undefined;
  const spec = existing && keepSnapshots(domainSpec(news, volumes), existing.defined, olds.diskPaths);
  const needsRestart = live !== undefined && spec !== undefined && news.powerState === "running" && !hasHardware(live, spec);
  const isDeclared = changesOf(olds, news).some(({ effect }) => effect === "restart");
  if (needsRestart && isDeclared && news.onRestartRequired === "fail") throw new Error(restartRefusal(news.name));

  for (const { path } of volumes) {
    if (olds.diskPaths.includes(path) && !news.diskPaths.includes(path)) {
      context.log(
        "info",
        `${news.name}: ${path} is no longer a disk of the machine; it stays on ${host.label} until the machine is deleted`,
      );
    }
  }
  const domain = await define({ context, host, inputs: news, existing, volumes, declaredPaths: olds.diskPaths });
  if (isRunning) await relabel(libvirt, domain, news, volumes);
  const restart = needsRestart && news.onRestartRequired === "restart";
  return settle({ context, host, libvirt, domain }, news, { mustWait: !olds.ready, restart });
}

/** A running machine shows its old title, description and metadata until it is told the new ones. */
async function relabel(libvirt: Libvirt, domain: Domain, inputs: MachineInputs, volumes: readonly OwnVolume[]): Promise<void> {
  const { title, description } = inputs;
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.title, title, undefined, undefined, AFFECT_LIVE);
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.description, description, undefined, undefined, AFFECT_LIVE);
  const all = [...new Set([...volumes, ...ownVolumes(inputs)].map(({ path }) => path))];
  const { metadata } = domainSpec(
    inputs,
    all.map((path) => ({ path, isUnfinished: false })),
  );
  await writeMetadata(libvirt, domain, metadata, AFFECT_LIVE);
}

async function read(context: Context, id: string, state: MachineState) {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, state.uuid);
  if (!existing) return undefined;
  const { domain, defined } = existing;
  const drifted = await driftOf(context, libvirt, domain, defined, state);
  const inputs = { ...inputsOf(state), ...drifted };
  const found = await stateOf({ context, host, libvirt, domain }, inputs, state.ready);
  return {
    id,
    state: found,
    inputs: { ...inputs, powerState: found.powerState === "running" ? ("running" as const) : ("stopped" as const) },
  };
}

function inputsOf(state: MachineState): MachineInputs {
  const { ipAddresses: _i, restartPending: _p, ready: _r, ownVolumes: _v, powerState, ...inputs } = state;
  return { ...inputs, powerState: powerState === "running" ? "running" : "stopped" };
}

/** What a human changed, in the user's own properties: of those only that the user declared. What lies deeper is said in a line. */
async function driftOf(
  context: Context,
  libvirt: Libvirt,
  domain: Domain,
  defined: ObservedDomain,
  state: MachineState,
): Promise<Partial<MachineInputs>> {
  const drift: Partial<Record<keyof MachineInputs, unknown>> = {
    memoryMiB: defined.memoryKiB / 1024,
    vcpus: defined.vcpus,
    machine: defined.machine,
    firmware: defined.firmware,
    secureBoot: defined.secureBoot,
    title: defined.title,
    description: defined.description,
    autostart: await libvirt.domainGetAutostart(domain),
    networks: networksOf(state, defined.interfaces),
    disks: state.disks.filter(({ path }) => isAttached(path, state, defined)),
  };
  const spec = domainSpec(inputsOf(state), []);
  for (const disk of spec.disks) {
    const found = defined.disks.find(({ target }) => target === disk.target);
    if (found?.path !== disk.path) {
      context.log(
        "warn",
        `${state.name}: its disk ${disk.target} is ${found?.path ?? "gone"}, not ${disk.path}, by somebody else's change`,
      );
    }
  }
  return Object.fromEntries(Object.entries(drift).filter(([key]) => state.declared.includes(key))) as Partial<MachineInputs>;
}

/** A disk under a snapshot is still attached: its place in the definition is taken by the file on top. */
function isAttached(path: string, state: MachineState, defined: ObservedDomain): boolean {
  const target = domainSpec(inputsOf(state), []).disks.find((disk) => disk.path === path)?.target;
  return defined.disks.some((disk) => disk.path === path || disk.target === target);
}

/** The networks as they are now; those that did not change stay word for word. */
function networksOf(state: MachineState, interfaces: readonly ObservedInterface[]): readonly unknown[] {
  const expected = domainSpec(inputsOf(state), []).interfaces;
  return interfaces.map((each) => {
    const index = expected.findIndex(({ mac }) => mac === each.mac);
    if (index >= 0 && isSame(expected[index], each)) return state.networks[index];
    const { type, source, mac, model } = each;
    return { ...(type === "user" ? { type } : { [type]: source }), mac, model };
  });
}

const UNDEFINE_ALL =
  DOMAIN_UNDEFINE.managedSave | DOMAIN_UNDEFINE.snapshotsMetadata | DOMAIN_UNDEFINE.nvram | DOMAIN_UNDEFINE.checkpointsMetadata;

async function remove(context: Context, _id: string, state: MachineState): Promise<void> {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, state.uuid);
  if (existing) {
    const { domain, defined } = existing;
    if (defined.metadata !== undefined && defined.metadata.origin !== state.origin) {
      throw new Error(
        `the machine ${defined.name} on ${host.label} belongs to ${defined.metadata.origin} and is not deleted: remove it by hand, or run pulumi state delete`,
      );
    }
    try {
      await stopGuest({ context, host, libvirt, domain }, { timeoutSeconds: state.shutdownTimeoutSeconds, onTimeout: "cut" });
      await undefine(libvirt, domain);
    } catch (error) {
      if (!isNotFound(error)) throw error;
    }
  }
  const volumes = existing?.defined.metadata?.volumes.map(({ path }) => path) ?? [];
  for (const path of new Set([...state.ownVolumes, ...volumes])) await deleteVolume(libvirt, path);
}

/** With its NVRAM, saved state and what libvirt knows of its snapshots. */
async function undefine(libvirt: Libvirt, domain: Domain): Promise<void> {
  try {
    await libvirt.domainUndefineFlags(domain, UNDEFINE_ALL);
  } catch (error) {
    // VIR_ERR_INVALID_ARG: libvirt's test driver, and older daemons, refuse flags that they do not know.
    if (!(error instanceof LibvirtError) || error.code !== INVALID_ARG) throw error;
    await libvirt.domainUndefineFlags(domain, DOMAIN_UNDEFINE.managedSave | DOMAIN_UNDEFINE.snapshotsMetadata);
  }
}

/** VIR_ERR_INVALID_ARG of virterror.h. */
const INVALID_ARG = 8;
