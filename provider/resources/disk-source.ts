/** From what a program declares as a disk's source to something that can be read: on this machine, on a server, or on the host itself. */
import { basename, posix } from "node:path";
import { ConnectionError, DiskError, isNotFound, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { resolveChecksum } from "../transfer/checksum.ts";
import { ImageError } from "../image/parser.ts";
import { isTar } from "../image/tar.ts";
import { wrappingOf } from "../image/wrapping.ts";
import { isZip, ZIP_MAGIC_BYTES } from "../image/zip.ts";
import { fetchOnHost, type HostFetchOptions, lookFromHost } from "../transfer/host-fetch.ts";
import { shownUrl, urlFileName } from "../transfer/http.ts";
import { type HostFile, HostFolder, type HostMode, type HostSource } from "../transfer/on-host.ts";
import { WORK_FOLDER } from "../transfer/part-file.ts";
import { parseStamp, probe } from "../transfer/probe.ts";
import { imageAhead, lookAhead, openSource, type OpenSource, type SourceOptions, type SourceSpec } from "../transfer/source.ts";
import { findWrapping } from "../transfer/unwrap.ts";
import type { DiskInputs } from "./imported-disk.ts";
import { readPackage } from "./machine-description.ts";
import { gatherSource, type SourceFacts } from "./preflight/source-facts.ts";
import type { Source } from "./schema.ts";
import { domainsUsing } from "./usage.ts";

/** Where things are kept on this machine, what stops a long read, and who is told how far the host is when it fetches. */
export type SourceSettings = Pick<SourceOptions, "scratchFolder" | "signal"> & Pick<HostFetchOptions, "onProgress">;

/** What of a declared source decides which bytes it gives: how it is fetched, and which machine it was of, does not. */
export function sourceIdentity(source: Source): object {
  if ("file" in source) return { file: source.file };
  if (!("url" in source)) return source;
  return { url: source.url, ...(source.disk !== undefined && { disk: source.disk }) };
}

/** A declared source as it may be kept where others read it: without secrets. */
export function publicSource(source: Source): object {
  return "url" in source ? { ...sourceIdentity(source), url: shownUrl(source.url) } : source;
}

/** Whether a source, declared or not yet checked, is a file that is taken where it is. */
export function isAdopted(source: unknown): boolean {
  return typeof source === "object" && source !== null && "hostPath" in source && "mode" in source && source.mode === "adopt";
}

/** The names that an adopted file gives to its disk; undefined for any other source. */
export function adoptedName({ source, format }: Pick<DiskInputs, "source" | "format">) {
  if (!("hostPath" in source) || source.mode !== "adopt") return undefined;
  const volumeName = posix.basename(source.hostPath);
  return { volumeName, diskId: volumeName.endsWith(`.${format}`) ? volumeName.slice(0, -format.length - 1) : volumeName };
}

/**
 * Opens what the host itself reads for its import; a URL is fetched first. Throws as `openSource` does; DiskError (step "source") when a source on the
 * host cannot be taken as it is. Close it.
 */
export async function openOnHost(host: Host, inputs: DiskInputs, source: HostRead, settings: SourceSettings): Promise<HostSource> {
  return "url" in source ? openFetched(host, inputs, source, settings) : open(host, inputs, source, settings, false);
}

/**
 * What a source tells in preview, in seconds whatever its size, or why it cannot be imported. Sizes that only the import will know are 0.
 * Throws LibvirtError or ConnectionError of the host.
 */
export async function previewDeclared(host: Host, inputs: DiskInputs, settings: SourceSettings): Promise<SourceFacts | DiskError> {
  const { source, checksum } = inputs;
  try {
    if (isFetchedByHost(source)) return await previewFetch(host, source, checksum, settings);
    if (!isOnHost(source)) {
      const outlook = await lookAhead(source, { ...settings, checksum });
      if (outlook) {
        const { path, image, notes, expected, fileBytes = 1 } = outlook;
        const { format, variant, virtualSizeBytes } = image ?? {
          format: "raw",
          variant: "or what its bytes turn out to be",
          virtualSizeBytes: 0,
        };
        const dataBytes = virtualSizeBytes > 0 ? virtualSizeBytes : fileBytes;
        return {
          path,
          format,
          variant,
          virtualSizeBytes,
          dataBytes,
          fileBytes,
          digests: [expected],
          notes,
          partitions: undefined,
          packed: undefined,
        };
      }
    }
    await using opened = isOnHost(source)
      ? (await open(host, inputs, source, settings, true)).source
      : await openSource(source, { ...settings, checksum, isPreview: true });
    const facts = await gatherSource(opened);
    return "file" in source && source.vmx !== undefined ? { ...facts, packed: packedBy(source.vmx, source.file) } : facts;
  } catch (error) {
    if (error instanceof DiskError) return error;
    if (error instanceof ConnectionError && ("url" in source || checksum?.startsWith("http"))) {
      return new DiskError(error.message, { step: "source", path: "url" in source ? shownUrl(source.url) : "", cause: error });
    }
    throw error;
  }
}

/** The machine of a VMX, and which of its disks a file beside it is; undefined when it is none of them. Throws DiskError. */
function packedBy(vmx: string, file: string): SourceFacts["packed"] {
  const machine = readPackage(vmx);
  const disk = machine.disks.find(({ place }) => place?.name === basename(file));
  return disk && { package: machine, disk };
}

/** A source whose bytes the host itself reads, by programs of its own. */
export type HostRead = Exclude<Source, SourceSpec> | Extract<Source, { readonly url: string }>;

export function isReadByHost(source: Source): source is HostRead {
  return isOnHost(source) || isFetchedByHost(source);
}

/** Why a source that the host itself is to read cannot be had, where programs cannot write there; undefined where they can, or for any other source. */
export function refusalWithoutPrograms(host: Host, { source }: DiskInputs, uploadReason: string | undefined): DiskError | undefined {
  if (uploadReason === undefined || !isReadByHost(source)) return undefined;
  const path = "url" in source ? shownUrl(source.url) : "hostPath" in source ? source.hostPath : source.volume;
  const words = "url" in source ? `is to be fetched by ${host.label}` : `lies on ${host.label} and would be copied there by a program`;
  const remedy = "url" in source ? 'let this machine fetch (`fetch: "client"`)' : "bring it here and name it as `file`";
  return refusal(path, `${path} ${words}, but ${uploadReason}: ${remedy}`);
}

/** Whether the host itself is to read a URL. */
export function isFetchedByHost(source: Source): source is Extract<Source, { readonly url: string }> {
  return "url" in source && source.fetch === "host";
}

/** What the host sees of what it would fetch. */
async function previewFetch(
  host: Host,
  source: Extract<Source, { readonly url: string }>,
  checksum: string | undefined,
  settings: SourceSettings,
): Promise<SourceFacts> {
  const path = shownUrl(source.url);
  const { head, sizeBytes } = await lookFromHost(host, source);
  const wrapping = wrappingOf(head);
  const other = wrapping ? `is wrapped in ${wrapping}` : isTar(head) ? "is an OVA" : isZip(head) ? "is a zip archive" : undefined;
  if (other !== undefined)
    throw refusal(path, `${path} ${other}, which is only taken apart on this machine: let it fetch (\`fetch: "client"\`)`);
  const image = await imageAhead(head, sizeBytes, sizeBytes === head.length).catch((error: unknown) => {
    throw error instanceof ImageError ? new DiskError(`${path}: ${error.message}`, { step: "header", path, cause: error }) : error;
  });
  const digest = checksum === undefined ? undefined : await resolveChecksum(checksum, urlFileName(source.url), settings);
  const { format, variant, virtualSizeBytes } = image ?? UNKNOWN_IMAGE;
  return {
    path,
    format,
    variant,
    virtualSizeBytes,
    dataBytes: sizeBytes ?? 1,
    fileBytes: sizeBytes ?? 1,
    digests: [digest],
    notes: [`${host.label} fetches it itself, into the pool's file system, and removes that copy afterwards`],
    partitions: undefined,
    packed: undefined,
  };
}

/** What only the import will know. */
const UNKNOWN_IMAGE = { format: "raw", variant: "or what its bytes turn out to be", virtualSizeBytes: 0 } as const;

function isOnHost(source: Source): source is Exclude<Source, SourceSpec> {
  return "hostPath" in source || "volume" in source;
}

async function open(
  host: Host,
  inputs: DiskInputs,
  source: Exclude<Source, SourceSpec>,
  settings: SourceSettings,
  isPreview: boolean,
): Promise<HostSource> {
  const { checksum } = inputs;
  const mode = "hostPath" in source ? source.mode : "copy";
  const path = "hostPath" in source ? source.hostPath : await volumePath(host, source.pool ?? inputs.pool, source.volume);
  const folder = new HostFolder(host, path);
  const file = await folder.look("");
  await refuseUsed(host, file, mode);
  // A block device is its guest's from the first byte on: what looks like a format there is the guest's own.
  const options = { ...settings, checksum, isPreview, folder, ...(file.kind === "block" && { format: "raw" as const }) };
  if (file.kind === "file") {
    const range = await folder.file("");
    if ((await findWrapping(range)) || isZip(await range.readCached(0, ZIP_MAGIC_BYTES)))
      throw refusal(path, `${path} on ${host.label} is wrapped, which is only taken off on the machine that runs Pulumi: unpack it there`);
  }
  const opened = await openSource({ file: path }, options);
  try {
    refuseMode(host, inputs, opened, file, mode);
    if (mode === "move") await refuseMove(host, inputs, file);
    if (mode === "adopt") await refuseAdoption(host, inputs, opened, file);
  } catch (error) {
    await opened[Symbol.asyncDispose]();
    throw error;
  }
  return { source: opened, folder, mode };
}

/** What the host has fetched, as a source of its own. */
async function openFetched(
  host: Host,
  inputs: DiskInputs,
  source: Extract<Source, { readonly url: string }>,
  settings: SourceSettings,
): Promise<HostSource> {
  const { checksum, importId: id, path: finalPath } = inputs;
  const digest = checksum === undefined ? undefined : await resolveChecksum(checksum, urlFileName(source.url), settings);
  const path = await fetchOnHost(host, source, {
    id,
    finalPath,
    signal: settings.signal ?? new AbortController().signal,
    onProgress: settings.onProgress,
  });
  const folder = new HostFolder(host, path);
  const opened = await openSource(
    { file: path },
    { ...settings, ...(digest && { checksum: `${digest.algorithm}:${digest.hex}` }), folder },
  );
  try {
    refuseMode(host, inputs, opened, await folder.look(""), "copy");
  } catch (error) {
    await opened[Symbol.asyncDispose]();
    throw error;
  }
  return { source: opened, folder, mode: "copy" };
}

function refusal(path: string, message: string): DiskError {
  return new DiskError(message, { step: "source", path });
}

/** The path of a volume, which is a file or a block device. */
async function volumePath(host: Host, pool: string, volume: string): Promise<string> {
  const libvirt = await host.libvirt();
  let path: string;
  try {
    path = await libvirt.storageVolGetPath(await libvirt.storageVolLookupByName(await libvirt.storagePoolLookupByName(pool), volume));
  } catch (error) {
    const isMissing = isNotFound(error) || (error instanceof LibvirtError && error.code === NO_STORAGE_POOL);
    if (!isMissing) throw error;
    throw refusal(volume, `there is no volume ${volume} in the pool ${pool} on ${host.label}: look at virsh vol-list ${pool}`);
  }
  if (!path.startsWith("/"))
    throw refusal(
      volume,
      `the volume ${volume} in the pool ${pool} on ${host.label} is no file or device there, but ${path}, which is not read`,
    );
  return path;
}

/** VIR_ERR_NO_STORAGE_POOL of virterror.h. */
const NO_STORAGE_POOL = 49;

/** VIR_CONNECT_LIST_DOMAINS_ACTIVE of libvirt-domain.h. */
const LIST_ACTIVE = 1;

/** A running machine writes while a copy is made; what is moved away, any machine would miss. */
async function refuseUsed(host: Host, file: HostFile, mode: HostMode): Promise<void> {
  const [user] = await domainsUsing(await host.libvirt(), file.path, mode === "copy" ? LIST_ACTIVE : 0);
  if (user === undefined) return;
  const remedy = mode === "copy" ? "stop it first, or its copy is torn" : "undefine it first, or copy the file";
  throw refusal(file.path, `the machine ${user} on ${host.label} uses ${file.path}: ${remedy}`);
}

function refuseMode(host: Host, inputs: DiskInputs, { image }: OpenSource, file: HostFile, mode: HostMode): void {
  const verb = mode === "move" ? "moved" : "adopted";
  const isKept = image.format === "raw" && inputs.format === "raw";
  if (mode === "copy" && !isKept && !file.hasQemuImg) {
    throw refusal(file.path, `${host.label} lacks qemu-img, which makes ${inputs.format} of ${file.path}: install qemu-utils`);
  }
  if (mode === "copy") return;
  if (file.kind !== "file") throw refusal(file.path, `${file.path} on ${host.label} is a device, which cannot be ${verb}: copy it`);
  if (image.format !== inputs.format) {
    throw refusal(
      file.path,
      `${file.path} on ${host.label} is ${image.format} and the volume is to be ${inputs.format}: copy it, or declare the format ${image.format}`,
    );
  }
  if (inputs.layout !== "sparse") throw refusal(file.path, `${file.path} is ${verb} as it is: leave \`layout\` out, or copy it`);
}

/** In the pool's folder under its own name, of one name, and nobody else's. */
async function refuseAdoption(host: Host, inputs: DiskInputs, { image }: OpenSource, file: HostFile): Promise<void> {
  if (inputs.path !== file.path) {
    throw refusal(
      file.path,
      `${file.path} does not lie in ${posix.dirname(inputs.path)}, the folder of the pool ${inputs.pool} on ${host.label}: move it instead of adopting it`,
    );
  }
  if (inputs.name !== undefined && inputs.name !== inputs.diskId) {
    throw refusal(file.path, `${file.path} is adopted under its own name: leave \`name\` out, or give ${inputs.diskId}`);
  }
  if (inputs.capacity !== undefined && inputs.capacity !== image.virtualSizeBytes) {
    throw refusal(file.path, `${file.path} is adopted as it is, with ${image.virtualSizeBytes} bytes: leave \`capacity\` out`);
  }
  if (image.virtualSizeBytes % SECTOR_BYTES !== 0) {
    throw refusal(file.path, `${file.path} has ${image.virtualSizeBytes} bytes, which is no multiple of ${SECTOR_BYTES}: copy it`);
  }
  if (file.links > 1) throw refusal(file.path, `${file.path} on ${host.label} has ${file.links} names (hard links): copy it`);
  const owner = await ownerOf(host, file, inputs.importId);
  if (owner !== undefined && owner !== inputs.origin) {
    throw refusal(
      file.path,
      `${file.path} on ${host.label} is the disk of ${owner}: destroy that one with \`onDelete: "retain"\`, or copy the file`,
    );
  }
}

const SECTOR_BYTES = 512;

/** The stamps beside volumes that are bound to the inode of one, whoever's import they are of. */
const STAMPS_OF = `
inode=$(stat -c %i -- "$2")
for stamp in "$1"/*.stamp; do
  [ -f "$stamp" ] && [ "$(head -n 1 -- "$stamp")" = "$inode" ] && tail -n +2 -- "$stamp" && echo
done
exit 0
`;

/** Whose disk a file is, by the stamp inside or beside it; undefined when it is nobody's, or of the import itself. */
async function ownerOf(host: Host, file: HostFile, importId: string): Promise<string | undefined> {
  const inside = (await probe(host, file.path, importId)).file?.stamp;
  const work = posix.join(posix.dirname(file.path), WORK_FOLDER);
  const { stdout } = await host.run(["sh", "-c", STAMPS_OF, "virtlift", work, file.path]);
  const beside = stdout.toString("utf8").split("\n").map(parseStamp);
  const stamp = [inside, ...beside].find((each) => each !== undefined && each.importId !== importId);
  return stamp && String(stamp["origin"]);
}

/** One file system, no other name of the file, and no stamp of another import. */
async function refuseMove(host: Host, inputs: DiskInputs, file: HostFile): Promise<void> {
  const folder = posix.dirname(inputs.path);
  const { stdout } = await host.run(["stat", "-c", "%d", "--", folder]);
  if (stdout.toString("latin1").trim() !== file.device) {
    throw refusal(file.path, `${file.path} on ${host.label} does not lie on the file system of ${folder}: copy it`);
  }
  const part = posix.join(folder, WORK_FOLDER, `${inputs.importId}.part`);
  const { stdout: own } = await host.run(["sh", "-c", '[ "$1" -ef "$2" ] && echo own; exit 0', "virtlift", file.path, part]);
  // The other name may be that of our own part, which an interrupted run left.
  if (file.links > (own.length > 0 ? 2 : 1)) {
    throw refusal(
      file.path,
      `${file.path} on ${host.label} has ${file.links} names (hard links), whose content would change with the volume's: copy it`,
    );
  }
}
