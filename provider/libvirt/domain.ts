/**
 * A machine as libvirt's domain XML and as plain data, both ways. What libvirt adds by itself (aliases, addresses, default controllers, the version
 * of the machine type) is no part of the data. Pure: knows no connection and no host. Source: https://libvirt.org/formatdomain.html.
 */
import { parseXml, type XmlElement } from "../image/xml.ts";
import {
  type Addresses,
  diskElement,
  type DiskSpec,
  interfaceElement,
  type InterfaceSpec,
  type ObservedDisk,
  type ObservedInterface,
  parseDisk,
  parseInterface,
} from "./domain-devices.ts";
import { type GivenDevices, keepWritten, type Written } from "./domain-keep.ts";
import { describeOthers, otherDevices, otherElements, type Others, type OtherWords, parseOthers, patched } from "./domain-others.ts";
import { element, type Element, renderXml } from "./render.ts";
import { attribute, child, childrenOf, text } from "./tree.ts";
import { patchXml, type XmlPatch } from "./xml-patch.ts";

/** The namespace of our element in `<metadata>`. */
export const MACHINE_NAMESPACE = "https://virtlift.dev/xmlns/machine/1";
/** The prefix under which libvirt is asked to write that element. */
export const MACHINE_PREFIX = "virtlift";

/** What an operator on the host finds about a machine of ours with `virsh metadata` or `virsh dumpxml`. */
export interface MachineMetadata {
  /** `<organization>/<project>/<stack>/<logical name>`: who owns it. */
  readonly origin: string;
  /** The imported disks, the boot disk first. */
  readonly disks: readonly DiskProvenance[];
  /** The volumes that were made for this machine and go with it. */
  readonly volumes: readonly OwnVolume[];
  readonly tags: Readonly<Record<string, string>>;
  /** A hash of the XML patches that the definition was made with; undefined: none. */
  readonly patches?: string | undefined;
  /** When its making was done, as ISO 8601 in UTC; undefined until then. */
  readonly finished?: string | undefined;
}

export interface DiskProvenance {
  readonly diskId: string;
  /** The kind of source: `ova`, `file`. */
  readonly source?: string | undefined;
  readonly migrationRef?: string | undefined;
}

export interface OwnVolume {
  /** Absolute path on the host. */
  readonly path: string;
  /** Whether its making may have been interrupted: no guest has written to it yet. */
  readonly isUnfinished: boolean;
}

/** A machine as it is found: words are libvirt's own, also those that we never write. */
export interface ObservedDomain {
  /** `kvm`, `qemu` (emulated), `test`. */
  readonly type: string;
  readonly name: string;
  /** Lower case, with dashes. */
  readonly uuid: string;
  readonly title?: string | undefined;
  readonly description?: string | undefined;
  readonly metadata?: MachineMetadata | undefined;
  /** What the guest gets. */
  readonly memoryKiB: number;
  /** What it can be given while it runs. Undefined: not more. */
  readonly maxMemoryKiB?: number | undefined;
  /** The size of the huge pages that its memory is made of, 0 for the host's default size. Undefined: ordinary pages. */
  readonly hugepagesKiB?: number | undefined;
  readonly vcpus: number;
  /** How many it can be given while it runs. Undefined: not more. */
  readonly maxVcpus?: number | undefined;
  /** By number of the virtual CPU, ascending. Undefined: none is pinned. */
  readonly pinning?: readonly VcpuPin[] | undefined;
  readonly arch: string;
  /** `q35` or `pc` for any version of these, else libvirt's word. */
  readonly machine: string;
  readonly firmware: "bios" | "uefi";
  readonly secureBoot: boolean;
  /** The files of UEFI where they were given and not chosen by libvirt. */
  readonly loader?: Loader | undefined;
  /** Undefined: what the hypervisor makes up. */
  readonly smbios?: Smbios | undefined;
  /** Undefined: the hypervisor's default. */
  readonly cpu?: ObservedCpu | undefined;
  readonly topology?: CpuTopology | undefined;
  /** `utc`, `localtime` and so on. */
  readonly clock: string;
  /** Whether a Windows guest is told that it runs on a hypervisor, and how to save it work. */
  readonly hasHyperv: boolean;
  /** In the order of the definition. */
  readonly disks: readonly ObservedDisk[];
  readonly interfaces: readonly ObservedInterface[];
  /** Absolute path of the file that keeps what the guest writes to its first serial port. */
  readonly serialLog?: string | undefined;
  /** Undefined: none. */
  readonly graphics?: Graphics | undefined;
  /** `vga`, `virtio`, `qxl`; undefined: no graphics card. */
  readonly video?: string | undefined;
  /** Whether it has a TPM 2.0. */
  readonly hasTpm: boolean;
  /** Whether memory can be taken from it and given back while it runs. */
  readonly hasBalloon: boolean;
  /** Whether it is given random numbers. */
  readonly hasRng: boolean;
  /** What its watchdog does when the guest hangs: `reset`, `poweroff`, `pause`. Undefined: it has none. */
  readonly watchdog?: string | undefined;
}

