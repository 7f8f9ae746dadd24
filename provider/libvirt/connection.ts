/** A conversation with libvirt over any Duplex: calls, their replies, their streams, and messages that nobody asked for. Knows no procedure's meaning. */
import type { Duplex } from "node:stream";
import { ConnectionError, LibvirtError, type ConnectionPhase } from "../errors.ts";
import { encodePacket, HEADER_BYTES, PACKET_STATUS, PACKET_TYPE, PacketReader, type Packet, type PacketHeader } from "./packet.ts";
import {
  errorReply,
  PROCEDURES,
  PROGRAM_VERSION,
  type Arguments,
  type ErrorReply,
  type Procedure,
  type ProcedureName,
  type Result,
} from "./procedures.ts";
import { CallStream } from "./stream.ts";
import { decodeAll, encodeAll, XdrError, type Codec } from "./xdr.ts";

/** libvirtd.conf `max_client_requests` is 5, and the packet that it is about to read counts: at 5 it logs a warning and stops reading (seen with 9.0). */
const MAX_CALLS_IN_FLIGHT = 4;

/** virkeepaliveprotocol.x: program, and the procedures PING and PONG. */
const KEEPALIVE = { program: 0x6b656570, ping: 1, pong: 2 } as const;

const MAX_SERIAL = 0xffff_ffff;

/** The most that is kept of a stream's packets which overtake the reply that opens it. */
const MAX_EARLY_BYTES = 64 * 1024 * 1024;

/** A call that waits for its turn or for its reply. It is out of `queue` and in `sent` until the reply comes, wanted or not: the daemon works on it. */
interface Call {
  readonly name: ProcedureName;
  readonly program: number;
  readonly number: number;
  readonly payload: Uint8Array;
  readonly early: EarlyPackets | undefined;
  readonly accept: (reply: Packet) => void;
  readonly fail: (error: Error) => void;
}

/**
 * What has arrived of a stream before the reply of the call that opens it. libvirtd lets the stream go before its worker queues the reply: seen with
 * DomainScreenshot of libvirt 9.0.
 */
interface EarlyPackets {
  readonly packets: Packet[];
  bytes: number;
}

/** What becomes of the reply to a call: `accept` while somebody waits for it, `drop` afterwards. */
interface ReplyUse<T> {
  readonly early: EarlyPackets | undefined;
  readonly accept: (reply: Packet, call: Call) => T;
  readonly drop: (reply: Packet, call: Call) => void;
}

/**
 * Owns its transport: reads and writes it alone, and destroys it at the end.
 *
 * A ConnectionError of the transport itself (an SSH channel that says why it ended) is passed on as it is.
 */
export class Connection {
  /** Resolves when the connection has ended, for whatever reason. Never rejects. */
  readonly closed: Promise<void>;
  readonly #transport: Duplex;
  readonly #host: string;
  readonly #packets = new PacketReader();
  readonly #queue: Call[] = [];
  readonly #sent = new Map<number, Call>();
  readonly #streams = new Map<number, { readonly call: Call; readonly stream: CallStream }>();
  readonly #holders = new Set<number>();
  readonly #listeners = new Map<number, Set<(payload: Uint8Array) => void>>();
  readonly #drainWaiters: (() => void)[] = [];
  readonly #markClosed: () => void;
  #serial = 0;
  #ended: ConnectionError | undefined;

