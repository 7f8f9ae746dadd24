/**
 * What an OVF descriptor says about a machine, as plain data in its own terms. Knows neither where the files are nor what libvirt makes of it.
 * Sources: DMTF DSP0243 (OVF) and the CIM resource types of DSP0004's CIM_ResourceAllocationSettingData; for what vendors add, see each reader.
 */
import { ImageError } from "./parser.ts";
import { quoted } from "./words.ts";
import { parseXml, type XmlElement } from "./xml.ts";

export interface OvfSystem {
  /** The descriptor's own identifier, and the name that people see. */
  readonly id: string;
  readonly name: string;
  readonly annotation: string | undefined;
  readonly guest: OvfGuest;
  /** The families of virtual hardware it was made for, as written: `vmx-19`, `virtualbox-2.2`, `xen-3.0-unknown`. */
  readonly hardwareVersion: string | undefined;
  readonly cpus: number | undefined;
  /** undefined: as many as the hypervisor likes. */
  readonly coresPerSocket: number | undefined;
  readonly memoryMiB: number | undefined;
  readonly firmware: "bios" | "efi";
  readonly secureBoot: boolean;
  readonly cpuHotAdd: boolean;
  readonly memoryHotAdd: boolean;
  readonly nestedVirtualization: boolean;
  readonly controllers: readonly OvfController[];
  /** In hardware order: by the bus's kind (SCSI, SATA, IDE, NVMe, others), its number, the unit, then the document's order. */
  readonly disks: readonly OvfDisk[];
  readonly nics: readonly OvfNic[];
  readonly cdroms: readonly OvfDrive[];
  readonly floppies: readonly OvfDrive[];
  readonly hasVtpm: boolean;
  /** The USB controllers as written: `ehci`, `vmware.usb.xhci`. */
  readonly usbControllers: readonly string[];
  readonly videoRamKiB: number | undefined;
  /** Hardware that has no field of its own, in words: `PCI passthrough (vmware.pcipassthrough)`. */
  readonly others: readonly string[];
  readonly product: OvfProduct | undefined;
  readonly properties: readonly OvfProperty[];
  /** How the properties reach the guest: `com.vmware.guestInfo`, `iso`. */
  readonly transports: readonly string[];
  /** The deployment option that was taken: the default one. undefined when there are none. */
  readonly deploymentOption: string | undefined;
  readonly deploymentOptions: readonly string[];
  /** Texts that the user is asked to accept. */
  readonly licences: readonly string[];
  /** The vendor's settings, vmw:Config and vmw:ExtraConfig alike, as written: `vm.genid`, `uuid.bios`, `tools.syncTimeWithHost`. */
  readonly settings: ReadonlyMap<string, string>;
  /** What the user should know, one sentence each. */
  readonly notes: readonly string[];
}

export interface OvfGuest {
  /** CIM_OperatingSystem.OsType: 94 is Ubuntu 64-bit, 96 Debian 64-bit, 1 other. */
  readonly cimId: number | undefined;
  /** The vendor's identifier: `ubuntu64Guest` (vmw:osType), `Ubuntu_64` (vbox:OSType). */
  readonly vendorId: string | undefined;
  readonly description: string | undefined;
}

export type OvfBus = "scsi" | "sata" | "ide" | "nvme" | "virtio";

export interface OvfController {
  readonly bus: OvfBus;
  /** As written: `lsilogic`, `VirtualSCSI`, `AHCI`, `PIIX4`; undefined when it is not said. */
  readonly model: string | undefined;
  readonly busNumber: number;
}

export interface OvfDisk {
  /** The identifier in the disk section. */
  readonly id: string;
  /** What people call it: `Hard disk 1`. */
  readonly name: string;
  readonly controller: OvfController | undefined;
  /** The place on the controller. */
  readonly unit: number;
  /** undefined when the descriptor does not say, which only disks with a file may do. */
  readonly capacityBytes: number | undefined;
  readonly populatedBytes: number | undefined;
  /** The format's URI as written. */
  readonly format: string | undefined;
  /** undefined: a blank disk. */
  readonly file: OvfFile | undefined;
  /** The disk that this one is a delta of. */
  readonly parentId: string | undefined;
}

