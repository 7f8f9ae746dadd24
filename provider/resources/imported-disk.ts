/** ImportedDisk: a disk of any common format becomes a verified volume in a pool of a libvirt host. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import type { z } from "zod";
import { CommandError, ConnectionError, DiskError, isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { formatBytes, formatSeconds, tellProgress } from "../transfer/progress.ts";
import { importDisk } from "../transfer/import.ts";
import { probe, removeStamp, type Stamp, type VolumeFile } from "../transfer/probe.ts";
import { openSource, type OpenSource } from "../transfer/source.ts";
import { configuredHost, daemonOf, openHost } from "./connect.ts";
import { parseArgs } from "./parse.ts";
import { PoolError, poolFolder, refreshPool } from "./pool.ts";
import type { CheckFailure, Context, PropertyChange, Resource } from "./resource.ts";
import { ImportedDiskSchema } from "./schema.ts";
import { UNKNOWN } from "./unknown.ts";
import { domainsUsing, volumesBackedBy } from "./usage.ts";

type Args = z.output<typeof ImportedDiskSchema>;

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
    const inputs = { ...placed, path: posix.join(await poolFolder(openHost(context, args.host), args.pool), volumeName) };
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
  const { file } = await probe(openHost(context, olds.host), olds.path, olds.importId);
  if (!file || file.stamp?.importId !== olds.importId || file.untouched) return [];
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
  const place = await probe(host, inputs.path, inputs.importId);
  const folder = posix.dirname(inputs.path);
  if (place.file) {
    // Published by an earlier run that did not live to say so.
    if (place.file.stamp?.importId === inputs.importId) return [];
    failures.push({
      property: "name",
      reason: `name: ${inputs.path} exists on ${host.label} and is not overwritten: choose another \`name\`, or remove it`,
    });
  }
  if (place.missingTools.length > 0) {
    failures.push({
      property: "host",
      reason: `host: ${host.label} lacks ${place.missingTools.join(", ")}, which the transfer needs: install coreutils and util-linux`,
    });
  }
  if (place.folder !== "writable") {
    const why = place.folder === "none" ? "does not exist" : `is not writable for ${place.user}`;
    failures.push({
      property: "pool",
      reason: `pool: the folder ${folder} of pool ${inputs.pool} on ${host.label} ${why}: mend it, or log in as somebody who may (\`sudo: true\` on the host)`,
    });
  }
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

async function sourceFailures(
  context: Context,
  source: OpenSource,
  inputs: DiskInputs,
  place: { readonly freeBytes: number | undefined; readonly partBytes: number },
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
  const neededBytes = inputs.layout === "full" ? capacityBytes : Math.min(capacityBytes, await storedBytes(source));
  if (place.freeBytes !== undefined && neededBytes > place.freeBytes + place.partBytes) {
    const reason = `pool: ${posix.dirname(inputs.path)} on ${host.label} has ${formatBytes(place.freeBytes)} free and the disk takes up to ${formatBytes(neededBytes)}: make room, or choose another pool`;
    failures.push({ property: "pool", reason });
  }
  if (failures.length === 0) {
    const wireBytes = inputs.layout === "full" ? capacityBytes : Math.min(capacityBytes, await storedBytes(source));
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
  await refreshPool(host, inputs.pool);
  await libvirt.storageVolLookupByName(await libvirt.storagePoolLookupByName(inputs.pool), inputs.volumeName);
  return { id: inputs.diskId, state: { ...inputs, ...outputs } };
}

type Outputs = Omit<DiskState, keyof DiskInputs>;

async function importOrAdopt(context: Context, host: Host, inputs: DiskInputs): Promise<Outputs> {
  const { file } = await probe(host, inputs.path, inputs.importId);
  const finished = file?.stamp?.importId === inputs.importId ? outputsOf(file.stamp, file) : undefined;
  if (finished) {
    context.log("info", `${inputs.diskId}: ${inputs.path} on ${host.label} was finished by an earlier run`);
    return finished;
  }
  const startedMs = performance.now();
  await using source = await openSource(inputs.source, { checksum: inputs.checksum });
  const virtualSizeBytes = Math.max(inputs.capacity ?? 0, Math.ceil(source.image.virtualSizeBytes / 512) * 512);
  const { importId, origin, provenance, migrationRef, source: from } = inputs;
  const result = await importDisk(host, source, {
    id: importId,
    finalPath: inputs.path,
    format: inputs.format,
    layout: inputs.layout,
    capacityBytes: virtualSizeBytes,
    stamp: (ends) => ({ importId, origin, provenance, migrationRef, source: from, virtualSizeBytes, ...ends }),
    signal: context.signal,
    onProgress: tellProgress(inputs.diskId, (line) => context.log("info", line)),
  });
  const seconds = (performance.now() - startedMs) / 1000;
  const kept = result.keptBytes > 0 ? `, ${formatBytes(result.keptBytes)} were there from an interrupted run` : "";
  context.log(
    "info",
    `${inputs.diskId}: ${formatBytes(virtualSizeBytes)} virtual arrived as ${formatBytes(result.sentBytes)} in ${formatSeconds(seconds)}${kept}; both ends agree on every byte`,
  );
  const { sourceDigest, contentDigest, allocatedBytes } = result;
  return { virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest };
}

/** The outputs of a volume that an earlier run published, from its stamp; undefined when the stamp does not tell them. */
function outputsOf(stamp: Stamp, file: VolumeFile): Outputs | undefined {
  const { virtualSizeBytes, sourceDigest, contentDigest } = stamp as { [key: string]: unknown };
  if (typeof virtualSizeBytes !== "number" || typeof sourceDigest !== "string" || typeof contentDigest !== "string") return undefined;
  return { virtualSizeBytes, allocatedBytes: file.allocatedBytes, sourceDigest, contentDigest };
}

async function read(context: Context, id: string, state: DiskState) {
  const host = openHost(context, state.host);
  const libvirt = await host.libvirt();
  const pool = await libvirt.storagePoolLookupByName(state.pool);
  try {
    await libvirt.storageVolLookupByName(pool, state.volumeName);
    const { file } = await probe(host, state.path, state.importId);
    if (!file) {
      // libvirt remembers the folder as it last saw it: a file removed by hand is gone only when it says so too.
      await refreshPool(host, state.pool);
      await libvirt.storageVolLookupByName(pool, state.volumeName);
    }
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
  return { id, state, inputs: inputsOf(state) };
}

function inputsOf(state: DiskState): DiskInputs {
  const { virtualSizeBytes: _v, allocatedBytes: _a, sourceDigest: _s, contentDigest: _c, ...inputs } = state;
  return inputs;
}

/** Nothing on the host changes: what would change the disk replaces it. */
async function update(_context: Context, _id: string, olds: DiskState, news: DiskInputs): Promise<DiskState> {
  const { virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest } = olds;
  return { ...news, virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest };
}

async function remove(context: Context, _id: string, state: DiskState): Promise<void> {
  const host = openHost(context, state.host);
  if (state.onDelete === "retain") {
    context.log("info", `${state.diskId}: ${state.path} stays on ${host.label}, as \`onDelete: "retain"\` says`);
    return;
  }
  const { file } = await probe(host, state.path, state.importId);
  const libvirt = await host.libvirt();
  if (file) {
    if (file.stamp?.importId !== state.importId) {
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
  await refreshPool(host, state.pool);
  try {
    await libvirt.storageVolDelete(
      await libvirt.storageVolLookupByName(await libvirt.storagePoolLookupByName(state.pool), state.volumeName),
    );
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
  await removeStamp(host, state.path, state.importId);
}