  /** `host` is for messages. */
  constructor(transport: Duplex, host: string) {
    this.#transport = transport;
    this.#host = host;
    let markClosed = (): void => undefined;
    this.closed = new Promise((resolve) => {
      markClosed = resolve;
    });
    this.#markClosed = markClosed;
    transport.on("data", (chunk: Uint8Array) => this.#receive(chunk));
    transport.on("drain", () => {
      for (const resolve of this.#drainWaiters.splice(0)) resolve();
    });
    transport.on("error", (error) => this.#end(this.#lost(error)));
    transport.on("end", () => this.#end(this.#error("closed", "the host ended the connection to libvirt")));
    transport.on("close", () => this.#end(this.#error("closed", "the connection to libvirt ended")));
  }

  get isOpen(): boolean {
    return this.#ended === undefined;
  }

  /**
   * Calls a procedure and decodes its result. With four calls under way, a further one waits for its turn here.
   *
   * Throws LibvirtError when libvirt refuses; ConnectionError when the connection ends (phase "closed"), the reply cannot be understood ("framing"), or the
   * signal fires ("aborted": the reply is then dropped, but libvirt still does what it was asked); XdrError when an argument does not fit its type.
   */
  async call<Name extends ProcedureName>(name: Name, args: Arguments<Name>, signal?: AbortSignal): Promise<Result<Name>> {
    const procedure: Procedure<Arguments<Name>, Result<Name>> = PROCEDURES[name];
    return this.#request(name, args, signal, {
      early: undefined,
      accept: (reply) => decodeAll(procedure.result, reply.payload),
      drop: () => undefined,
    });
  }

  /** Calls a procedure that opens a stream. Throws as `call` does. When the signal fires later, the stream is aborted. */
  async openStream<Name extends ProcedureName>(
    name: Name,
    args: Arguments<Name>,
    signal?: AbortSignal,
  ): Promise<{ readonly result: Result<Name>; readonly stream: CallStream }> {
    const procedure: Procedure<Arguments<Name>, Result<Name>> = PROCEDURES[name];
    const early: EarlyPackets = { packets: [], bytes: 0 };
    return this.#request(name, args, signal, {
      early,
      accept: (reply, call) => {
        const result = decodeAll(procedure.result, reply.payload);
        const stream = this.#createStream(reply.serial, call, signal);
        for (const packet of early.packets.splice(0)) this.#acceptStreamed(packet, call, stream);
        return { result, stream };
      },
      drop: (reply, call) => abandon(this.#createStream(reply.serial, call, undefined), signal?.reason),
    });
  }

  /**
   * Hears the messages of a procedure, until the returned function is called. Listeners must not throw.
   *
   * A message that cannot be decoded ends the connection: whoever waits for an event must not wait for ever.
   */
  onMessage<Body>(procedure: number, body: Codec<Body>, listener: (body: Body) => void): () => void {
    const listeners = this.#listeners.get(procedure) ?? new Set();
    this.#listeners.set(procedure, listeners);
    const decodeAndTell = (payload: Uint8Array): void => listener(decodeAll(body, payload));
    listeners.add(decodeAndTell);
    return () => listeners.delete(decodeAndTell);
  }

  /** Ends the connection at once; whoever waits is rejected with a ConnectionError (phase "closed"). May be called twice. */
  destroy(): void {
    this.#end(this.#error("closed", "the connection to libvirt was closed"));
  }

  async #request<Name extends ProcedureName, T>(
    name: Name,
    args: Arguments<Name>,
    signal: AbortSignal | undefined,
    reply: ReplyUse<T>,
  ): Promise<T> {
    const procedure: Procedure<Arguments<Name>, Result<Name>> = PROCEDURES[name];
    const payload = encodeAll(procedure.args, args);
    if (this.#ended !== undefined) throw this.#ended;
    if (signal?.aborted) throw this.#aborted(name, signal.reason);
    return new Promise<T>((resolve, reject) => {
      let isWanted = true;
      const abort = (): void => {
        isWanted = false;
        const position = this.#queue.indexOf(call);
        if (position >= 0) this.#queue.splice(position, 1);
        reject(this.#aborted(name, signal?.reason));
      };
      const call: Call = {
        name,
        program: procedure.program,
        number: procedure.number,
        payload,
        early: reply.early,
        accept: (packet) => {
          signal?.removeEventListener("abort", abort);
          try {
            if (packet.status !== PACKET_STATUS.ok) reject(this.#refusal(name, packet));
            else if (isWanted) resolve(reply.accept(packet, call));
            else reply.drop(packet, call);
          } catch (error) {
            reject(this.#unreadable(name, error));
          }
        },
        fail: (error) => {
          signal?.removeEventListener("abort", abort);
          reject(error);
        },
      };
      signal?.addEventListener("abort", abort, { once: true });
      this.#queue.push(call);
      this.#sendQueued();
    });
  }

  #sendQueued(): void {
    while (this.#sent.size < MAX_CALLS_IN_FLIGHT) {
      const call = this.#queue.shift();
      if (call === undefined) return;
      this.#serial = this.#serial === MAX_SERIAL ? 1 : this.#serial + 1;
      this.#sent.set(this.#serial, call);
      this.#send({ ...call, procedure: call.number, type: PACKET_TYPE.call, serial: this.#serial, status: PACKET_STATUS.ok }, call.payload);
    }
  }

  #send(header: Omit<PacketHeader, "version">, payload: Uint8Array): void {
    if (this.#ended === undefined) this.#transport.write(encodePacket({ ...header, version: PROGRAM_VERSION }, payload));
  }

  #createStream(serial: number, call: Call, signal: AbortSignal | undefined): CallStream {
    const abort = (): void => abandon(stream, signal?.reason);
    const stream = new CallStream({
      send: (type, status, payload) => this.#send({ program: call.program, procedure: call.number, type, serial, status }, payload),
      drained: async () => {
        if (this.#transport.writableNeedDrain) await new Promise<void>((resolve) => this.#drainWaiters.push(resolve));
      },
      hold: (held) => {
        if (held) this.#holders.add(serial);
        else this.#holders.delete(serial);
        if (this.#holders.size > 0) this.#transport.pause();
        else this.#transport.resume();
      },
      release: () => {
        signal?.removeEventListener("abort", abort);
        this.#streams.delete(serial);
      },
      errorOf: (payload) => this.#libvirtError(call.name, payload),
      aborted: (reason) => this.#aborted(call.name, reason),
    });
    signal?.addEventListener("abort", abort, { once: true });
    this.#streams.set(serial, { call, stream });
    return stream;
  }

  #receive(chunk: Uint8Array): void {
    this.#packets.append(chunk);
    while (this.#ended === undefined) {
      const packet = this.#nextPacket();
      if (packet === undefined) return;
      this.#dispatch(packet);
    }
  }

  #nextPacket(): Packet | undefined {
    try {
      return this.#packets.read();
    } catch (error) {
      this.#end(this.#unreadable("libvirt", error));
      return undefined;
    }
  }

  /** What fits nothing (an unknown serial, an event without a listener) is dropped: it answers a question that was given up. */
  #dispatch(packet: Packet): void {
    if (packet.program === KEEPALIVE.program) {
      if (packet.procedure === KEEPALIVE.ping) this.#send({ ...packet, procedure: KEEPALIVE.pong }, new Uint8Array());
      return;
    }
    if (packet.type === PACKET_TYPE.message) {
      this.#acceptMessage(packet);
      return;
    }
    const open = this.#streams.get(packet.serial);
    if (open !== undefined && belongs(packet, open.call)) {
      this.#acceptStreamed(packet, open.call, open.stream);
      return;
    }
    const call = this.#sent.get(packet.serial);
    if (call === undefined || !belongs(packet, call)) return;
    if (call.early !== undefined && packet.status === PACKET_STATUS.continue) {
      this.#keepEarly(packet, call.name, call.early);
      return;
    }
    this.#sent.delete(packet.serial);
    call.accept(packet);
    this.#sendQueued();
  }

  #keepEarly(packet: Packet, name: ProcedureName, early: EarlyPackets): void {
    early.packets.push(packet);
    early.bytes += HEADER_BYTES + packet.payload.length;
    if (early.bytes > MAX_EARLY_BYTES)
      this.#end(this.#error("framing", `${name} sent ${early.bytes} bytes of its stream before its reply`));
  }

  #acceptMessage(packet: Packet): void {
    try {
      for (const listener of this.#listeners.get(packet.procedure) ?? []) listener(packet.payload);
    } catch (error) {
      this.#end(this.#unreadable(`the event ${packet.procedure}`, error));
    }
  }

  #acceptStreamed(packet: Packet, call: Call, stream: CallStream): void {
    try {
      stream.accept(packet);
    } catch (error) {
      stream.fail(this.#unreadable(call.name, error));
    }
  }

  #end(error: ConnectionError): void {
    if (this.#ended !== undefined) return;
    this.#ended = error;
    const calls = [...this.#sent.values(), ...this.#queue.splice(0)];
    this.#sent.clear();
    for (const call of calls) call.fail(error);
    for (const { stream } of this.#streams.values()) stream.fail(error);
    this.#drainWaiters.length = 0;
    this.#transport.destroy();
    this.#markClosed();
  }

  #refusal(name: ProcedureName, packet: Packet): Error {
    if (packet.status === PACKET_STATUS.error) return this.#libvirtError(name, packet.payload);
    return this.#error("framing", `${name}: the reply has the unknown status ${packet.status}`);
  }

  #libvirtError(name: ProcedureName, payload: Uint8Array): Error {
    try {
      const reply = decodeAll(errorReply, payload);
      return new LibvirtError(`${name} failed: ${sentenceOf(reply)} (on ${this.#host})`, {
        code: reply.code,
        domain: reply.domain,
        procedure: name,
      });
    } catch (error) {
      return this.#unreadable(name, error);
    }
  }

  #unreadable(subject: string, error: unknown): ConnectionError {
    if (!(error instanceof XdrError)) throw error;
    return this.#error("framing", `${subject} sent what cannot be read: ${error.message}`, error);
  }

