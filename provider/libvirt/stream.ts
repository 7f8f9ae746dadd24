/** The bytes that belong to one call: volumes up and down, consoles, screenshots. Knows packets, not procedures. */
import { Duplex } from "node:stream";
import { PACKET_STATUS, PACKET_TYPE, type Packet } from "./packet.ts";
import { decodeAll, encodeAll, int64, tuple, uint32, XdrError } from "./xdr.ts";

/** The most bytes of a volume in one packet: VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX, which every daemon takes. */
const MAX_CHUNK_BYTES = 262_120;

/** What has arrived and was not read: above the first the connection stops reading, below the second it goes on. */
const HIGH_WATER_BYTES = 2 * 1024 * 1024;
const LOW_WATER_BYTES = 512 * 1024;

/** virNetStreamHole: i64 length, u32 flags. */
const streamHole = tuple<[bigint, number]>(int64, uint32);

/** Data, or a number of bytes that are all zero and were not sent. */
export type Piece = { readonly data: Uint8Array } | { readonly hole: number };

/** What a stream needs of its connection. */
export interface StreamCarrier {
  /** Sends a packet of this stream, after all that was sent before. Does nothing when the connection has ended: `fail` was or will be called. */
  send(type: number, status: number, payload: Uint8Array): void;
  /** Resolves when more may be sent. Never settles when the connection ends first. */
  drained(): Promise<void>;
  /** While any stream holds it, the connection reads nothing. */
  hold(held: boolean): void;
  /** Nothing more will be sent, and nothing that arrives is expected. */
  release(): void;
  /** The error of an error packet. */
  errorOf(payload: Uint8Array): Error;
  /** The error of whoever waits when the stream is given up. */
  aborted(reason: unknown): Error;
}

interface Waiter<T> {
  readonly resolve: (value: T) => void;
  readonly reject: (error: Error) => void;
}

/**
 * One stream of a connection. It must be brought to its end by `finish` or `abort`, or it stays with the connection until that ends.
 *
 * A failure that the daemon reports (no space, I/O error) rejects whatever waits, and every later call but `abort`.
 */
export class CallStream {
  readonly #carrier: StreamCarrier;
  #state: "open" | "finishing" | "aborting" | "ended" = "open";
  #error: Error | undefined;
  /** The daemon said that no more data comes. */
  #isDrained = false;
  #isHeld = false;
  #arrived: Piece[] = [];
  #arrivedBytes = 0;
  #reader: Waiter<Piece | undefined> | undefined;
  readonly #writers = new Set<Waiter<void>>();
  readonly #closers = new Set<Waiter<void>>();

  constructor(carrier: StreamCarrier) {
    this.#carrier = carrier;
  }

  /** Sends all of `bytes`, which are copied; resolves when more may be written. Several writes keep their order. */
  async write(bytes: Uint8Array): Promise<void> {
    this.#assertOpen();
    for (let start = 0; start < bytes.length; start += MAX_CHUNK_BYTES) {
      this.#carrier.send(PACKET_TYPE.stream, PACKET_STATUS.continue, bytes.subarray(start, start + MAX_CHUNK_BYTES));
    }
    await this.#sent();
  }

  /** Skips bytes that are zero. Only for a stream that was opened as sparse: libvirt ends the connection at any other hole. */
  async hole(lengthBytes: number): Promise<void> {
    this.#assertOpen();
    if (lengthBytes > 0)
      this.#carrier.send(PACKET_TYPE.streamHole, PACKET_STATUS.continue, encodeAll(streamHole, [BigInt(lengthBytes), 0]));
    await this.#sent();
  }

