/**
 * What a VMX says about a machine: the configuration that VMware keeps beside the machine's VMDKs, in the terms of an OVF.
 * Sources: libvirt's src/vmx/vmx.c, which documents the keys and their defaults; open-vm-tools lib/dict for the form of a line and its escapes.
 */
import { Buffer } from "node:buffer";
import { basename, extname } from "node:path/posix";
import type { OvfPackage, PackagedDisk } from "./ova.ts";
import {
  canonicalMac,
  inHardwareOrder,
  type OvfBus,
  type OvfController,
  type OvfDisk,
  type OvfDrive,
  type OvfFile,
  type OvfNic,
} from "./ovf.ts";
import type { OvfSystem } from "./ovf.ts";
import { openImage } from "./open.ts";
import { ImageError, type Parser, readExactly, sizeOf } from "./parser.ts";
import { quoted } from "./words.ts";

/** Real ones have some KiB. */
const MAX_VMX_BYTES = 1024 * 1024;
const MAX_KEYS = 20_000;
/** What a machine of VMware may have. Source: VMware's configuration maximums, "Virtual disks per virtual machine (PVSCSI)". */
const MAX_DISKS = 256;
/** More than VMware gives to any machine. Source: VMware's configuration maximums, "Virtual CPUs per virtual machine" and "RAM per virtual machine". */
const MAX_CPUS = 1024;
const MAX_MEMORY_MIB = 64 * 1024 * 1024;

const DEFAULT_ENCODING = "utf-8";
/** What VMware gives a machine whose file does not say. Source: vmx.c virVMXParseConfig, "memsize". */
const DEFAULT_MEMORY_MIB = 32;

/** What of a package is known of a machine that lies unpacked. */
export type VmxPackage = Pick<OvfPackage, "system" | "disks" | "notes">;

/**
 * Opens the VMX of `sizeBytes` that the parser's file "" is, and looks into the header of each disk that it names.
 *
 * Throws ImageError as `parseVmx` does, and when a disk does not lie beside it under a plain name, is no VMDK, or holds only the changes since a snapshot.
 */
export function* openVmx(sizeBytes: number): Parser<VmxPackage> {
  if (sizeBytes > MAX_VMX_BYTES) throw new ImageError(`the VMX has ${sizeBytes} bytes; at most ${MAX_VMX_BYTES} are read`);
  const system = parseVmx(yield* readExactly("", 0, sizeBytes, "the VMX"));
  const disks: PackagedDisk[] = [];
  const notes = [...system.notes];
  for (const [index, disk] of system.disks.entries()) {
    const name = disk.file?.href ?? "";
    const found = yield* openDisk(name, disk.name);
    notes.push(...found.notes.map((note) => `${quoted(name)}: ${note}`));
    disks.push({
      ...disk,
      index,
      capacityBytes: found.capacityBytes,
      place: { name, file: name, offset: 0, sizeBytes: found.sizeBytes },
      digest: undefined,
    });
  }
  return { system, disks, notes };
}

interface FoundDisk {
  readonly sizeBytes: number;
  readonly capacityBytes: number;
  readonly notes: readonly string[];
}

function* openDisk(file: string, label: string): Parser<FoundDisk> {
  if (file !== basename(file) || file.includes("\\") || file.includes("\0") || file === "" || file === "." || file === "..")
    throw new ImageError(`${label} lies at ${quoted(file)}: only files beside the VMX are read; copy it there, and name it so in the VMX`);
  const sizeBytes = yield* sizeOf(file);
  if (sizeBytes === undefined) throw new ImageError(`there is no ${quoted(file)} beside the VMX, the file of ${label}: copy it there`);
  try {
    const { format, virtualSizeBytes, notes } = yield* within(file, openImage({ sizeBytes }));
    if (format !== "vmdk") throw new ImageError(`it is ${format}, not VMDK`);
    return { sizeBytes, capacityBytes: virtualSizeBytes, notes };
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    throw new ImageError(`${quoted(file)}, the file of ${label}: ${error.message}`, { cause: error });
  }
}

/** The parser with `file` as its own file. */
function* within<T>(file: string, parser: Parser<T>): Parser<T> {
  let step = parser.next();
  while (step.done !== true) step = parser.next(yield step.value.file === "" ? { ...step.value, file } : step.value);
  return step.value;
}

