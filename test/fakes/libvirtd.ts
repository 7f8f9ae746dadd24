/**
 * A libvirtd that says what a test tells it to, in real packets over a pair of streams. Bytes are built and taken apart here on their own, not by the code
 * under test.
 */
import { duplexPair, type Duplex } from "node:stream";

/** A packet as the fake has seen it. */
export interface SeenPacket {
  readonly program: number;
  readonly version: number;
  readonly procedure: number;
  readonly type: number;
  readonly serial: number;
  readonly status: number;
  readonly payload: Buffer;
}

export const REMOTE_PROGRAM = 0x20008086;
export const KEEPALIVE_PROGRAM = 0x6b656570;
export const CALL = 0;
export const REPLY = 1;
export const MESSAGE = 2;
export const STREAM = 3;
export const HOLE = 6;
export const OK = 0;
export const ERROR = 1;
export const CONTINUE = 2;

/** One big-endian word of 32 bits, signed or not. */
export function word(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
}

/** One big-endian number of 64 bits. */
export function long(value: bigint): Buffer {
  return Buffer.concat([word(Number(BigInt.asUintN(32, value >> 32n))), word(Number(BigInt.asUintN(32, value)))]);
}

/** A string: length, bytes, zeros up to a multiple of four. */
export function text(value: string): Buffer {
  const bytes = Buffer.from(value, "utf8");
  return Buffer.concat([word(bytes.length), bytes, Buffer.alloc((4 - (bytes.length % 4)) % 4)]);
}

/** An optional value that is there, or is not. */
export function some(bytes: Buffer): Buffer {
  return Buffer.concat([word(1), bytes]);
}
export const none = word(0);

/** remote_nonnull_domain. */
export function domainBytes(name: string, uuid: string, id: number): Buffer {
  return Buffer.concat([text(name), Buffer.from(uuid.replaceAll("-", ""), "hex"), word(id)]);
}

/** virNetMessageError, with what libvirt leaves out left out. */
export function errorBytes(code: number, domain: number, message: string): Buffer {
  return Buffer.concat([word(code), word(domain), some(text(message)), word(2), none, none, none, none, word(0), word(0), none]);
}

/** The bytes of one packet. */
export function packetBytes(fields: Omit<SeenPacket, "payload" | "version">, payload: Buffer): Buffer {
  const { program, procedure, type, serial, status } = fields;
  const words = [28 + payload.length, program, 1, procedure, type, serial, status].map(word);
  return Buffer.concat([...words, payload]);
}

export class FakeLibvirtd {
  /** The client's end. */
  readonly transport: Duplex;
  readonly #own: Duplex;
  #bytes: Buffer = Buffer.alloc(0);

  constructor() {
    const [transport, own] = duplexPair();
    this.transport = transport;
    this.#own = own;
    own.on("error", () => {
      // The client's end was destroyed: `isClosed` says so.
    });
  }

  /** The next packet of the client, in the order in which they were sent. Nothing is read from the client in the meantime. Rejects when it ends first. */
  async next(): Promise<SeenPacket> {
    const header = await this.#take(28);
    const at = (index: number): number => header.readUInt32BE(index * 4);
    return {
      program: at(1),
      version: at(2),
      procedure: at(3),
      type: at(4),
      serial: at(5),
      status: at(6),
      payload: await this.#take(at(0) - 28),
    };
  }

  /** Whether the client has sent nothing more, a moment from now. */
  async isQuiet(): Promise<boolean> {
    await new Promise((resolve) => setTimeout(resolve, 5));
    return this.#bytes.length === 0 && this.#own.readableLength === 0;
  }

  /** Answers a call. */
  reply(call: SeenPacket, payload: Buffer = Buffer.alloc(0)): void {
    this.send({ ...call, type: REPLY, status: OK }, payload);
  }

  /** Refuses a call, or breaks its stream when `type` is STREAM. */
  refuse(call: SeenPacket, code: number, message: string, type: number = REPLY): void {
    this.send({ ...call, type, status: ERROR }, errorBytes(code, 18, message));
  }

  /** Sends a packet; whether the client takes more without waiting. */
  send(fields: Omit<SeenPacket, "payload" | "version">, payload: Buffer = Buffer.alloc(0)): boolean {
    return this.sendBytes(packetBytes(fields, payload));
  }

  sendBytes(bytes: Buffer): boolean {
    return this.#own.write(bytes);
  }

  /** Bytes that were sent and that the client has not taken yet. */
  get untakenBytes(): number {
    return this.#own.writableLength;
  }

  get isClosed(): boolean {
    return this.#own.destroyed || this.transport.destroyed;
  }

  /** Answers what a client asks when it opens a connection. */
  async welcome(): Promise<void> {
    this.reply(await this.next(), Buffer.concat([word(1), word(0)]));
    this.reply(await this.next());
  }

  /** Ends the connection as a daemon does that is killed. */
  die(): void {
    this.#own.end();
  }

  async #take(length: number): Promise<Buffer> {
    while (this.#bytes.length < length) {
      const chunk: Buffer | null = this.#own.read();
      if (chunk !== null) this.#bytes = Buffer.concat([this.#bytes, chunk]);
      else if (this.#own.readableEnded || this.#own.destroyed) throw new Error("the client has ended");
      else await new Promise((resolve) => this.#own.once("readable", resolve).once("end", resolve).once("close", resolve));
    }
    const taken = this.#bytes.subarray(0, length);
    this.#bytes = this.#bytes.subarray(length);
    return taken;
  }
}
