/** What a host can run, from libvirt's capabilities and domain capabilities. Pure. Source: https://libvirt.org/formatcaps.html, formatdomaincaps.html. */
import { parseXml, type XmlElement } from "../image/xml.ts";

/** The kinds of machines that the host offers for a full PC: `kvm`, `qemu`, `test`. Throws ImageError on what is no XML. */
export function parseDomainTypes(capabilities: string): ReadonlySet<string> {
  const types = all(parseXml(capabilities, "the host's capabilities"), "guest")
    .filter((guest) => all(guest, "os_type").some(({ text }) => text === "hvm"))
    .flatMap((guest) => all(guest, "arch"))
    .flatMap((arch) => all(arch, "domain").map((domain) => ({ arch, type: domain.attributes.get("type") ?? "" })))
    // libvirt's test driver knows no 64 bits, and takes what it is given.
    .filter(({ arch, type }) => arch.attributes.get("name") === "x86_64" || type === "test");
  return new Set(types.map(({ type }) => type));
}

/** The host's UUID; undefined where libvirt tells none, as its test driver. Throws ImageError on what is no XML. */
export function parseHostUuid(capabilities: string): string | undefined {
  const [host] = all(parseXml(capabilities, "the host's capabilities"), "host");
  return host && all(host, "uuid")[0]?.text;
}

/** Who guards the host's machines, and as whom QEMU runs. */
export interface HostSecurity {
  /** `selinux`, `apparmor`, `dac`; what is switched off is left out. */
  readonly models: readonly string[];
  /** The numbers of QEMU's user and group; undefined where libvirt does not say them, as for a user's own daemon. */
  readonly qemuUser: { readonly uid: number; readonly gid: number } | undefined;
}

/** Throws ImageError on what is no XML. Source: formatcaps.html, `secmodel`; the DAC label is `+uid:+gid` (security_dac.c). */
export function parseSecurity(capabilities: string): HostSecurity {
  const models = all(parseXml(capabilities, "the host's capabilities"), "host").flatMap((host) => all(host, "secmodel"));
  const nameOf = (model: XmlElement): string => all(model, "model")[0]?.text ?? "";
  const dac = models.find((model) => nameOf(model) === "dac");
  const [, uid, gid] = /^\+(\d+):\+(\d+)$/.exec((dac && all(dac, "baselabel")[0]?.text) ?? "") ?? [];
  return {
    models: models.map(nameOf).filter((name) => name !== "none" && name !== ""),
    qemuUser: uid === undefined ? undefined : { uid: Number(uid), gid: Number(gid) },
  };
}

/** What the host offers to machines of one type (`q35`, `pc`) and kind (`kvm`, `qemu`). */
export interface MachineOffer {
  readonly uefi: boolean;
  readonly secureBoot: boolean;
  /** undefined: not said. */
  readonly maxVcpus: number | undefined;
  /** The CPU modes: `host-passthrough`, `host-model`, `maximum`, `custom`. */
  readonly cpuModes: readonly string[];
  /** Every named CPU model, those that this host lacks features of among them. */
  readonly cpuModels: ReadonlySet<string>;
  readonly diskBuses: readonly string[];
  /** Whether a TPM can be emulated: swtpm is installed. */
  readonly tpm: boolean;
}

/** Throws ImageError on what is no XML. Source: formatdomaincaps.html. */
export function parseOffer(domainCapabilities: string): MachineOffer {
  const root = parseXml(domainCapabilities, "the domain capabilities");
  const [os] = all(root, "os");
  const [devices] = all(root, "devices");
  const [vcpu] = all(root, "vcpu");
  const modes = all(root, "cpu").flatMap((cpu) => all(cpu, "mode"));
  const uefi = values(os, "firmware").includes("efi");
  const custom = modes.find(({ attributes }) => attributes.get("name") === "custom");
  const device = (name: string): XmlElement | undefined => devices && all(devices, name)[0];
  return {
    uefi,
    secureBoot: uefi && values(os && all(os, "loader")[0], "secure").includes("yes"),
    maxVcpus: Number(vcpu?.attributes.get("max")) || undefined,
    cpuModes: modes.filter(isSupported).map(({ attributes }) => attributes.get("name") ?? ""),
    cpuModels: new Set((custom ? all(custom, "model") : []).map(({ text }) => text)),
    diskBuses: values(device("disk"), "bus"),
    tpm: isSupported(device("tpm")) && values(device("tpm"), "backendModel").includes("emulator"),
  };
}

/**
 * Whether a network's interfaces may have VLAN tags on whatever version of libvirt. Throws ImageError on what is no XML.
 * Source: formatnetwork.html, `vlan`; a Linux bridge takes them since libvirt 11.0.
 */
export function parseTakesVlan(network: string): boolean {
  const root = parseXml(network, "the network's XML");
  const mode = all(root, "forward")[0]?.attributes.get("mode");
  const ports = [root, ...all(root, "portgroup")].flatMap((each) => all(each, "virtualport"));
  return mode === "hostdev" || mode === "passthrough" || ports.some(({ attributes }) => attributes.get("type") === "openvswitch");
}

function isSupported(element: XmlElement | undefined): boolean {
  return element?.attributes.get("supported") === "yes";
}

function values(parent: XmlElement | undefined, name: string): readonly string[] {
  const list = parent && all(parent, "enum").find(({ attributes }) => attributes.get("name") === name);
  return list ? all(list, "value").map(({ text }) => text) : [];
}

function all(parent: XmlElement, name: string): readonly XmlElement[] {
  return parent.children.filter((child) => child.name === name);
}
