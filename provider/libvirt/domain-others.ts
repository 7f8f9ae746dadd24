/**
 * What a machine has that our definitions say nothing of: it was given by somebody else. Most of it stays when the machine is defined anew, the rest goes.
 * Pure. Source: https://libvirt.org/formatdomain.html.
 */
import type { XmlElement } from "../image/xml.ts";
import { element, type Element } from "./render.ts";
import { attribute, child, childrenOf } from "./tree.ts";
import type { XmlPatch } from "./xml-patch.ts";

/** Elements of a machine that stay as they are. */
export interface Others {
  /** Children of `<domain>`. */
  readonly elements: readonly XmlElement[];
  /** Children of `<devices>`. */
  readonly devices: readonly XmlElement[];
}

/** What of a machine was given by somebody else, in words such as `hostdev (pci)`. */
export interface OtherWords {
  readonly staying: readonly string[];
  readonly going: readonly string[];
}

const AGENT_CHANNEL = "org.qemu.guest_agent.0";

/** Devices that need nothing else of the machine, and that our definitions never have. */
const FREE_DEVICES: ReadonlySet<string> = new Set([
  "crypto",
  "filesystem",
  "hostdev",
  "hub",
  "iommu",
  "panic",
  "parallel",
  "redirdev",
  "redirfilter",
  "shmem",
  "smartcard",
  "sound",
  "vsock",
]);

/** Settings of the machine as a whole that need nothing else, and that our definitions never have. */
const FREE_ELEMENTS: ReadonlySet<string> = new Set([
  "blkiotune",
  "idmap",
  "iothreadids",
  "iothreads",
  "memtune",
  "numatune",
  "pm",
  "resource",
  "seclabel",
]);

/** What our definitions say, each in its own way, and what libvirt adds to every machine. */
const KNOWN_ELEMENTS: ReadonlySet<string> = new Set(
  "name uuid title description metadata memory currentMemory memoryBacking vcpu vcpus cputune os sysinfo features cpu clock on_poweroff on_reboot on_crash devices".split(
    " ",
  ),
);
const KNOWN_DEVICES: ReadonlySet<string> = new Set(
  "emulator disk controller interface serial console channel input tpm graphics audio video watchdog memballoon rng".split(" "),
);

/** What stays of a machine's definition. What `patches` name is left to them: it is the user's to say. */
export function parseOthers(domain: XmlElement, patches: readonly XmlPatch[]): Others {
  const isPatched = patched(patches);
  const isNamed = ({ name }: XmlElement): boolean => isPatched(name);
  const devices = childrenOf(child(domain, "devices")).filter(isFreeDevice);
  const hasSound = devices.some((device) => device.name === "sound" && !isNamed(device));
  const audio = hasSound ? childrenOf(child(domain, "devices"), "audio") : [];
  return {
    elements: childrenOf(domain).filter((each) => isFreeElement(each) && !isNamed(each)),
    devices: [...devices, ...audio].filter((device) => !isNamed(device)),
  };
}

/** Tells which elements patches speak of, by their names. */
export function patched(patches: readonly XmlPatch[]): (name: string) => boolean {
  const named = patches.map(({ path, add = "" }) => `${path} ${add}`).join(" ");
  return (name) => new RegExp(`\\b${name}\\b`).test(named);
}

/** The devices as they are written beside a screen of that kind: some come with SPICE only. */
export function otherDevices({ devices }: Others, graphics: string | undefined): readonly Element[] {
  return devices.filter((device) => attribute(device, "type") !== "spicevmc" || graphics === "spice").map(asWritten);
}

export function otherElements({ elements }: Others): readonly Element[] {
  return elements.map(asWritten);
}

/** What of a machine's definition stays, and what goes when it is defined anew. */
export function describeOthers(domain: XmlElement): OtherWords {
  const { elements, devices } = parseOthers(domain, []);
  const present = childrenOf(child(domain, "devices"));
  return {
    staying: [...elements, ...devices.filter(({ name }) => name !== "audio")].map(inWords),
    going: [
      ...childrenOf(domain).filter(({ name }) => !KNOWN_ELEMENTS.has(name) && !elements.some((each) => each.name === name)),
      ...present.filter((device) => !KNOWN_DEVICES.has(device.name) && !devices.includes(device)),
    ].map(inWords),
  };
}

function isFreeDevice(device: XmlElement): boolean {
  if (device.name === "channel") return attribute(child(device, "target"), "name") !== AGENT_CHANNEL;
  return FREE_DEVICES.has(device.name);
}

/** Memory of NUMA nodes goes with the nodes, which the CPU's definition has. */
function isFreeElement(each: XmlElement): boolean {
  return FREE_ELEMENTS.has(each.name) && child(each, "memnode") === undefined;
}

function inWords(each: XmlElement): string {
  const kind = attribute(child(each, "target"), "name") ?? attribute(each, "type") ?? attribute(each, "model");
  return kind === undefined ? each.name : `${each.name} (${kind})`;
}

/** An element that was read, to be written again. */
export function asWritten({ name, attributes, children, text }: XmlElement): Element {
  return element(name, Object.fromEntries(attributes), ...(children.length > 0 ? children.map(asWritten) : text === "" ? [] : [text]));
}
