/** ImportedDisk: a disk of any common format becomes a verified volume in a pool of a libvirt host. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import type { z } from "zod";
import { DiskError, isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { formatArrival, formatBytes, formatSeconds, tellProgress } from "../transfer/progress.ts";
import { importInProcess } from "../transfer/import-process.ts";
import { capacityOf, type ImportResult } from "../transfer/import.ts";
import { removeLeftover } from "../transfer/leftovers.ts";
import { WORK_FOLDER } from "../transfer/part-file.ts";
import { removeStamp, type Stamp, type VolumeFile } from "../transfer/probe.ts";
import { adoptOnHost, releaseOnHost } from "../transfer/adopt.ts";
import { type HostImportOptions, importOnHost } from "../transfer/on-host.ts";
import { refreshPool } from "../transfer/volume.ts";
import { configuredHost, daemonOf, openHost } from "./connect.ts";
import {
  adoptedName,
  isAdopted,
  type HostRead,
  isReadByHost,
  openOnHost,
  publicSource,
  refusalWithoutPrograms,
  sourceIdentity,
  type SourceSettings,
} from "./disk-source.ts";
import { parseArgs } from "./parse.ts";
import { lookAtPlace } from "./place.ts";
import { machinesReaching } from "./file-users.ts";
import { assertHome, type Home, homeOf } from "./home.ts";
import { ARGUMENT_RULES, HOST_RULES } from "./preflight/argument-rules.ts";
import { DISK_CHANGE_RULES, type DiskChange } from "./preflight/change-rules.ts";
import { deploymentOf } from "./preflight/deployment.ts";
import { declaredDisk, type DiskFacts, gatherDisk, wireBytes } from "./preflight/disk-facts.ts";
import { describeCopy, DISK_RULES, takenRefusal } from "./preflight/disk-rules.ts";
import { changing, factsOf } from "./preflight/host-facts.ts";
import { conclude, judgeTrouble, settingsOf, type Subject, tell } from "./preflight/preflight.ts";
import { judge } from "./preflight/rule.ts";
import { type GuestTraits, traitsOf } from "./preflight/source-facts.ts";
import type { Context, PropertyChange, Resource } from "./resource.ts";
import { activePool } from "./pool.ts";
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
  /** What its source told of the guest when it was declared, for a machine that is made or changed later; absent where it told nothing. */
  readonly guest?: GuestTraits | undefined;
}

export interface DiskState extends DiskInputs, Home {
  readonly virtualSizeBytes: number;
  /** Allocated when it was imported. */
  readonly allocatedBytes: number;
  /** As `ImportResult.sourceDigest`. */
  readonly sourceDigest: string;
  /** As `ImportResult.contentDigest`. */
  readonly contentDigest: string;
  /** What was proved when it was imported; absent in states of disks that were imported before that could be chosen: `digest`. */
  readonly verified?: "digest" | "content";
  /** Set where the bytes went through libvirt's upload stream: a raw volume then carries no stamp. */
  readonly isUploaded?: true | undefined;
  /** As `ImportResult.importedAt`, of what was uploaded: its volume was never written before. Absent in older states. */
  readonly uploadedAt?: number | undefined;
  /** Where the file system of its folder was mounted when it was imported; undefined where nobody could tell. */
  readonly mountPoint?: string | undefined;
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
  preflight: "live",
  origin: "live",
  declaration: "replace",
  importId: "replace",
  diskId: "replace",
  volumeName: "replace",
  path: "replace",
  guest: "live",
};

export const importedDisk: Resource<DiskInputs, DiskState> = {
  check,
  diff,
  create: (context, inputs) => changing(openHost(context, inputs.host), () => create(context, inputs)),
  read,
  update,
  delete: (context, id, state) => changing(openHost(context, state.host), () => remove(context, id, state)),
};

