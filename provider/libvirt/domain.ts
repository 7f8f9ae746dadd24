/**
 * A machine as libvirt's domain XML and as plain data, both ways. What libvirt adds by itself (aliases, addresses, default controllers, the version
 * of the machine type) is no part of the data. Pure: knows no connection and no host. Source: https://libvirt.org/formatdomain.html.
 */
import { parseXml, type XmlElement } from "../image/xml.ts";
import { element, type Element, renderXml } from "./render.ts";

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
  readonly memoryKiB: number;
  readonly vcpus: number;
  readonly arch: string;
  /** `q35` or `pc` for any version of these, else libvirt's word. */
  readonly machine: string;
  readonly firmware: "bios" | "uefi";
  readonly secureBoot: boolean;
  /** Undefined: the hypervisor's default. */
  readonly cpu?: ObservedCpu | undefined;
  /** `utc`, `localtime` and so on. */
  readonly clock: string;
  /** In the order of the definition. */
  readonly disks: readonly ObservedDisk[];
  readonly interfaces: readonly ObservedInterface[];
  /** Absolute path of the file that keeps what the guest writes to its first serial port. */
  readonly serialLog?: string | undefined;
}

export interface ObservedCpu {
  /** `host-passthrough`, `host-model`, `maximum`, or `custom` with a model. */
  readonly mode: string;
  readonly model?: string | undefined;
}

export interface ObservedDisk {
  /** `disk`, `cdrom`, `floppy`, `lun`. */
  readonly device: string;
  /** Absolute path; undefined for an empty drive and for what is no file. */
  readonly path?: string | undefined;
  /** `qcow2`, `raw`; undefined where libvirt is left to guess. */
  readonly format?: string | undefined;
  readonly bus: string;
  /** The name that libvirt knows it by: `vda`. The guest may have another. */
  readonly target: string;
  /** From 1. */
  readonly bootOrder?: number | undefined;
  readonly serial?: string | undefined;
  readonly isReadOnly: boolean;
}

export interface ObservedInterface {
  /** `network`, `bridge`, `user`, `direct` and so on. */
  readonly type: string;
  /** The network's or the bridge's name; undefined for `user`. */
  readonly source?: string | undefined;
  /** Lower case, with colons. */
  readonly mac: string;
  /** `virtio`, `e1000e`. */
  readonly model?: string | undefined;
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
}

export interface DiskSpec extends ObservedDisk {
  readonly device: "disk" | "cdrom";
  readonly path: string;
  readonly format: "qcow2" | "raw";
  readonly bus: "virtio" | "sata" | "scsi" | "ide";
}

export interface InterfaceSpec extends ObservedInterface {
  readonly type: "network" | "bridge" | "user";
  readonly model: string;
}

/**
 * What libvirt chose for a machine and what must outlive a redefinition, so that the guest finds its hardware where it was: the version of the machine
 * type, the firmware's files, and the PCI addresses of disks (by path) and interfaces (by MAC).
 */
export interface Placement {
  readonly machine: string;
  readonly firmwareFiles: readonly XmlElement[];
  readonly addresses: ReadonlyMap<string, Readonly<Record<string, string>>>;
}

/** The domain XML of a machine. `placement` is that of the definition which this one replaces. Throws RangeError on text that XML cannot hold. */
export function renderDomain(spec: DomainSpec, placement?: Placement): string {
  return renderXml(
    element(
      "domain",
      { type: spec.type },
      element("name", {}, spec.name),
      element("uuid", {}, spec.uuid),
      spec.title === undefined ? undefined : element("title", {}, spec.title),
      spec.description === undefined ? undefined : element("description", {}, spec.description),
      element("metadata", {}, metadataElement(spec.metadata)),
      element("memory", { unit: "KiB" }, String(spec.memoryKiB)),
      element("currentMemory", { unit: "KiB" }, String(spec.memoryKiB)),
      element("vcpu", {}, String(spec.vcpus)),
      osElement(spec, placement),
      element("features", {}, element("acpi"), element("apic"), spec.secureBoot ? element("smm", { state: "on" }) : undefined),
      spec.cpu && cpuElement(spec.cpu),
      clockElement(spec.clock),
      element("on_poweroff", {}, "destroy"),
      element("on_reboot", {}, "restart"),
      element("on_crash", {}, "destroy"),
      element(
        "devices",
        {},
        ...spec.disks.map((disk) => diskElement(disk, placement)),
        spec.disks.some(({ bus }) => bus === "scsi") ? element("controller", { type: "scsi", index: 0, model: "virtio-scsi" }) : undefined,
        ...spec.interfaces.map((each) => interfaceElement(each, placement)),
        element("serial", { type: "pty" }, serialLogElement(spec), element("target", { port: 0 })),
        element("console", { type: "pty" }, serialLogElement(spec), element("target", { type: "serial", port: 0 })),
        element("channel", { type: "unix" }, element("target", { type: "virtio", name: "org.qemu.guest_agent.0" })),
        element("input", { type: "tablet", bus: "usb" }),
        element("graphics", { type: "vnc", autoport: "yes", listen: "127.0.0.1" }),
        element("video", {}, element("model", { type: "vga" })),
        element("memballoon", { model: "virtio" }),
        element("rng", { model: "virtio" }, element("backend", { model: "random" }, "/dev/urandom")),
      ),
    ),
  );
}

