/** ImportedDisk: a disk of any common format becomes a verified volume in a pool of a libvirt host. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import type { z } from "zod";
import { CommandError, ConnectionError, DiskError, isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { formatBytes, formatSaving, formatSeconds, tellProgress } from "../transfer/progress.ts";
import { importDisk } from "../transfer/import.ts";
import { removeStamp, type Stamp, type VolumeFile } from "../transfer/probe.ts";
import { openSource, type OpenSource } from "../transfer/source.ts";
import { refreshPool } from "../transfer/volume.ts";
import { configuredHost, daemonOf, openHost } from "./connect.ts";
import { parseArgs } from "./parse.ts";
import { lookAtPlace, type Place } from "./place.ts";
import { activePool, nextPartition, PoolError } from "./pool.ts";
import type { CheckFailure, Context, PropertyChange, Resource } from "./resource.ts";
import { ImportedDiskSchema } from "./schema.ts";
import { UNKNOWN } from "./unknown.ts";
import { domainsUsing, volumesBackedBy } from "./usage.ts";

type Args = z.output<typeof ImportedDiskSchema>;

/** Since libvirt 6.7.0 a sparse stream may end in a device. Source: libvirt's NEWS. */
const SPARSE_DEVICES_VERSION = 6_007_000;

/** What check makes of the arguments: known in preview, so that a machine sees its disk before it exists. */
export interface DiskInputs extends Args {
  /** Hash of what decides which bytes lie where: another declaration is another disk. */
  readonly declaration: string;
  /** Identity of the import on the host: of the resource and its declaration. */
  readonly importId: string;
  /** The volume's name without its extension. */
  readonly diskId: string;
  readonly volumeName: string;
  /** Absolute path on the host. */
  readonly path: string;
}

export interface DiskState extends DiskInputs {
  readonly virtualSizeBytes: number;
  /** Allocated when it was imported. */
  readonly allocatedBytes: number;
  /** `sha256:<hex>` of the source file. */
  readonly sourceDigest: string;
  /** `sha256:<hex>` of the volume as published: a raw one whole, a qcow2 from its second cluster on. */
  readonly contentDigest: string;
  /** What was proved when it was imported; absent in states of disks that were imported before that could be chosen: `digest`. */
  readonly verified?: "digest" | "content";
  /** Set where the bytes went through libvirt's upload stream: a raw volume then carries no stamp. */
  readonly isUploaded?: true | undefined;
}

/** The keys whose change makes another disk. */
const DECLARATION_KEYS = ["host", "source", "pool", "name", "format", "layout", "capacity"] as const;

/** Every key of the inputs and what its change takes. The disk itself never changes: what would make another one replaces it. */
export const DISK_CHANGES: Readonly<Record<keyof DiskInputs, "live" | "replace">> = {
  host: "live",
  source: "replace",
  pool: "replace",
  name: "replace",
  format: "replace",
  layout: "replace",
  capacity: "replace",
  checksum: "live",
  verify: "live",
  provenance: "live",
  migrationRef: "live",
  onDelete: "live",
  replaceWritten: "live",
  origin: "live",
  declaration: "replace",
  importId: "replace",
  diskId: "replace",
  volumeName: "replace",
  path: "replace",
};

export const importedDisk: Resource<DiskInputs, DiskState> = { check, diff, create, read, update, delete: remove };

