/**
 * Puts what somebody else said into a definition of ours: whatever means the same in both stays as it is written, word for word, with all that no property
 * knows of it. Pure. Source: https://libvirt.org/formatdomain.html.
 */
import type { XmlElement } from "../image/xml.ts";
import type { ObservedDomain } from "./domain.ts";
import { parseDisk, parseInterface } from "./domain-devices.ts";
import { asWritten } from "./domain-others.ts";
import type { Element } from "./render.ts";
import { isSame } from "./same.ts";
import { attribute, child, childrenOf } from "./tree.ts";

/** A definition as it is found. */
export interface Written {
  readonly domain: XmlElement;
  readonly observed: ObservedDomain;
  /** What others keep in its metadata, as XML. */
  readonly foreignMetadata: string | undefined;
  /** The disks and interfaces that our last definition had: others are somebody else's, and stay. Undefined: none is. */
  readonly given: GivenDevices | undefined;
  /** Whether an element is left to the user's patches. */
  readonly isPatched: (name: string) => boolean;
}

export interface GivenDevices {
  readonly disks: readonly { readonly path?: string | undefined; readonly target: string }[];
  readonly interfaces: readonly { readonly mac: string }[];
}

/** Whether a disk is one of these, by its name or by its file. */
export function hasDisk({ disks }: Pick<GivenDevices, "disks">, disk: Pick<ObservedDomain["disks"][number], "path" | "target">): boolean {
  return disks.some(({ path, target }) => target === disk.target || (path !== undefined && path === disk.path));
}

export function hasInterface({ interfaces }: Pick<GivenDevices, "interfaces">, mac: string): boolean {
  return interfaces.some((each) => each.mac === mac);
}

type Facts = readonly (keyof ObservedDomain)[];

/** The children of `<domain>`, and what of a machine they say. */
const SECTIONS: Readonly<Record<string, Facts>> = {
  memoryBacking: ["hugepagesKiB"],
  vcpu: ["vcpus", "maxVcpus"],
  cputune: ["pinning"],
  os: ["machine", "firmware", "secureBoot", "loader", "smbios"],
  sysinfo: ["smbios"],
  features: ["hasHyperv", "secureBoot"],
  cpu: ["cpu", "topology"],
  clock: ["clock", "hasHyperv"],
  on_poweroff: [],
  on_reboot: [],
  on_crash: [],
};

/** The devices that have no name of their own, and what of a machine they say. */
const DEVICES: Readonly<Record<string, Facts>> = {
  emulator: ["type"],
  controller: ["machine"],
  serial: ["serialLog"],
  console: ["serialLog"],
  input: [],
  tpm: ["hasTpm"],
  graphics: ["graphics"],
  video: ["video"],
  watchdog: ["watchdog"],
  memballoon: ["hasBalloon"],
  rng: ["hasRng"],
};

/** What our own words can say. Of other kinds all stays. */
const DISK_TYPES: ReadonlySet<string> = new Set(["file", "block"]);
const INTERFACE_TYPES: ReadonlySet<string> = new Set(["network", "bridge", "direct", "user"]);

/** Our definition, that stands for `wanted`, with the words of the one that it replaces. */
export function keepWritten(ours: Element, wanted: ObservedDomain, written: Written): Element {
  const { domain, observed, isPatched } = written;
  const isKept = (name: string, facts: Facts): boolean =>
    !isPatched(name) && facts.every((fact) => isSame(observed[fact], wanted[fact])) && childrenOf(domain, name).length > 0;
  const kept = Object.keys(SECTIONS).filter((name) => isKept(name, SECTIONS[name]!));
  const children = ours.children.map((each) => {
    if (!isElement(each)) return each;
    if (each.name === "devices") return { ...each, children: keepDevices(each, wanted, written) };
    if (each.name === "metadata" && written.foreignMetadata !== undefined)
      return { ...each, children: [...each.children, { raw: written.foreignMetadata }] };
    return kept.includes(each.name) ? sectionAsWritten(child(domain, each.name)!) : each;
  });
  const missing = kept.filter((name) => !children.some((each) => isElement(each) && each.name === name));
  return { ...ours, children: [...children, ...missing.map((name) => sectionAsWritten(child(domain, name)!))] };
}

/** The order of our disks is said with each; libvirt takes it in one place only. */
function sectionAsWritten(section: XmlElement): Element {
  return asWritten(section.name === "os" ? { ...section, children: section.children.filter(({ name }) => name !== "boot") } : section);
}

function keepDevices(ours: Element, wanted: ObservedDomain, { domain, observed, given, isPatched }: Written): Element["children"] {
  const named = (name: string): readonly XmlElement[] => (isPatched(name) ? [] : childrenOf(child(domain, "devices"), name));
  const kinds = Object.keys(DEVICES).filter(
    (name) => named(name).length > 0 && DEVICES[name]!.every((fact) => isSame(observed[fact], wanted[fact])),
  );
  const disks = named("disk").flatMap((device) => {
    const disk = parseDisk(device);
    const wish = wanted.disks.find(({ target }) => target === disk.target);
    const isOurs = given === undefined || hasDisk(given, disk);
    const isSayable = DISK_TYPES.has(attribute(device, "type") ?? "");
    return (wish ? isSame(wish, disk) || !isSayable : !isOurs) ? [{ key: disk.target, device }] : [];
  });
  const interfaces = named("interface").flatMap((device) => {
    const each = parseInterface(device);
    const wish = wanted.interfaces.find(({ mac }) => mac === each.mac);
    const isOurs = given === undefined || hasInterface(given, each.mac);
    const isSayable = INTERFACE_TYPES.has(each.type);
    return (wish ? isSame(wish, each) || !isSayable : !isOurs) ? [{ key: each.mac, device }] : [];
  });
  const keyOf = (device: Element): string | undefined => {
    const names = device.children.filter(isElement);
    if (device.name === "disk") return String(names.find(({ name }) => name === "target")?.attributes["dev"]);
    return device.name === "interface" ? String(names.find(({ name }) => name === "mac")?.attributes["address"]) : undefined;
  };
  const kept = new Map([...disks, ...interfaces].map(({ key, device }) => [key, asWritten(device)]));
  const keptControllers = kinds.includes("controller")
    ? new Set(named("controller").map((device) => attribute(device, "type")))
    : undefined;
  const inPlace = ours.children.flatMap((device): Element["children"] => {
    if (!isElement(device)) return [device];
    // A kind of controller that comes with a new disk is not there yet.
    if (device.name === "controller" && keptControllers) return keptControllers.has(String(device.attributes["type"])) ? [] : [device];
    if (kinds.includes(device.name)) return [];
    const key = keyOf(device) ?? "";
    const old = kept.get(key);
    kept.delete(key);
    return [old ?? device];
  });
  return [...inPlace, ...kept.values(), ...kinds.flatMap((name) => named(name)).map(asWritten)];
}

function isElement(each: Element["children"][number]): each is Element {
  return typeof each !== "string" && "name" in each;
}
