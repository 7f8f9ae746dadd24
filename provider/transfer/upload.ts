/**
 * The second way in: a volume written through libvirt's upload stream. For hosts that give no shell, users who may not write the pool's folder, and
 * pools whose volumes are devices. The host computes no hash here: what was written is read back through libvirt and hashed on this side.
 *
 * libvirt renames no volume, so the volume has its final name from the beginning. What tells that it is unfinished, and whose it is, is a mark in its
 * first sector; the true one is written last, by a single write. libvirt makes no byte durable on demand: a host that loses its power within the
 * kernel's write-back time (half a minute) after the end of an import may lose some of the disk.
 */
import { createHash, type Hash } from "node:crypto";
import { posix } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { ConnectionError, DiskError, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { element, renderXml } from "../libvirt/render.ts";
import type { Libvirt, Upload } from "../libvirt/client.ts";
import { STORAGE_VOL_RESIZE, STORAGE_VOL_TRANSFER } from "../libvirt/constants.ts";
import type { StorageVol } from "../libvirt/procedures.ts";
import { FrameBuffer } from "./frame-buffer.ts";
import { type Part, pathTaken } from "./part.ts";
import { type Throttle, throttled } from "./throttle.ts";
import {
  encodeMark,
  hashVolume,
  HEAD_BYTES,
  lookAtVolume,
  MARK_BYTES,
  markInside,
  modificationTime,
  readVolume,
  refreshPool,
} from "./volume.ts";

/** What is compared and confirmed as one. */
const FRAME_BYTES = 16 * 1024 * 1024;

/** How long a volume must have been silent before it is taken over from a writer who may be alive, unless told otherwise. */
const TAKEOVER_PATIENCE_MS = 10_000;
/** A writer who was silent for this long makes sure that nobody took over before he goes on. */
const SILENCE_MS = 3000;
const WATCH_INTERVAL_MS = 500;

/** VIR_ERR_OPERATION_INVALID and VIR_ERR_STORAGE_VOL_EXIST of virterror.h: a file or a volume of that name is there. */
const NAME_TAKEN_CODES: ReadonlySet<number> = new Set([55, 90]);

export interface UploadOptions {
  /** Names the import: the same one goes on with its volume, another one never touches it. */
  readonly id: string;
  readonly pool: string;
  /** Absolute path of the volume-to-be; its last part is the volume's name. */
  readonly finalPath: string;
  /** Whether the pool's volumes are devices, which have their size from the beginning. */
  readonly isBlock: boolean;
  /** The size of the disk for its guest. */
  readonly capacityBytes: number;
  /** Who writes: the same value may open the volume again at once. At most 64 characters. */
  readonly writer: string;
  readonly signal: AbortSignal;
  /** Milliseconds of silence after which an unfinished volume counts as abandoned. Default 10,000. */
  readonly patienceMs?: number;
  /** Whether `writtenDigest` will be asked for. Default false. */
  readonly hashesAll?: boolean;
  /** What frames wait for. Default: nothing. */
  readonly throttle?: Throttle | undefined;
}

/**
 * Creates the volume, or takes up what an interrupted run of the same import left of it, on a connection of its own. Throws PathTaken when there is
 * a volume that is not this import's, DiskError when another writer is at it, LibvirtError or ConnectionError when libvirt refuses or is gone.
 */
export async function openUpload(host: Host, options: UploadOptions): Promise<VolumeUpload> {
  const connection = await host.openLibvirt();
  try {
    const libvirt = connection.withSignal(options.signal);
    const { volume, isResumed } = await claim(libvirt, host, options);
    return new VolumeUpload({ connection, libvirt, volume, isResumed, host, options });
  } catch (error) {
    await connection.close();
    throw error;
  }
}

async function claim(
  libvirt: Libvirt,
  host: Host,
  options: UploadOptions,
): Promise<{ readonly volume: StorageVol; readonly isResumed: boolean }> {
  // libvirt 9.0 misplaces the third partition of a disk that it did not look at again.
  const pool = await refreshPool(libvirt, options.pool);
  const name = posix.basename(options.finalPath);
  // A file that is all zeros and has this size can only be what an interrupted run had created and not yet marked.
  const birthBytes = options.isBlock ? options.capacityBytes : birthSizeBytes(options.id);
  let volume: StorageVol;
  let isResumed = false;
  try {
    volume = await libvirt.storageVolCreateXML(pool, volumeXml(name, birthBytes, options.isBlock));
  } catch (error) {
    if (!(error instanceof LibvirtError) || !NAME_TAKEN_CODES.has(error.code)) throw error;
    const seen = await lookAtVolume(libvirt, options.pool, name);
    if (seen === undefined) throw error;
    const isUnmarked = !seen.isBlock && seen.sizeBytes === birthBytes && seen.allocatedBytes === 0;
    if (seen.mark?.importId !== options.id && !isUnmarked) throw pathTaken(options.finalPath, host.label);
    if (seen.mark?.writer !== options.writer && seen.modifiedAt !== undefined) await awaitSilence(libvirt, host, seen.volume, options);
    volume = seen.volume;
    isResumed = true;
  }
  await writeAt(libvirt, volume, 0, encodeMark({ importId: options.id, writer: options.writer }));
  return { volume, isResumed };
}

function volumeXml(name: string, sizeBytes: number, isBlock: boolean): string {
  const bytes = { unit: "bytes" };
  return renderXml(
    element(
      "volume",
      {},
      element("name", {}, name),
      element("capacity", bytes, String(sizeBytes)),
      element("allocation", bytes, String(isBlock ? sizeBytes : 0)),
      ...(isBlock ? [] : [element("target", {}, element("format", { type: "raw" }))]),
    ),
  );
}

/** An odd number below 2^24 that stands for the import: no disk has such a size. */
function birthSizeBytes(id: string): number {
  return createHash("sha256").update(id).digest().readUIntBE(0, 3) | 1;
}

/** Waits until nobody has written to the volume for a while. Throws DiskError when somebody does. */
async function awaitSilence(libvirt: Libvirt, host: Host, volume: StorageVol, options: UploadOptions): Promise<void> {
  const before = await modificationTime(libvirt, volume);
  const deadline = Date.now() + (options.patienceMs ?? TAKEOVER_PATIENCE_MS);
  while (Date.now() < deadline) {
    await sleep(Math.min(WATCH_INTERVAL_MS, deadline - Date.now()), undefined, { signal: options.signal });
    if ((await modificationTime(libvirt, volume)) === before) continue;
    throw new DiskError(
      `another import is writing ${options.finalPath} on ${host.label} right now: let it end or stop it, then run up again`,
      { step: "transfer", path: options.finalPath },
    );
  }
}

async function writeAt(libvirt: Libvirt, volume: StorageVol, offset: number, bytes: Uint8Array): Promise<void> {
  const upload = await libvirt.storageVolUpload(volume, offset, bytes.length);
  await upload.write(bytes);
  await upload.finish();
}

/** A range of the volume. */
interface Extent {
  readonly offset: number;
  readonly lengthBytes: number;
}

/** An open volume-to-be. One frame is held, and the volume's first 64 KiB. */
export class VolumeUpload implements Part {
  readonly #connection: Libvirt;
  readonly #libvirt: Libvirt;
  readonly #volume: StorageVol;
  readonly #isResumed: boolean;
  readonly #host: Host;
  readonly #options: UploadOptions;
  /** The volume's beginning: it takes the mark's place at the end. */
  readonly #head = Buffer.alloc(HEAD_BYTES);
  readonly #frames = new FrameBuffer(FRAME_BYTES);
  #written: Hash | undefined;
  #stream: { readonly upload: Upload; position: number } | undefined;
  /** All that is in its place, by frames and holes. */
  readonly #placed: Extent[] = [];
  #placedEnd = 0;
  /** Frames that were sent and not yet read back. */
  #unconfirmed: (Extent & { readonly digest: string })[] = [];
  /** Whether what an earlier run wrote has been the same so far. */
  #isComparing: boolean;
  /** Where the volume ends, as far as it is known. */
  #endBytes = 0;
  #lastWriteMs = performance.now();
  #isPublished = false;
  #sentBytes = 0;
  #keptBytes = 0;

  constructor(given: {
    readonly connection: Libvirt;
    readonly libvirt: Libvirt;
    readonly volume: StorageVol;
    readonly isResumed: boolean;
    readonly host: Host;
    readonly options: UploadOptions;
  }) {
    this.#connection = given.connection;
    this.#libvirt = given.libvirt;
    this.#volume = given.volume;
    this.#isResumed = given.isResumed;
    this.#isComparing = given.isResumed;
    this.#host = given.host;
    this.#options = given.options;
    this.#written = given.options.hashesAll === true ? createHash("sha256") : undefined;
  }

  get sentBytes(): number {
    return this.#sentBytes;
  }

  get keptBytes(): number {
    return this.#keptBytes;
  }

  /** Nothing to learn: what is there is read when its turn comes. */
  async resume(): Promise<void> {}

  async write(offset: number, bytes: Uint8Array): Promise<void> {
    const inHead = Math.min(bytes.length, Math.max(0, HEAD_BYTES - offset));
    this.#head.set(bytes.subarray(0, inHead), inHead > 0 ? offset : 0);
    this.#endBytes = Math.max(this.#endBytes, offset + bytes.length);
    this.#written?.update(bytes);
    for (let at = inHead; at < bytes.length;) {
      at += this.#frames.add(offset + at, bytes.subarray(at));
      if (at < bytes.length || this.#frames.isFull) await this.#flush();
    }
  }

  async settle(): Promise<void> {
    await this.#flush();
    await this.#explained(async () => {
      await this.#closeStream();
      for (const { offset, lengthBytes, digest } of this.#unconfirmed) {
        if ((await hashVolume(this.#libvirt, this.#volume, offset, lengthBytes)).digest !== digest)
          throw this.#differs(offset, lengthBytes);
      }
      this.#unconfirmed = [];
    });
  }

  async setSize(sizeBytes: number): Promise<void> {
    await this.settle();
    await this.#explained(async () => {
      const { allocation: deviceBytes } = await this.#libvirt.storageVolGetInfo(this.#volume);
      if (!this.#options.isBlock) await this.#truncate(sizeBytes);
      this.#endBytes = this.#options.isBlock ? deviceBytes : sizeBytes;
      for (const gap of this.#gaps()) await this.#clear(gap);
      await this.#closeStream();
    });
  }

  async allocate(sizeBytes: number): Promise<void> {
    await this.setSize(sizeBytes);
    if (this.#options.isBlock) return;
    await this.#explained(() => this.#libvirt.storageVolResize(this.#volume, sizeBytes, STORAGE_VOL_RESIZE.allocate));
  }

  /** The volume's beginning counts as it will be. */
  async digest(offset: number): Promise<string> {
    const hash = createHash("sha256").update(this.#head.subarray(offset, Math.min(HEAD_BYTES, this.#endBytes)));
    const start = Math.max(offset, HEAD_BYTES);
    if (this.#endBytes <= start) return hash.digest("hex");
    return this.#explained(async () => (await hashVolume(this.#libvirt, this.#volume, start, this.#endBytes - start, hash)).digest);
  }

  async writtenDigest(): Promise<string> {
    const hash = this.#written;
    if (hash === undefined) throw new Error("the upload was not opened to hash all that is written");
    this.#written = undefined;
    return hash.digest("hex");
  }

  /** There is no place for it: a raw volume that came this way is known by the resource's state alone. */
  async stamp(): Promise<void> {}

  /** libvirt gives no way to set the time: that of the mark, written anew, is at most some milliseconds before that of the last write. */
  async closingTime(): Promise<number> {
    return this.#explained(async () => {
      await this.#assertOwner();
      await writeAt(this.#libvirt, this.#volume, 0, encodeMark({ importId: this.#options.id, writer: this.#options.writer }));
      return Math.floor(Number(await modificationTime(this.#libvirt, this.#volume))) - 0.5;
    });
  }

  /** Writes the volume's beginning, its first sector last. */
  async publish(): Promise<{ readonly allocatedBytes: number }> {
    await this.settle();
    return this.#explained(async () => {
      await this.#assertOwner();
      if (!this.#options.isBlock) await this.#truncate(this.#endBytes);
      const head = this.#head.subarray(0, Math.min(HEAD_BYTES, this.#endBytes));
      for (const part of [head.subarray(MARK_BYTES), head.subarray(0, MARK_BYTES)]) {
        if (part.length === 0) continue;
        const offset = part.byteOffset - head.byteOffset;
        await writeAt(this.#libvirt, this.#volume, offset, part);
        this.#sentBytes += part.length;
        if (!(await readVolume(this.#libvirt, this.#volume, offset, part.length)).equals(part)) throw this.#differs(offset, part.length);
      }
      this.#isPublished = true;
      await refreshPool(this.#libvirt, this.#options.pool);
      const { allocation } = await this.#libvirt.storageVolGetInfo(this.#volume);
      return { allocatedBytes: allocation };
    });
  }

  /** Removes the volume when it is still unfinished and this writer's. */
  async discard(): Promise<void> {
    if (this.#isPublished) return;
    await this.#stream?.upload.abort();
    this.#stream = undefined;
    await this.#explained(async () => {
      await this.#assertOwner();
      await this.#libvirt.storageVolDelete(this.#volume);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#connection.close();
  }

  async #flush(): Promise<void> {
    const frame = this.#frames.take();
    if (frame === undefined) return;
    const { offset, bytes } = frame;
    const extent = { offset, lengthBytes: bytes.length };
    const digest = createHash("sha256").update(bytes).digest("hex");
    await this.#explained(async () => {
      if (this.#isComparing) {
        const there = await hashVolume(this.#libvirt, this.#volume, offset, bytes.length);
        if (there.lengthBytes === bytes.length && there.digest === digest) {
          this.#keptBytes += bytes.length;
          this.#place(extent);
          return;
        }
        this.#isComparing = false;
      }
      if (this.#options.isBlock || performance.now() - this.#lastWriteMs > SILENCE_MS) await this.#assertOwner();
      const stream = await this.#streamAt(offset);
      for await (const piece of throttled(bytes, this.#options.throttle, this.#options.signal)) await stream.upload.write(piece);
      stream.position += bytes.length;
      this.#lastWriteMs = performance.now();
      this.#sentBytes += bytes.length;
      this.#place(extent);
      this.#unconfirmed.push({ ...extent, digest });
    });
    this.#frames.release(frame);
  }

  /** A stream that stands at `offset`. */
  async #streamAt(offset: number): Promise<{ readonly upload: Upload; position: number }> {
    const open = this.#stream;
    if (open?.position === offset) return open;
    // In a file a hole cuts off all that lies behind it. Source: virfdstream.c virFDStreamThreadDoWrite.
    if (open !== undefined && open.position < offset && open.position >= this.#placedEnd) {
      const lengthBytes = offset - open.position;
      await open.upload.hole(lengthBytes);
      if (this.#options.isBlock) this.#place({ offset: open.position, lengthBytes });
      open.position = offset;
      return open;
    }
    await this.#closeStream();
    const upload = await this.#libvirt.storageVolUpload(this.#volume, offset, 0, STORAGE_VOL_TRANSFER.sparse);
    this.#stream = { upload, position: offset };
    return this.#stream;
  }

  #place(extent: Extent): void {
    this.#placed.push(extent);
    this.#placedEnd = Math.max(this.#placedEnd, extent.offset + extent.lengthBytes);
  }

  async #closeStream(): Promise<void> {
    const open = this.#stream;
    this.#stream = undefined;
    await open?.upload.finish();
  }

  /** What nobody has written, from the head to the end. */
  *#gaps(): Generator<Extent, void> {
    let at = HEAD_BYTES;
    for (const { offset, lengthBytes } of this.#placed.toSorted((a, b) => a.offset - b.offset)) {
      if (offset > at) yield { offset: at, lengthBytes: offset - at };
      at = Math.max(at, offset + lengthBytes);
    }
    if (this.#endBytes > at) yield { offset: at, lengthBytes: this.#endBytes - at };
  }

  /**
   * Makes zeros of a gap: a device has old content there, a resumed file perhaps that of another version of the source.
   * In a device libvirt writes the zeros of a hole itself. Source: NEWS of libvirt 6.7.0.
   */
  async #clear({ offset, lengthBytes }: Extent): Promise<void> {
    if (this.#options.isBlock) {
      const upload = await this.#libvirt.storageVolUpload(this.#volume, offset, lengthBytes, STORAGE_VOL_TRANSFER.sparse);
      await upload.hole(lengthBytes);
      await upload.finish();
      return;
    }
    if (!this.#isResumed) return;
    let at = offset;
    for await (const piece of await this.#libvirt.storageVolDownload(this.#volume, offset, lengthBytes, STORAGE_VOL_TRANSFER.sparse)) {
      const length = "data" in piece ? piece.data.length : piece.hole;
      if ("data" in piece && piece.data.some((byte) => byte !== 0)) {
        const { upload } = await this.#streamAt(at);
        await upload.write(new Uint8Array(length));
        this.#stream!.position += length;
      }
      at += length;
    }
  }

  /** Sets a file's size by the hole that ends there: StorageVolResize shrinks none below what it has allocated. Source: virfdstream.c virFDStreamThreadDoWrite. */
  async #truncate(sizeBytes: number): Promise<void> {
    const upload = await this.#libvirt.storageVolUpload(this.#volume, sizeBytes - 1, 1, STORAGE_VOL_TRANSFER.sparse);
    await upload.hole(1);
    await upload.finish();
  }

  /** Throws ConnectionError when another writer has taken over: then nothing here may be touched any more. */
  async #assertOwner(): Promise<void> {
    const mark = markInside(await readVolume(this.#libvirt, this.#volume, 0, MARK_BYTES));
    if (mark?.importId === this.#options.id && mark.writer === this.#options.writer) return;
    throw new ConnectionError(
      `another import has taken over ${this.#options.finalPath} on ${this.#host.label}: let it end, then run up again`,
      {
        host: this.#host.label,
        phase: "aborted",
      },
    );
  }

  #differs(offset: number, lengthBytes: number): DiskError {
    const { finalPath } = this.#options;
    return new DiskError(
      `${finalPath} on ${this.#host.label} does not hold the bytes that were sent (${lengthBytes} at ${offset}): its storage or memory is faulty`,
      { step: "verify", path: finalPath },
    );
  }

  async #explained<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof LibvirtError)) throw error;
      const { finalPath } = this.#options;
      throw new DiskError(`cannot write ${finalPath}: ${error.message}`, { step: "transfer", path: finalPath, cause: error });
    }
  }
}