/** A CPU of the guest that runs on some of the host's only. */
export interface VcpuPin {
  readonly vcpu: number;
  /** As libvirt writes it: `0-3,8`. */
  readonly cpus: string;
}

export interface Loader {
  readonly path: string;
  /** What the machine's NVRAM is made from. */
  readonly nvramTemplate?: string | undefined;
  /** The machine's NVRAM. Undefined: where libvirt keeps those of machines. */
  readonly nvram?: string | undefined;
}

/** Tables of SMBIOS with their entries by libvirt's names: `manufacturer`, `serial`. */
export interface Smbios {
  readonly system?: Readonly<Record<string, string>> | undefined;
  readonly baseBoard?: Readonly<Record<string, string>> | undefined;
  readonly chassis?: Readonly<Record<string, string>> | undefined;
}

export interface CpuTopology {
  readonly sockets: number;
  readonly cores: number;
  readonly threads: number;
}

export interface Graphics {
  /** `vnc`, `spice`. */
  readonly type: string;
  /** The host's address on which it is served. */
  readonly listen?: string | undefined;
}

export interface ObservedCpu {
  /** `host-passthrough`, `host-model`, `maximum`, or `custom` with a model. */
  readonly mode: string;
  readonly model?: string | undefined;
  /** By name: `require`, `disable` and so on. Undefined: none is named. */
  readonly features?: Readonly<Record<string, string>> | undefined;
  /** False where features that keep a guest on its host are let through. Undefined: they are not. */
  readonly isMigratable?: false | undefined;
}

/** A machine as we define it. */
export interface DomainSpec extends ObservedDomain {
  readonly type: "kvm" | "qemu" | "test";
  readonly metadata: MachineMetadata;
  readonly arch: "x86_64";
  readonly machine: "q35" | "pc";
  readonly clock: "utc" | "localtime";
  readonly disks: readonly DiskSpec[];
  readonly interfaces: readonly InterfaceSpec[];
  /** Applied to the definition before it is handed over. */
  readonly xmlPatches?: readonly XmlPatch[] | undefined;
}

/**
 * What must outlive a redefinition, so that the guest finds its hardware where it was: what libvirt chose for the machine (the version of its type, the
 * firmware's files, the PCI addresses of disks by path and of interfaces by MAC), and what somebody else gave it.
 */
export interface Placement {
  readonly machine: string;
  readonly firmwareFiles: readonly XmlElement[];
  readonly addresses: Addresses;
  readonly others: Others;
  readonly written: Written;
}

/**
 * Slots of a q35 that take a PCI Express card each, those of the machine's own devices included: what is not taken is there to plug into while the
 * guest runs. As many as virt-install makes (DomainPci in virt-manager's domain.py); libvirt alone leaves one.
 */
const PCIE_SLOTS = 14;

/**
 * The domain XML of a machine. `placement` is that of the definition which this one replaces.
 * Throws RangeError on text that XML cannot hold, and PatchError.
 */