/**
 * Reads a VMX's bytes and the machine in it. Its disks have a file each, and no capacity, which only the VMDK knows.
 *
 * Throws ImageError when a line means nothing, a key stands twice, the text is not in the encoding that it declares, the machine is encrypted, or a
 * part that matters cannot be read.
 */
export function parseVmx(bytes: Uint8Array): OvfSystem {
  const values = parseLines(bytes);
  if (values.text("encryption.keysafe") !== undefined || values.text("encryption.data") !== undefined)
    throw new ImageError("the machine is encrypted, as one with a vTPM is: remove both in VMware first, or export it as an OVA");
  const firmware = values.text("firmware")?.toLowerCase() === "efi" ? "efi" : "bios";
  const drives = drivesOf(values);
  const disks = drives.filter(({ kind }) => kind === "disk").map(diskOf);
  if (disks.length > MAX_DISKS) throw new ImageError(`the VMX names ${disks.length} disks; at most ${MAX_DISKS} are read`);
  const controllers = [...new Set(drives.map(({ controller }) => controller))];
  const name = values.text("displayname") ?? "";
  return {
    id: name,
    name,
    annotation: values.text("annotation"),
    guest: { cimId: undefined, vendorId: values.text("guestos"), description: undefined },
    hardwareVersion: versionOf(values),
    cpus: values.amount("numvcpus", MAX_CPUS) ?? 1,
    coresPerSocket: values.amount("cpuid.corespersocket", MAX_CPUS),
    memoryMiB: values.amount("memsize", MAX_MEMORY_MIB) ?? DEFAULT_MEMORY_MIB,
    firmware,
    secureBoot: firmware === "efi" && values.isTrue("uefi.secureboot.enabled"),
    cpuHotAdd: values.isTrue("vcpu.hotadd"),
    memoryHotAdd: values.isTrue("mem.hotadd"),
    nestedVirtualization: values.isTrue("vhv.enable"),
    controllers,
    disks: inHardwareOrder(disks, controllers),
    nics: values.present(/^ethernet(\d{1,2})$/).map(([key, number]) => nicOf(values, key, Number(number))),
    cdroms: drives.filter(({ kind }) => kind === "cdrom").map(mediumOf),
    floppies: values.present(/^floppy(\d)$/).map(([, number]) => ({ name: `floppy drive ${number}`, file: undefined })),
    hasVtpm: values.isTrue("vtpm.present") || values.text("managedvm.autoaddvtpm") !== undefined,
    usbControllers: values.present(/^(?:usb|ehci|usb_xhci)$/).map(([key]) => key),
    videoRamKiB: kibibytes(values.count("svga.vramsize")),
    others: othersOf(values, drives),
    product: undefined,
    properties: [],
    transports: [],
    deploymentOption: undefined,
    deploymentOptions: [],
    licences: [],
    settings: values.asWritten,
    notes: notesOf(values, drives),
  };
}

/** The keys in lower case, as VMware reads them, and their values. */
class Values {
  /** The keys as written. */
  readonly asWritten: ReadonlyMap<string, string>;
  readonly #values: ReadonlyMap<string, string>;

  constructor(values: ReadonlyMap<string, string>) {
    this.asWritten = values;
    this.#values = new Map([...values].map(([key, value]) => [key.toLowerCase(), value]));
  }

  /** undefined when it is empty or not there. */
  text(key: string): string | undefined {
    return this.#values.get(key) || undefined;
  }

  isTrue(key: string): boolean {
    return /^(true|1|yes|on)$/i.test(this.text(key) ?? "");
  }

  /** A whole number from 0 on. Throws ImageError on anything else that is there. */
  count(key: string): number | undefined {
    const text = this.text(key)?.trim();
    if (text === undefined) return undefined;
    if (!/^\d{1,12}$/.test(text)) throw new ImageError(`${key} in the VMX is ${quoted(text)}, which is no number`);
    return Number(text);
  }

  /** A whole number from 1 to `most`. Throws ImageError on anything else that is there. */
  amount(key: string, most: number): number | undefined {
    const amount = this.count(key);
    if (amount === undefined || (amount >= 1 && amount <= most)) return amount;
    throw new ImageError(`${key} in the VMX is ${amount}: it may be from 1 to ${most}`);
  }

