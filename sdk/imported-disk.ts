/** The class of a disk that is imported into a libvirt storage pool. It declares only: `provider/resources/imported-disk.ts` does the work. */
import * as pulumi from "@pulumi/pulumi";
import type { z } from "zod";
import type { DiskRef, ImportedDiskSchema } from "../provider/resources/schema.ts";
import { type Host, type Later, originOf, type Outputs, withSecrets } from "./values.ts";

// Type and text are in every state that was ever stored: neither can change.
const TYPE = "pulumi-nodejs:dynamic/virtlift:ImportedDisk";
const PROVIDER = 'exports.handler = () => require("virtlift/provider").importedDisk;';

type Declared = z.input<typeof ImportedDiskSchema>;

/** What to import, and where to. */
export type ImportedDiskArgs = { readonly [Key in keyof Omit<Declared, "host" | "origin">]: Later<Declared[Key]> } & {
  /** The host that gets the disk: a libvirt URI, or an object with what a URI cannot say. Default: the stack's configuration `virtlift:host`. */
  readonly host?: Later<Host>;
};

/** What is known of an imported disk: its arguments as resolved, all of which preview knows, and what its import found. */
export interface ImportedDiskState extends Omit<z.output<typeof ImportedDiskSchema>, "origin"> {
  /** Names the disk for machines: the volume's name without its extension. Known in preview. */
  readonly diskId: string;
  /** Absolute path of the volume on the host. Known in preview. */
  readonly path: string;
  /** The volume's name in its pool. Known in preview. */
  readonly volumeName: string;
  /** A hash of what decides the disk's content; it changes when the disk is imported anew. Known in preview. */
  readonly declaration: string;
  /** The disk's size as the guest sees it. */
  readonly virtualSizeBytes: number;
  /** What the volume occupies on the host. */
  readonly allocatedBytes: number;
  /**
   * Digest of the source file as it was read: `sha256:<hex>`, or `sha256-data:<hex>` of the data alone where the file has over 1 GiB of holes and
   * nothing vouches for it: of its blocks of 64 KiB that are not all zeros, each behind its offset as 64 bits, big-endian.
   */
  readonly sourceDigest: string;
  /**
   * Digest of the volume's file as it was published: `sha256:<hex>`, of a qcow2 from its second cluster on; of a raw one with over 1 GiB of holes
   * `sha256-data:<hex>` as above, where its source gives its data in the disk's order.
   */
  readonly contentDigest: string;
  /** What was proved when it was imported: see `verify`. */
  readonly verified: "digest" | "content";
}

/** A property that is not named to Pulumi here never becomes an output of the object. */
const OUTPUTS: Readonly<Record<keyof ImportedDiskState, undefined>> = {
  allocatedBytes: undefined,
  capacity: undefined,
  checksum: undefined,
  contentDigest: undefined,
  declaration: undefined,
  diskId: undefined,
  format: undefined,
  host: undefined,
  layout: undefined,
  migrationRef: undefined,
  name: undefined,
  onDelete: undefined,
  path: undefined,
  pool: undefined,
  preflight: undefined,
  provenance: undefined,
  replaceWritten: undefined,
  source: undefined,
  sourceDigest: undefined,
  verified: undefined,
  verify: undefined,
  virtualSizeBytes: undefined,
  volumeName: undefined,
};

/** Where a disk keeps the making of its reference. Found by its name, so that a disk of another copy of this package is known too. */
const REF: unique symbol = Symbol.for("virtlift.ImportedDisk");

/**
 * What machines refer to a disk by: only what preview knows, also of a disk that exists. With any other output, and with one that may be absent,
 * the machine would seem to change whenever it is previewed.
 */
export type DiskReference = Readonly<Record<keyof DiskRef, pulumi.Input<unknown>>>;

// Pulumi assigns them all in its constructor, and the type of OUTPUTS keeps that list complete.
// oxlint-disable-next-line typescript/no-unsafe-declaration-merging
export interface ImportedDisk extends Outputs<ImportedDiskState> {}

/**
 * A disk image, from wherever it is, as a volume in a pool of a libvirt host: copied once, verified, and owned for its life.
 * `pulumi preview` reads the image's header and the host, and changes nothing.
 */
export class ImportedDisk extends pulumi.CustomResource {
  readonly [REF]: () => DiskReference;

  constructor(name: string, args: ImportedDiskArgs, options?: pulumi.CustomResourceOptions) {
    super(
      TYPE,
      name,
      {
        ...OUTPUTS,
        ...args,
        source: withSecretHeaders(args.source),
        host: withSecrets(args.host),
        origin: originOf(name),
        __provider: PROVIDER,
      },
      options,
    );
    const { diskId, path, format, pool, declaration, source, host } = this;
    this[REF] = () => ({
      diskId,
      path,
      format,
      pool,
      declaration,
      migrationRef: args.migrationRef,
      source: pulumi.unsecret(source).apply(kindOf),
      // Alone, as the host may hold a passphrase: a part of a secret is a secret, and so is all that it is in.
      host: pulumi.unsecret(host).apply(uriOf),
    });
  }

  /** Whether the value is a disk, of whichever copy of this package. */
  static override isInstance(value: unknown): value is ImportedDisk {
    return typeof value === "object" && value !== null && REF in value;
  }

  /** What the properties of machines take in place of the disk. */
  static refOf(disk: ImportedDisk): DiskReference {
    return disk[REF]();
  }
}

/** The source with the values of its headers marked as secrets, also where the program gave plain text. */
function withSecretHeaders(source: ImportedDiskArgs["source"]): pulumi.Input<unknown> {
  if (source instanceof Promise || pulumi.Output.isInstance(source))
    return pulumi.output(source).apply((known) => pulumi.output(withSecretHeaders(known)));
  return "headers" in source && source.headers !== undefined ? { ...source, headers: pulumi.secret(source.headers) } : source;
}

/** Which kind of source was declared: the key that only this kind has. */
function kindOf(source: object): string {
  return ["ova", "url", "hostPath", "volume"].find((kind) => kind in source) ?? "file";
}

/** A host that no provider has resolved, as under Pulumi's mocks, is as the program gave it. */
function uriOf(host: Host | undefined): pulumi.Input<string> | undefined {
  return typeof host === "string" ? host : host?.uri;
}