export function renderDomain(spec: DomainSpec, placement?: Placement): string {
  const { maxMemoryKiB = spec.memoryKiB, maxVcpus = spec.vcpus } = spec;
  const domain = element(
    "domain",
    { type: spec.type },
    element("name", {}, spec.name),
    element("uuid", {}, spec.uuid),
    spec.title === undefined ? undefined : element("title", {}, spec.title),
    spec.description === undefined ? undefined : element("description", {}, spec.description),
    element("metadata", {}, metadataElement(spec.metadata)),
    element("memory", { unit: "KiB" }, String(maxMemoryKiB)),
    element("currentMemory", { unit: "KiB" }, String(spec.memoryKiB)),
    hugepagesElement(spec),
    element("vcpu", { current: maxVcpus === spec.vcpus ? undefined : spec.vcpus }, String(maxVcpus)),
    spec.pinning && element("cputune", {}, ...spec.pinning.map(({ vcpu, cpus }) => element("vcpupin", { vcpu, cpuset: cpus }))),
    osElement(spec, placement),
    spec.smbios && sysinfoElement(spec.smbios),
    featuresElement(spec),
    (spec.cpu ?? spec.topology) && cpuElement(spec),
    clockElement(spec),
    element("on_poweroff", {}, "destroy"),
    element("on_reboot", {}, "restart"),
    element("on_crash", {}, "destroy"),
    element("devices", {}, ...deviceElements(spec, placement)),
    ...(placement ? otherElements(placement.others) : []),
  );
  const wanted = placement && parseDomain(renderXml(domain));
  return renderXml(patchXml(placement && wanted ? keepWritten(domain, wanted, placement.written) : domain, spec.xmlPatches ?? []));
}

/** A disk by itself, as calls that attach, detach and update take it. */
export function renderDisk(disk: DiskSpec): string {
  return renderXml(diskElement(disk));
}

/** An interface by itself, as calls that attach, detach and update take it. */
export function renderInterface(each: InterfaceSpec): string {
  return renderXml(interfaceElement(each));
}

/** A CPU by itself, as `connectCompareHypervisorCPU` takes it. */
export function renderCpu(cpu: ObservedCpu): string {
  return renderXml(cpuElement({ cpu, topology: undefined }));
}

/** Our metadata as `domainSetMetadata` takes it: libvirt adds the namespace and the prefix itself. */
export function renderMetadata(metadata: MachineMetadata): string {
  return renderXml(metadataElement(metadata, ""));
}

function metadataElement(metadata: MachineMetadata, prefix = `${MACHINE_PREFIX}:`): Element {
  return element(
    `${prefix}machine`,
    {
      [`xmlns:${MACHINE_PREFIX}`]: prefix === "" ? undefined : MACHINE_NAMESPACE,
      origin: metadata.origin,
      patches: metadata.patches,
      finished: metadata.finished,
    },
    ...metadata.disks.map(({ diskId, source, migrationRef }) => element(`${prefix}disk`, { id: diskId, source, migrationRef })),
    ...metadata.volumes.map(({ path, isUnfinished }) =>
      element(`${prefix}volume`, { path, state: isUnfinished ? "unfinished" : undefined }),
    ),
    ...Object.entries(metadata.tags).map(([name, value]) => element(`${prefix}tag`, { name, value })),
  );
}

function hugepagesElement({ hugepagesKiB }: DomainSpec): Element | undefined {
  if (hugepagesKiB === undefined) return undefined;
  const page = hugepagesKiB === 0 ? undefined : element("page", { size: hugepagesKiB, unit: "KiB" });
  return element("memoryBacking", {}, element("hugepages", {}, page));
}

function osElement(spec: DomainSpec, placement: Placement | undefined): Element {
  const machine = placement !== undefined && machineFamily(placement.machine) === spec.machine ? placement.machine : spec.machine;
  const type = element("type", { arch: spec.arch, machine }, "hvm");
  const smbios = spec.smbios && element("smbios", { mode: "sysinfo" });
  if (spec.firmware === "bios") return element("os", {}, type, smbios);
  if (spec.loader) {
    const { path, nvramTemplate, nvram } = spec.loader;
    return element(
      "os",
      {},
      type,
      element("loader", { readonly: "yes", secure: spec.secureBoot ? "yes" : undefined, type: "pflash" }, path),
      nvramTemplate === undefined && nvram === undefined ? undefined : element("nvram", { template: nvramTemplate }, nvram),
      smbios,
    );
  }
  const features = ["enrolled-keys", "secure-boot"].map((name) => element("feature", { enabled: spec.secureBoot ? "yes" : "no", name }));
  return element(
    "os",
    { firmware: "efi" },
    type,
    element("firmware", {}, ...features),
    ...(placement?.firmwareFiles ?? []).map(({ name, attributes, text: path }) => element(name, Object.fromEntries(attributes), path)),
    smbios,
  );
}

