/** known_hosts(5), sshd(8) "SSH_KNOWN_HOSTS FILE FORMAT": whether a host's key is the one we know. Judging is pure; reading and adding touch files. */
import { createHash, createHmac, randomBytes } from "node:crypto";
import { mkdir, open, readFile, stat } from "node:fs/promises";
import { dirname } from "node:path";

const MAX_FILE_BYTES = 16 * 1024 * 1024;
const DEFAULT_PORT = 22;
const HASH_MAGIC = "|1|";
const SALT_BYTES = 20;

/** Key types and the signature algorithms that prove them, in the order in which they are offered. `ssh-rsa` (SHA-1) only for servers that know nothing better. */
const ALGORITHMS = [
  ["ssh-ed25519", ["ssh-ed25519"]],
  ["ecdsa-sha2-nistp256", ["ecdsa-sha2-nistp256"]],
  ["ecdsa-sha2-nistp384", ["ecdsa-sha2-nistp384"]],
  ["ecdsa-sha2-nistp521", ["ecdsa-sha2-nistp521"]],
  ["ssh-rsa", ["rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"]],
] as const;

export type HostKeyAlgorithm = (typeof ALGORITHMS)[number][1][number];

/** One line of a known_hosts file. */
export interface KnownHostLine {
  readonly marker: "revoked" | "cert-authority" | undefined;
  /** Patterns with a comma between them, or one hashed name. */
  readonly hosts: string;
  readonly keyType: string;
  /** base64, as in the file. */
  readonly key: string;
  /** `path:line`, for messages. */
  readonly place: string;
}

/** How known_hosts files call a host. */
export interface KnownHostName {
  /** What is looked for first and what is written down: `kvm1`, `[kvm1]:2222`, or the HostKeyAlias. */
  readonly name: string;
  /** The name without a port, where `name` has one: a key that is known for it is accepted too, as ssh does. */
  readonly plainName?: string;
}

/** What the files say about a key. `lines` are those that speak of the host and have another key. */
export type HostKeyVerdict =
  | { readonly kind: "known" }
  | { readonly kind: "unknown" }
  | { readonly kind: "revoked"; readonly place: string }
  | { readonly kind: "changed"; readonly lines: readonly KnownHostLine[] }
  | { readonly kind: "certificate-only"; readonly place: string };

/** Source: OpenSSH misc.c put_host_port and sshconnect.c get_hostfile_hostname_ipaddr: an alias has no port. */
export function knownHostName(host: string, port: number, alias?: string): KnownHostName {
  if (alias !== undefined) return { name: alias };
  const plainName = host.toLowerCase();
  return port === DEFAULT_PORT ? { name: plainName } : { name: `[${plainName}]:${port}`, plainName };
}

/** The lines of one file; comments, empty lines and lines that make no sense are left out, as ssh does. */
export function parseKnownHosts(text: string, path: string): readonly KnownHostLine[] {
  const lines: KnownHostLine[] = [];
  for (const [index, line] of text.split("\n").entries()) {
    const words = line.trim().split(/\s+/);
    if (words[0] === undefined || words[0] === "" || words[0].startsWith("#")) continue;
    const hasMarker = words[0].startsWith("@");
    const marker = words[0] === "@revoked" ? "revoked" : words[0] === "@cert-authority" ? "cert-authority" : undefined;
    if (hasMarker && marker === undefined) continue;
    const [hosts, keyType, key] = hasMarker ? words.slice(1) : words;
    if (hosts === undefined || keyType === undefined || key === undefined) continue;
    lines.push({ marker, hosts, keyType, key, place: `${path}:${index + 1}` });
  }
  return lines;
}

/**
 * Compares a host's public key (the SSH wire blob) with what is known.
 *
 * A key of a type that is not known, for a host of which other types are, is "changed": otherwise who pretends to be the host needs only another type.
 * Source: OpenSSH hostfile.c check_hostkeys_by_key_or_type, but for that.
 */
export function judgeHostKey(lines: readonly KnownHostLine[], host: KnownHostName, key: Buffer): HostKeyVerdict {
  const encoded = key.toString("base64");
  const speaking = lines.filter((line) => matchesHost(line.hosts, host.name));
  const plain = host.plainName === undefined ? [] : lines.filter((line) => matchesHost(line.hosts, host.plainName ?? ""));
  const revoked = [...speaking, ...plain].find((line) => line.marker === "revoked" && line.key === encoded);
  if (revoked !== undefined) return { kind: "revoked", place: revoked.place };
  const isSame = (line: KnownHostLine): boolean => line.marker === undefined && line.key === encoded;
  if (speaking.some(isSame)) return { kind: "known" };
  const others = speaking.filter((line) => line.marker === undefined);
  if (others.length > 0) return { kind: "changed", lines: others };
  if (plain.some(isSame)) return { kind: "known" };
  const authority = speaking.find((line) => line.marker === "cert-authority");
  return authority === undefined ? { kind: "unknown" } : { kind: "certificate-only", place: authority.place };
}