export interface OvfFile {
  readonly id: string;
  /** As written: a basename by rights, but it may be a path or a URL. */
  readonly href: string;
  readonly sizeBytes: number | undefined;
  /** As written: `gzip`, or a URI; undefined when it is not compressed. */
  readonly compression: string | undefined;
  /** The file is cut in pieces of this size, named `<href>.000000000` and so on. */
  readonly chunkBytes: number | undefined;
}

export interface OvfNic {
  readonly name: string;
  /** As written: `VmxNet3`, `E1000`, `virtio`; undefined when it is not said. */
  readonly model: string | undefined;
  readonly network: string | undefined;
  /** `00:50:56:01:02:03`. VMware leaves it out of most exports. */
  readonly mac: string | undefined;
  /** Whether the cable is in when the machine starts. */
  readonly connected: boolean;
  /** VMware's number of the PCI slot, from which guests make the interface's name. */
  readonly pciSlot: number | undefined;
}

export interface OvfDrive {
  readonly name: string;
  readonly file: OvfFile | undefined;
}

export interface OvfProduct {
  readonly name: string | undefined;
  readonly vendor: string | undefined;
  readonly version: string | undefined;
}

export interface OvfProperty {
  /** `class.key.instance`, each part where there is one. */
  readonly key: string;
  readonly type: string;
  readonly value: string | undefined;
  readonly label: string | undefined;
  readonly userConfigurable: boolean;
}

const MAX_ITEMS = 4096;
const MAX_DISKS = 1024;
const MAX_SYSTEMS = 256;
const MIB = 1024 * 1024;

/** Forklift's "libvirt order", which puts the disk that BIOS starts from first most often. */
const BUS_ORDER: readonly (OvfBus | undefined)[] = ["scsi", "sata", "ide", "nvme", "virtio", undefined];

/** The files, disks and properties that hardware refers to. */
interface Package {
  readonly files: ReadonlyMap<string, OvfFile>;
  readonly disks: ReadonlyMap<string, XmlElement>;
}

/** A hardware item by its local names; CIM writes InstanceID, older programs InstanceId. */
interface Item {
  readonly element: XmlElement;
  readonly type: number;
  readonly instance: string | undefined;
  readonly subtype: string | undefined;
  readonly name: string;
  readonly settings: ReadonlyMap<string, string>;
}

/**
 * Reads a descriptor (the XML's text) and the machine in it; `system` names one of several, by name or id.
 *
 * Throws ImageError when it is no OVF, names no machine or several without a choice, or when a part that matters contradicts itself or cannot be read.
 */
export function parseOvf(xml: string, options: { readonly system?: string | undefined } = {}): OvfSystem {
  const envelope = parseXml(xml, "the OVF descriptor");
  if (envelope.name !== "Envelope")
    throw new ImageError(`the OVF descriptor is none: its root element is ${quoted(envelope.name)}, not "Envelope"`);
  const systems = systemsIn(envelope);
  const system = chooseSystem(systems, options.system);
  const read = readSystem(envelope, system);
  const loose = systems.length === 1 ? looseDisks(envelope, read) : [];
  if (loose.length === 0) return read;
  return {
    ...read,
    disks: [...read.disks, ...loose],
    notes: [
      ...read.notes,
      `${loose.length === 1 ? "1 disk is attached to no controller in the descriptor and comes" : `${loose.length} disks are attached to no controller in the descriptor and come`} last`,
    ],
  };
}

/** All machines of the envelope, those in nested collections too. */
function systemsIn(parent: XmlElement): readonly XmlElement[] {
  const systems = parent.children.flatMap((child) => {
    const kind = kindOf(child);
    if (kind === "VirtualSystem") return [child];
    return kind === "VirtualSystemCollection" ? systemsIn(child) : [];
  });
  if (systems.length > MAX_SYSTEMS)
    throw new ImageError(`the OVF descriptor holds ${systems.length} machines; at most ${MAX_SYSTEMS} are read`);
  return systems;
}