/** Of the chassis libvirt knows fewer entries than SMBIOS has. Source: formatdomain.html#smbios-system-information. */
function sysinfoElement(smbios: Smbios): Element {
  const tables = (["system", "baseBoard", "chassis"] as const).flatMap((table) => {
    const entries = Object.entries(smbios[table] ?? {});
    return entries.length === 0 ? [] : [element(table, {}, ...entries.map(([name, value]) => element("entry", { name }, value)))];
  });
  return element("sysinfo", { type: "smbios" }, ...tables);
}

/** What current versions of Windows use of Hyper-V, as virt-install sets it (DomainFeatures in virt-manager's guest.py). */
function featuresElement({ secureBoot, hasHyperv }: DomainSpec): Element {
  const on = (name: string, more: Readonly<Record<string, string>> = {}): Element => element(name, { state: "on", ...more });
  const hyperv = element(
    "hyperv",
    { mode: "custom" },
    on("relaxed"),
    on("vapic"),
    on("spinlocks", { retries: "8191" }),
    on("vpindex"),
    on("runtime"),
    on("synic"),
    on("stimer"),
    on("frequencies"),
  );
  return element("features", {}, element("acpi"), element("apic"), hasHyperv ? hyperv : undefined, secureBoot ? on("smm") : undefined);
}

function cpuElement({ cpu, topology }: Pick<DomainSpec, "cpu" | "topology">): Element {
  return element(
    "cpu",
    {
      mode: cpu?.mode,
      match: cpu?.model === undefined ? undefined : "exact",
      migratable: cpu?.isMigratable === false ? "off" : undefined,
    },
    cpu?.model === undefined ? undefined : element("model", { fallback: "forbid" }, cpu.model),
    topology && element("topology", { sockets: topology.sockets, dies: 1, cores: topology.cores, threads: topology.threads }),
    ...Object.entries(cpu?.features ?? {}).map(([name, policy]) => element("feature", { policy, name })),
  );
}

/** The ticks of a PC's clocks as libvirt's own tools set them: a late interrupt is made up for, and no HPET wakes an idle guest. */
function clockElement({ clock, hasHyperv }: DomainSpec): Element {
  return element(
    "clock",
    { offset: clock },
    element("timer", { name: "rtc", tickpolicy: "catchup" }),
    element("timer", { name: "pit", tickpolicy: "delay" }),
    element("timer", { name: "hpet", present: "no" }),
    hasHyperv ? element("timer", { name: "hypervclock", present: "yes" }) : undefined,
  );
}

function deviceElements(spec: DomainSpec, placement: Placement | undefined): readonly (Element | undefined)[] {
  const { graphics, watchdog } = spec;
  const slots = Array.from({ length: PCIE_SLOTS }, (_, slot) => slot + 1);
  return [
    ...spec.disks.map((disk) => diskElement(disk, placement?.addresses)),
    ...(spec.machine === "q35" ? [element("controller", { type: "pci", index: 0, model: "pcie-root" })] : []),
    ...(spec.machine === "q35" ? slots.map((index) => element("controller", { type: "pci", index, model: "pcie-root-port" })) : []),
    spec.disks.some(({ bus }) => bus === "scsi") ? element("controller", { type: "scsi", index: 0, model: "virtio-scsi" }) : undefined,
    ...spec.interfaces.map((each) => interfaceElement(each, placement?.addresses)),
    element("serial", { type: "pty" }, serialLogElement(spec), element("target", { port: 0 })),
    element("console", { type: "pty" }, serialLogElement(spec), element("target", { type: "serial", port: 0 })),
    element("channel", { type: "unix" }, element("target", { type: "virtio", name: "org.qemu.guest_agent.0" })),
    element("input", { type: "tablet", bus: "usb" }),
    spec.hasTpm ? element("tpm", { model: "tpm-crb" }, element("backend", { type: "emulator", version: "2.0" })) : undefined,
    graphics && element("graphics", { type: graphics.type, autoport: "yes", listen: graphics.listen }),
    element("video", {}, element("model", { type: spec.video ?? "none" })),
    watchdog === undefined ? undefined : element("watchdog", { model: WATCHDOG, action: watchdog }),
    element("memballoon", { model: spec.hasBalloon ? "virtio" : "none" }),
    spec.hasRng ? element("rng", { model: "virtio" }, element("backend", { model: "random" }, "/dev/urandom")) : undefined,
    ...(placement ? otherDevices(placement.others, graphics?.type) : []),
  ];
}

