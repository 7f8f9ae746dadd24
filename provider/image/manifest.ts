/** Lists of digests: an OVF manifest, a SHA256SUMS file, and a digest as a user writes it. */
import { ImageError } from "./parser.ts";
import { quoted } from "./words.ts";

export type DigestAlgorithm = "sha1" | "sha256" | "sha512";

/** A digest as declared; `hex` is lower case and of the algorithm's length. */
export interface Digest {
  readonly algorithm: DigestAlgorithm;
  readonly hex: string;
}

/** File name to its digest. A leading `./` is taken off the names; otherwise they are as written, and only to be compared. */
export type Manifest = ReadonlyMap<string, Digest>;

/** The largest manifest that is read, in bytes. */
export const MAX_MANIFEST_BYTES = 1024 * 1024;

const HEX_LENGTHS: Readonly<Record<DigestAlgorithm, number>> = { sha1: 40, sha256: 64, sha512: 128 };

/** `SHA256(disk.vmdk)= 0a1b...`: OVF (DSP0243 2.1.1, section 5.1), openssl dgst (since 3.0 with `SHA2-256`), and BSD's sha256. */
const TAGGED = /^SHA(?:2?-)?(1|256|512) ?\((.+)\) ?= ?([0-9a-f]+)$/i;
/** `0a1b...  disk.vmdk`, or ` *disk.vmdk` when read as binary: sha256sum(1). */
const SUMS = /^([0-9a-f]+) [ *](.+)$/i;

/**
 * Reads a manifest: lines `SHA256(file)= hex` of an OVF package, or `hex  file` of coreutils, also mixed. Blank lines are skipped.
 *
 * Throws ImageError with the line's number on a line of another kind, a digest of a wrong length, and two digests that contradict each other.
 */
export function parseManifest(text: string): Manifest {
  if (text.length > MAX_MANIFEST_BYTES)
    throw new ImageError(`the manifest has ${text.length} characters; at most ${MAX_MANIFEST_BYTES} are read`);
  const digests = new Map<string, Digest>();
  for (const [index, raw] of text
    .replace(/^\uFEFF/, "")
    .split("\n")
    .entries()) {
    const line = raw.trim();
    if (line === "") continue;
    const entry = parseLine(line);
    if (entry === undefined) throw new ImageError(`line ${index + 1} of the manifest is no digest of a file: ${quoted(line)}`);
    const known = digests.get(entry.name);
    if (known !== undefined && known.algorithm === entry.digest.algorithm && known.hex !== entry.digest.hex)
      throw new ImageError(`line ${index + 1} of the manifest contradicts an earlier one about ${quoted(entry.name)}`);
    if (known === undefined || strength(entry.digest) > strength(known)) digests.set(entry.name, entry.digest);
  }
  return digests;
}

/** Reads a list of digests as servers keep them: as `parseManifest`, but lines of any other kind (comments, a signature around it) are skipped. */
export function parseDigestList(text: string): Manifest {
  return parseManifest(
    text
      .split("\n")
      .filter((line) => parseLine(line.trim()) !== undefined)
      .join("\n"),
  );
}

/** Reads a digest as a user declares it: `sha256:<hex>`, also sha1 and sha512, in any case. Throws ImageError saying what is wrong with it. */
export function parseDigest(text: string): Digest {
  const match = /^(sha1|sha256|sha512):([0-9a-f]+)$/i.exec(text.trim());
  const digest = match === null ? undefined : digestOf(match[1]!, match[2]!);
  if (digest === undefined)
    throw new ImageError(`the checksum ${quoted(text)} is not of the form sha256:<64 hex digits>, sha1:<40> or sha512:<128>`);
  return digest;
}

function parseLine(line: string): { readonly name: string; readonly digest: Digest } | undefined {
  const tagged = TAGGED.exec(line);
  if (tagged !== null) return named(tagged[2]!, digestOf(`sha${tagged[1]!}`, tagged[3]!));
  const sums = SUMS.exec(line);
  if (sums === null) return undefined;
  const algorithm = Object.entries(HEX_LENGTHS).find(([, length]) => length === sums[1]!.length)?.[0];
  return algorithm === undefined ? undefined : named(sums[2]!, digestOf(algorithm, sums[1]!));
}

function named(name: string, digest: Digest | undefined): { readonly name: string; readonly digest: Digest } | undefined {
  return digest === undefined ? undefined : { name: name.trim().replace(/^\.\//, ""), digest };
}

/** undefined when the hex has not the algorithm's length. */
function digestOf(word: string, hex: string): Digest | undefined {
  const algorithm = word.toLowerCase();
  if (!isAlgorithm(algorithm) || hex.length !== HEX_LENGTHS[algorithm]) return undefined;
  return { algorithm, hex: hex.toLowerCase() };
}

function isAlgorithm(word: string): word is DigestAlgorithm {
  return Object.hasOwn(HEX_LENGTHS, word);
}

function strength({ algorithm }: Digest): number {
  return HEX_LENGTHS[algorithm];
}
