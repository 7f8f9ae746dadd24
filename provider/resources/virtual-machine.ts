/** VirtualMachine: a libvirt machine that boots from an imported disk or from a template, and stays the user's own for life. */
import { posix } from "node:path";
import { isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_AFFECT, DOMAIN_METADATA, DOMAIN_UNDEFINE, DOMAIN_XML, LIBVIRT_ERROR } from "../libvirt/constants.ts";
import {
  type DomainSpec,
  MACHINE_NAMESPACE,
  MACHINE_PREFIX,
  type MachineMetadata,
  type ObservedDomain,
  type OwnVolume,
  parseDomain,
  parsePlacement,
  renderDomain,
  renderMetadata,
} from "../libvirt/domain.ts";
import type { Domain } from "../libvirt/procedures.ts";
import { PatchError, type XmlPatch } from "../libvirt/xml-patch.ts";
import { isSame } from "../libvirt/same.ts";
import { configuredHost, daemonOf, type DeclaredHost, openHost } from "./connect.ts";
import { machinesReaching } from "./file-users.ts";
import { assertHome, type Home, homeOf } from "./home.ts";
import { parseArgs } from "./parse.ts";
import { ARGUMENT_RULES, BOOT_RULES, COMBINATION_RULES, HOST_RULES } from "./preflight/argument-rules.ts";
import { MACHINE_CHANGE_RULES, restartRefusal } from "./preflight/change-rules.ts";
import { deploymentOf } from "./preflight/deployment.ts";
import { changing, factsOf } from "./preflight/host-facts.ts";
import { declaredMachine, gatherMachine, isOfOtherState, isStranger } from "./preflight/machine-facts.ts";
import { MACHINE_RULES, otherStateRefusal, strangerRefusal } from "./preflight/machine-rules.ts";
import { conclude, judgeTrouble, settingsOf, tell } from "./preflight/preflight.ts";
import { judge, type Judgement, type PreflightSettings } from "./preflight/rule.ts";
import { type Context, Incomplete, type PropertyChange, type Resource } from "./resource.ts";
import { hasUnknown, UNKNOWN } from "./unknown.ts";
import {
  addressesOf,
  type Guest,
  GuestTimeout,
  hostnameOf,
  pauseGuest,
  type PowerState,
  powerStateOf,
  startGuest,
  stopGuest,
  waitForGuest,
} from "./virtual-machine-guest.ts";
import { ADOPTED, type Adopted, assertAdoptable, findAdopted, tellAdoption } from "./virtual-machine-adopt.ts";
import { changesOf } from "./virtual-machine-changes.ts";
import { driftOf } from "./virtual-machine-drift.ts";
import { defaultDomainType, placeDisk, placeDiskRef, placeImage, PlacementError, placeSeed } from "./virtual-machine-host.ts";
import { changeLive, growVolumes } from "./virtual-machine-live.ts";
import { type VirtualMachineArgs, VirtualMachineSchema } from "./virtual-machine-schema.ts";
import {
  definitionOf,
  domainSpec,
  hasHardware,
  isDefined,
  keepSnapshots,
  macOf,
  type MachineInputs,
  nameOf,
  ownVolumes,
  type PlacedImage,
  type PlacedNetwork,
  targetsOf,
  uuidOf,
} from "./virtual-machine-spec.ts";
import { domainsUsing, volumesBackedBy } from "./usage.ts";
import { deleteVolume, findSnapshots, isVolume, makeVolume, sizesOf } from "./virtual-machine-volumes.ts";