/** Our metadata as `domainSetMetadata` takes it: libvirt adds the namespace and the prefix itself. */
export function renderMetadata(metadata: MachineMetadata): string {
  return renderXml(metadataElement(metadata, ""));
}

function metadataElement(metadata: MachineMetadata, prefix = `${MACHINE_PREFIX}:`): Element {
  return element(
    `${prefix}machine`,
    { [`xmlns:${MACHINE_PREFIX}`]: prefix === "" ? undefined : MACHINE_NAMESPACE, origin: metadata.origin },
    ...metadata.disks.map(({ diskId, source, migrationRef }) => element(`${prefix}disk`, { id: diskId, source, migrationRef })),
    ...metadata.volumes.map(({ path, isUnfinished }) =>
      element(`${prefix}volume`, { path, state: isUnfinished ? "unfinished" : undefined }),
    ),
    ...Object.entries(metadata.tags).map(([name, value]) => element(`${prefix}tag`, { name, value })),
  );
}

function osElement(spec: DomainSpec, placement: Placement | undefined): Element {
  const machine = placement !== undefined && machineFamily(placement.machine) === spec.machine ? placement.machine : spec.machine;
  const type = element("type", { arch: spec.arch, machine }, "hvm");
  if (spec.firmware === "bios") return element("os", {}, type);
  const features = ["enrolled-keys", "secure-boot"].map((name) => element("feature", { enabled: spec.secureBoot ? "yes" : "no", name }));
  return element(
    "os",
    { firmware: "efi" },
    type,
    element("firmware", {}, ...features),
    ...(placement?.firmwareFiles ?? []).map(({ name, attributes, text }) => element(name, Object.fromEntries(attributes), text)),
  );
}

function cpuElement({ mode, model }: ObservedCpu): Element {
  return model === undefined
    ? element("cpu", { mode })
    : element("cpu", { mode, match: "exact" }, element("model", { fallback: "forbid" }, model));
}

/** The ticks of a PC's clocks as libvirt's own tools set them: a late interrupt is made up for, and no HPET wakes an idle guest. */
function clockElement(offset: string): Element {
  return element(
    "clock",
    { offset },
    element("timer", { name: "rtc", tickpolicy: "catchup" }),
    element("timer", { name: "pit", tickpolicy: "delay" }),
    element("timer", { name: "hpet", present: "no" }),
  );
}

function diskElement(disk: DiskSpec, placement: Placement | undefined): Element {
  return element(
    "disk",
    { type: "file", device: disk.device },
    element("driver", { name: "qemu", type: disk.format, discard: disk.device === "disk" ? "unmap" : undefined }),
    element("source", { file: disk.path }),
    element("target", { dev: disk.target, bus: disk.bus }),
    disk.serial === undefined ? undefined : element("serial", {}, disk.serial),
    disk.isReadOnly ? element("readonly") : undefined,
    disk.bootOrder === undefined ? undefined : element("boot", { order: disk.bootOrder }),
    disk.bus === "virtio" ? addressElement(placement, disk.path) : undefined,
  );
}

function interfaceElement({ type, source, mac, model }: InterfaceSpec, placement: Placement | undefined): Element {
  return element(
    "interface",
    { type },
    element("mac", { address: mac }),
    source === undefined ? undefined : element("source", { [type]: source }),
    element("model", { type: model }),
    addressElement(placement, mac),
  );
}

function addressElement(placement: Placement | undefined, key: string): Element | undefined {
  const address = placement?.addresses.get(key);
  return address && element("address", address);
}

/** Truncated at each start: what is in it was said by this run of the guest. */
function serialLogElement({ serialLog }: DomainSpec): Element | undefined {
  return serialLog === undefined ? undefined : element("log", { file: serialLog, append: "off" });
}

