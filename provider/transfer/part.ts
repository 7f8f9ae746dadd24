/** What an import writes into: a volume that is no disk yet. Its two kinds are a part file on the host and an upload through libvirt. */
import { DiskError } from "../errors.ts";

/** An open part. Not for concurrent use. Disposing lets go of it: what was not published or discarded stays for the next run. */
export interface Part extends AsyncDisposable {
  /** Bytes that went over the wire. */
  readonly sentBytes: number;
  /** Bytes that the host held already, proven by their hash. */
  readonly keptBytes: number;
  /** Takes up what an earlier run left. Call it before the first write. */
  resume(): Promise<unknown>;
  /** Writes bytes at an offset; the buffer is free again when the promise resolves. */
  write(offset: number, bytes: Uint8Array): Promise<void>;
  /** Resolves when all that was written is on the host and the hash of every frame was compared there. Throws DiskError (step "verify") when one differs. */
  settle(): Promise<void>;
  /** Sets the size of the part, for what ends in a hole: all that was not written is zeros. */
  setSize(sizeBytes: number): Promise<void>;
  /** As `setSize`, with all of its blocks allocated. */
  allocate(sizeBytes: number): Promise<void>;
  /** The SHA-256 of what the host holds from `offset` to the end, in hex. */
  digest(offset: number): Promise<string>;
  /** The SHA-256 in hex of all that was written so far, in the order in which it came. Once, after `settle`, of a part that was opened for it. */
  writtenDigest(): Promise<string>;
  /** Keeps a stamp beside the part, for formats that have no room for one, where there is a place for it. */
  stamp(stamp: Uint8Array): Promise<void>;
  /** Lets the host's own qemu-img read the disk, once it is whole and sealed. Absent where no program of ours may run on the host. */
  readGuest?(format: "qcow2" | "raw"): Promise<GuestOnHost>;
  /** The time for the stamp, in seconds since 1970: a whole one, which `publish` sets, or half of one, by which `isUntouched` knows that none can be set. */
  closingTime(): Promise<number>;
  /** Makes the volume of it, modified at `modifiedSeconds` where that can be set. Throws PathTaken when the path exists by now. */
  publish(modifiedSeconds: number): Promise<{ readonly allocatedBytes: number }>;
  /** Removes the part and all that belongs to it. */
  discard(): Promise<void>;
}

/** The guest's disk as the host's qemu-img reads it. */
export interface GuestOnHost {
  readonly sizeBytes: number;
  /** Where it may be other than zeros, ascending. */
  readonly extents: readonly { readonly offset: number; readonly lengthBytes: number }[];
  /** The SHA-256 of a range, in hex. */
  digest(offset: number, lengthBytes: number): Promise<string>;
}

/** Something of that name is there already, and it is not ours to overwrite. */
export class PathTaken extends DiskError {}

export function pathTaken(path: string, host: string): PathTaken {
  return new PathTaken(`${path} exists on ${host} and is not overwritten: choose another \`name\`, or remove it`, {
    step: "publish",
    path,
  });
}