export interface MachineState extends Omit<MachineInputs, "powerState">, Home {
  /** As it was when virtlift last looked. */
  readonly powerState: PowerState;
  /** Addresses that others can reach it at; empty when none is known. */
  readonly ipAddresses: readonly string[];
  /** What the guest calls itself, by its agent or its lease; undefined when neither tells. */
  readonly hostname?: string | undefined;
  /** Whether the guest runs on older hardware than is defined, until its next start. */
  readonly restartPending: boolean;
  /** Whether it showed all that `waitFor` asks for since virtlift started it. */
  readonly ready: boolean;
  /** Absolute paths of the volumes made for the machine, also of blank disks that it no longer has. Those that its definition names go with it. */
  readonly ownVolumes: readonly string[];
}

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
  const boot = judge(BOOT_RULES, { importedDisk: news["importedDisk"], image: news["image"] }, {});
  const unfit = conclude(context, { origin: String(news["origin"]), name: "" }, [
    ...judge(ARGUMENT_RULES, { failures: parsed }, {}),
    ...boot,
    ...judge(HOST_RULES, { host }, {}),
  ]);
  if (!args || unfit.length > 0) return { inputs: news as never, failures: unfit };

  let adopted: Adopted | undefined;
  try {
    adopted = args.adopt && args.host && !olds ? await findAdopted(openHost(context, args.host), args, given) : undefined;
  } catch (error) {
    return { inputs: news as never, failures: conclude(context, { origin: args.origin, name: nameOf(args.origin) }, judgeTrouble(error)) };
  }
  // Of a machine that was adopted stays what it was and nobody has declared since.
  const found = args.adopt ? (adopted?.inputs ?? Object.fromEntries(ADOPTED.map((key) => [key, olds?.[key]]))) : {};
  const kept = Object.fromEntries(Object.entries(found).filter(([key, value]) => !given.includes(key) && value !== undefined));
  const base = adopted?.inputs ?? olds;
  const identified: Identified = {
    ...args,
    ...kept,
    // A resource that got another logical name, with an alias, is still the same machine.
    name: args.name ?? (args.adopt || base?.declared.includes("name") === false ? base?.name : undefined) ?? nameOf(args.origin),
    uuid: args.uuid ?? base?.uuid ?? uuidOf(args.origin),
    declared: given,
  };
  const { settings, failures: unset } = settingsOf(context, args.preflight);
  const combined = [...unset, ...conclude(context, identified, judge(COMBINATION_RULES, identified, settings))];
  if (combined.length > 0) return { inputs: identified as never, failures: combined };
  if (args.host === undefined || Object.keys(unknown).length > 0) {
    return { inputs: { ...identified, ...unplaced(identified, olds), ...unknown } as never, failures: [] };
  }
  try {
    const opened = openHost(context, args.host);
    const inputs = await place(
      context,
      opened,
      { ...identified, host: args.host },
      adopted ? { ...adopted.inputs, host: args.host } : olds,
    );
    if (adopted) {
      await assertAdoptable(opened, inputs, adopted);
      tellAdoption(context, inputs, adopted);
    }
    return {
      inputs,
      failures: conclude(context, inputs, await judgeInputs(context, opened, inputs, { olds, settings, ownUuid: adopted?.inputs.uuid })),
    };
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
  const { domainType = UNKNOWN, diskPaths = UNKNOWN, diskTargets = UNKNOWN, serialLog = UNKNOWN, cpu = UNKNOWN } = olds ?? {};
  return {
    networks,
    diskTargets,
    macAddresses: networks.map(({ mac }) => mac),
    domainType: args.domainType ?? domainType,
    diskPaths,
    serialLog: args.serialLog ?? serialLog,
    cpu: args.cpu ?? cpu,
  };
}

/** Throws PlacementError, and what the host throws. */
async function place(
  context: Context,
  host: Host,
  args: Identified & { readonly host: DeclaredHost },
  olds: MachineInputs | undefined,
): Promise<MachineInputs> {
  const { name, importedDisk, image } = args;
  const isSameHost = olds !== undefined && daemonOf(olds.host) === daemonOf(args.host);
  const domainType = args.domainType ?? (isSameHost ? olds.domainType : await defaultDomainType(host));
  const isComing = (path: string): boolean =>
    deploymentOf(context.hosts).isDiskComing(path, { origin: args.origin, daemon: daemonOf(args.host) });
  const placedDisk = importedDisk && (await placeDiskRef(host, "importedDisk", importedDisk));
  // A template is asked for once: it may be gone when only the capacity changes.
  const kept =
    isSameHost && olds.name === name && olds.image && isSame(templateOf(olds.image), image && templateOf(image)) ? olds.image : undefined;
  const placedImage = image && (kept ? { ...image, ...placeOf(kept) } : await placeImage(host, image, { machine: name, isComing }));
  const disks = await Promise.all(args.disks.map((disk, index) => placeDisk(host, `disks[${index}]`, disk, args)));
  const networks = placeNetworks(args, olds);
  const cloudInit = args.cloudInit && (await placeSeed(host, args.cloudInit, args, isSameHost ? olds.cloudInit : undefined));
  const cpu = args.cpu ?? DEFAULT_CPU[domainType];
  const placed = { ...args, importedDisk: placedDisk, image: placedImage, disks, cloudInit };
  const inputs: MachineInputs = {
    ...placed,
    domainType,
    ...(cpu && { cpu }),
    networks,
    macAddresses: networks.map(({ mac }) => mac),
    diskPaths: [placedDisk?.path ?? placedImage?.volumePath ?? "", ...disks.map(({ path = "" }) => path)],
    diskTargets: targetsOf(placed, olds),
    serialLog: args.serialLog ?? (await serialLogPath(host, name)),
  };
  tryPatches(inputs);
  return inputs;
}