/** Reads domain XML, live or inactive, of any machine. Throws ImageError when it is no XML or no domain. */
export function parseDomain(xml: string): ObservedDomain {
  const domain = parseXml(xml, "the domain XML");
  const os = child(domain, "os");
  const type = os && child(os, "type");
  const cpu = child(domain, "cpu");
  const devices = child(domain, "devices");
  const serial = devices && child(devices, "serial");
  return {
    type: attribute(domain, "type") ?? "",
    name: text(domain, "name") ?? "",
    uuid: text(domain, "uuid") ?? "",
    title: text(domain, "title"),
    description: text(domain, "description"),
    metadata: parseMetadata(domain),
    memoryKiB: parseMemoryKiB(child(domain, "memory")),
    vcpus: Number(text(domain, "vcpu") ?? "1"),
    arch: attribute(type, "arch") ?? "",
    machine: machineFamily(attribute(type, "machine") ?? ""),
    ...parseFirmware(os, child(domain, "features")),
    cpu: cpu && parseCpu(cpu),
    clock: attribute(child(domain, "clock"), "offset") ?? "utc",
    disks: childrenOf(devices, "disk").map(parseDisk),
    interfaces: childrenOf(devices, "interface").map(parseInterface),
    serialLog: attribute(serial && child(serial, "log"), "file"),
  };
}

/** Reads from the inactive domain XML what a redefinition must keep. Throws as `parseDomain`. */
export function parsePlacement(xml: string): Placement {
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
    machine: attribute(os && child(os, "type"), "machine") ?? "",
    firmwareFiles: childrenOf(os).filter(({ name }) => name === "loader" || name === "nvram"),
    addresses,
  };
}

/** `pc-q35-7.2` -> `q35`, `pc-i440fx-7.2` -> `pc`: libvirt writes the version that the alias stood for. */
function machineFamily(machine: string): string {
  if (/^pc-q35-[\d.]+$/.test(machine)) return "q35";
  return /^pc-i440fx-[\d.]+$/.test(machine) ? "pc" : machine;
}

function parseMetadata(domain: XmlElement): MachineMetadata | undefined {
  const machine = childrenOf(child(domain, "metadata"), "machine").find((each) => each.attributes.has("origin"));
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
  };
}

/** A loader from a file of flash memory is UEFI's; firmware from a file may be either, and libvirt names it. */
function parseFirmware(os: XmlElement | undefined, features: XmlElement | undefined): Pick<ObservedDomain, "firmware" | "secureBoot"> {
  const loader = os && child(os, "loader");
  const isUefi = attribute(os, "firmware") === "efi" || (attribute(os, "firmware") === undefined && attribute(loader, "type") === "pflash");
  const feature = childrenOf(os && child(os, "firmware"), "feature").find((each) => attribute(each, "name") === "secure-boot");
  const smm = features && child(features, "smm");
  const isSecure = feature ? attribute(feature, "enabled") === "yes" : attribute(loader, "secure") === "yes" && smm !== undefined;
  return { firmware: isUefi ? "uefi" : "bios", secureBoot: isUefi && isSecure };
}

function parseCpu(cpu: XmlElement): ObservedCpu | undefined {
  const mode = attribute(cpu, "mode") ?? (child(cpu, "model") ? "custom" : undefined);
  if (mode === undefined) return undefined;
  return { mode, model: mode === "custom" ? text(cpu, "model") : undefined };
}

function parseDisk(disk: XmlElement): ObservedDisk {
  const target = child(disk, "target");
  const bootOrder = attribute(child(disk, "boot"), "order");
  return {
    device: attribute(disk, "device") ?? "disk",
    path: attribute(disk, "type") === "file" ? attribute(child(disk, "source"), "file") : undefined,
    format: attribute(child(disk, "driver"), "type"),
    bus: attribute(target, "bus") ?? "",
    target: attribute(target, "dev") ?? "",
    bootOrder: bootOrder === undefined ? undefined : Number(bootOrder),
    serial: text(disk, "serial"),
    // libvirt marks every CD-ROM, whether it was told to or not.
    isReadOnly: child(disk, "readonly") !== undefined,
  };
}

function parseInterface(each: XmlElement): ObservedInterface {
  const type = attribute(each, "type") ?? "";
  return {
    type,
    source: attribute(child(each, "source"), type),
    mac: (attribute(child(each, "mac"), "address") ?? "").toLowerCase(),
    model: attribute(child(each, "model"), "type"),
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

function child(parent: XmlElement | undefined, name: string): XmlElement | undefined {
  return parent?.children.find((each) => each.name === name);
}

function childrenOf(parent: XmlElement | undefined, name?: string): readonly XmlElement[] {
  return (parent?.children ?? []).filter((each) => name === undefined || each.name === name);
}

function attribute(each: XmlElement | undefined, name: string): string | undefined {
  return each?.attributes.get(name);
}

function text(parent: XmlElement, name: string): string | undefined {
  return child(parent, name)?.text;
}