/** The algorithms to offer: those of the key types that are known for the host first, so that a server with several keys shows the known one. */
export function offeredAlgorithms(lines: readonly KnownHostLine[], host: KnownHostName): HostKeyAlgorithm[] {
  const knownTypes = new Set(
    lines
      .filter((line) => line.marker === undefined)
      .filter((line) => matchesHost(line.hosts, host.name) || (host.plainName !== undefined && matchesHost(line.hosts, host.plainName)))
      .map((line) => line.keyType),
  );
  const isKnown = ([type]: (typeof ALGORITHMS)[number]): boolean => knownTypes.has(type);
  return [...ALGORITHMS.filter(isKnown), ...ALGORITHMS.filter((each) => !isKnown(each))].flatMap(([, algorithms]) => [...algorithms]);
}

/** The algorithms by kind of key, to ask a server for one kind after the other. */
export function algorithmsByKind(): readonly HostKeyAlgorithm[][] {
  const ofKind = (prefix: string): HostKeyAlgorithm[] =>
    ALGORITHMS.filter(([type]) => type.startsWith(prefix)).flatMap(([, algorithms]) => [...algorithms]);
  return [ofKind("ssh-ed25519"), ofKind("ecdsa"), ofKind("ssh-rsa")];
}

/** `SHA256:...` as ssh-keygen -l prints it: unpadded base64 of the digest of the wire blob. */
export function fingerprintOf(key: Buffer): string {
  return `SHA256:${createHash("sha256").update(key).digest("base64").replaceAll("=", "")}`;
}

/** `ssh-ed25519` and the like: the first string of the wire blob (RFC 4253 6.6). A damaged blob has the type "unreadable". */
export function keyTypeOf(key: Buffer): string {
  const length = key.length >= 4 ? key.readUInt32BE(0) : 0;
  return length > 0 && length <= 64 && key.length >= 4 + length ? key.toString("latin1", 4, 4 + length) : "unreadable";
}

/** Reads the files that exist, in order. Throws Error on one that is larger than 16 MiB or may not be read: leaving out what it revokes would be unsafe. */
export async function readKnownHosts(paths: readonly string[]): Promise<readonly KnownHostLine[]> {
  const lines: KnownHostLine[] = [];
  for (const path of paths) {
    try {
      const { size } = await stat(path);
      if (size > MAX_FILE_BYTES) throw new Error(`${path} is larger than ${MAX_FILE_BYTES} bytes`);
      lines.push(...parseKnownHosts(await readFile(path, "utf8"), path));
    } catch (error) {
      // ENOENT: most users have one of the four default files.
      if (!(error instanceof Error && "code" in error && error.code === "ENOENT")) throw error;
    }
  }
  return lines;
}

/** Appends one line, in one write, to a file that is made when missing (mode 0600, its folder 0700). What the file holds stays as it is. */
export async function addKnownHost(path: string, host: KnownHostName, key: Buffer, hashed: boolean): Promise<void> {
  await mkdir(dirname(path), { recursive: true, mode: 0o700 });
  await using file = await open(path, "a+", 0o600);
  const { size } = await file.stat();
  const last = Buffer.alloc(1);
  if (size > 0) await file.read(last, 0, 1, size - 1);
  const separator = size > 0 && last[0] !== 0x0a ? "\n" : "";
  await file.appendFile(`${separator}${hashed ? hashName(host.name) : host.name} ${keyTypeOf(key)} ${key.toString("base64")}\n`);
}

function hashName(name: string): string {
  const salt = randomBytes(SALT_BYTES);
  return `${HASH_MAGIC}${salt.toString("base64")}|${createHmac("sha1", salt).update(name).digest("base64")}`;
}

/** Whether a line's host part means this name: hashed, or patterns of which one matches and no negated one does. */
function matchesHost(hosts: string, name: string): boolean {
  if (hosts.startsWith(HASH_MAGIC)) {
    const [salt, hash] = hosts.slice(HASH_MAGIC.length).split("|");
    return salt !== undefined && createHmac("sha1", Buffer.from(salt, "base64")).update(name).digest("base64") === hash;
  }
  let matched = false;
  for (const pattern of hosts.toLowerCase().split(",")) {
    if (pattern.startsWith("!") && matchesPattern(pattern.slice(1), name)) return false;
    matched ||= matchesPattern(pattern, name);
  }
  return matched;
}

/** `*` is any run of characters and `?` any one, as in OpenSSH's match.c. Linear but for one step back, so that no pattern can stall. */
function matchesPattern(pattern: string, name: string): boolean {
  let inPattern = 0;
  let inName = 0;
  let star = -1;
  let retry = 0;
  while (inName < name.length) {
    const wanted = pattern[inPattern];
    if (wanted === "*") {
      star = inPattern++;
      retry = inName;
    } else if (wanted === "?" || (wanted !== undefined && wanted === name[inName])) {
      inPattern++;
      inName++;
    } else if (star >= 0) {
      inPattern = star + 1;
      inName = ++retry;
    } else {
      return false;
    }
  }
  return /^\**$/.test(pattern.slice(inPattern));
}
