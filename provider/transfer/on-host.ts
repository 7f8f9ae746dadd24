/** A source that lies on the host: its header read there by our own parsers, its bytes copied or converted there, under the lock of its import. */
import { createHash } from "node:crypto";
import { posix } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { DiskError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { quoteCommand } from "../host/quote.ts";
import type { DiskImage, ImageFormat } from "../image/image.ts";
import type { Digest } from "../image/manifest.ts";
import { placeStamp } from "../image/qcow2.ts";
import { openImage } from "../image/open.ts";
import { verifyContent } from "./content.ts";
import { type ImportOptions, type ImportResult, intoPart, stampOf } from "./import.ts";
import { openPartFile, type PartFile, WORK_FOLDER } from "./part-file.ts";
import type { OnProgress } from "./progress.ts";
import { drive, type Folder, MissingFile, Range, refusePath } from "./range.ts";
import type { OpenSource } from "./source.ts";

/** Digests and conversions of whole disks. */
const LONG_MS = 24 * 60 * 60 * 1000;

const LOOK = `
file=$(readlink -f -- "$1") && [ -e "$file" ] || { echo none; exit 0; }
if [ "$2" = beside ] && [ -L "$1" ]; then echo link; exit 0; fi
if [ -f "$file" ]; then kind=file size=$(stat -c %s -- "$file")
elif [ -b "$file" ]; then kind=block size=$(blockdev --getsize64 -- "$file")
else echo other; exit 0; fi
[ -r "$file" ] || { printf 'refused %s\\n' "$(id -un)"; exit 0; }
command -v qemu-img >/dev/null 2>&1 && tool=yes || tool=no
printf 'found %s %s %s %s %s\\n' "$kind" "$size" "$tool" "$(stat -c '%b %d:%i:%.9Y %.9Z %h' -- "$file")" "$file"
`;

/** What the host says of a file. */
export interface HostFile {
  /** With all symbolic links resolved. */
  readonly path: string;
  readonly kind: "file" | "block";
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
  /** What tells this state of the file from any other, as long as nobody sets times back. */
  readonly seen: string;
  /** When anything about a file was last changed, which nobody can set back; undefined for a device. */
  readonly changedAt: string | undefined;
  /** The number of the file system. */
  readonly device: string;
  readonly links: number;
  /** Whether the host has qemu-img. */
  readonly hasQemuImg: boolean;
}

/**
 * Looks at a file or block device of the host. `isBeside` refuses a symbolic link.
 * Throws MissingFile, or DiskError (step "source") when it is something else or may not be read; ConnectionError and CommandError.
 */
export async function lookAtHostFile(host: Host, path: string, isBeside = false): Promise<HostFile> {
  const { stdout } = await host.run(["sh", "-c", LOOK, "virtlift", path, isBeside ? "beside" : "source"]);
  const answer = stdout.toString("utf8").replace(/\n$/, "");
  const detail = { step: "source", path } as const;
  if (answer === "none") throw new MissingFile(`there is no file ${path} on ${host.label}`, detail);
  if (answer === "link") throw new DiskError(`${path} on ${host.label} is a symbolic link: a part of an image must be a file`, detail);
  if (answer === "other") throw new DiskError(`${path} on ${host.label} is neither a file nor a block device`, detail);
  const user = /^refused (.*)$/.exec(answer)?.[1];
  if (user !== undefined)
    throw new DiskError(
      `${path} on ${host.label} may not be read by ${user}: log in as somebody who may, or set \`sudo: true\` on the host`,
      detail,
    );
  const match = /^found (file|block) (\d+) (yes|no) (\d+) (\d+):(\S+) (\S+) (\d+) (\/.*)$/s.exec(answer);
  if (!match)
    throw new DiskError(`${host.label} does not say what ${path} is: its stat answers ${JSON.stringify(answer.slice(0, 200))}`, detail);
  const [, kind, size, tool, blocks, device, rest, changed, links, real] = match;
  const sizeBytes = Number(size);
  return {
    path: real!,
    kind: kind === "block" ? "block" : "file",
    sizeBytes,
    allocatedBytes: kind === "block" ? sizeBytes : Number(blocks) * 512,
    seen: `${device}:${rest}:${size}`,
    changedAt: kind === "block" ? undefined : changed,
    device: device!,
    links: Number(links),
    hasQemuImg: tool === "yes",
  };
}

/** The files of a source on the host, read by dd in bounded pieces. */
export class HostFolder implements Folder {
  readonly #host: Host;
  readonly #path: string;
  readonly #open = new Map<string, Promise<{ readonly file: HostFile; readonly range: Range }>>();

  constructor(host: Host, path: string) {
    this.#host = host;
    this.#path = path;
  }

  async file(name: string): Promise<Range> {
    if (name !== "") refusePath(name);
    return (await this.#opened(name)).range;
  }

  /** What the host says of a file that was opened. */
  async look(name: string): Promise<HostFile> {
    return (await this.#opened(name)).file;
  }

  async assertUnchanged(): Promise<void> {
    for (const { file } of await Promise.all(this.#open.values())) {
      const now = await lookAtHostFile(this.#host, file.path);
      // Another link to it, such as a backup's, or ours when it is moved, changes nothing in it.
      if (now.seen === file.seen && (now.changedAt === file.changedAt || now.links !== file.links)) continue;
      throw new DiskError(`${file.path} on ${this.#host.label} changed while it was read: stop what writes it, then run up again`, {
        step: "source",
        path: file.path,
      });
    }
  }

  async close(): Promise<void> {
    // Nothing is held open on the host.
  }

  #opened(name: string) {
    let opened = this.#open.get(name);
    if (!opened) {
      opened = this.#openFile(name);
      this.#open.set(name, opened);
    }
    return opened;
  }

  async #openFile(name: string) {
    const path = name === "" ? this.#path : posix.join(posix.dirname((await this.look("")).path), name);
    const file = await lookAtHostFile(this.#host, path, name !== "");
    return { file, range: new Range(posix.basename(path), file, { readAt: (offset, length) => this.#read(file.path, offset, length) }) };
  }

  async #read(path: string, offset: number, length: number): Promise<Buffer> {
    if (length <= 0) return Buffer.alloc(0);
    const argv = [
      "dd",
      `if=${path}`,
      "bs=1048576",
      "iflag=skip_bytes,count_bytes,fullblock",
      `skip=${offset}`,
      `count=${length}`,
      "status=none",
    ];
    return (await this.#host.run(argv)).stdout;
  }
}

/** How the bytes get into the volume: `copy` leaves the source alone, `move` makes the source's own file the volume, `adopt` takes it where it is. */
export type HostMode = "copy" | "move" | "adopt";

export interface HostSource {
  /** Opened by `openSource` over the folder. */
  readonly source: OpenSource;
  readonly folder: HostFolder;
  readonly mode: HostMode;
}

/** qemu's names of the formats. */
const QEMU_FORMATS: Readonly<Record<ImageFormat, string>> = {
  raw: "raw",
  qcow2: "qcow2",
  vmdk: "vmdk",
  vhd: "vpc",
  vhdx: "vhdx",
  vdi: "vdi",
};

/** As for an import from elsewhere, but that nobody may know how much a volume will take. */
export type HostImportOptions = Omit<ImportOptions, "onProgress"> & { readonly onProgress: OnProgress };

/**
 * Makes a volume of a file of the host without its bytes leaving it. Throws as `importDisk` does. An interrupted run begins anew, but for `move`, which
 * is done at once: until its end the source has its name, and its bytes are as they were, but for a stamp in the header of a qcow2.
 */
export async function importOnHost(host: Host, source: HostSource, options: HostImportOptions): Promise<ImportResult> {
  return intoPart({ open: () => openPartFile(host, options), path: source.source.path, signal: options.signal }, (part) =>
    fillOnHost(host, part, source, options),
  );
}

async function fillOnHost(
  host: Host,
  part: PartFile,
  { source, folder, mode }: HostSource,
  options: HostImportOptions,
): Promise<ImportResult> {
  const { image } = source;
  const files = await Promise.all(image.files.map(({ name }) => folder.look(name)));
  const [file] = files;
  if (file === undefined) throw new Error("an image has at least one file");
  const digesting = Promise.all(files.map(({ path }, index) => digestOnHost(host, path, source.files[index]?.expected, options.signal)));
  digesting.catch(() => {});
  if (mode === "move") await confirm(digesting, folder);
  const partPath = posix.join(posix.dirname(options.finalPath), WORK_FOLDER, `${options.id}.part`);
  const filling = part.run(fillScript(mode, file.path, image, options));
  await watchFile(host, partPath, { totalBytes: filledBytes(mode, files, options), onProgress: options.onProgress }, filling);
  if (mode === "copy" || options.capacityBytes > image.virtualSizeBytes) await grow(part, options);
  if (mode === "copy") await confirm(digesting, folder);
  const sourceDigest = digestOfAll(await digesting, files);
  await part.settle();
  const work = new HostFolder(host, partPath);
  const madeBytes = (await work.look("")).sizeBytes;
  const made = await drive(openImage({ sizeBytes: madeBytes, format: options.format }), (name) => work.file(name));
  if (made.virtualSizeBytes !== options.capacityBytes) {
    const message = `qemu-img on ${host.label} made a disk of ${made.virtualSizeBytes} bytes of ${file.path} where ${options.capacityBytes} were expected`;
    throw new DiskError(message, { step: "verify", path: file.path });
  }
  const contentDigest = `sha256:${await part.digest(options.format === "raw" ? 0 : made.granularityBytes)}`;
  const importedAt = await part.closingTime();
  const stamp = stampOf(options, { sourceDigest, contentDigest, importedAt });
  if (options.format === "raw") await part.stamp(stamp);
  else await stampPart(part, work, stamp);
  if (options.verify === "content") {
    const { capacityBytes, signal, finalPath: path, format } = options;
    await verifyContent(await part.readGuest(format), source, await source.runs(), { capacityBytes, signal, path, place: host.label });
  }
  const { allocatedBytes } = await part.publish(importedAt);
  // Its bytes have another name now: only the old name goes, and only while it still leads to them.
  if (mode === "move") await host.run(["sh", "-c", '[ "$1" -ef "$2" ] && rm -- "$1"', "virtlift", file.path, options.finalPath]);
  const virtualSizeBytes = options.capacityBytes;
  return { virtualSizeBytes, sourceDigest, contentDigest, allocatedBytes, sentBytes: 0, keptBytes: 0, importedAt };
}

/** What the part will occupy, about; undefined where nobody can say: how far bytes can be compressed shows at the end. */
function filledBytes(mode: HostMode, files: readonly HostFile[], { layout, capacityBytes }: HostImportOptions): number | undefined {
  if (mode === "move" || layout === "compressed") return undefined;
  return layout === "full" ? capacityBytes : files.reduce((sum, { allocatedBytes }) => sum + allocatedBytes, 0);
}

/** How often the host is asked how far a work is: each time costs a command. */
const WATCH_MS = 10_000;

export interface WatchOptions {
  /** What the file will occupy; undefined where nobody knows. */
  readonly totalBytes: number | undefined;
  readonly onProgress: OnProgress;
  /** Default 10,000. */
  readonly everyMs?: number;
}

/** Tells how much of a file on the host is there by now, until the work that writes it has settled; then settles as that did. */
export async function watchFile<T>(host: Host, path: string, options: WatchOptions, work: Promise<T>): Promise<T> {
  const { totalBytes, onProgress, everyMs = WATCH_MS } = options;
  const end = new AbortController();
  const watch = async (): Promise<void> => {
    for (;;) {
      await sleep(everyMs, undefined, { signal: end.signal });
      const { stdout } = await host.run(["stat", "-c", "%b", "--", path], { signal: end.signal });
      onProgress(Math.min(totalBytes ?? Number.POSITIVE_INFINITY, Number(stdout.toString("latin1")) * 512), totalBytes);
    }
  };
  const watching = watch().catch(() => {
    // The work is over, or the host cannot be asked: the work itself tells of that.
  });
  try {
    return await work;
  } finally {
    end.abort();
    await watching;
  }
}

async function confirm(digesting: Promise<unknown>, folder: HostFolder): Promise<void> {
  await digesting;
  await folder.assertUnchanged();
}

async function stampPart(part: PartFile, work: HostFolder, stamp: Uint8Array): Promise<void> {
  for (const { offset, bytes } of await drive(placeStamp(stamp), (name) => work.file(name))) {
    await part.write(offset, bytes);
    await part.settle();
  }
}

function fillScript(mode: HostMode, path: string, image: DiskImage, { format, layout }: HostImportOptions): string {
  if (mode === "move") return `exec ${quoteCommand(["ln", "-f", "-T", "--", path])} "$part"`;
  if (image.format === "raw" && format === "raw") {
    const sparse = layout === "full" ? "never" : "always";
    return `exec ${quoteCommand(["cp", `--sparse=${sparse}`, "--reflink=auto", "--", path])} "$part"`;
  }
  // vpc rounds to cylinders unless told to take the size in the footer. Source: QEMU block/vpc.c.
  const from = image.format === "vhd" ? `driver=vpc,force_size_calc=current_size,file.filename=${path.replaceAll(",", ",,")}` : path;
  const input = image.format === "vhd" ? ["--image-opts"] : ["-f", QEMU_FORMATS[image.format]];
  const shape = layout === "compressed" ? ["-c"] : layout === "full" ? ["-S", "0"] : [];
  return `exec ${quoteCommand(["qemu-img", "convert", "-q", ...input, "-O", format, ...shape, "--", from])} "$part"`;
}

/** Brings the part to the declared size. */
async function grow(part: PartFile, { format, layout, capacityBytes }: HostImportOptions): Promise<void> {
  if (format === "raw") await (layout === "full" ? part.allocate(capacityBytes) : part.setSize(capacityBytes));
  else {
    const preallocation = layout === "full" ? ["--preallocation=falloc"] : [];
    await part.run(`exec ${quoteCommand(["qemu-img", "resize", "-q", "-f", "qcow2", ...preallocation])} "$part" ${capacityBytes}`);
  }
}

const DIGEST = `
if command -v openssl >/dev/null 2>&1; then openssl dgst -sha256 -r "$2" || exit 1; [ -z "$1" ] || openssl dgst "-$1" -r "$2"
else sha256sum <"$2" || exit 1; [ -z "$1" ] || "$1"sum <"$2"; fi
`;

/** SHA-256 of a file as it lies on the host, in hex. Throws DiskError (step "source") when another digest was expected. */
export async function digestOnHost(host: Host, path: string, expected: Digest | undefined, signal: AbortSignal): Promise<string> {
  const other = expected && expected.algorithm !== "sha256" ? expected.algorithm : "";
  const { stdout } = await host.run(["sh", "-c", DIGEST, "virtlift", other, path], { signal, timeoutMs: LONG_MS });
  const [digest = "", found = digest] = stdout
    .toString("latin1")
    .split("\n")
    .filter(Boolean)
    .map((line) => line.split(" ")[0]!);
  if (expected && expected.hex !== found) {
    throw new DiskError(`${path} on ${host.label} is damaged: its ${expected.algorithm} is ${found}, and ${expected.hex} was promised`, {
      step: "source",
      path,
    });
  }
  return digest;
}

function digestOfAll(digests: readonly string[], files: readonly HostFile[]): string {
  if (digests.length === 1) return `sha256:${digests[0]}`;
  const lines = files.map(({ path }, index) => `${digests[index]}  ${posix.basename(path)}\n`);
  return `sha256:${createHash("sha256").update(lines.join("")).digest("hex")}`;
}