/** The watchdog that machines of both chipsets can have. libvirt 9.1 and later give each q35 an `itco` besides, which is the chipset's own. */
const WATCHDOG = "i6300esb";

/** Truncated at each start: what is in it was said by this run of the guest. */
function serialLogElement({ serialLog }: DomainSpec): Element | undefined {
  return serialLog === undefined ? undefined : element("log", { file: serialLog, append: "off" });
}

/** Reads domain XML, live or inactive, of any machine. Throws ImageError when it is no XML or no domain. */
export function parseDomain(xml: string): ObservedDomain {
  return observe(parseXml(xml, "the domain XML"));
}

function observe(domain: XmlElement): ObservedDomain {
  const os = child(domain, "os");
  const features = child(domain, "features");
  const cpu = child(domain, "cpu");
  const devices = child(domain, "devices");
  const name = text(domain, "name") ?? "";
  return {
    type: attribute(domain, "type") ?? "",
    name,
    uuid: text(domain, "uuid") ?? "",
    title: text(domain, "title"),
    description: text(domain, "description"),
    metadata: parseMetadata(domain),
    ...parseMemory(domain),
    ...parseVcpus(domain),
    arch: attribute(child(os, "type"), "arch") ?? "",
    machine: machineFamily(attribute(child(os, "type"), "machine") ?? ""),
    ...parseFirmware(os, features),
    loader: parseLoader(os, name),
    smbios: parseSmbios(child(domain, "sysinfo")),
    cpu: cpu && parseCpu(cpu),
    topology: parseTopology(child(cpu, "topology")),
    clock: attribute(child(domain, "clock"), "offset") ?? "utc",
    hasHyperv: child(features, "hyperv") !== undefined,
    disks: childrenOf(devices, "disk").map(parseDisk),
    interfaces: childrenOf(devices, "interface").map(parseInterface),
    serialLog: attribute(child(child(devices, "serial"), "log"), "file"),
    ...parseFurtherDevices(devices),
  };
}

/**
 * Reads from the inactive domain XML what a redefinition must keep, but for what `patches` speak of. `given` are the devices that our last definition had;
 * undefined: all of them. Throws as `parseDomain`.
 */
export function parsePlacement(xml: string, patches: readonly XmlPatch[] = [], given?: GivenDevices): Placement {
  const domain = parseXml(xml, "the domain XML");
  const os = child(domain, "os");
  const devices = child(domain, "devices");
  const addresses = new Map<string, Readonly<Record<string, string>>>();
  for (const device of childrenOf(devices)) {
    const address = child(device, "address");
    const key = device.name === "disk" ? parseDisk(device).path : device.name === "interface" ? parseInterface(device).mac : undefined;
    if (key !== undefined && address !== undefined && attribute(address, "type") === "pci") {
      addresses.set(key, Object.fromEntries(address.attributes));
    }
  }
  return {
    machine: attribute(child(os, "type"), "machine") ?? "",
    firmwareFiles: childrenOf(os).filter(({ name }) => name === "loader" || name === "nvram"),
    addresses,
    others: parseOthers(domain, patches),
    written: { domain, observed: observe(domain), foreignMetadata: foreignMetadata(xml), given, isPatched: patched(patches) },
  };
}

