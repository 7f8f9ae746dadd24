/** Everything that the rules about a machine look at, gathered from its host and from what the deployment has said so far. Only reads. */
import { posix } from "node:path";
import { isNotFound } from "../../errors.ts";
import type { Host } from "../../host/hosts.ts";
import type { MachineOffer } from "../../libvirt/capabilities.ts";
import type { Libvirt } from "../../libvirt/client.ts";
import type { MachineMetadata } from "../../libvirt/domain.ts";
import { daemonOf } from "../connect.ts";
import { type MachineInputs, ownVolumes } from "../virtual-machine-spec.ts";
import type { DeclaredMachine, Deployment } from "./deployment.ts";
import {
  factsOf,
  type HostFacts,
  type HostFolder,
  type HostMachine,
  type HostNature,
  type HostNetwork,
  type HostSystem,
} from "./host-facts.ts";
import type { GuestTraits } from "./source-facts.ts";

export interface MachineFacts {
  readonly inputs: MachineInputs;
  readonly host: HostNature;
  /** Undefined where the host gives no shell. */
  readonly system: HostSystem | undefined;
  /** What the host offers to machines of this type; undefined where libvirt cannot tell. */
  readonly offer: MachineOffer | "unsupported" | undefined;
  /** Features of the CPU model that the host lacks; none for an emulated machine, which goes without. */
  readonly cpuGaps: readonly string[];
  readonly networks: readonly HostNetwork[];
  /** Of the networks whose interfaces are to have VLAN tags, those that take them on whatever version of libvirt. */
  readonly vlanNetworks: ReadonlySet<string>;
  /** The base of its overlay is not there, and no disk of this deployment comes there. */
  readonly isTemplateMissing: boolean;
  /** The machine itself, where this deployment's state does not know it and another one's does. */
  readonly ofOtherState: HostMachine | undefined;
  /** What stands in place of the machine that this state knows, and is not it. */
  readonly stranger: HostMachine | undefined;
  /** The host's other machines. */
  readonly neighbours: readonly HostMachine[];
  /** Of the volumes that are to be made for the machine: those that are there already and are not its own. */
  readonly takenVolumes: ReadonlySet<string>;
  /** The folders of its disks, as far as they are there. */
  readonly folders: readonly HostFolder[];
  /** The other machines of this deployment on the same host. */
  readonly siblings: readonly DeclaredMachine[];
  /** What the bytes tell of the disk that it boots from; undefined when they were not read in this deployment. */
  readonly boot: GuestTraits | undefined;
}

/** How long after its making a machine is still taken for that of an engine which was killed before it kept the answer. */
const TAKEOVER_MS = 15 * 60 * 1000;

/**
 * Whether a machine by this origin that no state of ours knows was made for good: by another checkout with a state of its own, or by one whose state was
 * lost. Its owner is then said by the user, with `adopt`.
 */
export function isOfOtherState(origin: string, metadata: MachineMetadata | undefined): boolean {
  if (metadata?.origin !== origin || metadata.finished === undefined) return false;
  return !(Math.abs(Date.now() - Date.parse(metadata.finished)) < TAKEOVER_MS);
}

/**
 * Whether a machine that has the UUID of ours is not ours: it was made for another, or, without a mark, by somebody else; the latter is ours with the
 * user's consent. `origins` are those that ours may bear.
 */
export function isStranger(
  metadata: MachineMetadata | undefined,
  { origins, hasConsent }: { readonly origins: readonly string[]; readonly hasConsent: boolean },
): boolean {
  return metadata === undefined ? !hasConsent : !origins.includes(metadata.origin);
}

/**
 * `ownUuid` is the machine's, when it was made by us before or is adopted: it is no neighbour of itself. `madeFor` is the origin that it was made for;
 * undefined when this state does not know it. Throws what the host throws.
 */