  #aborted(name: ProcedureName, reason: unknown): ConnectionError {
    const why = reason instanceof Error ? reason.message : typeof reason === "string" ? reason : "nobody waits for it any more";
    return this.#error("aborted", `${name} was given up: ${why}`, reason);
  }

  #lost(error: Error): ConnectionError {
    return error instanceof ConnectionError ? error : this.#error("closed", `the connection to libvirt broke: ${error.message}`, error);
  }

  #error(phase: ConnectionPhase, sentence: string, cause?: unknown): ConnectionError {
    return new ConnectionError(`${sentence} (on ${this.#host})`, { host: this.#host, phase, cause });
  }
}

function belongs(packet: Packet, call: Call): boolean {
  return packet.program === call.program && packet.procedure === call.number;
}

/** Aborts a stream that nobody waits for. */
function abandon(stream: CallStream, reason: unknown): void {
  stream.abort(reason).catch(() => {
    // The daemon's last word on a stream that was given up is of no use to anyone.
  });
}

/** All that libvirt said, on one line: the message, and the details that it does not repeat. */
function sentenceOf(reply: ErrorReply): string {
  const message = reply.message ?? `error ${reply.code} without a message`;
  const details = [reply.str1, reply.str2, reply.str3].filter(
    (detail) => detail !== undefined && !detail.includes("%") && !message.includes(detail),
  );
  return [message, ...details]
    .join("; ")
    .replaceAll(/\s*\n\s*/g, " ")
    .trim();
}