function chooseSystem(systems: readonly XmlElement[], wanted: string | undefined): XmlElement {
  const names = systems.map(nameOfSystem);
  const offer = names.map(quoted).join(", ");
  if (wanted !== undefined) {
    const matching = systems.filter((system) => nameOfSystem(system) === wanted || system.attributes.get("id") === wanted);
    if (matching.length === 1) return matching[0]!;
    throw new ImageError(
      `the OVF descriptor holds ${matching.length === 0 ? "no machine" : "several machines"} named ${quoted(wanted)}; it holds ${offer || "none"}`,
    );
  }
  if (systems.length > 1) throw new ImageError(`the OVF descriptor holds ${systems.length} machines: say which one is meant (${offer})`);
  return systems[0] ?? refuse("the OVF descriptor holds no virtual machine");
}

function nameOfSystem(system: XmlElement): string {
  return childText(system, "Name") ?? system.attributes.get("id") ?? "";
}

function readSystem(envelope: XmlElement, system: XmlElement): OvfSystem {
  const hardware =
    section(system, "VirtualHardwareSection") ??
    refuse(`machine ${quoted(nameOfSystem(system))} of the OVF descriptor has no hardware section`);
  const notes: string[] = [];
  if (sections(system, "VirtualHardwareSection").length > 1)
    notes.push("the descriptor offers several kinds of virtual hardware; the first is taken");
  const deployment = readDeployment(envelope);
  const items = itemsOf(hardware, deployment.taken);
  const properties = readProperties(system);
  const contents: Package = { files: readFiles(envelope), disks: diskElements(envelope) };
  const settings = readSettings(hardware);
  const machine = child(system, "Machine");
  const controllers = readControllers(items);
  const cpu = items.find(({ type }) => type === 3);
  const memory = items.find(({ type }) => type === 4);
  const products = sections(system, "ProductSection");
  return {
    id: system.attributes.get("id") ?? "",
    name: nameOfSystem(system),
    annotation: textOf(section(system, "AnnotationSection"), "Annotation") ?? childText(system, "Description"),
    guest: readGuest(system),
    hardwareVersion: textOf(child(hardware, "System"), "VirtualSystemType"),
    ...readProcessors(cpu?.element),
    memoryMiB: memory === undefined ? undefined : readMemory(memory.element),
    ...readFirmware(system, hardware, settings),
    cpuHotAdd: isTrue(settings.get("cpuHotAddEnabled")),
    memoryHotAdd: isTrue(settings.get("memoryHotAddEnabled")),
    nestedVirtualization: isTrue(settings.get("nestedHVEnabled")),
    controllers: [...controllers.values()],
    disks: readDisks(items, controllers, contents, properties),
    nics: readNics(items, machine, notes),
    cdroms: readDrives(items, [15, 16], contents),
    floppies: readDrives(items, [14], contents),
    hasVtpm: items.some(isVtpm),
    usbControllers: items.filter(({ type }) => type === 23).map(({ subtype, name }) => subtype ?? name),
    videoRamKiB: readVideoRam(items),
    others: items.filter((item) => !KNOWN_TYPES.has(item.type) && !isVtpm(item)).map(inWords),
    product: products[0] === undefined ? undefined : readProduct(products[0]),
    properties,
    transports: (hardware.attributes.get("transport") ?? "").split(/\s+/).filter((word) => word !== ""),
    deploymentOption: deployment.taken,
    deploymentOptions: deployment.all,
    licences: [...sections(system, "EulaSection"), ...sections(envelope, "EulaSection")].flatMap(
      (eula) => childText(eula, "License") ?? [],
    ),
    settings,
    notes,
  };
}

function readGuest(system: XmlElement): OvfGuest {
  const element = section(system, "OperatingSystemSection");
  const cimId = element?.attributes.get("id") ?? "";
  return {
    cimId: /^[0-9]{1,6}$/.test(cimId) ? Number(cimId) : undefined,
    vendorId: element?.attributes.get("osType") ?? textOf(element, "OSType"),
    description: textOf(element, "Description"),
  };
}

function readDeployment(envelope: XmlElement): { readonly taken: string | undefined; readonly all: readonly string[] } {
  const configurations = childrenOf(section(envelope, "DeploymentOptionSection"), "Configuration");
  const taken = configurations.find(({ attributes }) => isTrue(attributes.get("default"))) ?? configurations[0];
  return { taken: taken?.attributes.get("id"), all: configurations.flatMap(({ attributes }) => attributes.get("id") ?? []) };
}