/** Throws PlacementError when the user's patches do not fit the definition. */
function tryPatches(inputs: MachineInputs): void {
  try {
    renderDomain(domainSpec(inputs, []));
  } catch (error) {
    if (!(error instanceof PatchError)) throw error;
    throw new PlacementError(
      `xmlPatches[${error.index}]`,
      `${error.message}: look at the definition with the configuration virtlift:showXml`,
    );
  }
}

const DEFAULT_CPU: Readonly<Record<MachineInputs["domainType"], MachineInputs["cpu"]>> = {
  kvm: { mode: "host-passthrough" },
  qemu: { mode: "maximum" },
  test: undefined,
};

function placeOf({ template, volumeName, volumePath }: PlacedImage) {
  return { template, volumeName, volumePath };
}

function templateOf({ path, volume, pool, mode, format }: NonNullable<VirtualMachineArgs["image"]>) {
  return { path, volume, pool, mode, format };
}

/**
 * Each interface with its address: the user's; else that of an interface which was on the same network before, at the same place first; else that of one
 * which was at the same place; else a new one. So an interface keeps its address when another one goes, and when it is moved to another network.
 */
function placeNetworks(args: Identified, olds: Pick<MachineInputs, "networks"> | undefined): readonly PlacedNetwork[] {
  const model = args.bus === "virtio" ? "virtio" : args.machine === "q35" ? "e1000e" : "e1000";
  const before = olds?.networks ?? [];
  const macs = new Map<number, string>();
  const isFree = (mac: string): boolean => ![...macs.values()].includes(mac);
  const take = (fits: (network: Declared, index: number, old: PlacedNetwork, oldIndex: number) => boolean): void => {
    for (const [index, network] of args.networks.entries()) {
      if (macs.has(index)) continue;
      const old = before.find((each, oldIndex) => isFree(each.mac) && fits(network, index, each, oldIndex));
      if (old) macs.set(index, old.mac);
    }
  };
  for (const [index, { mac }] of args.networks.entries()) if (mac !== undefined) macs.set(index, mac);
  const isSamePlace = (one: Declared, other: PlacedNetwork): boolean =>
    one.network === other.network && one.bridge === other.bridge && one.direct === other.direct && one.type === other.type;
  take((network, index, old, oldIndex) => index === oldIndex && isSamePlace(network, old));
  take((network, _index, old) => isSamePlace(network, old));
  take((_network, index, _old, oldIndex) => index === oldIndex);
  return args.networks.map((network, index) => {
    const known = macs.get(index);
    if (known !== undefined) return { ...network, mac: known, model: network.model ?? model };
    let number = index;
    while (!isFree(macOf(args.origin, number)) || before.some(({ mac }) => mac === macOf(args.origin, number))) number++;
    macs.set(index, macOf(args.origin, number));
    return { ...network, mac: macOf(args.origin, number), model: network.model ?? model };
  });
}
type Declared = VirtualMachineArgs["networks"][number];

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
  {
    olds,
    settings,
    ownUuid,
  }: { readonly olds: MachineInputs | undefined; readonly settings: PreflightSettings; readonly ownUuid: string | undefined },
): Promise<readonly Judgement[]> {
  const deployment = deploymentOf(context.hosts);
  const isSameHost = olds !== undefined && daemonOf(olds.host) === daemonOf(inputs.host);
  if (olds && olds.origin !== inputs.origin) deployment.withdraw(olds.origin);
  const facts = await gatherMachine(host, inputs, {
    deployment,
    ownUuid: isSameHost ? olds.uuid : ownUuid,
    madeFor: isSameHost ? olds.origin : undefined,
  });
  deployment.declareMachine(declaredMachine(inputs));
  if (context.config("virtlift:showXml") === "true") showXml(context, inputs);
  const judgements = judge(MACHINE_RULES, facts, settings);
  if (!isSameHost || olds.name !== inputs.name || olds.uuid !== inputs.uuid) return judgements;
  const refused = changesOf(olds, inputs).filter(({ effect }) => effect === "refused");
  const restart = await restartsOf(context, await host.libvirt(), inputs, olds);
  return [...judgements, ...judge(MACHINE_CHANGE_RULES, { name: inputs.name, refused, restart }, settings)];
}