async function check(context: Context, olds: DiskInputs | undefined, declared: unknown) {
  const news: Record<string, unknown> = { ...(declared as Record<string, unknown>) };
  news["host"] ??= configuredHost(context);
  const { args, failures, unknown } = parseArgs(ImportedDiskSchema, news);
  if (news["host"] === undefined) {
    return {
      inputs: news as never,
      failures: [{ property: "host", reason: "host: give a libvirt URI, here or as the stack's configuration virtlift:host" }],
    };
  }
  if (!args) return { inputs: (unknown.size > 0 ? { ...news, ...unknownIdentity } : news) as never, failures };

  const declaration = declarationOf(args);
  // The source of a disk that was imported is history: only another declaration makes it read again.
  if (olds?.declaration === declaration) return { inputs: { ...args, ...identityOf(olds) }, failures: [] };
  const diskId = args.name ?? `${fileName(args.origin)}-${declaration.slice(0, 8)}`;
  if (olds && olds.diskId === diskId && olds.pool === args.pool && daemonOf(olds.host) === daemonOf(args.host)) {
    const reason = `name: ${diskId} was imported from another declaration, which is never overwritten: give the changed disk another \`name\``;
    return { inputs: { ...args, ...identityOf(olds) }, failures: [{ property: "name", reason }] };
  }
  const volumeName = `${diskId}.${args.format}`;
  const importId = hash(JSON.stringify([args.origin, declaration])).slice(0, 32);
  const placed: DiskInputs = { ...args, declaration, importId, diskId, volumeName, path: `/${volumeName}` };
  try {
    const pool = await activePool(openHost(context, args.host), args.pool);
    // Partitions and logical volumes have names without endings.
    const nameThere = pool.isBlock ? diskId : volumeName;
    const inputs = { ...placed, volumeName: nameThere, path: posix.join(pool.path, nameThere) };
    return {
      inputs,
      failures: [...(olds ? await replacementFailures(context, olds, args) : []), ...(await placementFailures(context, inputs))],
    };
  } catch (error) {
    return { inputs: placed, failures: [failureOf(error)] };
  }
}

const unknownIdentity = { declaration: UNKNOWN, importId: UNKNOWN, diskId: UNKNOWN, volumeName: UNKNOWN, path: UNKNOWN };

function identityOf({ declaration, importId, diskId, volumeName, path }: DiskInputs) {
  return { declaration, importId, diskId, volumeName, path };
}

function declarationOf(args: Args): string {
  return hash(JSON.stringify(DECLARATION_KEYS.map((key) => (key === "host" ? daemonOf(args.host) : (args[key] ?? null)))));
}

function hash(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}

/** The logical name as part of a file's name. */
function fileName(origin: string): string {
  const logicalName = origin.split("/").slice(3).join("/");
  return (
    logicalName
      .replaceAll(/[^A-Za-z0-9._+-]+/g, "-")
      .replace(/^[^A-Za-z0-9]+/, "")
      .slice(0, 150) || "disk"
  );
}

/** What a user can mend, as a failure of the property that shows it; anything else is thrown on. */
function failureOf(error: unknown): CheckFailure {
  if (error instanceof DiskError) return { property: "source", reason: `source: ${error.message}` };
  if (error instanceof PoolError) return { property: "pool", reason: `pool: ${error.message}` };
  if (error instanceof ConnectionError || error instanceof CommandError || error instanceof LibvirtError)
    return { property: "host", reason: `host: ${error.message}` };
  throw error;
}

/** Whether the disk that a changed declaration would replace may go: not when a guest has written to it. */
async function replacementFailures(context: Context, olds: DiskInputs, args: Args): Promise<readonly CheckFailure[]> {
  if (args.replaceWritten) return [];
  const { file } = await lookAtPlace(openHost(context, olds.host), olds);
  // The inputs do not tell whether a raw volume without a stamp came by an upload: it may have.
  if (!file || !isOurs(file, { ...olds, isUploaded: true }) || file.untouched) return [];
  const changed = DECLARATION_KEYS.filter((key) => JSON.stringify(olds[key]) !== JSON.stringify(args[key]));
  const property = changed[0] ?? "source";
  const reason =
    `${property}: ${olds.path} was written since its import, and a changed ${changed.join(", ")} would replace it by a fresh copy of the source: ` +
    "undo the change, or set `replaceWritten: true` to let what was written go";
  return [{ property, reason }];
}

