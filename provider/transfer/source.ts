/** Where a disk's bytes come from: files of this machine or of a web server, alone or in a package, wrapped or not; opened, parsed and watched for changes. */
import { tmpdir } from "node:os";
import { DiskError } from "../errors.ts";
import type { DiskImage, ImageFormat, RunList } from "../image/image.ts";
import { openImage } from "../image/open.ts";
import type { Digest } from "../image/manifest.ts";
import { openOva, openOvf, type OvfPackage, type PackagedDisk, selectDisk } from "../image/ova.ts";
import { ImageError } from "../image/parser.ts";
import { isTar } from "../image/tar.ts";
import { type Wrapping, wrappingOf } from "../image/wrapping.ts";
import { isZip, ZIP_MAGIC_BYTES } from "../image/zip.ts";
import { resolveChecksum } from "./checksum.ts";
import { LocalFolder } from "./files.ts";
import { shownUrl, urlFileName, type WebSpec } from "./http.ts";
import type { DataExtent } from "./holes.ts";
import { formatBytes } from "./progress.ts";
import { drive, type Folder, Range, type Resolve } from "./range.ts";
import { scratchRoom } from "./scratch.ts";
import { chunksOf, declaredInside, digestOf, findWrapping, peekInside, stage } from "./unwrap.ts";
import { WebFolder } from "./url.ts";
import { ZipFolder } from "./zip-folder.ts";

/** What tells a tar archive, and with it an OVA. */
const TAR_SNIFF_BYTES = 512;

/** A range of a file on this machine or a server. */
export interface SourceFile {
  /** The name that messages show. */
  readonly name: string;
  readonly sizeBytes: number;
  /** What the file occupies where it lies, holes left out; a member of an archive counts in full. */
  readonly allocatedBytes: number;
  /** What the file's bytes must hash to; undefined when nobody says, and where that was compared already. */
  readonly expected: Digest | undefined;
  /** SHA-256 in hex of the file as the user has it, where other bytes are read: those that were inside. */
  readonly wrappedDigest: string | undefined;
  /** At most `length` bytes at `offset`, fewer only at the end. The buffer is the caller's. */
  read(offset: number, length: number): Promise<Buffer>;
  /** Where it may hold other bytes than zeros; undefined when nobody knows. */
  dataExtents(): Promise<readonly DataExtent[] | undefined>;
}

/** Which disk of a package: its index in the hardware's order, or its file's name; undefined for the only one. */
export type DiskChoice = string | number | undefined;

/** What a user may declare as a source whose bytes pass through this machine. */
export type SourceSpec =
  | { readonly file: string }
  | { readonly ova: string; readonly disk?: DiskChoice }
  | (WebSpec & { readonly disk?: DiskChoice });

export interface SourceOptions {
  /** The user's own digest of the file that is named, as it lies there: `sha256:<hex>`, or the URL of a list of digests. */
  readonly checksum?: string | undefined;
  /** Has the bytes taken for this format. */
  readonly format?: ImageFormat;
  /** Where temporary copies lie. Default: the system's temporary folder. */
  readonly scratchFolder?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** How long a web server may be silent. Default 60,000. */
  readonly silenceMs?: number | undefined;
  /** For a preview: the digest of a whole package is not compared. Default false. */
  readonly isPreview?: boolean;
  /** What answers for the declared file and those beside it. Default: this machine, or the URL's server. */
  readonly folder?: Folder;
}