/** The definition as it will be sent, but for what libvirt fills in; one line of it a line. */
function showXml(context: Context, inputs: MachineInputs): void {
  const volumes = ownVolumes(inputs).map(({ path }) => ({ path, isUnfinished: false }));
  for (const line of renderDomain(domainSpec(inputs, volumes)).trimEnd().split("\n")) tell(context, "info", `${inputs.name}: ${line}`);
}

/** The properties whose change needs a restart that the user did not consent to. What is going to happen with consent, and to its power, is said. */
async function restartsOf(context: Context, libvirt: Libvirt, inputs: MachineInputs, olds: MachineInputs): Promise<readonly string[]> {
  const changes = changesOf(olds, inputs);
  const properties = changes.filter(({ effect }) => effect === "restart").map(({ property }) => property);
  if (changes.length === 0) return [];
  const domain = await findDomain(libvirt, inputs.uuid);
  if (!domain) return [];
  const found = await powerStateOf({ libvirt, domain });
  if (found !== inputs.powerState)
    tell(context, "info", `${inputs.name}: ${powerWords(found, inputs.powerState)}: declare \`powerState: "${found}"\` to leave it so`);
  if (found === "stopped" || inputs.powerState === "stopped") return [];
  if (properties.length === 0) return [];
  // What somebody else defined and did not start goes without a restart.
  if (await runsAs(libvirt, domain, inputs)) return [];
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

/** What is going to happen to a machine that was found in one state and is declared in another. */
function powerWords(found: MachineInputs["powerState"], declared: MachineInputs["powerState"]): string {
  if (found === "stopped") return "it is off, and is started";
  if (declared === "stopped") return `it ${found === "paused" ? "is paused" : "runs"}, and is shut down`;
  return found === "paused" ? "it is paused, and goes on" : "it runs, and is paused";
}

async function diff(_context: Context, _id: string, olds: MachineState, news: MachineInputs) {
  const changes = changesOf(olds, news).map(({ property, effect, why }): PropertyChange => ({
    property,
    // What is refused has failed the check, and is not reached.
    effect: effect === "refused" ? "live" : effect,
    ...(why !== undefined && { why }),
  }));
  // A definition that waits for the guest's next start is done, unless the user now wants the restart.
  const restart =
    olds.restartPending && news.onRestartRequired === "restart" && news.powerState !== "stopped" && olds.powerState !== "stopped";
  const pending: readonly PropertyChange[] =
    restart && !changes.some(({ effect }) => effect === "restart")
      ? [{ property: "onRestartRequired", effect: "restart", why: "the guest still runs on its old definition" }]
      : [];
  // Name, UUID and volumes of the old machine are those of the new one.
  return { changes: [...changes, ...pending], deleteBeforeReplace: true };
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
  const owner = existing?.defined.metadata;
  const isMade = isOfOtherState(inputs.origin, owner);
  const isAdopted = existing !== undefined && inputs.adopt !== undefined && (owner === undefined || isMade);
  if (existing && !isAdopted && owner?.origin !== inputs.origin) {
    throw new Error(
      `the machine ${existing.defined.name} on ${host.label} has the UUID ${inputs.uuid} and is not ours: nothing was changed`,
    );
  }
  if (existing && isMade && !isAdopted) throw new Error(otherStateRefusal(existing.defined, host.label));
  const volumes = existing?.defined.metadata?.volumes ?? [];
  const domain = await define({
    context,
    host,
    inputs,
    existing,
    volumes,
    declaredPaths: inputs.diskPaths,
    declaredPatches: [],
    given: undefined,
  });
  const state = await settle({ context, host, libvirt, domain }, inputs, { mustWait: !isAdopted });
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
  /** The patches that the last definition of ours was made with. */
  readonly declaredPatches: readonly XmlPatch[];
  /** The last definition of ours: what it does not have was given by somebody else, and stays. Undefined: nothing was. */
  readonly given: DomainSpec | undefined;
}

/**
 * Makes the machine's own volumes, defines it over what is defined, and changes what runs as far as that can be. Which volumes are being made stands in
 * the definition first, so that a kill at any time leaves nothing that is not known to be ours. When it fails, what was there before is there again.
 */
async function define({ context, host, inputs, existing, volumes, declaredPaths, declaredPatches, given }: Definition): Promise<Domain> {
  const libvirt = await host.libvirt();
  const missing = ownVolumes(inputs).filter(({ path }) => !volumes.some((volume) => volume.path === path && !volume.isUnfinished));
  const others = volumes.filter(({ path }) => !missing.some((plan) => plan.path === path));
  const isSnapshot = existing && (await findSnapshots(libvirt, existing.defined, declaredPaths));
  const wanted = (isUnfinished: boolean): DomainSpec => {
    const plain = domainSpec(inputs, [...others, ...missing.map(({ path }) => ({ path, isUnfinished }))]);
    const labels = given && existing ? keepLabels(given, existing.defined, plain) : {};
    const spec = { ...plain, ...labels, metadata: { ...plain.metadata, finished: existing?.defined.metadata?.finished } };
    return existing && isSnapshot ? withSnapshots(context, keepSnapshots(spec, existing.defined, isSnapshot), spec) : spec;
  };
  const spec = wanted(false);
  const patches = [...declaredPatches, ...(inputs.xmlPatches ?? [])];
  const made: string[] = [];
  let marked = existing?.domain;
  try {
    if (missing.length > 0) {
      marked ??= await libvirt.domainDefineXMLFlags(renderDomain(wanted(true)));
      if (existing?.defined.metadata) await writeMetadata(libvirt, marked, wanted(true).metadata, DOMAIN_AFFECT.config);
    }
    for (const plan of missing) {
      if (volumes.some(({ path }) => path === plan.path)) await deleteVolume(libvirt, plan.path);
      context.log("info", `${inputs.name}: making ${plan.path} on ${host.label}`);
      await makeVolume(host, plan, context.signal);
      made.push(plan.path);
    }
    if (existing && isDefined(existing.defined, spec)) return existing.domain;
    const domain = await libvirt.domainDefineXMLFlags(renderDomain(spec, existing && parsePlacement(existing.xml, patches, given)));
    if ((await powerStateOf({ libvirt, domain })) !== "stopped") await changeLive({ context, host, libvirt, domain }, spec, given);
    return domain;
  } catch (error) {
    try {
      if (existing) await libvirt.domainDefineXMLFlags(existing.xml);
      // What the running guest did not let go is still its own.
      const held = existing ? parseDomain(await libvirt.domainGetXMLDesc(existing.domain)).disks.map(({ path }) => path) : [];
      for (const path of made) if (!held.includes(path)) await deleteVolume(libvirt, path);
      const left = made.filter((path) => held.includes(path)).map((path) => ({ path, isUnfinished: false }));
      if (left.length > 0)
        await writeMetadata(libvirt, existing!.domain, { ...spec.metadata, volumes: [...volumes, ...left] }, DOMAIN_AFFECT.config);
      if (!existing && marked) await undefine(libvirt, marked);
    } catch (failure) {
      // What made it fail is what the user is to know of; what stays is known to be ours, and the next try goes on with it.
      context.log("warn", `${inputs.name}: what was begun on ${host.label} could not be taken back: ${messageOf(failure)}`);
    }
    throw error;
  }
}

/** Title and description that nobody declared are somebody else's words. */
function keepLabels(given: DomainSpec, { title, description }: ObservedDomain, wanted: DomainSpec): Partial<DomainSpec> {
  return {
    title: wanted.title ?? (given.title === undefined ? title : undefined),
    description: wanted.description ?? (given.description === undefined ? description : undefined),
  };
}

/** Says on which files the machine runs in place of the declared ones. */
function withSnapshots(context: Context, kept: DomainSpec, declared: DomainSpec): DomainSpec {
  for (const [index, { path }] of kept.disks.entries()) {
    const below = declared.disks[index]?.path;
    if (path !== below)
      tell(context, "warn", `${declared.name}: a snapshot put ${path} on top of ${below}; the machine keeps running on it`);
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
  {
    mustWait,
    restart = false,
    keepsAutostart = false,
  }: { readonly mustWait: boolean; readonly restart?: boolean; readonly keepsAutostart?: boolean },
): Promise<MachineState> {
  const { libvirt, domain } = guest;
  const policy = { timeoutSeconds: inputs.shutdownTimeoutSeconds, onTimeout: inputs.onShutdownTimeout };
  try {
    if (!keepsAutostart && (await libvirt.domainGetAutostart(domain)) !== inputs.autostart)
      await libvirt.domainSetAutostart(domain, inputs.autostart);
    if (restart || inputs.powerState === "stopped") await stopGuest(guest, policy);
    if (inputs.powerState !== "stopped") {
      if (isSession(guest.host)) await guest.host.run(["mkdir", "-p", "--", posix.dirname(inputs.serialLog)]);
      const started = inputs.powerState === "paused" ? await pauseGuest(guest) : await startGuest(guest);
      if (inputs.powerState === "running" && (started || mustWait)) await waitForGuest(guest, inputs.waitFor, inputs.serialLog);
    }
    const { metadata } = parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive));
    if (metadata && metadata.finished === undefined)
      await writeMetadata(libvirt, domain, { ...metadata, finished: new Date().toISOString() }, DOMAIN_AFFECT.config);
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
    ipAddresses: powerState === "running" ? await addressesOf(guest) : [],
    hostname: powerState === "running" ? await hostnameOf(guest) : undefined,
    restartPending: powerState !== "stopped" && !hasHardware(parseDomain(await libvirt.domainGetXMLDesc(domain)), defined),
    ready,
    ownVolumes: volumes.map(({ path }) => path),
    ...(await homeOf(guest.host)),
  };
}