/** What others keep in the machine's metadata, word for word. libvirt writes our element with the prefix that we gave it. */
function foreignMetadata(xml: string): string | undefined {
  const start = xml.indexOf("<metadata>") + "<metadata>".length;
  const end = xml.indexOf("</metadata>", start);
  if (start < "<metadata>".length || end === -1) return undefined;
  const ours = new RegExp(`<${MACHINE_PREFIX}:machine\\b[^>]*(?:/>|>[^]*?</${MACHINE_PREFIX}:machine>)`);
  return xml.slice(start, end).replace(ours, "").trim() || undefined;
}

/** What of a machine no property of ours knows. Throws as `parseDomain`. */
export function parseOtherWords(xml: string): OtherWords {
  return describeOthers(parseXml(xml, "the domain XML"));
}

/** `pc-q35-7.2` -> `q35`, `pc-i440fx-7.2` -> `pc`: libvirt writes the version that the alias stood for. */
function machineFamily(machine: string): string {
  if (/^pc-q35-[\d.]+$/.test(machine)) return "q35";
  return /^pc-i440fx-[\d.]+$/.test(machine) ? "pc" : machine;
}

/** Others may have an element of the same name: only one of our namespace is ours, whatever its prefix. */
function parseMetadata(domain: XmlElement): MachineMetadata | undefined {
  const machines = childrenOf(child(domain, "metadata"), "machine").filter(({ namespace }) => namespace === MACHINE_NAMESPACE);
  const machine = machines.find(({ attributes }) => attributes.has("origin"));
  if (machine === undefined) return undefined;
  return {
    origin: attribute(machine, "origin") ?? "",
    disks: childrenOf(machine, "disk").map((disk) => ({
      diskId: attribute(disk, "id") ?? "",
      source: attribute(disk, "source"),
      migrationRef: attribute(disk, "migrationRef"),
    })),
    volumes: childrenOf(machine, "volume").map((volume) => ({
      path: attribute(volume, "path") ?? "",
      isUnfinished: attribute(volume, "state") === "unfinished",
    })),
    tags: Object.fromEntries(childrenOf(machine, "tag").map((tag) => [attribute(tag, "name") ?? "", attribute(tag, "value") ?? ""])),
    patches: attribute(machine, "patches"),
    finished: attribute(machine, "finished"),
  };
}

/** A loader from a file of flash memory is UEFI's; firmware from a file may be either, and libvirt names it. */
function parseFirmware(os: XmlElement | undefined, features: XmlElement | undefined): Pick<ObservedDomain, "firmware" | "secureBoot"> {
  const loader = child(os, "loader");
  const isUefi = attribute(os, "firmware") === "efi" || (attribute(os, "firmware") === undefined && attribute(loader, "type") === "pflash");
  const feature = childrenOf(child(os, "firmware"), "feature").find((each) => attribute(each, "name") === "secure-boot");
  const smm = child(features, "smm");
  const isSecure = feature ? attribute(feature, "enabled") === "yes" : attribute(loader, "secure") === "yes" && smm !== undefined;
  return { firmware: isUefi ? "uefi" : "bios", secureBoot: isUefi && isSecure };
}

/** Where libvirt chose the firmware, its files are no part of the data; nor is the place where it keeps a machine's NVRAM by itself. */
function parseLoader(os: XmlElement | undefined, machine: string): Loader | undefined {
  const path = text(os, "loader");
  if (path === undefined || attribute(os, "firmware") !== undefined || attribute(child(os, "loader"), "type") !== "pflash")
    return undefined;
  const nvram = text(os, "nvram");
  const isOwn = nvram === undefined || nvram === "" || nvram.endsWith(`/nvram/${machine}_VARS.fd`);
  return { path, nvramTemplate: attribute(child(os, "nvram"), "template"), nvram: isOwn ? undefined : nvram };
}

function parseSmbios(sysinfo: XmlElement | undefined): Smbios | undefined {
  if (attribute(sysinfo, "type") !== "smbios") return undefined;
  const table = (name: string): Readonly<Record<string, string>> | undefined => {
    const found = child(sysinfo, name);
    return found && Object.fromEntries(childrenOf(found, "entry").map((entry) => [attribute(entry, "name") ?? "", entry.text]));
  };
  return { system: table("system"), baseBoard: table("baseBoard"), chassis: table("chassis") };
}