/** An open source. Close it with `await using`. */
export interface OpenSource extends AsyncDisposable {
  /** The path as declared; of a URL, without its query. */
  readonly path: string;
  readonly image: DiskImage;
  /** The files of `image.files`, in the same order. */
  readonly files: readonly SourceFile[];
  /** The machine that the disk was packed with, and which of its disks it is; undefined outside of an OVA or OVF. */
  readonly packed: { readonly package: OvfPackage; readonly disk: PackagedDisk } | undefined;
  /** Whether a digest, the user's or a manifest's, covers all of its bytes. */
  readonly isVouched: boolean;
  /** Sentences for the user: what the parsers noted, and what was staged. */
  readonly notes: readonly string[];
  /** Reads the image's tables: what lies where in the files. Throws DiskError (step "header") when they are refused. */
  runs(): Promise<RunList>;
  /** Throws DiskError (step "source") when a file was written, replaced or cut since it was opened. */
  assertUnchanged(): Promise<void>;
}

/** What can be said, without a long read, of a source that is copied to a temporary file before it is imported. */
export interface StagedOutlook {
  readonly path: string;
  /** The image inside, as far as its first bytes tell; undefined where they do not. */
  readonly image: { readonly format: ImageFormat; readonly variant: string; readonly virtualSizeBytes: number } | undefined;
  /** What is read of the file as it lies there; undefined where a server does not say. */
  readonly fileBytes: number | undefined;
  /** What vouches for the bytes. */
  readonly expected: Digest | undefined;
  readonly notes: readonly string[];
}

/**
 * Opens a source and parses its header. What is wrapped, and what a server gives no ranges of, is first copied into a temporary file without a name,
 * which may take long: `lookAhead` tells before whether it will.
 *
 * Without `checksum` an OVF manifest's digest counts. Throws DiskError: step "source" when a file cannot be read or has another digest, step "header"
 * when its bytes are refused; ConnectionError when a server cannot be reached.
 */
export async function openSource(spec: SourceSpec, options: SourceOptions = {}): Promise<OpenSource> {
  const opening = new Opening(spec, options);
  try {
    return await opening.open();
  } catch (error) {
    await opening.close();
    throw refused(opening.path, error);
  }
}

/** What is known beforehand of a source that has to be staged; undefined when it has not, and `openSource` is quick. Throws as `openSource` does. */
export async function lookAhead(spec: SourceSpec, options: SourceOptions = {}): Promise<StagedOutlook | undefined> {
  const opening = new Opening(spec, options);
  try {
    return await opening.lookAhead();
  } catch (error) {
    throw refused(opening.path, error);
  } finally {
    await opening.close();
  }
}

/** The source as messages and stamps name it: no query, no header. */
export function shownSource(spec: SourceSpec): string {
  if ("url" in spec) return shownUrl(spec.url);
  return "file" in spec ? spec.file : spec.ova;
}

function refused(path: string, error: unknown): unknown {
  return error instanceof ImageError ? new DiskError(`${path}: ${error.message}`, { step: "header", path, cause: error }) : error;
}

/** A range, and what was done to have it. */
interface Ready {
  readonly range: Range;
  readonly wrappedDigest?: string;
}

/** Why a range is staged. */
interface Need {
  readonly wrapping: Wrapping | undefined;
}

/** A file, and where those lie that its image may name; undefined where it is packed alone. */
interface Found {
  readonly range: Range;
  readonly beside: Folder | undefined;
}

/** What a look at a wrapped or packed file brings. */
interface Glimpse {
  /** Why it is staged, the beginning of a sentence. */
  readonly why: string;
  readonly bytes: Buffer;
  readonly isWhole: boolean;
  /** How large it says to be inside. */
  readonly declaredBytes: number | undefined;
  /** Answers for other files of the image. */
  readonly beside?: Resolve;
}

/** The way from a declaration to an image, and all that is opened on it. */
class Opening {
  readonly path: string;
  readonly #spec: SourceSpec;
  readonly #options: SourceOptions;
  readonly #folder: Folder;
  readonly #staged: { close(): Promise<void> }[] = [];
  readonly #notes: string[] = [];

  constructor(spec: SourceSpec, options: SourceOptions) {
    this.#spec = spec;
    this.#options = options;
    this.path = shownSource(spec);
    this.#folder = options.folder ?? ("url" in spec ? new WebFolder(spec, options) : new LocalFolder(this.path));
  }