/** Everything that would stop the import, found without moving a byte. */
async function placementFailures(context: Context, inputs: DiskInputs): Promise<readonly CheckFailure[]> {
  const host = openHost(context, inputs.host);
  const failures: CheckFailure[] = [];
  const place = await lookAtPlace(host, inputs);
  if (place.file) {
    // Published by an earlier run that did not live to say so.
    if (place.file.stamp?.importId === inputs.importId) return [];
    failures.push({
      property: "name",
      reason: `name: ${inputs.path} exists on ${host.label} and is not overwritten: choose another \`name\`, or remove it`,
    });
  }
  if (place.uploadReason !== undefined) failures.push(...(await uploadFailures(context, host, inputs, place)));
  for (const domain of await domainsUsing(await host.libvirt(), inputs.path)) {
    failures.push({
      property: "name",
      reason: `name: the machine ${domain} on ${host.label} uses ${inputs.path}: choose another \`name\``,
    });
  }
  try {
    await using source = await openSource(inputs.source, { checksum: inputs.checksum });
    failures.push(...(await sourceFailures(context, source, inputs, place, host)));
  } catch (error) {
    failures.push(failureOf(error));
  }
  return failures;
}

/** What stops an upload through libvirt; says why that way is taken. */
async function uploadFailures(context: Context, host: Host, inputs: DiskInputs, place: Place): Promise<readonly CheckFailure[]> {
  const failures: CheckFailure[] = [];
  const { pool } = place;
  if (pool.isBlock) {
    const where = `the volumes of pool ${pool.name} on ${host.label} are devices`;
    if (inputs.format !== "raw") {
      failures.push({
        property: "format",
        reason: `format: ${where}, which hold a raw disk: set \`format: "raw"\`, or choose another pool`,
      });
    }
    if ((await (await host.libvirt()).connectGetLibVersion()) < SPARSE_DEVICES_VERSION) {
      failures.push({ property: "pool", reason: `pool: ${where}, and libvirt there is older than 6.7: update it, or choose another pool` });
    }
  }
  if (inputs.verify === "content") {
    const reason = `verify: the content is read by a program on ${host.label}, and none may run, since ${place.uploadReason}: leave out \`verify\`; all is read back through libvirt anyway`;
    failures.push({ property: "verify", reason });
  }
  const isNew = place.file === undefined && place.partBytes === 0;
  const partition = pool.type === "disk" && isNew ? await nextPartition(host, pool) : inputs.volumeName;
  if (partition !== inputs.volumeName) {
    const reason = `name: a volume of the disk pool ${pool.name} on ${host.label} has its partition's name, and the next one is ${partition}: set \`name: "${partition}"\``;
    failures.push({ property: "name", reason });
  }
  if (failures.length === 0) {
    const stampless =
      inputs.format === "raw" ? "; a raw volume then carries no stamp, and is known as ours by the stack's state alone" : "";
    context.log(
      "info",
      `${inputs.diskId}: goes through libvirt's upload stream, since ${place.uploadReason}; all is read back to be compared${stampless}`,
    );
  }
  return failures;
}

async function sourceFailures(
  context: Context,
  source: OpenSource,
  inputs: DiskInputs,
  place: Place,
  host: Host,
): Promise<readonly CheckFailure[]> {
  const failures: CheckFailure[] = [];
  const { image } = source;
  if (inputs.layout === "compressed" && inputs.format === "raw") {
    failures.push({ property: "layout", reason: "layout: a raw volume cannot be compressed: choose the format qcow2, or another layout" });
  }
  if (inputs.capacity !== undefined && inputs.capacity < image.virtualSizeBytes) {
    const reason = `capacity: ${formatBytes(inputs.capacity)} is less than the source's ${formatBytes(image.virtualSizeBytes)}, and a disk is never cut: give at least ${image.virtualSizeBytes} bytes`;
    failures.push({ property: "capacity", reason });
  }
  const capacityBytes = Math.max(inputs.capacity ?? 0, image.virtualSizeBytes);
  const isWhole = inputs.layout === "full" || place.pool.isBlock;
  const volumeBytes = isWhole ? capacityBytes : Math.min(capacityBytes, await storedBytes(source));
  const neededBytes = inputs.verify === "content" ? volumeBytes * 2 : volumeBytes;
  if (place.freeBytes !== undefined && neededBytes > place.freeBytes + place.partBytes) {
    const reason = `pool: ${posix.dirname(inputs.path)} on ${host.label} has ${formatBytes(place.freeBytes)} free and the disk takes up to ${formatBytes(neededBytes)}: make room, or choose another pool`;
    failures.push({ property: "pool", reason });
  }
  if (failures.length === 0) {
    const wireBytes = isWhole ? capacityBytes : Math.min(capacityBytes, await storedBytes(source));
    const { format, variant } = image;
    context.log(
      "info",
      `${inputs.diskId}: ${source.path} (${format} ${variant}, ${formatBytes(image.virtualSizeBytes)} virtual) -> ${host.label}:${inputs.path}, at most ${formatBytes(wireBytes)} to send`,
    );
    for (const note of source.notes) context.log("info", `${inputs.diskId}: ${note}`);
  }
  return failures;
}

