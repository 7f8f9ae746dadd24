/** The shapes of what users declare: hosts, sizes, sources, imported disks. The one source of types and documentation of arguments. */
import { z } from "zod";
import { shownUrl, urlFault } from "../transfer/http.ts";
import { PreflightSchema } from "./preflight/rule.ts";

const UNITS: Readonly<Record<string, number>> = {
  B: 1,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  TiB: 2 ** 40,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
};

/** Bytes of `40GiB`, `512 MB` or a number of bytes; undefined when it is no size. Units: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB (of 1000). */
export function parseSizeBytes(size: string | number): number | undefined {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$/.exec(String(size));
  const unit = UNITS[match?.[2] === "" ? "B" : (match?.[2] ?? "")];
  if (!match || unit === undefined) return undefined;
  const bytes = Number(match[1]) * unit;
  return Number.isSafeInteger(bytes) && bytes > 0 ? bytes : undefined;
}

/** A size as users write it, canonicalised to bytes. */
export const SizeSchema = z.union([z.number(), z.string()]).transform((size, context) => {
  const bytes = parseSizeBytes(size);
  if (bytes !== undefined) return bytes;
  context.addIssue({ code: "custom", message: `"${size}" is no size: give a number of bytes or a string such as "40GiB"` });
  return z.NEVER;
});

const HostObjectSchema = z.strictObject({
  /** A libvirt URI: `qemu:///system`, `qemu:///session`, `qemu+unix:///system?socket=/path`, `qemu+ssh://user@host:port/system`. */
  uri: z.string().min(1),
  /** Path of the private key for SSH. Default: what ssh_config and the agent offer. */
  identityFile: z.string().optional(),
  /** Passphrase of the identity file; a secret. */
  passphrase: z.string().optional(),
  /** Password of the login; a secret. */
  password: z.string().optional(),
  /** Path of a known_hosts file. Default: ssh_config's, else `~/.ssh/known_hosts` and `/etc/ssh/ssh_known_hosts`. */
  knownHostsFile: z.string().optional(),
  /** The only host key to accept, as `ssh-keygen -l` prints it: `SHA256:...`. */
  fingerprint: z.string().optional(),
  /** `strict` (default) accepts known host keys only; `accept-new` writes an unknown one down and refuses a changed one. */
  hostKeyPolicy: z.enum(["strict", "accept-new"]).optional(),
  /** `user@host:port` of the jump hosts, first hop first. Default: ssh_config's ProxyJump. */
  jumpHosts: z.array(z.string()).optional(),
  /** Run commands and libvirt's helper through `sudo -n`. Default false. */
  sudo: z.boolean().optional(),
});

/** A host: a libvirt URI, or an object with what a URI cannot say. Canonicalised to the object. */
export const HostSchema = z
  .union([z.string().min(1), HostObjectSchema])
  .transform((host) => (typeof host === "string" ? { uri: host } : host));

/** What a machine needs to know of a disk that it is made from. `ImportedDisk` maps itself to this; programs may write it by hand. */
export const DiskRefSchema = z.strictObject({
  /** The volume's name without its extension. */
  diskId: z.string().min(1),
  /** Absolute path on the host. Default: the pool's folder, then `<diskId>.<format>`. */
  path: z.string().optional(),
  /** Default `qcow2`. */
  format: z.enum(["qcow2", "raw"]).optional(),
  /** Where the disk lies. Default: the machine's host. */
  host: HostSchema.optional(),
  /** Default `default`. */
  pool: z.string().optional(),
  /** A hash of the declaration that made the disk: the machine's diff sees a re-import by it. */
  declaration: z.string().optional(),
  /** What the disk came from, for the machine's metadata. */
  source: z.string().optional(),
  /** The user's own name for the migration, for the machine's metadata. */
  migrationRef: z.string().optional(),
});
export type DiskRef = z.output<typeof DiskRefSchema>;

/** Names that are one plain file name: what libvirt and a directory pool both take. */
export const VolumeNameSchema = z
  .string()
  .regex(/^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$/, "a disk's name is 1 to 200 letters, digits and . _ + -, beginning with a letter or digit");