async function update(context: Context, _id: string, olds: MachineState, news: MachineInputs): Promise<MachineState> {
  const host = openHost(context, news.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, news.uuid);
  if (!existing) await assertHome(host, news.name, olds);
  const marks = { origins: [olds.origin, news.origin], hasConsent: news.adopt !== undefined };
  if (existing && isStranger(existing.defined.metadata, marks)) throw new Error(strangerRefusal(existing.defined, host.label, "changed"));
  const own = ownVolumes(news).map(({ path }) => path);
  const kept = olds.ownVolumes.filter((path) => own.includes(path)).map((path) => ({ path, isUnfinished: false }));
  if (!existing) await tellStaying({ context, host, name: news.name }, without(olds.ownVolumes, news.diskPaths.concat(own)), GONE);
  // What is declared as a disk that exists is the user's, and is not deleted with the machine.
  const volumes = (existing?.defined.metadata?.volumes ?? kept).filter(({ path }) => own.includes(path) || !news.diskPaths.includes(path));
  const isRunning = existing !== undefined && (await powerStateOf({ libvirt, domain: existing.domain })) !== "stopped";
  const staysOn = isRunning && news.powerState !== "stopped";
  const isDeclared = changesOf(olds, news).some(({ effect }) => effect === "restart");
  if (staysOn && isDeclared && news.onRestartRequired === "fail" && !(await runsAs(libvirt, existing.domain, news))) {
    throw new Error(restartRefusal(news.name));
  }

  const seed = olds.cloudInit?.volumePath;
  for (const { path } of volumes) {
    if (path !== seed && olds.diskPaths.includes(path) && !news.diskPaths.includes(path)) {
      context.log(
        "info",
        `${news.name}: ${path} is no longer a disk of the machine; it stays on ${host.label} until the machine is deleted`,
      );
    }
  }
  const declaredPatches = olds.xmlPatches ?? [];
  const given = domainSpec(inputsOf(olds) as MachineInputs, []);
  const domain = await define({ context, host, inputs: news, existing, volumes, declaredPaths: olds.diskPaths, declaredPatches, given });
  const guest: Guest = { context, host, libvirt, domain };
  const defined = parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive));
  for (const path of await growVolumes(guest, ownVolumes(news), defined)) context.log("info", `${news.name}: ${path} has grown`);
  const live = isRunning ? parseDomain(await libvirt.domainGetXMLDesc(domain)) : undefined;
  const isPending = live !== undefined && !hasHardware(live, defined);
  const isSeedOurs = existing?.defined.metadata?.volumes.some(({ path }) => path === seed) ?? false;
  if (seed !== undefined && isSeedOurs && seed !== news.cloudInit?.volumePath && !live?.disks.some(({ path }) => path === seed)) {
    await dropVolume(libvirt, domain, defined.metadata, seed);
  }
  if (isRunning) await relabel(libvirt, domain, defined, live?.metadata?.patches);
  return settle(guest, news, {
    mustWait: !olds.ready,
    restart: staysOn && isPending && news.onRestartRequired === "restart",
    // What nobody declares may be somebody else's word.
    keepsAutostart: !news.declared.includes("autostart") && olds.autostart === news.autostart,
  });
}