export async function gatherMachine(
  host: Host,
  inputs: MachineInputs,
  {
    deployment,
    ownUuid,
    madeFor,
  }: { readonly deployment: Deployment; readonly ownUuid: string | undefined; readonly madeFor?: string | undefined },
): Promise<MachineFacts> {
  const facts = factsOf(host);
  const daemon = daemonOf(inputs.host);
  const isOwn = ({ uuid, metadata }: HostMachine): boolean => uuid === ownUuid || metadata?.origin === inputs.origin;
  const [nature, system, offer, cpuGaps, networks, machines, folders] = await Promise.all([
    facts.nature(),
    facts.system(),
    facts.offer(inputs.machine, inputs.domainType),
    inputs.domainType === "kvm" && inputs.cpu?.model !== undefined ? facts.cpuGaps(inputs.machine, "kvm", inputs.cpu) : [],
    facts.networks(),
    facts.machines(),
    Promise.all(
      [...new Set(inputs.diskPaths.filter((path) => path !== "").map((path) => posix.dirname(path)))].map((folder) => facts.folder(folder)),
    ),
  ]);
  const tagged = inputs.networks.flatMap(({ network, vlan }) => (network !== undefined && vlan ? [network] : []));
  const takesVlan = await Promise.all(tagged.map((network) => facts.takesVlan(network)));
  const known = machines.filter(isOwn).flatMap(({ metadata }) => metadata?.volumes.map(({ path }) => path) ?? []);
  const wanted = ownVolumes(inputs).filter(({ path }) => !known.includes(path));
  return {
    inputs,
    host: nature,
    system,
    offer,
    cpuGaps,
    networks,
    vlanNetworks: new Set(tagged.filter((_, index) => takesVlan[index])),
    isTemplateMissing: await isTemplateMissing(facts, inputs, deployment),
    ofOtherState:
      ownUuid === undefined
        ? machines.find(({ uuid, metadata }) => uuid === inputs.uuid && isOfOtherState(inputs.origin, metadata))
        : undefined,
    stranger:
      madeFor === undefined
        ? undefined
        : machines.find(
            ({ uuid, metadata }) =>
              uuid === ownUuid && isStranger(metadata, { origins: [madeFor, inputs.origin], hasConsent: inputs.adopt !== undefined }),
          ),
    neighbours: machines.filter((machine) => !isOwn(machine)),
    takenVolumes: await existing(
      await host.libvirt(),
      wanted.map(({ path }) => path),
    ),
    folders: folders.filter((folder) => folder !== undefined),
    siblings: deployment.otherMachines({ origin: inputs.origin, daemon }),
    boot: deployment.contentAt(daemon, inputs.diskPaths[0] ?? ""),
  };
}

async function isTemplateMissing(facts: HostFacts, { origin, host, image }: MachineInputs, deployment: Deployment): Promise<boolean> {
  if (image?.mode !== "overlay") return false;
  const { path } = image.template;
  const folder = await facts.folder(posix.dirname(path));
  return (
    folder !== undefined && !folder.names.has(posix.basename(path)) && !deployment.isDiskComing(path, { origin, daemon: daemonOf(host) })
  );
}

/** The machine as the rules about others see it. */
export function declaredMachine(inputs: MachineInputs): DeclaredMachine {
  const { origin, name, uuid, macAddresses, memoryMiB, powerState } = inputs;
  return {
    origin,
    daemon: daemonOf(inputs.host),
    name,
    uuid,
    macs: macAddresses,
    writablePaths: inputs.diskPaths.filter((_, index) => isWritable(inputs, index)),
    memoryMiB,
    isRunning: powerState !== "stopped",
  };
}

/** Whether the guest writes to the disk at `index` of `diskPaths`, the boot disk first, as if it were alone: not when it is declared shareable. */
export function isWritable(inputs: MachineInputs, index: number): boolean {
  const further = inputs.disks[index - 1];
  return !further?.readOnly && further?.device !== "cdrom" && further?.shareable !== true;
}

async function existing(libvirt: Libvirt, paths: readonly string[]): Promise<ReadonlySet<string>> {
  const found = await Promise.all(
    paths.map(async (path) => {
      try {
        return [(await libvirt.storageVolLookupByPath(path)).key];
      } catch (error) {
        if (isNotFound(error)) return [];
        throw error;
      }
    }),
  );
  return new Set(found.flat());
}