const FileSourceSchema = z.strictObject({
  /**
   * Path of a disk image on the machine that runs Pulumi: VMDK (also in several files), qcow2, raw, VHD, VHDX, VDI; also wrapped in gzip, xz or zstd,
   * or in a zip archive that holds one. Relative to the program's folder.
   */
  file: z.string().min(1),
  /** Path of the VMX of the machine that the disk belongs to, so that its preview says what is lost with that. Changes nothing of the disk. */
  vmx: z.string().min(1).optional(),
});
const OvaSourceSchema = z.strictObject({
  /** Path of an OVA, of an OVF beside its disks, or of a zip archive with such or with several disks, on the machine that runs Pulumi. */
  ova: z.string().min(1),
  /**
   * Which disk: its index in the hardware's order (controller, unit), from 0, or its file name; where a zip archive holds several disks and no OVF, the
   * index in the archive's order. Default: the only one.
   */
  disk: z.union([z.number().int().min(0), z.string().min(1)]).optional(),
});
const UrlSchema = z.string().superRefine((url, context) => {
  const fault = urlFault(url);
  if (fault !== undefined) context.addIssue({ code: "custom", message: `${shownUrl(url)} ${fault}` });
});
const UrlSourceSchema = z.strictObject({
  /** URL of a disk image or an OVA, `http:` or `https:`, read through the machine that runs Pulumi. A user and password in it are refused. */
  url: UrlSchema,
  /** Which disk of an OVA: as for `ova`. */
  disk: z.union([z.number().int().min(0), z.string().min(1)]).optional(),
  /** Headers that are sent to the URL's own origin, such as Authorization. Secrets; a change of them changes nothing of the disk. */
  headers: z
    .record(
      z.string().regex(/^[A-Za-z0-9!#$%&'*+.^_`|~-]+$/, "a header's name is a word"),
      z.string().regex(/^[\t\x20-\x7e]*$/, "a header's value is one line of ASCII"),
    )
    .optional(),
  /** Who fetches: `client` (default) the machine that runs Pulumi, `host` the host by its own curl, which trusts what its system trusts. An OVA, and what is wrapped, takes the client. */
  fetch: z.enum(["client", "host"]).default("client"),
  /** Path of a PEM file with certificates of authorities that are trusted besides the system's; for the client only. */
  caFile: z.string().min(1).optional(),
});
const HostPathSourceSchema = z.strictObject({
  /** Absolute path of an image, or of a block device, on the host itself. Its bytes do not leave the host. */
  hostPath: z.string().regex(/^\//, "a path on the host is absolute"),
  /**
   * `copy` (default) leaves the file alone. `move` makes the very file the volume: it must have the volume's format and lie on the pool's file system.
   * `adopt` takes a file of the pool's folder as it is and where it is; it is deleted with the disk only where `onDelete: "delete"` is declared.
   */
  mode: z.enum(["copy", "move", "adopt"]).default("copy"),
});
const VolumeSourceSchema = z.strictObject({
  /** Name of a volume of the host that is cloned. Its bytes do not leave the host. */
  volume: z.string().min(1),
  /** The pool that it is in. Default: the pool that the disk goes to. */
  pool: z.string().min(1).optional(),
});
/** Where a disk comes from: exactly one kind. */
export const SourceSchema = z.union([FileSourceSchema, OvaSourceSchema, UrlSourceSchema, HostPathSourceSchema, VolumeSourceSchema], {
  error: ({ input }) =>
    `source is exactly one of { file, vmx? }, { ova, disk? }, { url, disk?, headers?, fetch?, caFile? }, { hostPath, mode? } and { volume, pool? }, got ${keysOf(input)}`,
});

/** What was declared, without values: those of headers are secrets. */
function keysOf(input: unknown): string {
  return typeof input === "object" && input !== null ? `{ ${Object.keys(input).join(", ")} }` : typeof input;
}
export type Source = z.output<typeof SourceSchema>;

/** What is said of an origin that is none: of its parts a program chooses the last one. */
export const ORIGIN_FAULT =
  "the logical name of a resource is one line of plain text, as it becomes part of names on the host: give it another";

/** The arguments of `ImportedDisk`. */
export const ImportedDiskSchema = z.strictObject({
  /** The host that gets the disk. Default: the stack's configuration `virtlift:host`. */
  host: HostSchema,
  /** Where the disk comes from. */
  source: SourceSchema,
  /** A directory pool that exists and is active. Default `default`. */
  pool: z.string().min(1).default("default"),
  /** The volume's name without its extension. Default: the logical name and a short hash of the declaration, so that a changed declaration makes a new file. */
  name: VolumeNameSchema.optional(),
  /** The volume's format. Default `qcow2`. */
  format: z.enum(["qcow2", "raw"]).default("qcow2"),
  /** `sparse` (default) stores what is not zero; `compressed` (qcow2 only) keeps it deflated; `full` allocates all. */
  layout: z.enum(["sparse", "compressed", "full"]).default("sparse"),
  /** Grow the disk to this size on import; never less than the source's. Default: the source's virtual size. */
  capacity: SizeSchema.optional(),
  /**
   * Digest of the file that `source` names, as it lies there, wrapped or packed: `sha256:<hex>`, also sha1 and sha512; or the URL of a list of digests
   * (SHA256SUMS) in which the file's name stands. Default: the OVF manifest's, where there is one.
   */
  checksum: z
    .string()
    .regex(
      /^(sha1:[0-9a-fA-F]{40}|sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128}|https?:\/\/[^/@]+\/.*)$/,
      'a checksum is "sha256:" and 64 hex digits (or sha1, sha512), or the URL of a list of them without user and password',
    )
    .transform((checksum) => (checksum.startsWith("http") ? checksum : checksum.toLowerCase()))
    .optional(),
  /**
   * How the import is proved before the volume is published. `digest` (default): both ends hash what was sent. `content`: besides, the host's own qemu-img
   * reads the whole disk, and what its guest would see is compared with the source, read once more; for that time the host needs room for the disk's
   * data a second time. Changing it later proves nothing anew.
   */
  verify: z.enum(["digest", "content"]).default("digest"),
  /** What the disk is: kept in the volume and in the machine's metadata. Default `migration`. */
  provenance: z.enum(["migration", "clone", "import", "snapshot"]).default("migration"),
  /** The user's own name for this migration; at most 200 characters. */
  migrationRef: z.string().max(200).optional(),
  /** What `destroy` does with the volume. Default `delete`; for an adopted file `retain`. */
  onDelete: z.enum(["delete", "retain"]).default("delete"),
  /** Allow a changed declaration to replace a disk that was written since its import. Default false: it is refused. */
  replaceWritten: z.boolean().default(false),
  /** Rules of the preview that are to have another level, or none, for this disk: by id, each with a reason that is kept. Default: as the rules say. */
  preflight: PreflightSchema.optional(),
  /** `<organization>/<project>/<stack>/<logical name>`: set by the class, the identity of the disk on the host. */
  origin: z.string().regex(/^[^/]+\/[^/]+\/[^/]+\/.+$/, ORIGIN_FAULT),
});
