/**
 * A machine as its package describes it, in the terms of our own arguments: which disks, what hardware, and what cannot come along.
 * Reads descriptors only, and at once: what a program declares depends on it.
 */
import { extname } from "node:path";
import { DiskError } from "../errors.ts";
import { openOva, openOvf, type OvfPackage } from "../image/ova.ts";
import type { OvfDisk, OvfNic, OvfSystem } from "../image/ovf.ts";
import { ImageError, type Parser } from "../image/parser.ts";
import { openVmx, type VmxPackage } from "../image/vmx.ts";
import { quoted } from "../image/words.ts";
import { fitsXml } from "../libvirt/render.ts";
import { driveAtOnce, openPackage } from "./package-files.ts";

/** A disk of the machine. */
export interface DescribedDisk {
  /** Its place in the hardware's order, from 0; the machine boots from the first one that has content. */
  readonly index: number;
  /** What people call it: `Hard disk 1`. */
  readonly label: string;
  /** The file's name within the package; undefined when the disk is blank. */
  readonly file: string | undefined;
  /** The disk's size as the guest sees it; undefined when the package does not say, which only disks with a file may do. */
  readonly sizeBytes: number | undefined;
}

/** A network interface of the machine. */
export interface DescribedNetwork {
  /** What people call it: `Network adapter 1`. */
  readonly label: string;
  /** The name of the network that it was connected to. */
  readonly network: string | undefined;
  /** `00:50:56:01:02:03`; undefined where a new address is to be made. */
  readonly mac: string | undefined;
  readonly model: "virtio" | "e1000e" | "e1000";
  /** `down` where its cable was out; absent where it was in. */
  readonly link?: "down";
}

/** A CD-ROM drive of the machine. It comes along empty. */
export interface DescribedDrive {
  /** What people call it: `CD/DVD drive 1`. */
  readonly label: string;
}

/** The hardware, as arguments of `VirtualMachine` of the same names. */
export interface DescribedHardware {
  readonly vcpus: number | undefined;
  readonly memoryMiB: number | undefined;
  readonly machine: "q35" | "pc";
  readonly firmware: "bios" | "uefi";
  readonly secureBoot: boolean;
  /** true, or undefined where it has none. */
  readonly tpm: boolean | undefined;
  /** undefined where each CPU is a socket. */
  readonly cpuTopology: { readonly sockets: number; readonly cores: number } | undefined;
  readonly bus: "virtio" | "sata" | "ide";
  readonly description: string | undefined;
}

/** A machine that can be made anew. Plain JSON, but for what is undefined: it may be stored, and used when the package is gone. */
export interface MachineDescription {
  /** The machine's own name, as people see it. */
  readonly name: string;
  readonly hardware: DescribedHardware;
  readonly disks: readonly DescribedDisk[];
  readonly networks: readonly DescribedNetwork[];
  /** Absent from descriptions that were stored before there were any. */
  readonly cdroms?: readonly DescribedDrive[];
  /** What the user should know, one sentence each: above all what does not come along. Not what the check of the boot disk says. */
  readonly notes: readonly string[];
}

/**
 * Reads the machine in an OVA, in an OVF or a VMX beside its disks, or in a zip archive of an OVA or of an OVF and its disks.
 *
 * Reads at once and at most some MiB: the archive's headers, the descriptor and the manifest; beside a VMX, the headers of its disks.
 * Throws DiskError: step "source" when a file cannot be read, step "header" when it is no package of one machine, or one that is incomplete.
 */
export function describeMachine(path: string): MachineDescription {
  return ofFile(path, () => descriptionOf(readAtOnce(path)));
}

/** What a package says in its own terms. Reads and throws as `describeMachine`. */
export function readPackage(path: string): MachinePackage {
  return ofFile(path, () => readAtOnce(path));
}

function readAtOnce(path: string): MachinePackage {
  using files = openPackage(path);
  return driveAtOnce(parserFor(files.name, files.file("").sizeBytes), files);
}

function ofFile<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    throw new DiskError(`${path}: ${error.message}`, { step: "header", path, cause: error });
  }
}

function parserFor(name: string, sizeBytes: number): Parser<MachinePackage> {
  switch (extname(name).toLowerCase()) {
    case ".ovf":
      return openOvf(name, sizeBytes);
    case ".vmx":
      return openVmx(sizeBytes);
    default:
      return openOva(sizeBytes);
  }
}

/** An OVF's says how its files are vouched for, too. */
export type MachinePackage = VmxPackage | OvfPackage;

/** What a package says, in our terms. Pure. Throws ImageError when the machine has no disk that it could boot from. */
function descriptionOf({ system, disks, notes }: MachinePackage): MachineDescription {
  if (!disks.some(({ place }) => place !== undefined))
    throw new ImageError("the machine has no disk with content: there is nothing to boot from");
  const guest = guestOf(system);
  const hardware = hardwareOf(system, disks, guest);
  const networks = system.nics.map((nic) => networkOf(nic, hardware.machine));
  return {
    name: system.name || system.id,
    hardware,
    disks: disks.map(({ index, name, place, capacityBytes }) => ({ index, label: name, file: place?.name, sizeBytes: capacityBytes })),
    networks,
    cdroms: system.cdroms.map(({ name }) => ({ label: name })),
    notes: [...notes, ...losses(system, disks, hardware, guest)],
  };
}

/** What kind of guest system it is, as far as our choices depend on it. */
type GuestKind = "old" | "windows" | "other";