/** Of items that hold for some deployment options only, those of the one taken; they replace general ones of the same instance (DSP0243, 9.8). */
function itemsOf(hardware: XmlElement, option: string | undefined): readonly Item[] {
  const elements = hardware.children.filter(({ name }) => ["Item", "StorageItem", "EthernetPortItem"].includes(name));
  if (elements.length > MAX_ITEMS)
    throw new ImageError(`the OVF descriptor names ${elements.length} hardware items; at most ${MAX_ITEMS} are read`);
  const items = new Map<string, Item>();
  for (const [index, element] of elements.entries()) {
    const configuration = element.attributes.get("configuration")?.split(/\s+/);
    if (configuration !== undefined && (option === undefined || !configuration.includes(option))) continue;
    const instance = childText(element, "InstanceID") ?? childText(element, "InstanceId");
    const key = configuration === undefined || instance === undefined ? `${index}` : `instance ${instance}`;
    const replaced = configuration === undefined ? undefined : [...items].find(([, item]) => item.instance === instance)?.[0];
    items.set(replaced ?? key, readItem(element, instance));
  }
  return [...items.values()];
}

function readItem(element: XmlElement, instance: string | undefined): Item {
  const type = childText(element, "ResourceType") ?? "";
  if (!/^[0-9]{1,5}$/.test(type))
    throw new ImageError(`a hardware item of the OVF descriptor has resource type ${quoted(type)}, which is no number`);
  return {
    element,
    type: Number(type),
    instance,
    subtype: childText(element, "ResourceSubType")?.split(/\s+/)[0],
    name: childText(element, "ElementName") ?? childText(element, "Caption") ?? `item ${instance ?? ""}`.trim(),
    settings: readSettings(element),
  };
}

/** vmw:Config and vmw:ExtraConfig, children with a key and a value. Source: VMware's OVF extensions, govmomi ovf/envelope.go. */
function readSettings(element: XmlElement): ReadonlyMap<string, string> {
  const settings = new Map<string, string>();
  for (const { attributes } of [...childrenOf(element, "Config"), ...childrenOf(element, "ExtraConfig")]) {
    const key = attributes.get("key");
    if (key !== undefined) settings.set(key, attributes.get("value") ?? "");
  }
  return settings;
}

/**
 * Firmware, as each vendor writes it: VMware's Config `firmware`; VirtualBox's `<Firmware type="EFI">` in its own machine element; oVirt's
 * `<BiosType>` (3 and 4 are OVMF, 4 with Secure Boot; engine BiosType.java); XenServer's HVM_boot_params (`order=cd;firmware=uefi`).
 */
function readFirmware(
  system: XmlElement,
  hardware: XmlElement,
  settings: ReadonlyMap<string, string>,
): Pick<OvfSystem, "firmware" | "secureBoot"> {
  const declared = settings.get("firmware")?.toLowerCase();
  const virtualBox = child(child(child(system, "Machine"), "Hardware"), "Firmware")?.attributes.get("type") ?? "";
  const ovirt = childText(system, "BiosType") ?? childText(hardware, "BiosType");
  const xen = hardware.children.some(
    (data) =>
      (data.attributes.get("Name") ?? childText(data, "Name")) === "HVM_boot_params" &&
      /(?:^|;)firmware=uefi(?:;|$)/.test(childText(data, "Value") ?? ""),
  );
  const isEfi = declared === "efi" || declared === "uefi" || /^EFI/i.test(virtualBox) || ovirt === "3" || ovirt === "4" || xen;
  const secureBoot =
    isTrue(settings.get("bootOptions.efiSecureBootEnabled")) || isTrue(settings.get("uefi.secureBoot.enabled")) || ovirt === "4";
  return { firmware: isEfi ? "efi" : "bios", secureBoot: isEfi && secureBoot };
}

/** The quantity and vmw:CoresPerSocket; oVirt counts sockets, cores of each, and threads of each. */
function readProcessors(element: XmlElement | undefined): Pick<OvfSystem, "cpus" | "coresPerSocket"> {
  if (element === undefined) return { cpus: undefined, coresPerSocket: undefined };
  const sockets = count(element, "num_of_sockets");
  const cores = count(element, "cpu_per_socket");
  const ofSockets = sockets === undefined ? undefined : sockets * (cores ?? 1) * (count(element, "threads_per_cpu") ?? 1);
  return { cpus: count(element, "VirtualQuantity") ?? ofSockets, coresPerSocket: count(element, "CoresPerSocket") ?? cores };
}

