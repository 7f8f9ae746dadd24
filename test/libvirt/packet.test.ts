import { expect, test } from "vitest";
import { encodePacket, MAX_PACKET_BYTES, PacketReader, type Packet } from "../../provider/libvirt/packet.ts";
import { XdrError } from "../../provider/libvirt/xdr.ts";
import { packetBytes, REMOTE_PROGRAM, word } from "../fakes/libvirtd.ts";
import { readConversation } from "./conversation.ts";

const HEADER = { program: REMOTE_PROGRAM, procedure: 23, type: 1, serial: 0xffff_fffe, status: 0 };

function readAll(reader: PacketReader): Packet[] {
  const packets: Packet[] = [];
  for (let packet = reader.read(); packet !== undefined; packet = reader.read()) packets.push(packet);
  return packets;
}

test("writes a packet as the protocol has it", () => {
  const bytes = encodePacket({ ...HEADER, version: 1 }, Buffer.from("abcd"));
  expect(bytes.toString("hex")).toBe("00000020" + "20008086" + "00000001" + "00000017" + "00000001" + "fffffffe" + "00000000" + "61626364");
});

test("does not write a packet over the bound", () => {
  expect(() => encodePacket({ ...HEADER, version: 1 }, Buffer.alloc(MAX_PACKET_BYTES))).toThrow(XdrError);
});

test("reads what it wrote, negative procedures and all", () => {
  const reader = new PacketReader();
  reader.append(encodePacket({ ...HEADER, procedure: -1, version: 1 }, Buffer.from("xyz")));
  expect(reader.read()).toEqual({ ...HEADER, procedure: -1, version: 1, payload: Buffer.from("xyz") });
  expect(reader.read()).toBeUndefined();
});

test("gives payloads that are the caller's to keep", () => {
  const bytes = packetBytes(HEADER, Buffer.from("abcd"));
  const reader = new PacketReader();
  reader.append(bytes);
  const packet = reader.read();
  bytes.fill(0);
  expect(packet?.payload).toEqual(Buffer.from("abcd"));
});

test("splits a recorded conversation the same way wherever the stream is cut", async () => {
  const stream = Buffer.concat((await readConversation()).filter(({ from }) => from === "daemon").map(({ bytes }) => bytes));
  const whole = new PacketReader();
  whole.append(stream);
  const packets = readAll(whole);
  expect(packets.length).toBeGreaterThan(10);
  for (let cut = 0; cut <= stream.length; cut += 1) {
    const reader = new PacketReader();
    reader.append(stream.subarray(0, cut));
    const before = readAll(reader);
    reader.append(stream.subarray(cut));
    expect([...before, ...readAll(reader)]).toEqual(packets);
  }
});

test("splits a recorded conversation that arrives byte by byte, and in every two packets at once", async () => {
  const recorded = (await readConversation()).filter(({ from }) => from === "daemon").map(({ bytes }) => bytes);
  const byByte = new PacketReader();
  const packets: Packet[] = [];
  for (const byte of Buffer.concat(recorded)) {
    byByte.append(Uint8Array.of(byte));
    packets.push(...readAll(byByte));
  }
  expect(packets).toHaveLength(recorded.length);
  for (const [index, bytes] of recorded.entries()) {
    const reader = new PacketReader();
    reader.append(Buffer.concat([bytes, recorded[(index + 1) % recorded.length] ?? Buffer.alloc(0)]));
    expect(readAll(reader)).toEqual([packets[index], packets[(index + 1) % packets.length]]);
  }
});

test.each([0, 1, 27, MAX_PACKET_BYTES + 1, 2 ** 32 - 1])("refuses the declared length %i as soon as it is seen", (length) => {
  const reader = new PacketReader();
  reader.append(word(length));
  expect(() => reader.read()).toThrow(`a packet declares ${length} bytes`);
});

test("waits for the largest packet without a byte of it", () => {
  const reader = new PacketReader();
  reader.append(word(MAX_PACKET_BYTES));
  expect(reader.read()).toBeUndefined();
});

test("takes a packet without a payload", () => {
  const reader = new PacketReader();
  reader.append(packetBytes(HEADER, Buffer.alloc(0)));
  expect(reader.read()?.payload).toHaveLength(0);
});

test("waits for the rest of a packet that is cut off, at every point", () => {
  const bytes = packetBytes(HEADER, Buffer.from("abcdefgh"));
  for (let length = 0; length < bytes.length; length += 1) {
    const reader = new PacketReader();
    reader.append(bytes.subarray(0, length));
    expect(reader.read()).toBeUndefined();
  }
});
