/** Machines that are on the host already and are to become ours: found, taken as they are, and what will change is said. Changes nothing there. */
import { isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { DOMAIN_XML } from "../libvirt/constants.ts";
import type { OtherWords } from "../libvirt/domain-others.ts";
import { type ObservedDomain, parseDomain, parseOtherWords } from "../libvirt/domain.ts";
import type { Domain } from "../libvirt/procedures.ts";
import { tell } from "./preflight/preflight.ts";
import type { Context } from "./resource.ts";
import { driftOf, propertiesOf } from "./virtual-machine-drift.ts";
import { powerStateOf } from "./virtual-machine-guest.ts";
import { PlacementError } from "./virtual-machine-host.ts";
import type { VirtualMachineArgs } from "./virtual-machine-schema.ts";
import { type MachineInputs, nameOf } from "./virtual-machine-spec.ts";

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
  readonly defined: ObservedDomain;
  /** What of it no property knows. */
  readonly others: OtherWords;
  /** Its identity, and the properties of `ADOPTED`. */
  readonly inputs: MachineInputs;
}

/** Throws PlacementError when there is none, or it is somebody's. */
export async function findAdopted(host: Host, { adopt, origin }: VirtualMachineArgs): Promise<Adopted> {
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
  const found = {
    ...propertiesOf(defined),
    name: defined.name,
    uuid: defined.uuid,
    domainType: defined.type,
    serialLog: defined.serialLog,
    powerState: await powerStateOf({ libvirt, domain }),
    autostart: await libvirt.domainGetAutostart(domain),
  };
  return { defined, others: parseOtherWords(xml), inputs: found as unknown as MachineInputs };
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
  for (const [property, value] of drift) {
    say(
      `adoption changes ${property} from ${JSON.stringify(value) ?? "none"} to ${JSON.stringify(inputs[property as keyof MachineInputs]) ?? "none"}`,
    );
  }
}