function readMemory(element: XmlElement): number | undefined {
  const quantity = count(element, "VirtualQuantity");
  if (quantity === undefined) return undefined;
  return Math.round((quantity * unitBytes(childText(element, "AllocationUnits"), MIB)) / MIB);
}

/** Source: DSP0243 2.1.1 appendix C (`byte * 2^20`), and the words that programs of OVF 0.9 and 1.0 write. */
const UNIT_WORDS: Readonly<Record<string, number>> = { k: 1024, m: MIB, g: 1024 * MIB, t: MIB * MIB };

/** How many bytes one unit is; `otherwise` when none is named. Throws ImageError on a unit that is not known. */
function unitBytes(units: string | undefined, otherwise: number): number {
  if (units === undefined) return otherwise;
  const text = units.replace(/\s+/g, "").toLowerCase();
  const word = /^(kilo|mega|giga|tera)bytes?$/.exec(text) ?? /^([kmgt])i?b?$/.exec(text);
  if (word !== null) return UNIT_WORDS[word[1]!.charAt(0)]!;
  const terms = text.split("*");
  if (!/^bytes?$/.test(terms[0]!)) return refuse(`the OVF descriptor uses the unit ${quoted(units)}, which is not known`);
  let bytes = 1;
  for (const term of terms.slice(1)) {
    const power = /^([0-9]{1,6})(?:\^([0-9]{1,2}))?$/.exec(term);
    bytes *= power === null ? Number.NaN : Number(power[1]) ** Number(power[2] ?? 1);
  }
  if (!(bytes >= 1 && Number.isSafeInteger(bytes))) return refuse(`the OVF descriptor uses the unit ${quoted(units)}, which is not known`);
  return bytes;
}

function readFiles(envelope: XmlElement): ReadonlyMap<string, OvfFile> {
  const files = new Map<string, OvfFile>();
  for (const { attributes } of childrenOf(child(envelope, "References"), "File")) {
    const href = attributes.get("href") ?? "";
    const id = attributes.get("id") ?? href;
    const compression = attributes.get("compression");
    if (files.has(id)) throw new ImageError(`the OVF descriptor names file ${quoted(id)} twice`);
    files.set(id, {
      id,
      href,
      sizeBytes: numeric(attributes.get("size"), `the size of file ${quoted(id)}`),
      compression: compression === "" || compression === "identity" ? undefined : compression,
      chunkBytes: numeric(attributes.get("chunkSize"), `the chunk size of file ${quoted(id)}`),
    });
  }
  return files;
}

function diskElements(envelope: XmlElement): ReadonlyMap<string, XmlElement> {
  const disks = new Map<string, XmlElement>();
  for (const element of sections(envelope, "DiskSection").flatMap((disk) => childrenOf(disk, "Disk"))) {
    const id = element.attributes.get("diskId") ?? refuse("a disk of the OVF descriptor has no diskId");
    if (disks.has(id)) throw new ImageError(`the OVF descriptor names disk ${quoted(id)} twice`);
    disks.set(id, element);
  }
  if (disks.size > MAX_DISKS) throw new ImageError(`the OVF descriptor names ${disks.size} disks; at most ${MAX_DISKS} are read`);
  return disks;
}

/** By instance. Type 20 is "other storage": SATA and NVMe, what VirtualBox has of SAS and virtio-scsi, and in oVirt's dialect the video card. */
function readControllers(items: readonly Item[]): ReadonlyMap<string, OvfController> {
  const controllers = new Map<string, OvfController>();
  for (const [index, { element, type, instance, subtype }] of items.entries()) {
    const isStorage = type === 20 && childText(element, "Type") !== "video";
    const bus = type === 5 ? "ide" : type === 6 ? "scsi" : isStorage ? otherStorageBus(subtype ?? "") : undefined;
    const address = childText(element, "Address") ?? "";
    const busNumber = /^[0-9]{1,4}$/.test(address) ? Number(address) : 0;
    if (bus !== undefined) controllers.set(instance ?? `item ${index}`, { bus, model: subtype, busNumber });
  }
  return controllers;
}