function parseCpu(cpu: XmlElement): ObservedCpu | undefined {
  const mode = attribute(cpu, "mode") ?? (child(cpu, "model") ? "custom" : undefined);
  if (mode === undefined) return undefined;
  const features = childrenOf(cpu, "feature").map((feature) => [
    attribute(feature, "name") ?? "",
    attribute(feature, "policy") ?? "require",
  ]);
  return {
    mode,
    model: mode === "custom" ? text(cpu, "model") : undefined,
    features: features.length === 0 ? undefined : (Object.fromEntries(features) as Readonly<Record<string, string>>),
    isMigratable: attribute(cpu, "migratable") === "off" ? false : undefined,
  };
}

function parseTopology(topology: XmlElement | undefined): CpuTopology | undefined {
  if (topology === undefined) return undefined;
  const count = (name: string): number => Number(attribute(topology, name) ?? "1");
  return { sockets: count("sockets") * count("dies"), cores: count("cores"), threads: count("threads") };
}

function parseMemory(domain: XmlElement): Pick<ObservedDomain, "memoryKiB" | "maxMemoryKiB" | "hugepagesKiB"> {
  const maximum = parseMemoryKiB(child(domain, "memory"));
  const current = child(domain, "currentMemory");
  const memoryKiB = current === undefined ? maximum : parseMemoryKiB(current);
  const hugepages = child(child(domain, "memoryBacking"), "hugepages");
  const page = child(hugepages, "page");
  const size = (Number(attribute(page, "size") ?? "0") * (MEMORY_UNITS[attribute(page, "unit") ?? "KiB"] ?? 1024)) / 1024;
  return { memoryKiB, maxMemoryKiB: maximum === memoryKiB ? undefined : maximum, hugepagesKiB: hugepages && size };
}

function parseVcpus(domain: XmlElement): Pick<ObservedDomain, "vcpus" | "maxVcpus" | "pinning"> {
  const maximum = Number(text(domain, "vcpu") ?? "1");
  const vcpus = Number(attribute(child(domain, "vcpu"), "current") ?? maximum);
  const pins = childrenOf(child(domain, "cputune"), "vcpupin").map((pin) => ({
    vcpu: Number(attribute(pin, "vcpu")),
    cpus: attribute(pin, "cpuset") ?? "",
  }));
  return {
    vcpus,
    maxVcpus: maximum === vcpus ? undefined : maximum,
    pinning: pins.length === 0 ? undefined : pins.toSorted((one, other) => one.vcpu - other.vcpu),
  };
}

function parseFurtherDevices(
  devices: XmlElement | undefined,
): Pick<ObservedDomain, "graphics" | "video" | "hasTpm" | "hasBalloon" | "hasRng" | "watchdog"> {
  const graphics = child(devices, "graphics");
  const video = attribute(child(child(devices, "video"), "model"), "type");
  const balloon = attribute(child(devices, "memballoon"), "model");
  return {
    graphics: graphics && { type: attribute(graphics, "type") ?? "", listen: attribute(graphics, "listen") },
    video: video === "none" ? undefined : video,
    hasTpm: child(devices, "tpm") !== undefined,
    hasBalloon: balloon !== undefined && balloon !== "none",
    hasRng: child(devices, "rng") !== undefined,
    watchdog: attribute(
      childrenOf(devices, "watchdog").find((each) => attribute(each, "model") === WATCHDOG),
      "action",
    ),
  };
}

/** Source: virScaleInteger, https://libvirt.org/formatdomain.html#memory-allocation. */
const MEMORY_UNITS: Readonly<Record<string, number>> = {
  b: 1,
  bytes: 1,
  KB: 1e3,
  k: 1024,
  KiB: 1024,
  MB: 1e6,
  M: 2 ** 20,
  MiB: 2 ** 20,
  G: 2 ** 30,
  GiB: 2 ** 30,
};

function parseMemoryKiB(memory: XmlElement | undefined): number {
  const unit = MEMORY_UNITS[attribute(memory, "unit") ?? "KiB"] ?? 1024;
  return Math.ceil((Number(memory?.text ?? "0") * unit) / 1024);
}