/** An upper bound of the guest data that a source holds. */
async function storedBytes(source: OpenSource): Promise<number> {
  const onDisk = source.files.reduce((sum, file) => sum + file.allocatedBytes, 0);
  const { dataBytes } = await source.runs();
  // Plain data cannot be more than what the files occupy, holes left out.
  return source.image.format === "raw" ? Math.min(dataBytes, onDisk) : dataBytes;
}

async function diff(
  _context: Context,
  _id: string,
  olds: DiskState,
  news: DiskInputs,
): Promise<{ readonly changes: readonly PropertyChange[] }> {
  const replaces = olds.declaration !== news.declaration && news.declaration !== UNKNOWN;
  const changes = (Object.keys(DISK_CHANGES) as (keyof DiskInputs)[])
    .filter((key) => JSON.stringify(olds[key]) !== JSON.stringify(news[key]))
    .map((property): PropertyChange => {
      const effect = replaces && (DISK_CHANGES[property] === "replace" || property === "host") ? "replace" : "live";
      return { property, effect, ...(effect === "replace" && { why: "another declaration makes another disk" }) };
    });
  return { changes };
}

async function create(context: Context, inputs: DiskInputs) {
  const host = openHost(context, inputs.host);
  const libvirt = await host.libvirt();
  const [user] = await domainsUsing(libvirt, inputs.path);
  if (user !== undefined)
    throw new DiskError(`the machine ${user} on ${host.label} uses ${inputs.path}: nothing is imported there`, {
      step: "publish",
      path: inputs.path,
    });
  const outputs = await importOrAdopt(context, host, inputs);
  await libvirt.storageVolLookupByName(await refreshPool(libvirt, inputs.pool), inputs.volumeName);
  return { id: inputs.diskId, state: { ...inputs, ...outputs } };
}

type Outputs = Omit<DiskState, keyof DiskInputs>;

async function importOrAdopt(context: Context, host: Host, inputs: DiskInputs): Promise<Outputs> {
  const { file, pool, uploadReason } = await lookAtPlace(host, inputs);
  const finished = file?.stamp?.importId === inputs.importId ? outputsOf(file.stamp, file) : undefined;
  if (finished) {
    context.log("info", `${inputs.diskId}: ${inputs.path} on ${host.label} was finished by an earlier run`);
    return finished;
  }
  const startedMs = performance.now();
  await using source = await openSource(inputs.source, { checksum: inputs.checksum });
  const virtualSizeBytes = Math.max(inputs.capacity ?? 0, Math.ceil(source.image.virtualSizeBytes / 512) * 512);
  const { importId, origin, provenance, migrationRef, source: from, verify: verified } = inputs;
  const result = await importDisk(host, source, {
    id: importId,
    finalPath: inputs.path,
    format: inputs.format,
    layout: inputs.layout,
    capacityBytes: virtualSizeBytes,
    verify: verified,
    stamp: (ends) => ({ importId, origin, provenance, migrationRef, source: from, virtualSizeBytes, verified, ...ends }),
    signal: context.signal,
    upload: uploadReason === undefined ? undefined : { pool: pool.name, isBlock: pool.isBlock },
    onProgress: tellProgress(inputs.diskId, (line) => context.log("info", line)),
  });
  const seconds = (performance.now() - startedMs) / 1000;
  const agreed = verified === "content" ? "its content is the source's, block by block" : "both ends agree on every byte";
  const kept = result.keptBytes > 0 ? `, ${formatBytes(result.keptBytes)} were there from an interrupted run` : "";
  context.log(
    "info",
    `${inputs.diskId}: ${formatBytes(virtualSizeBytes)} virtual arrived as ${formatBytes(result.sentBytes)} on the wire (${formatSaving(result.sentBytes, virtualSizeBytes)}) in ${formatSeconds(seconds)}${kept}; ${agreed}`,
  );
  const { sourceDigest, contentDigest, allocatedBytes } = result;
  return {
    virtualSizeBytes,
    allocatedBytes,
    sourceDigest,
    contentDigest,
    verified,
    ...(uploadReason !== undefined && { isUploaded: true }),
  };
}