async function check(context: Context, olds: DiskInputs | undefined, declared: unknown) {
  const news: Record<string, unknown> = { ...(declared as Record<string, unknown>) };
  news["host"] ??= configuredHost(context);
  if (isAdopted(news["source"])) news["onDelete"] ??= "retain";
  const { args, failures, unknown } = parseArgs(ImportedDiskSchema, news);
  const homeless = judge(HOST_RULES, { host: news["host"] }, {});
  if (!args || homeless.length > 0) {
    // A host that is not given is said once.
    const others = failures.filter(({ property }) => homeless.length === 0 || property !== "host");
    const unfit = conclude(context, { origin: String(news["origin"]), name: "" }, [
      ...homeless,
      ...judge(ARGUMENT_RULES, { failures: others }, {}),
    ]);
    return { inputs: (unknown.size > 0 ? { ...news, ...unknownIdentity } : news) as never, failures: unfit };
  }
  const { settings, failures: unset } = settingsOf(context, args.preflight);

  const declaration = declarationOf(args);
  // The source of a disk that was imported is history: only another declaration makes it read again.
  if (olds?.declaration === declaration) {
    deploymentOf(context.hosts).declareDisk({
      ...olds,
      origin: args.origin,
      daemon: daemonOf(args.host),
      neededBytes: 0,
      content: olds.guest,
    });
    return { inputs: { ...args, ...identityOf(olds) }, failures: unset };
  }
  const importId = hash(JSON.stringify([args.origin, declaration])).slice(0, 32);
  // Of the import, not of the declaration: stacks and resources that declare the same do not meet at one path.
  const diskId = args.name ?? `${fileName(args.origin)}-${importId.slice(0, 8)}`;
  const volumeName = `${diskId}.${args.format}`;
  const placed: DiskInputs = { ...args, declaration, importId, ...(adoptedName(args) ?? { diskId, volumeName }), path: `/${volumeName}` };
  try {
    const host = openHost(context, args.host);
    const change = olds && (await changeOf(context, olds, placed));
    const refused = change ? judge(DISK_CHANGE_RULES, change, settings) : [];
    if (change?.isSameName) return { inputs: { ...args, ...identityOf(olds!) }, failures: conclude(context, subjectOf(placed), refused) };
    const pool = await factsOf(host).pool(args.pool);
    // Partitions and logical volumes have names without endings.
    const nameThere = pool.isBlock ? placed.diskId : placed.volumeName;
    const inputs = { ...placed, volumeName: nameThere, path: posix.join(pool.path, nameThere) };
    const deployment = deploymentOf(context.hosts);
    const facts = await gatherDisk(host, inputs, deployment, sourceSettings(context));
    deployment.declareDisk(declaredDisk(facts));
    // Published by an earlier run that did not live to say so: nothing is read or copied any more.
    const isFinished = isFinishedBy(inputs, facts.place.file) && facts.users.length === 0;
    const judgements = [...refused, ...(isFinished ? [] : judge(DISK_RULES, facts, settings))];
    const found = [...unset, ...conclude(context, subjectOf(inputs), judgements)];
    if (found.length === 0 && !isFinished) await tellPlan(context, host, facts);
    const guest = facts.source instanceof DiskError ? undefined : traitsOf(facts.source);
    return { inputs: guest ? { ...inputs, guest } : inputs, failures: found };
  } catch (error) {
    return { inputs: placed, failures: conclude(context, subjectOf(placed), judgeTrouble(error)) };
  }
}

function subjectOf({ origin, diskId }: DiskInputs): Subject {
  return { origin, name: diskId };
}

const unknownIdentity = { declaration: UNKNOWN, importId: UNKNOWN, diskId: UNKNOWN, volumeName: UNKNOWN, path: UNKNOWN };

function identityOf({ declaration, importId, diskId, volumeName, path, guest }: DiskInputs) {
  return { declaration, importId, diskId, volumeName, path, guest };
}