  /** The devices `<name>.present` whose name matches, ascending: the match, the name first. */
  present(name: RegExp): readonly RegExpExecArray[] {
    return [...this.#values.keys()]
      .flatMap((key) => {
        const match = key.endsWith(".present") && this.isTrue(key) ? name.exec(key.slice(0, -".present".length)) : null;
        return match === null ? [] : [match];
      })
      .toSorted(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  }
}

function parseLines(bytes: Uint8Array): Values {
  const encoding = encodingOf(bytes);
  const values = new Map<string, string>();
  const seen = new Set<string>();
  for (const [index, rawLine] of decode(bytes, encoding).split("\n").entries()) {
    const line = rawLine.trim();
    if (line === "" || line.startsWith("#")) continue;
    const { key, value } = parseLine(line) ?? {};
    if (key === undefined || value === undefined) throw new ImageError(`line ${index + 1} of the VMX means nothing: ${quoted(line)}`);
    if (seen.has(key.toLowerCase())) throw new ImageError(`the VMX has ${quoted(key)} twice: VMware would not start it either`);
    if (seen.add(key.toLowerCase()).size > MAX_KEYS) throw new ImageError(`the VMX has more than ${MAX_KEYS} keys, which are not read`);
    values.set(key, unescape(value, encoding));
  }
  if (!seen.has("config.version") && !seen.has("virtualhw.version"))
    throw new ImageError("the file is no VMX: it has neither config.version nor virtualHW.version");
  return new Values(values);
}

/** `key = "value"`, `key = value` or `key =`, and perhaps a comment; undefined for anything else. Each expression goes over the line once. */
function parseLine(line: string): { readonly key: string; readonly value: string } | undefined {
  const [start, key] = /^([\w.:-]+)\s*=/.exec(line) ?? [];
  if (start === undefined || key === undefined) return undefined;
  const rest = line.slice(start.length).trimStart();
  const [written, inQuotes, bare = ""] = /^(?:"([^"]*)"|([^"\s#]*))/.exec(rest) ?? [""];
  const after = rest.slice(written.length).trimStart();
  return after === "" || after.startsWith("#") ? { key, value: inQuotes ?? bare } : undefined;
}

/** The name of the encoding stands in ASCII, whatever the encoding is. */
function encodingOf(bytes: Uint8Array): string {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1");
  return /^[ \t]*\.encoding[ \t]*=[ \t]*"([^"\r\n]{1,40})"/im.exec(text)?.[1] ?? DEFAULT_ENCODING;
}