  async close(): Promise<void> {
    await this.#folder.close();
    for (const staged of this.#staged) await staged.close();
  }

  async open(): Promise<OpenSource> {
    const declared = await this.#declaredDigest();
    const file = await this.#folder.file("");
    const need = await this.#needOf(file, declared);
    const outer: Ready = need ? await this.#stage(file, need, declared) : { range: file };
    const zip = await this.#openZip(outer.range);
    const found: Found = zip ? { range: await zip.file(""), beside: zip } : { range: outer.range, beside: need ? undefined : this.#folder };
    const isPackage = await this.#isPackage(found.range, zip !== undefined);
    const isPacked = isPackage || zip !== undefined;
    if (isPacked && !need && declared && !this.#options.isPreview) await digestOf(file, declared, this.#options.signal);
    const inside = isPackage ? await this.#unpack(found) : undefined;
    const disk = isPacked ? await this.#unwrapMember(inside?.disk ?? found.range, inside?.digest) : outer;
    const resolve = this.#resolver(disk.range, inside || disk.range !== found.range ? undefined : found.beside);
    const format = this.#options.format;
    const image = await drive(openImage({ sizeBytes: disk.range.sizeBytes, ...(format && { format }) }), resolve);
    const isCompared = isPacked || need !== undefined;
    const files: SourceFile[] = [];
    for (const { name } of image.files) {
      const range = await resolve(name);
      const isDisk = name === "";
      const expected = inside
        ? disk.wrappedDigest === undefined
          ? inside.digest
          : undefined
        : isDisk && !isCompared
          ? declared
          : undefined;
      files.push({
        name: range.name,
        sizeBytes: range.sizeBytes,
        allocatedBytes: range.allocatedBytes,
        expected,
        wrappedDigest: isDisk ? disk.wrappedDigest : undefined,
        read: (offset, length) => range.read(offset, length),
        dataExtents: () => range.dataExtents(),
      });
    }
    return {
      path: this.path,
      image,
      files,
      packed: inside?.packed,
      isVouched:
        files.every((each) => each.expected !== undefined) || (declared !== undefined && isCompared) || inside?.digest !== undefined,
      notes: [...this.#notes, ...image.notes],
      runs: async () => {
        try {
          return await drive(image.runs(), resolve);
        } catch (error) {
          throw refused(this.path, error);
        }
      },
      assertUnchanged: () => this.#folder.assertUnchanged(),
      [Symbol.asyncDispose]: () => this.close(),
    };
  }

  async lookAhead(): Promise<StagedOutlook | undefined> {
    const declared = await this.#declaredDigest();
    const file = await this.#folder.file("");
    const need = await this.#needOf(file, declared);
    if (need) return this.#outlook(file, await this.#glimpse(file, need), declared);
    const zip = await this.#openZip(file);
    const found: Found = zip ? { range: await zip.file(""), beside: zip } : { range: file, beside: this.#folder };
    if (zip && !isDescriptorName(found.range.name)) return this.#outlook(found.range, await this.#glimpseInZip(zip, found.range), declared);
    if (!(await this.#isPackage(found.range, zip !== undefined))) return undefined;
    const { disk, digest } = await this.#unpack(found);
    if (zip) return this.#outlook(disk, await this.#glimpseInZip(zip, disk), declared ?? digest);
    const wrapping = await findWrapping(disk);
    return wrapping && this.#outlook(disk, await this.#glimpse(disk, { wrapping }), declared ?? digest);
  }

  /** Why the declared file cannot be read as it lies there; undefined when it can. */
  async #needOf(file: Range, declared: Digest | undefined): Promise<Need | undefined> {
    const wrapping = this.#options.format === "raw" ? undefined : await findWrapping(file);
    // Of a package only one member is read: where its whole digest is to be compared, it is fetched whole.
    const isWholeWanted =
      "url" in this.#spec && declared !== undefined && ((await this.#isPackage(file, false)) || (await this.#isZip(file)));
    return wrapping !== undefined || file.isForwardOnly || isWholeWanted ? { wrapping } : undefined;
  }

  async #glimpse(range: Range, { wrapping }: Need): Promise<Glimpse> {
    const folder = this.#scratchFolder;
    const roomBytes = await scratchRoom(folder);
    const { bytes, isWhole } = await peekInside(range, wrapping);
    const declaredBytes = wrapping === undefined ? range.knownSizeBytes : await declaredInside(range, wrapping);
    if (wrapping === undefined && declaredBytes !== undefined && declaredBytes > roomBytes) {
      throw new DiskError(
        `${this.path} is copied to ${folder} first, which takes ${formatBytes(declaredBytes)} where ${formatBytes(roomBytes)} may be used: make room, or name another folder in the configuration virtlift:scratch`,
        { step: "source", path: this.path },
      );
    }
    const why =
      wrapping === undefined
        ? "the server gives no ranges, or the checksum of a whole package is to be compared"
        : `it is wrapped in ${wrapping}`;
    return { why, bytes, isWhole, declaredBytes };
  }

  async #glimpseInZip(zip: ZipFolder, range: Range): Promise<Glimpse> {
    const peek = await zip.peek(range.name);
    const beside: Resolve = async (name) => {
      const { sizeBytes } = await zip.file(name);
      return new Range(name, { sizeBytes }, { readAt: readAhead((await zip.peek(name)).bytes) });
    };
    return { why: "it is packed in a zip archive", ...peek, declaredBytes: range.sizeBytes, beside };
  }

  async #outlook(range: Range, glimpse: Glimpse, vouched: Digest | undefined): Promise<StagedOutlook> {
    const { why, bytes, isWhole, declaredBytes, beside } = glimpse;
    const sizeBytes = isWhole ? bytes.length : declaredBytes;
    const size = sizeBytes === undefined ? "of a size that shows then" : `of up to ${formatBytes(sizeBytes)}`;
    return {
      path: this.path,
      image: await imageAhead(bytes, sizeBytes, isWhole, beside),
      fileBytes: range.knownSizeBytes,
      expected: vouched,
      notes: [...this.#notes, `${why}: a temporary copy ${size} lies in ${this.#scratchFolder} during the import`],
    };
  }

  async #declaredDigest(): Promise<Digest | undefined> {
    const { checksum } = this.#options;
    if (checksum === undefined) return undefined;
    const name = "url" in this.#spec ? urlFileName(this.#spec.url) : this.path.slice(this.path.lastIndexOf("/") + 1);
    return resolveChecksum(checksum, name, this.#options);
  }

  get #scratchFolder(): string {
    return this.#options.scratchFolder ?? tmpdir();
  }

  async #isPackage(range: Range, isInZip: boolean): Promise<boolean> {
    if ("ova" in this.#spec && !isInZip) return true;
    const isLookedAt = isInZip || "url" in this.#spec;
    return isLookedAt && (isDescriptorName(range.name) || isTar(await range.readCached(0, TAR_SNIFF_BYTES)));
  }

  async #isZip(range: Range): Promise<boolean> {
    return this.#options.format !== "raw" && isZip(await range.readCached(0, ZIP_MAGIC_BYTES));
  }

  /** undefined when the range is no zip archive. */
  async #openZip(range: Range): Promise<ZipFolder | undefined> {
    if (!(await this.#isZip(range))) return undefined;
    const wanted = "file" in this.#spec ? undefined : this.#spec.disk;
    const zip = await ZipFolder.open(range, wanted, { scratchFolder: this.#scratchFolder, signal: this.#options.signal });
    this.#staged.push(zip);
    return zip;
  }

  async #stage(range: Range, { wrapping }: Need, expected: Digest | undefined): Promise<Ready> {
    const { signal } = this.#options;
    const staged = await stage(range.name, chunksOf(range), { folder: this.#scratchFolder, packing: wrapping, expected, signal });
    this.#staged.push(staged);
    return { range: staged.range, wrappedDigest: staged.digest };
  }

  /** What an OVF calls compressed, what is without a word, and what a zip archive holds besides. */
  async #unwrapMember(member: Range, expected: Digest | undefined): Promise<Ready> {
    const wrapping = await findWrapping(member);
    return wrapping ? this.#stage(member, { wrapping }, expected) : { range: member };
  }

  /** The wanted disk of a machine in an OVA, or in an OVF beside its files. */
  async #unpack({ range: archive, beside = this.#folder }: Found) {
    const wanted = "file" in this.#spec ? undefined : this.#spec.disk;
    const locate: Resolve = (name) => (name === "" ? Promise.resolve(archive) : beside.file(name));
    const isDescriptor = isDescriptorName(archive.name);
    const machine = await drive(isDescriptor ? openOvf(archive.name, archive.sizeBytes) : openOva(archive.sizeBytes), locate);
    const disk = selectDisk(machine.disks, wanted);
    const { place, digest } = disk;
    this.#notes.push(...machine.notes);
    const range = (await locate(place.file)).slice(place.name, place.offset, place.sizeBytes);
    return { disk: range, digest, packed: { package: machine, disk } };
  }

  /** Answers for the image and, where they lie beside it, the files that it names. */
  #resolver(disk: Range, beside: Folder | undefined): Resolve {
    return async (name) => {
      if (name === "" || name === disk.name) return disk;
      if (beside) return beside.file(name);
      throw partial(disk.name);
    };
  }
}

function partial(name: string): ImageError {
  return new ImageError(`${name} is only a part of a disk: what is packed or wrapped holds each disk in one file`);
}

function isDescriptorName(name: string): boolean {
  return name.toLowerCase().endsWith(".ovf");
}

/**
 * What the first bytes of a file tell about the image in it; undefined when it is a package, or goes on where they end. A fixed VHD, told by its last
 * bytes, shows as raw. `beside` answers for other files of the image; by default there are none.
 */
export async function imageAhead(
  bytes: Buffer,
  sizeBytes: number | undefined,
  isWhole: boolean,
  beside?: Resolve,
): Promise<StagedOutlook["image"]> {
  const parse = async (assumedBytes: number): Promise<StagedOutlook["image"]> => {
    const range = new Range("", { sizeBytes: assumedBytes }, { readAt: readAhead(bytes) });
    const resolve: Resolve = async (name) => {
      if (name === "") return range;
      if (beside) return beside(name);
      throw partial("it");
    };
    const { format, variant, virtualSizeBytes } = await drive(openImage({ sizeBytes: assumedBytes }), resolve);
    return { format, variant, virtualSizeBytes };
  };
  if (isTar(bytes) || isZip(bytes) || wrappingOf(bytes) !== undefined) return undefined;
  try {
    return await parse(isWhole ? bytes.length : (sizeBytes ?? Number.MAX_SAFE_INTEGER));
  } catch (error) {
    if (!(error instanceof BeyondPeek)) throw error;
  }
  // Where even the start alone, taken for all, is nothing but raw, only the size is left to know.
  const alone = await parse(bytes.length).catch(() => undefined);
  return alone?.format === "raw" && sizeBytes !== undefined ? { ...alone, virtualSizeBytes: sizeBytes } : undefined;
}

/** Reads the first bytes of a file of any size. */
function readAhead(bytes: Buffer): (offset: number, length: number) => Promise<Buffer> {
  return async (offset, length) => {
    if (offset + length > bytes.length) throw new BeyondPeek("the bytes are not at hand");
    return bytes.subarray(offset, offset + length);
  };
}

/** The header goes on where only the import will read. */
class BeyondPeek extends Error {}