function otherStorageBus(subtype: string): OvfBus {
  if (/nvme/i.test(subtype)) return "nvme";
  return /scsi|lsilogic/i.test(subtype) ? "scsi" : "sata";
}

/** Types 17 disk drive and 19 storage extent, when they refer to the disk section or to a file (DSP0243, 8.3.1). */
function readDisks(
  items: readonly Item[],
  controllers: ReadonlyMap<string, OvfController>,
  contents: Package,
  properties: readonly OvfProperty[],
): readonly OvfDisk[] {
  const disks = items.filter(isDisk).map((item, index): OvfDisk => {
    const controller = controllers.get(childText(item.element, "Parent") ?? "");
    const unit = count(item.element, "AddressOnParent") ?? index;
    return describeDisk(resolveResource(item, contents), { name: item.name, controller, unit }, contents, properties);
  });
  return inHardwareOrder(disks, [...controllers.values()]);
}

/** By the bus's kind, its number, the controller's place in `controllers`, and the unit. */
export function inHardwareOrder(disks: readonly OvfDisk[], controllers: readonly OvfController[]): readonly OvfDisk[] {
  const place = ({ controller, unit }: OvfDisk): readonly number[] => [
    BUS_ORDER.indexOf(controller?.bus),
    controller?.busNumber ?? 0,
    controller === undefined ? 0 : controllers.indexOf(controller),
    unit,
  ];
  return disks.toSorted((a, b) => compareInTurn(place(a), place(b)));
}

function isDisk({ element, type }: Item): boolean {
  return type === 17 || (type === 19 && childText(element, "HostResource") !== undefined);
}

/** What `ovf:/disk/ID` or `ovf:/file/ID` points to; oVirt writes `image/ID` or the bare ID of the disk. */
function resolveResource(item: Item, contents: Package): XmlElement | OvfFile {
  const resource = childText(item.element, "HostResource") ?? "";
  const [, kind, id] = /^(?:ovf:)?\/{1,2}(disk|file)\/(.+)$/.exec(resource) ?? [];
  const found =
    kind === "file"
      ? contents.files.get(id!)
      : kind === "disk"
        ? contents.disks.get(id!)
        : (contents.disks.get(resource) ?? contents.disks.get(resource.split("/").at(-1)!));
  return found ?? refuse(`${quoted(item.name)} of the OVF descriptor refers to ${quoted(resource)}, which the descriptor does not hold`);
}

function describeDisk(
  resource: XmlElement | OvfFile,
  place: Pick<OvfDisk, "name" | "controller" | "unit">,
  contents: Package,
  properties: readonly OvfProperty[],
): OvfDisk {
  if ("href" in resource)
    return {
      id: resource.id,
      ...place,
      capacityBytes: undefined,
      populatedBytes: undefined,
      format: undefined,
      file: resource,
      parentId: undefined,
    };
  const { attributes } = resource;
  const id = attributes.get("diskId") ?? "";
  const fileId = attributes.get("fileRef");
  // oVirt refers to files by their href, whose last part is the id.
  const file =
    fileId === undefined || fileId === ""
      ? undefined
      : (contents.files.get(fileId) ?? [...contents.files.values()].find(({ href }) => href === fileId));
  if (fileId !== undefined && fileId !== "" && file === undefined)
    throw new ImageError(`disk ${quoted(id)} of the OVF descriptor refers to file ${quoted(fileId)}, which the descriptor does not name`);
  const capacityBytes = readCapacity(attributes, properties);
  if (file === undefined && !(capacityBytes !== undefined && capacityBytes > 0))
    throw new ImageError(`disk ${quoted(id)} of the OVF descriptor has neither a file nor a capacity`);
  const parentId = attributes.get("parentRef");
  return {
    id,
    ...place,
    controller: place.controller ?? ovirtController(attributes.get("disk-interface")),
    capacityBytes,
    populatedBytes: numeric(attributes.get("populatedSize"), `the populated size of disk ${quoted(id)}`),
    format: attributes.get("format"),
    file,
    parentId: parentId === "" ? undefined : parentId,
  };
}