/** Whether the machine runs on the hardware that the inputs stand for. */
async function runsAs(libvirt: Libvirt, domain: Domain, inputs: MachineInputs): Promise<boolean> {
  return hasHardware(parseDomain(await libvirt.domainGetXMLDesc(domain)), definitionOf(domainSpec(inputs, [])));
}

/** Deletes a volume of the machine's own that it uses no more, and what its definition says of it. */
async function dropVolume(libvirt: Libvirt, domain: Domain, metadata: MachineMetadata | undefined, path: string): Promise<void> {
  await deleteVolume(libvirt, path);
  if (metadata === undefined) return;
  const volumes = metadata.volumes.filter((volume) => volume.path !== path);
  await writeMetadata(libvirt, domain, { ...metadata, volumes }, DOMAIN_AFFECT.config);
}

/**
 * A running machine shows its old title, description and metadata until it is told the new ones. `patches` stays what the machine was started with: by it
 * the next look tells whether it waits for a start.
 */
async function relabel(
  libvirt: Libvirt,
  domain: Domain,
  { title, description }: Pick<ObservedDomain, "title" | "description">,
  patches: string | undefined,
): Promise<void> {
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.title, title, undefined, undefined, DOMAIN_AFFECT.live);
  await libvirt.domainSetMetadata(domain, DOMAIN_METADATA.description, description, undefined, undefined, DOMAIN_AFFECT.live);
  const { metadata } = parseDomain(await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive));
  if (metadata) await writeMetadata(libvirt, domain, { ...metadata, patches }, DOMAIN_AFFECT.live);
}