function decode(bytes: Uint8Array, encoding: string): string {
  try {
    return new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch (error) {
    // RangeError: an encoding that is not known. TypeError: bytes that mean nothing in it.
    if (!(error instanceof RangeError || error instanceof TypeError)) throw error;
    throw new ImageError(`the VMX is not text in ${quoted(encoding)}: save it in UTF-8, with .encoding = "UTF-8"`, { cause: error });
  }
}

/** `|22` is the byte 0x22: what a line cannot hold. */
function unescape(value: string, encoding: string): string {
  return value.replaceAll(/(?:\|[0-9A-Fa-f]{2})+/g, (run) => new TextDecoder(encoding).decode(Buffer.from(run.replaceAll("|", ""), "hex")));
}

function versionOf(values: Values): string | undefined {
  const version = values.text("virtualhw.version");
  return version === undefined ? undefined : `vmx-${version}`;
}

function kibibytes(bytes: number | undefined): number | undefined {
  return bytes === undefined ? undefined : Math.floor(bytes / 1024);
}

/** What hangs on a controller. */
interface Drive {
  readonly key: string;
  readonly controller: OvfController;
  readonly unit: number;
  /** `unknown`: not said, and neither a VMDK nor what a CD-ROM drive holds. */
  readonly kind: "disk" | "cdrom" | "passthrough" | "unknown";
  /** As written: a plain name, a path, `auto detect`, or nothing. */
  readonly fileName: string;
  readonly mode: string;
  /** Whether `fileName` is the image of a CD, and no drive of the old host. */
  readonly hasMedium: boolean;
}

/** What stands in place of a file's name where a CD-ROM drive holds none. Source: vmx.c virVMXParseDisk. */
const NO_MEDIUM = /^(|auto detect|emptybackingstring)$/i;

/** `scsi0:1`, `ide1:0`: without a `deviceType` the file's name tells what it is. Source: vmx.c virVMXParseDisk. */
function drivesOf(values: Values): readonly Drive[] {
  const controllers = new Map<string, OvfController>();
  const controllerOf = (name: string, bus: OvfBus, busNumber: number): OvfController => {
    const known = controllers.get(name) ?? { bus, model: values.text(`${name}.virtualdev`), busNumber };
    controllers.set(name, known);
    return known;
  };
  return values.present(/^((scsi|sata|ide|nvme)(\d{1,2})):(\d{1,3})$/).map(([key, name = "", bus, busNumber, unit]): Drive => {
    const type = values.text(`${key}.devicetype`)?.toLowerCase() ?? "";
    const fileName = values.text(`${key}.filename`) ?? "";
    const suffix = extname(fileName).toLowerCase();
    return {
      key,
      controller: controllerOf(name, bus as OvfBus, Number(busNumber)),
      unit: Number(unit),
      kind: type === "" ? kindByName(fileName, suffix) : /passthru/.test(type) ? "passthrough" : type.endsWith("disk") ? "disk" : "cdrom",
      fileName,
      mode: values.text(`${key}.mode`)?.toLowerCase() ?? "",
      hasMedium: suffix === ".iso" || (type === "cdrom-image" && !NO_MEDIUM.test(fileName)),
    };
  });
}

function kindByName(fileName: string, suffix: string): Drive["kind"] {
  if (suffix === ".vmdk") return "disk";
  return suffix === ".iso" || NO_MEDIUM.test(fileName) ? "cdrom" : "unknown";
}

function diskOf({ key, controller, unit, fileName }: Drive): OvfDisk {
  return {
    id: key,
    name: key,
    controller,
    unit,
    capacityBytes: undefined,
    populatedBytes: undefined,
    format: undefined,
    file: fileOf(key, fileName),
    parentId: undefined,
  };
}

function fileOf(id: string, href: string): OvfFile {
  return { id, href, sizeBytes: undefined, compression: undefined, chunkBytes: undefined };
}

function mediumOf({ key, fileName, hasMedium }: Drive): OvfDrive {
  return { name: key, file: hasMedium ? fileOf(key, fileName) : undefined };
}

/** Without a `networkName`, as desktops write it, the kind of its connection is its network's name; bridged where nothing is said. */
function nicOf(values: Values, key: string, number: number): OvfNic {
  const type = values.text(`${key}.addresstype`)?.toLowerCase() ?? "generated";
  const written = values.text(`${key}.${type === "static" ? "address" : "generatedaddress"}`);
  const mac = written === undefined ? undefined : canonicalMac(written);
  if (written !== undefined && mac === undefined)
    throw new ImageError(`the MAC address of ${key} in the VMX is ${quoted(written)}, which is none`);
  return {
    name: `ethernet${number}`,
    model: values.text(`${key}.virtualdev`),
    network: values.text(`${key}.networkname`) ?? values.text(`${key}.vnet`) ?? values.text(`${key}.connectiontype`) ?? "bridged",
    mac,
    connected: values.text(`${key}.startconnected`) === undefined || values.isTrue(`${key}.startconnected`),
    pciSlot: undefined,
  };
}

/** Devices without a field of their own. A number is one of several. */
const OTHER_DEVICES = [
  [/^pcipassthru(\d{1,2})$/, "PCI passthrough"],
  [/^serial(\d{1,2})$/, "serial port"],
  [/^parallel(\d)$/, "parallel port"],
  [/^sound$/, "sound card"],
] as const;

function othersOf(values: Values, drives: readonly Drive[]): readonly string[] {
  const devices = OTHER_DEVICES.flatMap(([pattern, words]) =>
    values.present(pattern).map(([key]) => {
      const what = values.text(`${key}.virtualdev`) ?? values.text(`${key}.vgpu`);
      return `${words} ${quoted(key)}${what === undefined ? "" : ` (${what})`}`;
    }),
  );
  return [...devices, ...drives.filter(({ kind }) => kind === "passthrough").map(({ key }) => `device passthrough ${quoted(key)}`)];
}

function notesOf(values: Values, drives: readonly Drive[]): readonly string[] {
  const notes: string[] = [];
  if (values.text("checkpoint.vmstate") !== undefined)
    notes.push("it was suspended: its memory does not come along, and its disks are as after a power failure; shut it down first");
  for (const { key, mode } of drives)
    if (mode === "independent-nonpersistent") notes.push(`${key} forgot its changes at every power-off; here it keeps them`);
  for (const { key, kind, fileName } of drives)
    if (kind === "unknown")
      notes.push(
        `${key} is ${quoted(fileName)}, neither a VMDK nor an ISO, and does not come along: import it as a disk of its own, or make it a VMDK`,
      );
  return notes;
}