/** Systems from before SATA and PCI Express. Sources: VMware's VirtualMachineGuestOsIdentifier and, in a VMX, the same words in lower case; VirtualBox's OS types; CIM_OperatingSystem.OsType. */
const OLD_GUESTS = /^(dos|win31|win95|win98|winMe|winNT|win2000|winXP|winNet|win2k|Windows(31|95|98|Me|NT3x|NT4|2000|XP|2003))/i;
const OLD_CIM_IDS: ReadonlySet<number> = new Set([14, 15, 16, 17, 18, 63, 64, 65, 67, 69, 70, 71]);
/** VMware calls Windows Server 2008 by its code name in a VMX. */
const WINDOWS_GUESTS = /^(win|longhorn)/i;
/** Windows Vista to Server 2012 R2 and on, as CIM numbers them. */
const WINDOWS_CIM_IDS: ReadonlySet<number> = new Set([73, 74, 75, 76, 77, 103, 104, 105, 112, 113, 114, 115, 116, 117, 118, 119, 120]);

function guestOf({ guest: { vendorId, cimId } }: OvfSystem): GuestKind {
  if (vendorId === undefined) {
    if (cimId === undefined) return "other";
    return OLD_CIM_IDS.has(cimId) ? "old" : WINDOWS_CIM_IDS.has(cimId) ? "windows" : "other";
  }
  return OLD_GUESTS.test(vendorId) ? "old" : WINDOWS_GUESTS.test(vendorId) ? "windows" : "other";
}

/** Disks hang on what the guest has a driver for: virtio only where they did before. */
function hardwareOf(system: OvfSystem, disks: readonly OvfDisk[], guest: GuestKind): DescribedHardware {
  const boot = disks.find(({ file }) => file !== undefined)?.controller;
  const isVirtio = boot?.bus === "virtio" || /^virtio/i.test(boot?.model ?? "");
  const isOld = guest === "old" && system.firmware === "bios";
  const description = system.annotation?.trim();
  return {
    vcpus: system.cpus,
    memoryMiB: system.memoryMiB,
    machine: isOld ? "pc" : "q35",
    firmware: system.firmware === "efi" ? "uefi" : "bios",
    secureBoot: system.secureBoot,
    tpm: system.hasVtpm || undefined,
    cpuTopology: topologyOf(system),
    bus: isVirtio ? "virtio" : isOld && boot?.bus === "ide" ? "ide" : "sata",
    description: description === undefined || description === "" || !fitsXml(description) ? undefined : description,
  };
}

/** Only where the cores fill their sockets, as VMware asks for. */
function topologyOf({ cpus = 1, coresPerSocket: cores = 1 }: OvfSystem): DescribedHardware["cpuTopology"] {
  return cores > 1 && cpus > 0 && cpus % cores === 0 ? { sockets: cpus / cores, cores } : undefined;
}

function networkOf({ name, network, mac, connected, model = "" }: OvfNic, machine: "q35" | "pc"): DescribedNetwork {
  const isVirtio = /^virtio/i.test(model);
  // What knew a card from before PCI Express may know no other; a pc machine has no slot for one.
  const isOld = machine === "pc" || /^(e1000(?!e)|pcnet|am79|vlance|flexible)/i.test(model);
  return {
    label: name,
    network,
    mac: mac !== undefined && isUnicast(mac) ? mac : undefined,
    model: isVirtio ? "virtio" : isOld ? "e1000" : "e1000e",
    ...(!connected && { link: "down" }),
  };
}

/** The lowest bit of an address's first byte marks a group. */
function isUnicast(mac: string): boolean {
  return (Number.parseInt(mac.slice(0, 2), 16) & 1) === 0 && mac !== "00:00:00:00:00:00";
}

/** One sentence for everything that the machine had and will not have, but for what the rules about its boot disk say. */
function losses(system: OvfSystem, disks: readonly OvfDisk[], hardware: DescribedHardware, guest: GuestKind): readonly string[] {
  const said: string[] = [];
  const boot = disks.find(({ file }) => file !== undefined);
  if (disks[0] !== boot) said.push(`its first disk, ${quoted(disks[0]?.name ?? "")}, is blank; it boots from ${quoted(boot?.name ?? "")}`);
  if (system.coresPerSocket !== undefined && system.coresPerSocket > 1 && hardware.cpuTopology === undefined)
    said.push(
      `it had ${system.coresPerSocket} cores per socket, which its ${system.cpus ?? 1} processors do not fill; they now are a socket each, which licences counted by sockets may notice`,
    );
  if (guest === "windows" && hardware.bus === "sata" && boot?.controller?.bus === "scsi")
    said.push(
      "Windows started from SCSI and now finds its disk on SATA: enable its driver storahci before the export, or convert the disk first (virt-v2v)",
    );
  for (const nic of system.nics) {
    if (nic.mac !== undefined && !isUnicast(nic.mac))
      said.push(`the MAC address ${nic.mac} of ${quoted(nic.name)} is no machine's: a new one is made`);
  }
  for (const { name, file } of system.cdroms)
    if (file !== undefined)
      said.push(
        `the CD-ROM drive ${quoted(name)} comes along without ${quoted(file.href)}: give the machine a drive with a medium in \`disks\` where the guest needs it`,
      );
  const uuid = [...system.settings].find(([key]) => key.toLowerCase() === "uuid.bios")?.[1];
  if (uuid !== undefined && uuid !== "")
    said.push(
      `its BIOS UUID ${quoted(uuid)} does not come along: where a licence hangs on it, set \`uuid\` to what the guest saw (dmidecode -s system-uuid), since VMware writes it in another order of bytes`,
    );
  if (system.nestedVirtualization)
    said.push('it ran virtual machines itself: it still can where its `cpu` is "host-passthrough" and the host allows it');
  if (system.properties.some(({ value }) => value !== undefined && value !== "") && system.transports.length > 0)
    said.push(`its vApp properties (by ${system.transports.join(", ")}) do not reach the guest`);
  return said;
}