function declarationOf(args: Args): string {
  const keyed = { ...args, host: daemonOf(args.host), source: sourceIdentity(args.source) };
  return hash(JSON.stringify(DECLARATION_KEYS.map((key) => keyed[key] ?? null)));
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

/** What the new declaration does to the disk that exists: whether it may go when a guest has written to it. */
async function changeOf(context: Context, olds: DiskInputs, news: DiskInputs): Promise<DiskChange> {
  const changed = DECLARATION_KEYS.filter((key) => JSON.stringify(olds[key]) !== JSON.stringify(news[key]));
  const isSameName = olds.diskId === news.diskId && olds.pool === news.pool && daemonOf(olds.host) === daemonOf(news.host);
  const losesWrites = !isSameName && !news.replaceWritten && (await wasWritten(openHost(context, olds.host), olds));
  return { diskId: news.diskId, path: olds.path, changed, isSameName, losesWrites };
}

async function wasWritten(host: Host, olds: DiskInputs): Promise<boolean> {
  const { file } = await lookAtPlace(host, olds);
  if (file === undefined || file.untouched === true) return false;
  // The inputs do not tell whether a raw volume without a stamp came by an upload: it may have.
  return file.stamp === undefined ? olds.format === "raw" : file.stamp.importId === olds.importId;
}

/** What will be done, in lines that change from run to run and so are no inputs. */
async function tellPlan(context: Context, host: Host, facts: DiskFacts): Promise<void> {
  const { source, inputs } = facts;
  if (source instanceof DiskError) return;
  const link = await factsOf(host).link();
  const rates = { link: link?.bytesPerSecond, limit: context.throttle?.bytesPerSecond };
  tell(context, "info", `${inputs.diskId}: ${describeCopy(facts, source, wireBytes(facts), rates)}`);
  for (const note of source.notes) tell(context, "info", `${inputs.diskId}: ${note}`);
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
  return { id: inputs.diskId, state: { ...inputs, ...outputs, ...(await homeOf(host)) } };
}

function sourceSettings(context: Context): SourceSettings {
  return { scratchFolder: context.config("virtlift:scratch"), signal: context.signal };
}

const DONE = { copy: "copied", move: "moved", adopt: "adopted" } as const;

type Outputs = Omit<DiskState, keyof DiskInputs | keyof Home>;

async function importOrAdopt(context: Context, host: Host, inputs: DiskInputs): Promise<Outputs> {
  const { file, pool, uploadReason, partBytes, mountPoint } = await lookAtPlace(host, inputs);
  const finished = isFinishedBy(inputs, file) ? outputsOf(file.stamp, file) : undefined;
  if (finished) {
    if (uploadReason === undefined && partBytes > 0) await removeLeftover(host, { id: inputs.importId, path: partPath(inputs) });
    context.log("info", `${inputs.diskId}: ${inputs.path} on ${host.label} was finished by an earlier run`);
    return { ...finished, mountPoint };
  }
  if (file?.stamp?.importId === inputs.importId && !isAdopted(inputs.source)) {
    throw new DiskError(takenRefusal(inputs, host.label, file), { step: "publish", path: inputs.path });
  }
  const startedMs = performance.now();
  const refusal = refusalWithoutPrograms(host, inputs, uploadReason);
  if (refusal) throw refusal;
  const { importId, origin, provenance, migrationRef, source, verify: verified } = inputs;
  const options = {
    id: importId,
    finalPath: inputs.path,
    format: inputs.format,
    layout: inputs.layout,
    capacityBytes: inputs.capacity ?? 0,
    verify: verified,
    stamp: { importId, origin, provenance, migrationRef, source: publicSource(source) },
    upload: uploadReason === undefined ? undefined : { pool: pool.name, isBlock: pool.isBlock },
  };
  const { signal, throttle } = context;
  const onProgress = tellProgress(inputs.diskId, (line) => context.log("info", line));
  const { scratchFolder } = sourceSettings(context);
  const isOnHost = isReadByHost(source);
  const mode = isOnHost && "hostPath" in source ? source.mode : "copy";
  const result = isOnHost
    ? await importThere(context, host, inputs, source, { ...options, signal, onProgress })
    : await importInProcess(
        { host: host.spec, hosts: host.options, source, sourceOptions: { checksum: inputs.checksum, scratchFolder }, options },
        { signal, throttle, onProgress },
      );
  const { virtualSizeBytes } = result;
  const seconds = (performance.now() - startedMs) / 1000;
  const agreed = verified === "content" ? "its content is the source's, block by block" : "both ends agree on every byte";
  context.log(
    "info",
    isOnHost
      ? `${inputs.diskId}: ${formatBytes(virtualSizeBytes)} virtual ${DONE[mode]} on ${host.label} itself in ${formatSeconds(seconds)}, nothing on the wire`
      : `${inputs.diskId}: ${formatArrival(result)} in ${formatSeconds(seconds)}; ${agreed}`,
  );
  const { sourceDigest, contentDigest, allocatedBytes, importedAt } = result;
  return {
    virtualSizeBytes,
    allocatedBytes,
    sourceDigest,
    contentDigest,
    verified,
    mountPoint,
    ...(uploadReason !== undefined && { isUploaded: true, uploadedAt: importedAt }),
  };
}

/** Makes a volume of what the host itself reads. */
async function importThere(
  context: Context,
  host: Host,
  inputs: DiskInputs,
  from: HostRead,
  options: HostImportOptions,
): Promise<ImportResult> {
  const tellFetch = tellProgress(`${inputs.diskId}, to ${host.label}`, (line) => context.log("info", line));
  const found = await openOnHost(host, inputs, from, { ...sourceSettings(context), onProgress: tellFetch });
  const { source } = found;
  await using _closed = source;
  const whole = { ...options, capacityBytes: capacityOf(source, options.capacityBytes) };
  return await (found.mode === "adopt" ? adoptOnHost(host, found, whole) : importOnHost(host, found, whole));
}

/** How long after its import a disk that no state knows is still taken for that of an engine which was killed before it kept the answer. */
const TAKEOVER_SECONDS = 15 * 60;

/**
 * Whether a file is what an earlier run of this import published and did not live to say so. One that was written since, or is older, is that of another
 * state by the same names, such as another checkout's, or of one that was lost: it is somebody's, and is not taken unless it is to be adopted.
 */
function isFinishedBy(
  { importId, source }: Pick<DiskInputs, "importId" | "source">,
  file: VolumeFile | undefined,
): file is VolumeFile & { readonly stamp: Stamp } {
  if (file?.stamp?.importId !== importId || file.untouched === false) return false;
  const importedAt = Number(file.stamp["importedAt"]);
  // The time is this machine's own but where only libvirt could be asked.
  return isAdopted(source) || Math.abs(Date.now() / 1000 - importedAt) < TAKEOVER_SECONDS;
}

function partPath({ path, importId }: DiskInputs): string {
  return posix.join(posix.dirname(path), WORK_FOLDER, `${importId}.part`);
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
  await assertNotMoved(host, state);
  try {
    await libvirt.storageVolLookupByName(pool, state.volumeName);
    const { file, mountPoint } = await lookAtPlace(host, state);
    if (!file) {
      assertMounted(host, state, mountPoint);
      // libvirt remembers the folder as it last saw it: a file removed by hand is gone only when it says so too.
      await libvirt.storageVolLookupByName(await refreshPool(libvirt, state.pool), state.volumeName);
    }
  } catch (error) {
    if (!isNotFound(error)) throw error;
    await assertHome(host, state.diskId, state);
    return undefined;
  }
  return { id, state: { ...state, ...(await homeOf(host)) }, inputs: inputsOf(state) };
}

function inputsOf(state: DiskState): DiskInputs {
  const { virtualSizeBytes: _v, allocatedBytes: _a, sourceDigest: _s, contentDigest: _c, verified: _w, ...rest } = state;
  const { isUploaded: _u, uploadedAt: _t, mountPoint: _m, hostUuid: _h, hostName: _n, ...inputs } = rest;
  return inputs;
}

/** A pool of the same name in another folder says nothing about the disk, and a volume of the same name in it is another one. */
async function assertNotMoved(host: Host, { pool: name, path, volumeName }: DiskState): Promise<void> {
  const pool = await activePool(host, name);
  if (posix.join(pool.path, volumeName) === path) return;
  throw new DiskError(
    `the pool ${name} on ${host.label} lies in ${pool.path} now, and ${path} was imported when it lay elsewhere: let the pool lead there again, or run pulumi state delete`,
    { step: "publish", path },
  );
}

/** An empty folder where another file system should be mounted says nothing about what is on that. */
function assertMounted(host: Host, state: DiskState, mountPoint: string | undefined): void {
  if (state.mountPoint === undefined || mountPoint === undefined || mountPoint === state.mountPoint) return;
  throw new DiskError(
    `${state.path} on ${host.label} was imported to what is mounted at ${state.mountPoint}, and nothing is mounted there now: mount it, or run pulumi state delete`,
    { step: "publish", path: state.path },
  );
}

/** Nothing on the host changes: what would change the disk replaces it. */
async function update(_context: Context, _id: string, olds: DiskState, news: DiskInputs): Promise<DiskState> {
  const { virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest, verified = "digest" } = olds;
  const { isUploaded, uploadedAt, mountPoint, hostUuid, hostName } = olds;
  const found = { virtualSizeBytes, allocatedBytes, sourceDigest, contentDigest, verified };
  return { ...news, ...found, isUploaded, uploadedAt, mountPoint, hostUuid, hostName };
}

async function remove(context: Context, _id: string, state: DiskState): Promise<void> {
  const host = openHost(context, state.host);
  if (state.onDelete === "retain") {
    if (isAdopted(state.source)) await releaseOnHost(host, state.path, state.importId);
    context.log("info", `${state.diskId}: ${state.path} stays on ${host.label}, as \`onDelete: "retain"\` says`);
    return;
  }
  await assertNotMoved(host, state);
  const { file, uploadReason, mountPoint } = await lookAtPlace(host, state);
  if (!file) {
    assertMounted(host, state, mountPoint);
    await assertHome(host, state.diskId, state);
  }
  const libvirt = await host.libvirt();
  // First, so that libvirt knows the overlays that were made since.
  const pool = await refreshPool(libvirt, state.pool);
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
    const users = new Set([
      ...(await domainsUsing(libvirt, state.path)),
      ...(uploadReason === undefined ? await machinesReaching(host, state.path) : []),
      ...(await volumesBackedBy(libvirt, state.path)),
    ]);
    if (users.size > 0) {
      throw new DiskError(
        `${state.path} on ${host.label} is in use by ${[...users].join(", ")} and is not deleted: remove them first, or set \`onDelete: "retain"\``,
        {
          step: "publish",
          path: state.path,
        },
      );
    }
  }
  try {
    await libvirt.storageVolDelete(await libvirt.storageVolLookupByName(pool, state.volumeName));
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
  if (uploadReason === undefined) await removeStamp(host, state.path, state.importId);
}

/**
 * Whether a volume is the one that was imported: by its stamp, or by the state where a raw one could not get any. Its guest may have written all of
 * that, but neither changed its size nor its past.
 */
function isOurs(file: VolumeFile, state: DiskState): boolean {
  if (file.stamp !== undefined) return file.stamp.importId === state.importId;
  if (state.isUploaded !== true || state.format !== "raw") return false;
  if (file.modifiedAt === undefined) return file.sizeBytes === state.allocatedBytes;
  return file.sizeBytes === state.virtualSizeBytes && Number(file.modifiedAt) >= (state.uploadedAt ?? 0);
}