/** `capacity` with its units, or a property's value where it is `${key}`; oVirt's old dialect has `size` in GiB. */
function readCapacity(attributes: ReadonlyMap<string, string>, properties: readonly OvfProperty[]): number | undefined {
  const id = quoted(attributes.get("diskId") ?? "");
  const written = attributes.get("capacity");
  if (written === undefined) {
    const size = numeric(attributes.get("size"), `the size of disk ${id}`);
    return size === undefined ? undefined : size * 1024 * MIB;
  }
  const [, key] = /^\$\{(.+)\}$/.exec(written) ?? [];
  const value = key === undefined ? written : properties.find((property) => property.key === key)?.value;
  if (value === undefined) throw new ImageError(`the capacity of disk ${id} is property ${quoted(key ?? "")}, which has no value`);
  const bytes = (numeric(value, `the capacity of disk ${id}`) ?? 0) * unitBytes(attributes.get("capacityAllocationUnits"), 1);
  if (!Number.isSafeInteger(bytes)) throw new ImageError(`the capacity of disk ${id} is ${bytes} bytes, larger than any disk`);
  return bytes;
}

/** oVirt has no controllers but says the bus with the disk. Source: ovirt-engine DiskInterface. */
function ovirtController(name: string | undefined): OvfController | undefined {
  const buses: Readonly<Record<string, OvfBus>> = { virtio: "virtio", virtio_scsi: "scsi", ide: "ide", sata: "sata" };
  const key = name?.toLowerCase() ?? "";
  const bus = Object.hasOwn(buses, key) ? buses[key] : undefined;
  return bus === undefined ? undefined : { bus, model: name, busNumber: 0 };
}

/** The disks of the disk section that no hardware item refers to, and no delta. */
function looseDisks(envelope: XmlElement, system: OvfSystem): readonly OvfDisk[] {
  const contents: Package = { files: readFiles(envelope), disks: diskElements(envelope) };
  const used = new Set(system.disks.flatMap(({ id, parentId }) => [id, parentId]));
  return [...contents.disks]
    .filter(([id]) => !used.has(id))
    .map(([id, element], index) => describeDisk(element, { name: id, controller: undefined, unit: index }, contents, system.properties));
}

function readNics(items: readonly Item[], machine: XmlElement | undefined, notes: string[]): readonly OvfNic[] {
  const adapters = childrenOf(child(child(machine, "Hardware"), "Network"), "Adapter").filter(({ attributes }) =>
    isTrue(attributes.get("enabled")),
  );
  return items
    .filter(({ type }) => type === 10)
    .map((item, index): OvfNic => {
      // oVirt has an element of its own; VirtualBox keeps the MAC in its machine element, adapters in the order of the items.
      const written =
        childText(item.element, "Address") ?? childText(item.element, "MACAddress") ?? adapters[index]?.attributes.get("MACAddress");
      const mac = written === undefined ? undefined : canonicalMac(written);
      if (written !== undefined && mac === undefined)
        notes.push(`the MAC address ${quoted(written)} of ${quoted(item.name)} cannot be read; a new one is made`);
      return {
        name: item.name,
        model: item.subtype,
        network: childText(item.element, "Connection"),
        mac,
        connected: childText(item.element, "AutomaticAllocation")?.toLowerCase() !== "false",
        pciSlot: numeric(item.settings.get("slotInfo.pciSlotNumber"), `the PCI slot of ${quoted(item.name)}`),
      };
    });
}

/** `00:50:56:01:02:03` from twelve hex digits with colons, dashes or nothing between them; undefined when they are none. */
export function canonicalMac(text: string): string | undefined {
  const digits = text.replace(/[:-]/g, "").toLowerCase();
  return /^[0-9a-f]{12}$/.test(digits) ? digits.match(/../g)!.join(":") : undefined;
}

function readDrives(items: readonly Item[], types: readonly number[], contents: Package): readonly OvfDrive[] {
  return items
    .filter(({ type }) => types.includes(type))
    .map(({ element, name }) => {
      const [, id] = /^(?:ovf:)?\/{1,2}file\/(.+)$/.exec(childText(element, "HostResource") ?? "") ?? [];
      return { name, file: id === undefined ? undefined : contents.files.get(id) };
    });
}

function readVideoRam(items: readonly Item[]): number | undefined {
  return numeric(items.find(({ type }) => type === 24)?.settings.get("videoRamSizeInKB"), "the video memory");
}

