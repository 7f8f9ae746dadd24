/** The class of a libvirt machine. It declares only: `provider/resources/virtual-machine.ts` does the work. */
import * as pulumi from "@pulumi/pulumi";
import type { z } from "zod";
import type { DiskRefSchema } from "../provider/resources/schema.ts";
import type { PowerState } from "../provider/resources/virtual-machine-guest.ts";
import type { VirtualMachineSchema } from "../provider/resources/virtual-machine-schema.ts";
import { hostOf, withDiskRefs } from "./disk-ref.ts";
import type { ImportedDisk } from "./imported-disk.ts";
import { type Host, type Later, originOf, type Outputs, withSecrets } from "./values.ts";

// Type and text are in every state that was ever stored: neither can change.
const TYPE = "pulumi-nodejs:dynamic/virtlift:VirtualMachine";
const PROVIDER = 'exports.handler = () => require("virtlift/provider").virtualMachine;';

type Declared = z.input<typeof VirtualMachineSchema>;
type Resolved = z.output<typeof VirtualMachineSchema>;

/** What the machine is. Wherever a disk is asked for, an `ImportedDisk` of the same program will do. */
export type VirtualMachineArgs = {
  readonly [Key in keyof Omit<Declared, "host" | "origin">]: Later<Declared[Key], z.input<typeof DiskRefSchema>, ImportedDisk>;
} & {
  /** The host that runs the machine: a libvirt URI, or an object with what a URI cannot say. Default: its disk's, else the stack's configuration `virtlift:host`. */
  readonly host?: Later<Host>;
};

/** What is known of a machine: its arguments as resolved, all of which preview knows, and what it is like on its host. */
export interface VirtualMachineState extends Omit<Resolved, "origin" | "host" | "name" | "uuid" | "powerState"> {
  /** The host that runs the machine. Known in preview. */
  readonly host: NonNullable<Resolved["host"]>;
  /** The machine's name in libvirt. Known in preview. */
  readonly name: string;
  /** The machine's UUID, also in its SMBIOS. Known in preview; it never changes. */
  readonly uuid: string;
  /** As it was when virtlift last looked. */
  readonly powerState: PowerState;
  /** Addresses at which others can reach it, IPv4 first, as its lease, its agent or its host's neighbour table says; empty when none does. */
  readonly ipAddresses: readonly string[];
  /** What the guest calls itself, as its agent or its lease says; undefined when neither does. */
  readonly hostname: string | undefined;
  /** In the order of `networks`. Known in preview. */
  readonly macAddresses: readonly string[];
  /** Absolute paths on the host: of the boot disk, then of `disks` in their order; empty for a CD-ROM drive that is empty. Known in preview. */
  readonly diskPaths: readonly string[];
  /** The names by which libvirt knows the disks, in that order, then of the seed's drive. Known in preview. */
  readonly diskTargets: readonly string[];
  /** Absolute path, on the host, of the file that keeps what the guest writes to its first serial port. Known in preview. */
  readonly serialLog: string;
  /** Whether the guest runs on older hardware than is declared, until its next start. */
  readonly restartPending: boolean;
  /** Whether the guest showed all that `waitFor` asks for since virtlift started it. */
  readonly ready: boolean;
  /** Absolute paths of the volumes that were made for the machine and are deleted with it. */
  readonly ownVolumes: readonly string[];
}

/** A property that is not named to Pulumi here never becomes an output of the object. */
const OUTPUTS: Readonly<Record<keyof VirtualMachineState, undefined>> = {
  adopt: undefined,
  autostart: undefined,
  ballooning: undefined,
  bootDisk: undefined,
  bus: undefined,
  clock: undefined,
  cloudInit: undefined,
  cpu: undefined,
  cpuPinning: undefined,
  cpuTopology: undefined,
  description: undefined,
  diskPaths: undefined,
  disks: undefined,
  diskTargets: undefined,
  domainType: undefined,
  firmware: undefined,
  graphics: undefined,
  guest: undefined,
  host: undefined,
  hostname: undefined,
  hugepages: undefined,
  hyperv: undefined,
  image: undefined,
  importedDisk: undefined,
  ipAddresses: undefined,
  loader: undefined,
  macAddresses: undefined,
  machine: undefined,
  maxMemoryMiB: undefined,
  maxVcpus: undefined,
  memoryMiB: undefined,
  name: undefined,
  networks: undefined,
  onRestartRequired: undefined,
  onShutdownTimeout: undefined,
  ownVolumes: undefined,
  powerState: undefined,
  preflight: undefined,
  ready: undefined,
  restartPending: undefined,
  rng: undefined,
  secureBoot: undefined,
  serialLog: undefined,
  shutdownTimeoutSeconds: undefined,
  smbios: undefined,
  tags: undefined,
  title: undefined,
  tpm: undefined,
  uuid: undefined,
  vcpus: undefined,
  video: undefined,
  waitFor: undefined,
  watchdog: undefined,
  xmlPatches: undefined,
};

// Pulumi assigns them all in its constructor, and the type of OUTPUTS keeps that list complete.
// oxlint-disable-next-line typescript/no-unsafe-declaration-merging
export interface VirtualMachine extends Outputs<VirtualMachineState> {}

/**
 * A machine of a libvirt host, from a disk that was imported or from a template, owned for its life: what changes in the program changes the
 * machine, live where libvirt can.
 */
export class VirtualMachine extends pulumi.CustomResource {
  constructor(name: string, args: VirtualMachineArgs, options?: pulumi.CustomResourceOptions) {
    const { host, importedDisk, image, disks } = args;
    const properties = {
      ...OUTPUTS,
      ...args,
      host: withSecrets(host) ?? hostOf(importedDisk) ?? hostOf(image),
      importedDisk: withDiskRefs(importedDisk),
      image: withDiskRefs(image),
      disks: withDiskRefs(disks),
      origin: originOf(name),
      __provider: PROVIDER,
    };
    super(TYPE, name, properties, options);
  }
}