/** The outputs of a volume that an earlier run published, from its stamp; undefined when the stamp does not tell them. */
function outputsOf(stamp: Stamp, file: VolumeFile): Outputs | undefined {
  const { virtualSizeBytes, sourceDigest, contentDigest } = stamp as { [key: string]: unknown };
  if (typeof virtualSizeBytes !== "number" || typeof sourceDigest !== "string" || typeof contentDigest !== "string") return undefined;
  const verified = stamp["verified"] === "content" ? "content" : "digest";
  return { virtualSizeBytes, allocatedBytes: file.allocatedBytes, sourceDigest, contentDigest, verified };
}

async function read(context: Context, id: string, state: DiskState) {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const pool = await libvirt.storagePoolLookupByName(state.pool);
  try {
    await libvirt.storageVolLookupByName(pool, state.volumeName);
    const { file } = await lookAtPlace(host, state);
    if (!file) {
      // libvirt remembers the folder as it last saw it: a file removed by hand is gone only when it says so too.
      await libvirt.storageVolLookupByName(await refreshPool(libvirt, state.pool), state.volumeName);
    }
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
  return { id, state, inputs: inputsOf(state) };
}

function inputsOf(state: DiskState): DiskInputs {
  const { virtualSizeBytes: _v, allocatedBytes: _a, sourceDigest: _s, contentDigest: _c, isUploaded: _u, ...inputs } = state;
  return inputs;
}

/** Nothing on the host changes: what would change the disk replaces it. */
async function update(_context: Context, _id: string, olds: DiskState, news: DiskInputs): Promise<DiskState> {
  const { virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest, isUploaded } = olds;
  return { ...news, virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest, isUploaded };
}

async function remove(context: Context, _id: string, state: DiskState): Promise<void> {
  const host = openHost(context, state.host);
  if (state.onDelete === "retain") {
    context.log("info", `${state.diskId}: ${state.path} stays on ${host.label}, as \`onDelete: "retain"\` says`);
    return;
  }
  const { file, uploadReason } = await lookAtPlace(host, state);
  const libvirt = await host.libvirt();
  if (file) {
    if (!isOurs(file, state)) {
      throw new DiskError(
        `${state.path} on ${host.label} is not the disk that was imported there and is not deleted: remove it by hand, or run pulumi state delete`,
        {
          step: "publish",
          path: state.path,
        },
      );
    }
    const users = [...(await domainsUsing(libvirt, state.path)), ...(await volumesBackedBy(libvirt, state.pool, state.path))];
    if (users.length > 0) {
      throw new DiskError(
        `${state.path} on ${host.label} is in use by ${users.join(", ")} and is not deleted: remove them first, or set \`onDelete: "retain"\``,
        {
          step: "publish",
          path: state.path,
        },
      );
    }
  }
  const pool = await refreshPool(libvirt, state.pool);
  try {
    await libvirt.storageVolDelete(await libvirt.storageVolLookupByName(pool, state.volumeName));
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
  if (uploadReason === undefined) await removeStamp(host, state.path, state.importId);
}

/** Whether a volume is the one that was imported: by its stamp, or by the state where a raw one could not get any. */
function isOurs(file: VolumeFile, state: Pick<DiskState, "importId" | "format" | "isUploaded">): boolean {
  if (file.stamp !== undefined) return file.stamp.importId === state.importId;
  return state.isUploaded === true && state.format === "raw";
}
