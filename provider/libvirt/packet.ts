/** Framing: libvirt packets to bytes, and a stream of bytes to packets. Knows no procedure. Source: libvirt's virnetprotocol.x. */
import { XdrError } from "./xdr.ts";

/** The u32 length (which counts itself) and six u32 words: program, version, procedure, type, serial, status. */
export const HEADER_BYTES = 28;

/** libvirt's VIR_NET_MESSAGE_MAX, which leaves out the four bytes of the length itself. */
export const MAX_PACKET_BYTES = 32 * 1024 * 1024 + 4;

/** virNetMessageType. */
export const PACKET_TYPE = { call: 0, reply: 1, message: 2, stream: 3, callWithFds: 4, replyWithFds: 5, streamHole: 6 } as const;

/** virNetMessageStatus. */
export const PACKET_STATUS = { ok: 0, error: 1, continue: 2 } as const;

export interface PacketHeader {
  readonly program: number;
  readonly version: number;
  readonly procedure: number;
  /** One of `PACKET_TYPE`, or a number that this version does not know. */
  readonly type: number;
  /** Counts calls from 1; what belongs to a call repeats its serial. 0 in events. */
  readonly serial: number;
  /** One of `PACKET_STATUS`, or a number that this version does not know. */
  readonly status: number;
}

export interface Packet extends PacketHeader {
  readonly payload: Uint8Array;
}

/** The bytes of a packet in a new buffer. Throws XdrError when it would be longer than MAX_PACKET_BYTES. */
export function encodePacket(header: PacketHeader, payload: Uint8Array): Buffer {
  const lengthBytes = HEADER_BYTES + payload.length;
  if (lengthBytes > MAX_PACKET_BYTES) throw new XdrError(`a packet of ${lengthBytes} bytes is longer than ${MAX_PACKET_BYTES}`);
  const bytes = Buffer.allocUnsafe(lengthBytes);
  bytes.writeUInt32BE(lengthBytes, 0);
  bytes.writeUInt32BE(header.program, 4);
  bytes.writeUInt32BE(header.version, 8);
  bytes.writeInt32BE(header.procedure, 12);
  bytes.writeUInt32BE(header.type, 16);
  bytes.writeUInt32BE(header.serial, 20);
  bytes.writeUInt32BE(header.status, 24);
  bytes.set(payload, HEADER_BYTES);
  return bytes;
}

/**
 * Splits a byte stream into packets: `append` a chunk of any size, then `read` until it gives undefined.
 *
 * Holds what has arrived and allocates nothing for what is only declared. A payload is a copy, the caller's to keep.
 */
export class PacketReader {
  #chunks: Uint8Array[] = [];
  #heldBytes = 0;

  append(chunk: Uint8Array): void {
    if (chunk.length === 0) return;
    this.#chunks.push(chunk);
    this.#heldBytes += chunk.length;
  }

  /** The next whole packet. Throws XdrError when the declared length is under HEADER_BYTES or over MAX_PACKET_BYTES; the stream is then unusable. */
  read(): Packet | undefined {
    if (this.#heldBytes < 4) return undefined;
    const lengthBytes = this.#peekLength();
    if (lengthBytes < HEADER_BYTES || lengthBytes > MAX_PACKET_BYTES) {
      throw new XdrError(`a packet declares ${lengthBytes} bytes, which is not within ${HEADER_BYTES} and ${MAX_PACKET_BYTES}`);
    }
    if (this.#heldBytes < lengthBytes) return undefined;
    const header = this.#take(HEADER_BYTES);
    return {
      program: header.readUInt32BE(4),
      version: header.readUInt32BE(8),
      procedure: header.readInt32BE(12),
      type: header.readUInt32BE(16),
      serial: header.readUInt32BE(20),
      status: header.readUInt32BE(24),
      payload: this.#take(lengthBytes - HEADER_BYTES),
    };
  }

  #peekLength(): number {
    let length = 0;
    let seen = 0;
    for (const chunk of this.#chunks) {
      for (let index = 0; index < chunk.length && seen < 4; index += 1, seen += 1) length = length * 256 + (chunk[index] ?? 0);
      if (seen === 4) break;
    }
    return length;
  }

  /** Copies out the first `lengthBytes` bytes, which must be held, and lets go of them. */
  #take(lengthBytes: number): Buffer {
    const taken = Buffer.allocUnsafe(lengthBytes);
    let filled = 0;
    let used = 0;
    while (filled < lengthBytes) {
      const chunk = this.#chunks[used] ?? new Uint8Array();
      const part = chunk.subarray(0, lengthBytes - filled);
      taken.set(part, filled);
      filled += part.length;
      if (part.length < chunk.length) this.#chunks[used] = chunk.subarray(part.length);
      else used += 1;
    }
    this.#chunks.splice(0, used);
    this.#heldBytes -= lengthBytes;
    return taken;
  }
}