async function read(context: Context, id: string, state: MachineState) {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, state.uuid);
  if (!existing) {
    await assertHome(host, state.name, state);
    return undefined;
  }
  const { domain, defined } = existing;
  const inputs = { ...inputsOf(state), ...(await declaredDrift(context, libvirt, existing, state)) };
  const found = await stateOf({ context, host, libvirt, domain }, inputs, state.ready);
  if (isStranger(defined.metadata, { origins: [state.origin], hasConsent: state.adopt !== undefined })) {
    context.log("warn", `${state.name}: ${strangerRefusal(defined, host.label, "changed")}`);
  }
  return { id, state: found, inputs: { ...inputs, powerState: found.powerState } };
}

function inputsOf(state: MachineState): MachineInputs {
  const { ipAddresses: _i, restartPending: _p, ready: _r, ownVolumes: _v, hostname: _g, hostUuid: _u, hostName: _n, ...inputs } = state;
  return inputs;
}

/** What a human changed, in the user's own properties: of those only that the user declared, or that make up the machine's disks. */
async function declaredDrift(
  context: Context,
  libvirt: Libvirt,
  { domain, defined }: Existing,
  state: MachineState,
): Promise<Partial<MachineInputs>> {
  const inputs = inputsOf(state);
  const isSnapshot = await findSnapshots(libvirt, defined, state.diskPaths);
  const sizes = await sizesOf(libvirt, ownVolumes(inputs), defined);
  const autostart = await libvirt.domainGetAutostart(domain);
  const drift = { ...driftOf(inputs, defined, { isSnapshot, sizes }), ...(autostart !== state.autostart && { autostart }) };
  for (const { target, path } of domainSpec(inputs, []).disks) {
    const found = defined.disks.find((disk) => disk.target === target);
    if (found?.path !== path) {
      context.log(
        "warn",
        `${state.name}: its disk ${target} is ${found?.path ?? "gone"}, not ${path ?? "empty"}, by somebody else's change`,
      );
    }
  }
  return Object.fromEntries(Object.entries(drift).filter(([key]) => state.declared.includes(key))) as Partial<MachineInputs>;
}

