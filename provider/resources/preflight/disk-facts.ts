/** Everything that the rules about an imported disk look at, gathered from its host, its source, and what the deployment has said so far. Only reads. */
import { posix } from "node:path";
import { DiskError } from "../../errors.ts";
import type { Host } from "../../host/hosts.ts";
import { daemonOf } from "../connect.ts";
import { isAdopted, isFetchedByHost, isReadByHost, previewDeclared, refusalWithoutPrograms, type SourceSettings } from "../disk-source.ts";
import type { DiskInputs } from "../imported-disk.ts";
import type { Place } from "../place.ts";
import { nextPartition } from "../pool.ts";
import type { DeclaredDisk, Deployment } from "./deployment.ts";
import { factsOf, type HostFacts, type HostNature } from "./host-facts.ts";
import type { SourceFacts } from "./source-facts.ts";

/** A disk of the deployment that is not there yet. */
export interface PendingDisk {
  readonly origin: string;
  /** What it still wants of the same file system as the disk that is judged. */
  readonly pendingBytes: number;
}

export interface DiskFacts {
  readonly inputs: DiskInputs;
  readonly host: HostNature;
  readonly place: Place;
  /** Names of the host's machines that use the disk's path. */
  readonly users: readonly string[];
  /** The name that libvirt will give to the next volume, where the pool and not the user gives names; undefined elsewhere. */
  readonly givenName: string | undefined;
  /** Why the source cannot be imported, in place of what it tells. */
  readonly source: SourceFacts | DiskError;
  /** Other disks of this deployment on the same host. */
  readonly siblings: readonly DeclaredDisk[];
  /** Those of them that are not there yet and share its room. */
  readonly pending: readonly PendingDisk[];
}

/** Opens the source, and reads the host. Throws PoolError, LibvirtError or ConnectionError. */
export async function gatherDisk(
  host: Host,
  inputs: DiskInputs,
  deployment: Deployment,
  settings: SourceSettings = {},
): Promise<DiskFacts> {
  const facts = factsOf(host);
  const siblings = deployment.otherDisks({ origin: inputs.origin, daemon: daemonOf(inputs.host) });
  const placing = facts.place(inputs);
  const sourcing = async (): Promise<SourceFacts | DiskError> => {
    const uploadReason = isReadByHost(inputs.source) ? (await placing).uploadReason : undefined;
    return refusalWithoutPrograms(host, inputs, uploadReason) ?? previewDeclared(host, inputs, settings);
  };
  const [nature, place, machines, source, pending] = await Promise.all([
    facts.nature(),
    placing,
    facts.machines(),
    sourcing(),
    pendingDisks(facts, inputs, siblings),
  ]);
  const isNew = place.file === undefined && place.partBytes === 0;
  const isOwnFile = isAdopted(inputs.source) && place.file !== undefined && place.file.stamp?.importId !== inputs.importId;
  return {
    inputs,
    host: nature,
    // What is to be adopted is no other's file in the way, and has its room already.
    place: isOwnFile ? { ...place, file: undefined, partBytes: place.file?.allocatedBytes ?? 0 } : place,
    users: machines.filter(({ diskPaths }) => diskPaths.has(inputs.path)).map(({ name }) => name),
    givenName: place.pool.type === "disk" && isNew ? await nextPartition(host, place.pool) : undefined,
    source,
    siblings,
    pending,
  };
}

/** What is being copied right now counts with what is missing of it only. */
async function pendingDisks(facts: HostFacts, inputs: DiskInputs, siblings: readonly DeclaredDisk[]): Promise<readonly PendingDisk[]> {
  const own = await facts.folder(posix.dirname(inputs.path));
  const pending = siblings.map(async ({ origin, path, importId, neededBytes }): Promise<PendingDisk | undefined> => {
    const folder = posix.dirname(path);
    const there = await facts.folder(folder);
    const isSame = there && own ? there.device === own.device : folder === posix.dirname(inputs.path);
    if (!isSame) return undefined;
    const names = there?.names ?? (await facts.volumeNames(inputs.pool));
    const pendingBytes = names.has(posix.basename(path)) ? 0 : neededBytes - (there?.parts.get(importId) ?? 0);
    return pendingBytes > 0 ? { origin, pendingBytes } : undefined;
  });
  return (await Promise.all(pending)).filter((disk) => disk !== undefined);
}

/** The disk's size as the guest will see it; undefined when the source tells none. */
export function capacityOf({ inputs, source }: Pick<DiskFacts, "inputs" | "source">): number | undefined {
  return source instanceof DiskError ? undefined : Math.max(inputs.capacity ?? 0, source.virtualSizeBytes);
}

/** At most what the disk takes in its pool; 0 when the source tells nothing. */
function volumeBytes(facts: Pick<DiskFacts, "inputs" | "source" | "place">): number {
  const capacityBytes = capacityOf(facts);
  const { inputs, source, place } = facts;
  if (capacityBytes === undefined || source instanceof DiskError) return 0;
  return inputs.layout === "full" || place.pool.isBlock ? capacityBytes : Math.min(capacityBytes, source.dataBytes);
}

/** At most what the pool must have room for while the disk is imported; 0 when the source tells nothing. */
export function neededBytes(facts: Pick<DiskFacts, "inputs" | "source" | "place">): number {
  const { inputs, source } = facts;
  // What the host fetches lies beside the volume until that is published, and so does its content while it is read out.
  const fetchedBytes = isFetchedByHost(inputs.source) && !(source instanceof DiskError) ? source.fileBytes : 0;
  return volumeBytes(facts) * (inputs.verify === "content" ? 2 : 1) + fetchedBytes;
}

/** At most what is sent for it: what is compressed in the source stays so where the layout is. */
export function wireBytes(facts: Pick<DiskFacts, "inputs" | "source" | "place">): number {
  const { inputs, source } = facts;
  const bytes = volumeBytes(facts);
  return inputs.layout === "compressed" && !(source instanceof DiskError) ? Math.min(bytes, source.fileBytes) : bytes;
}

/** The disk as the rules about others see it. */
export function declaredDisk(facts: DiskFacts): DeclaredDisk {
  const { origin, host, path, importId } = facts.inputs;
  const content = facts.source instanceof DiskError ? undefined : facts.source;
  return { origin, daemon: daemonOf(host), path, importId, neededBytes: neededBytes(facts), content };
}