  /** The next piece, undefined when no more comes. One read at a time. */
  async read(): Promise<Piece | undefined> {
    const piece = this.#arrived.shift();
    if (piece === undefined) {
      if (this.#error !== undefined) throw this.#error;
      if (this.#isDrained || this.#state !== "open") return undefined;
      return new Promise((resolve, reject) => {
        this.#reader = { resolve, reject };
      });
    }
    this.#arrivedBytes -= "data" in piece ? piece.data.length : 0;
    if (this.#arrivedBytes < LOW_WATER_BYTES) this.#hold(false);
    return piece;
  }

  /** Says that all is sent or read, and resolves when the daemon has agreed. Throws the failure that the daemon reports instead. */
  async finish(): Promise<void> {
    if (this.#error !== undefined) throw this.#error;
    if (this.#state === "ended") return;
    await this.#close("finishing", PACKET_STATUS.ok);
  }

  /** Gives the stream up, and resolves when the daemon has too, or the connection has ended. Whoever waits is rejected. May be called twice. */
  async abort(reason?: unknown): Promise<void> {
    if (this.#state === "ended") return;
    this.#error ??= this.#carrier.aborted(reason);
    this.#rejectWaiters(this.#error);
    this.#discard();
    await this.#close("aborting", PACKET_STATUS.error);
  }

  /** Takes a packet of this stream. */
  accept(packet: Packet): void {
    if (packet.status === PACKET_STATUS.continue) {
      this.#acceptPiece(packet);
    } else if (packet.status === PACKET_STATUS.ok || this.#state === "aborting") {
      this.#end(undefined);
    } else {
      this.#end(this.#carrier.errorOf(packet.payload));
    }
  }

  /** The connection has ended, or what arrived cannot be understood. */
  fail(error: Error): void {
    if (this.#state !== "ended") this.#end(this.#state === "aborting" ? undefined : error);
  }

  #acceptPiece(packet: Packet): void {
    if (this.#state !== "open") return;
    const piece = pieceOf(packet);
    if (piece === undefined) {
      this.#isDrained = true;
      this.#reader?.resolve(undefined);
      this.#reader = undefined;
    } else if (this.#reader !== undefined) {
      this.#reader.resolve(piece);
      this.#reader = undefined;
    } else {
      this.#arrived.push(piece);
      this.#arrivedBytes += "data" in piece ? piece.data.length : 0;
      if (this.#arrivedBytes > HIGH_WATER_BYTES) this.#hold(true);
    }
  }

  #assertOpen(): void {
    if (this.#error !== undefined) throw this.#error;
    if (this.#state !== "open") throw this.#carrier.aborted("it was finished before");
  }

  async #sent(): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const writer = { resolve, reject };
      this.#writers.add(writer);
      void this.#carrier.drained().then(() => {
        this.#writers.delete(writer);
        resolve();
      });
    });
  }

  async #close(state: "finishing" | "aborting", status: number): Promise<void> {
    if (this.#state === "open" || (this.#state === "finishing" && state === "aborting")) {
      this.#state = state;
      this.#hold(false);
      this.#carrier.send(PACKET_TYPE.stream, status, new Uint8Array());
    }
    await new Promise<void>((resolve, reject) => this.#closers.add({ resolve, reject }));
  }

  #end(error: Error | undefined): void {
    this.#state = "ended";
    this.#error ??= error;
    this.#carrier.release();
    this.#hold(false);
    if (error === undefined) {
      this.#reader?.resolve(undefined);
      this.#reader = undefined;
      for (const closer of this.#closers) closer.resolve();
    } else {
      this.#rejectWaiters(error);
      for (const closer of this.#closers) closer.reject(error);
    }
    this.#closers.clear();
  }

  #rejectWaiters(error: Error): void {
    this.#reader?.reject(error);
    this.#reader = undefined;
    for (const writer of this.#writers) writer.reject(error);
    this.#writers.clear();
  }

  #discard(): void {
    this.#arrived = [];
    this.#arrivedBytes = 0;
  }

  #hold(held: boolean): void {
    if (held === this.#isHeld) return;
    this.#isHeld = held;
    this.#carrier.hold(held);
  }
}

/** A stream in both directions as Node knows it. Ending its writable side, or destroying it, closes both. */
export class StreamDuplex extends Duplex {
  readonly #stream: CallStream;

  constructor(stream: CallStream) {
    super();
    this.#stream = stream;
  }

  override _read(): void {
    this.#stream.read().then(
      (piece) => this.push(piece === undefined ? null : "data" in piece ? piece.data : Buffer.alloc(piece.hole)),
      (error: Error) => this.destroy(error),
    );
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: (error?: Error) => void): void {
    this.#stream.write(chunk).then(() => callback(), callback);
  }

  override _final(callback: (error?: Error) => void): void {
    this.#stream.finish().then(() => callback(), callback);
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.#stream.abort(error ?? "it was closed").then(() => callback(error), callback);
  }
}

/** Undefined is the end of the data. Throws XdrError on a hole that is none. */
function pieceOf(packet: Packet): Piece | undefined {
  if (packet.type !== PACKET_TYPE.streamHole) return packet.payload.length === 0 ? undefined : { data: packet.payload };
  const [lengthBytes] = decodeAll(streamHole, packet.payload);
  const hole = Number(lengthBytes);
  if (!Number.isSafeInteger(hole) || hole < 0) throw new XdrError(`a hole of ${lengthBytes} bytes`);
  return { hole };
}