const UNDEFINE_SAVED = DOMAIN_UNDEFINE.managedSave | DOMAIN_UNDEFINE.snapshotsMetadata;
const UNDEFINE_FILES = UNDEFINE_SAVED | DOMAIN_UNDEFINE.nvram | DOMAIN_UNDEFINE.checkpointsMetadata;

/** From all that libvirt 8.9 knows (the state of a TPM, which older ones delete by themselves) to what its test driver knows. */
const UNDEFINE_FLAGS: readonly number[] = [UNDEFINE_FILES | DOMAIN_UNDEFINE.tpm, UNDEFINE_FILES];

async function remove(context: Context, _id: string, state: MachineState): Promise<void> {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const existing = await findExisting(libvirt, state.uuid);
  if (!existing) await assertHome(host, state.name, state);
  if (existing && isStranger(existing.defined.metadata, { origins: [state.origin], hasConsent: false }))
    throw new Error(strangerRefusal(existing.defined, host.label, "deleted"));
  const own = existing?.defined.metadata?.volumes.map(({ path }) => path) ?? [];
  for (const path of own) {
    const [overlay] = await volumesBackedBy(libvirt, path);
    if (overlay !== undefined) {
      throw new Error(
        `${path} on ${host.label} is deleted with ${state.name}, and ${overlay} stands on it: nothing was changed; delete that one first`,
      );
    }
    // By hand it may have got into another machine beside this one.
    const hasShell = (await factsOf(host).system()) !== undefined;
    const users = [...(await domainsUsing(libvirt, path)), ...(hasShell ? await machinesReaching(host, path) : [])];
    const user = users.find((name) => name !== existing?.defined.name);
    if (user !== undefined) {
      throw new Error(
        `${path} on ${host.label} is deleted with ${state.name}, and the machine ${user} uses it: nothing was changed; remove it there first`,
      );
    }
  }
  await tellStaying({ context, host, name: state.name }, without(state.ownVolumes, own), existing ? UNNAMED : GONE);
  if (!existing) return;
  const { domain } = existing;
  const policy = { timeoutSeconds: state.shutdownTimeoutSeconds, onTimeout: "cut" } as const;
  await unlessGone(() => stopGuest({ context, host, libvirt, domain }, policy));
  // Before the definition, which is what proves them ours to the next try.
  for (const path of own) await deleteVolume(libvirt, path);
  await unlessGone(() => undefine(libvirt, domain));
}

const GONE = "the machine that it was made for is gone";
const UNNAMED = "the machine's definition names it no more";

function without(paths: readonly string[], others: readonly string[]): readonly string[] {
  return paths.filter((path) => !others.includes(path));
}

/** Names those of the machine's former volumes that are there: a path alone does not prove that it is still the volume that was made. */
async function tellStaying(
  { context, host, name }: { readonly context: Context; readonly host: Host; readonly name: string },
  paths: readonly string[],
  reason: string,
): Promise<void> {
  const libvirt = await host.libvirt();
  for (const path of paths) {
    if (await isVolume(libvirt, path))
      context.log(
        "warn",
        `${name}: ${path} on ${host.label} stays: ${reason}, and nothing proves that it is the same volume: remove it by hand`,
      );
  }
}

/** What is gone already needs no removal. */
async function unlessGone(remove: () => Promise<unknown>): Promise<void> {
  try {
    await remove();
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
}

/** With its NVRAM, the state of its TPM, its saved state and what libvirt knows of its snapshots. */
async function undefine(libvirt: Libvirt, domain: Domain): Promise<void> {
  for (const flags of UNDEFINE_FLAGS) {
    try {
      return await libvirt.domainUndefineFlags(domain, flags);
    } catch (error) {
      // Flags that it does not know are refused.
      if (!(error instanceof LibvirtError) || error.code !== LIBVIRT_ERROR.invalidArg) throw error;
    }
  }
  await libvirt.domainUndefineFlags(domain, UNDEFINE_SAVED);
}