function readProduct(element: XmlElement): OvfProduct {
  return {
    name: childText(element, "Product"),
    vendor: childText(element, "Vendor"),
    version: childText(element, "FullVersion") ?? childText(element, "Version"),
  };
}

/** Keys are `class.key.instance` (DSP0243, 9.5.1). */
function readProperties(system: XmlElement): readonly OvfProperty[] {
  return sections(system, "ProductSection").flatMap((product) =>
    childrenOf(product, "Property").map((element): OvfProperty => {
      const { attributes } = element;
      const parts = [product.attributes.get("class"), attributes.get("key"), product.attributes.get("instance")];
      return {
        key: parts.filter((part) => part !== undefined && part !== "").join("."),
        type: attributes.get("type") ?? "string",
        value: attributes.get("value"),
        label: childText(element, "Label"),
        userConfigurable: isTrue(attributes.get("userConfigurable")),
      };
    }),
  );
}

/** VMware's "virtual TPM" is of type 1, "other". Source: Broadcom, "TPM as a Virtual Device in OVF". */
function isVtpm({ subtype }: Item): boolean {
  return subtype?.toLowerCase() === "vmware.vtpm";
}

/** What has a field of its own: CPU, memory, IDE, SCSI, Ethernet, floppy, CD, DVD, disk, storage extent, other storage, USB, graphics. */
const KNOWN_TYPES: ReadonlySet<number> = new Set([3, 4, 5, 6, 10, 14, 15, 16, 17, 19, 20, 23, 24]);

/** CIM_ResourceAllocationSettingData.ResourceType. */
const TYPE_WORDS: Readonly<Record<number, string>> = {
  1: "other device",
  7: "Fibre Channel adapter",
  8: "iSCSI adapter",
  9: "InfiniBand adapter",
  11: "other network adapter",
  12: "I/O slot",
  13: "I/O device",
  18: "tape drive",
  21: "serial port",
  22: "parallel port",
  25: "FireWire controller",
  35: "sound card",
};

function inWords({ type, subtype, name }: Item): string {
  const word = TYPE_WORDS[type] ?? `device of type ${type}`;
  return `${word} ${quoted(name)}${subtype === undefined ? "" : ` (${subtype})`}`;
}

/** An element's kind: its name, or in the dialect of OVF 0.9 (oVirt) its xsi:type: `<Section xsi:type="ovf:DiskSection_Type">`. */
function kindOf({ name, attributes }: XmlElement): string {
  if (name !== "Section" && name !== "Content") return name;
  return (attributes.get("type") ?? name).replace(/^.*:/, "").replace(/_Type$/, "");
}

function sections(parent: XmlElement, kind: string): readonly XmlElement[] {
  return parent.children.filter((element) => kindOf(element) === kind);
}

function section(parent: XmlElement, kind: string): XmlElement | undefined {
  return sections(parent, kind)[0];
}

function childrenOf(parent: XmlElement | undefined, name: string): readonly XmlElement[] {
  return parent?.children.filter((element) => element.name === name) ?? [];
}

function child(parent: XmlElement | undefined, name: string): XmlElement | undefined {
  return childrenOf(parent, name)[0];
}

/** The child's text; undefined when it is empty or there is no such child. */
function childText(parent: XmlElement, name: string): string | undefined {
  const text = child(parent, name)?.text;
  return text === "" ? undefined : text;
}

function textOf(parent: XmlElement | undefined, name: string): string | undefined {
  return parent === undefined ? undefined : childText(parent, name);
}

function count(element: XmlElement, name: string): number | undefined {
  return numeric(childText(element, name), `<${name}> of a hardware item`);
}

/** A whole number from 0 on; undefined stays so. Throws ImageError naming `what` on anything else. */
function numeric(text: string | undefined, what: string): number | undefined {
  if (text === undefined || text === "") return undefined;
  const value = /^[0-9]{1,16}$/.test(text) ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(value)) throw new ImageError(`${what} in the OVF descriptor is ${quoted(text)}, which is no number`);
  return value;
}

function isTrue(text: string | undefined): boolean {
  return text?.toLowerCase() === "true" || text === "1";
}

function compareInTurn(a: readonly number[], b: readonly number[]): number {
  return a.map((value, index) => value - b[index]!).find((difference) => difference !== 0) ?? 0;
}

function refuse(message: string): never {
  throw new ImageError(message);
}
