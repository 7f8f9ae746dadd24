/** Machines that are on the host already and are to become ours: found, taken as they are, and what will change is said. Changes nothing there. */
import { isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_XML } from "../libvirt/constants.ts";
import type { OtherWords } from "../libvirt/domain-others.ts";
import { type ObservedDomain, parseDomain, parseOtherWords, parsePlacement, renderDomain } from "../libvirt/domain.ts";
import type { Domain } from "../libvirt/procedures.ts";
import { tell } from "./preflight/preflight.ts";
import type { Context } from "./resource.ts";
import { bootDiskOf, driftOf, propertiesOf } from "./virtual-machine-drift.ts";
import { powerStateOf } from "./virtual-machine-guest.ts";
import { PlacementError } from "./virtual-machine-host.ts";
import type { VirtualMachineArgs } from "./virtual-machine-schema.ts";
import { definitionOf, domainSpec, type MachineInputs, nameOf } from "./virtual-machine-spec.ts";

/** The properties that stay as they were found where the user says nothing of them. */
export const ADOPTED = [
  "bus",
  "disks",
  "networks",
  "vcpus",
  "maxVcpus",
  "cpuTopology",
  "cpuPinning",
  "memoryMiB",
  "maxMemoryMiB",
  "ballooning",
  "hugepages",
  "machine",
  "firmware",
  "secureBoot",
  "loader",
  "tpm",
  "smbios",
  "cpu",
  "clock",
  "hyperv",
  "graphics",
  "video",
  "rng",
  "watchdog",
  "title",
  "description",
  "domainType",
  "powerState",
  "autostart",
  "serialLog",
] as const satisfies readonly (keyof MachineInputs)[];

/** A machine that is to be adopted. */
export interface Adopted {
  /** As it is defined. */
  readonly xml: string;
  readonly defined: ObservedDomain;
  /** What of it no property knows. */
  readonly others: OtherWords;
  /** Its identity, and the properties of `ADOPTED`. */
  readonly inputs: MachineInputs;
}

/** `given` are the properties that the user says. Throws PlacementError when there is none, it is somebody's, or it has a drive that no property can say. */
export async function findAdopted(host: Host, { adopt, origin }: VirtualMachineArgs, given: readonly string[]): Promise<Adopted> {
  const { uuid, name } = adopt!;
  const libvirt = await host.libvirt();
  let domain: Domain;
  try {
    domain = uuid === undefined ? await libvirt.domainLookupByName(name!) : await libvirt.domainLookupByUUID(uuid);
  } catch (error) {
    if (!isNotFound(error)) throw error;
    const names = (await libvirt.connectListAllDomains()).map((each) => each.name);
    const remedy = names.length > 0 ? `it has ${names.join(", ")}` : "it has none";
    throw new PlacementError("adopt", `there is no machine ${name ?? uuid} on ${host.label}: ${remedy}`);
  }
  const xml = await libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive);
  const defined = parseDomain(xml);
  const owner = defined.metadata?.origin;
  if (owner !== undefined && owner !== origin) {
    throw new PlacementError(
      "adopt",
      `the machine ${defined.name} on ${host.label} belongs to ${owner}: remove it from that program first`,
    );
  }
  const drive = given.includes("disks") ? undefined : unsayableDrive(defined);
  if (drive !== undefined) {
    throw new PlacementError(
      "adopt",
      `the machine ${defined.name} on ${host.label} has ${drive}, which no disk of virtlift's can be: remove it there, or declare \`disks\` without it`,
    );
  }
  const found = {
    ...propertiesOf(defined),
    name: defined.name,
    uuid: defined.uuid,
    domainType: defined.type,
    serialLog: defined.serialLog,
    powerState: await powerStateOf({ libvirt, domain }),
    autostart: await libvirt.domainGetAutostart(domain),
  };
  return { xml, defined, others: parseOtherWords(xml), inputs: found as unknown as MachineInputs };
}

/** A drive besides the boot disk that is neither a disk nor a CD-ROM, or on a bus that our disks are never on. */
function unsayableDrive(defined: ObservedDomain): string | undefined {
  const bootDisk = bootDiskOf(defined);
  const drive = defined.disks.find(
    (disk) => disk !== bootDisk && (!["disk", "cdrom"].includes(disk.device) || !["virtio", "sata", "scsi", "ide"].includes(disk.bus)),
  );
  return drive && `a ${drive.device} ${drive.target} on ${drive.bus}`;
}

/**
 * Throws PlacementError when libvirt refuses the definition that the machine is to get, and takes the one that it has: something of it does not fit what
 * is declared. What libvirt refuses either way, or cannot tell, says nothing of the adoption.
 */
export async function assertAdoptable(host: Host, inputs: MachineInputs, { xml, defined }: Adopted): Promise<void> {
  const libvirt = await host.libvirt();
  const refusal = await refusalOf(libvirt, renderDomain(domainSpec(inputs, []), parsePlacement(xml, inputs.xmlPatches)));
  if (refusal === undefined || (await refusalOf(libvirt, xml)) !== undefined) return;
  throw new PlacementError(
    "adopt",
    `the machine ${defined.name} on ${host.label} has what cannot be kept beside the declared properties, as libvirt says (${refusal.message}): remove it there, or leave the properties out`,
  );
}

/** Why libvirt would not define the machine; undefined when it would. Nothing is changed. */
async function refusalOf(libvirt: Libvirt, xml: string): Promise<LibvirtError | undefined> {
  try {
    await libvirt.connectDomainXMLToNative("qemu-argv", xml);
    return undefined;
  } catch (error) {
    if (!(error instanceof LibvirtError)) throw error;
    return error;
  }
}

/** Says what adoption changes of the machine as it is defined, a line for each property; what a running guest cannot take comes at its next start. */
export function tellAdoption(context: Context, inputs: MachineInputs, { defined, others }: Adopted): void {
  const drift = Object.entries(driftOf(inputs, defined, { isSnapshot: () => false, sizes: new Map() }));
  const say = (line: string): void => tell(context, "info", `${nameOf(inputs.origin)}: ${line}`);
  say(`the machine ${defined.name} (${defined.uuid}) is adopted and not restarted`);
  if (others.staying.length > 0) say(`adoption leaves alone what no property knows: ${others.staying.join(", ")}`);
  if (others.going.length > 0) {
    say(`adoption takes out of the definition, unless \`xmlPatches\` say it: ${others.going.join(", ")}`);
  }
  const defaulted = propertiesOf(definitionOf(domainSpec(inputs, [])));
  for (const [name, value] of drift) {
    const property = name as keyof MachineInputs;
    const inWords = (each: unknown): string => JSON.stringify(each) ?? "none";
    // A default that the property's words leave out is said.
    const to = inWords(inputs[property]) === inWords(value) ? defaulted[property] : inputs[property];
    say(`adoption changes ${property} from ${inWords(value)} to ${inWords(to)}`);
  }
}
