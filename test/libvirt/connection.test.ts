import { Duplex } from "node:stream";
import { expect, test } from "vitest";
import { ConnectionError, LibvirtError } from "../../provider/errors.ts";
import { Connection } from "../../provider/libvirt/connection.ts";
import type { CallStream } from "../../provider/libvirt/stream.ts";
import { int32 } from "../../provider/libvirt/xdr.ts";
import {
  CALL,
  CONTINUE,
  domainBytes,
  ERROR,
  errorBytes,
  FakeLibvirtd,
  HOLE,
  KEEPALIVE_PROGRAM,
  long,
  MESSAGE,
  none,
  OK,
  packetBytes,
  REMOTE_PROGRAM,
  REPLY,
  some,
  STREAM,
  text,
  word,
  type SeenPacket,
} from "../fakes/libvirtd.ts";
import { converse, readConversation } from "./conversation.ts";

const UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const VOLUME = { pool: "default", name: "a.raw", key: "/images/a.raw" };

function openFake(): { readonly daemon: FakeLibvirtd; readonly connection: Connection } {
  const daemon = new FakeLibvirtd();
  return { daemon, connection: new Connection(daemon.transport, "kvm1") };
}

async function openUpload(
  daemon: FakeLibvirtd,
  connection: Connection,
): Promise<{ readonly call: SeenPacket; readonly stream: CallStream }> {
  const opening = connection.openStream("StorageVolUpload", [VOLUME, 0, 0, 0]);
  const call = await daemon.next();
  daemon.reply(call);
  return { call, stream: (await opening).stream };
}

async function openDownload(
  daemon: FakeLibvirtd,
  connection: Connection,
): Promise<{ readonly call: SeenPacket; readonly stream: CallStream }> {
  const opening = connection.openStream("StorageVolDownload", [VOLUME, 0, 0, 1]);
  const call = await daemon.next();
  daemon.reply(call);
  return { call, stream: (await opening).stream };
}

/** The error of a promise that must fail. */
async function failure(promise: Promise<unknown>): Promise<Error> {
  return promise.then(
    () => expect.fail("it did not fail"),
    (error: Error) => error,
  );
}

test("sends a call and decodes its reply", async () => {
  const { daemon, connection } = openFake();
  const domain = connection.call("DomainLookupByName", ["web"]);
  const call = await daemon.next();
  expect(call).toEqual({ program: REMOTE_PROGRAM, version: 1, procedure: 23, type: CALL, serial: 1, status: OK, payload: text("web") });
  daemon.reply(call, domainBytes("web", UUID, -1));
  expect(await domain).toEqual({ name: "web", uuid: UUID, id: -1 });
});

test("takes replies in any order", async () => {
  const { daemon, connection } = openFake();
  const names = [connection.call("ConnectGetHostname", []), connection.call("ConnectGetUri", []), connection.call("ConnectGetType", [])];
  const calls = [await daemon.next(), await daemon.next(), await daemon.next()];
  for (const [index, call] of [...calls.entries()].toReversed()) daemon.reply(call, text(`answer ${index}`));
  expect(await Promise.all(names)).toEqual(["answer 0", "answer 1", "answer 2"]);
});

test("keeps four calls in flight and sends the next when one is answered", async () => {
  const { daemon, connection } = openFake();
  const answers = Promise.all(Array.from({ length: 7 }, () => connection.call("ConnectGetHostname", [])));
  const calls: SeenPacket[] = [];
  for (let index = 0; index < 4; index += 1) calls.push(await daemon.next());
  expect(await daemon.isQuiet()).toBe(true);
  while (calls.length > 0) {
    const call = calls.shift();
    if (call !== undefined) daemon.reply(call, text(`host ${call.serial}`));
    if ((call?.serial ?? 0) <= 3) calls.push(await daemon.next());
  }
  expect(await answers).toEqual(["host 1", "host 2", "host 3", "host 4", "host 5", "host 6", "host 7"]);
});

test("tells libvirt's refusal with code, domain, procedure, host and all its words on one line", async () => {
  const { daemon, connection } = openFake();
  const answer = failure(connection.call("DomainLookupByName", ["web"]));
  const call = await daemon.next();
  const details = [some(text("Domain not found: %s")), some(text("no such\n thing")), some(text("Domain not found"))];
  daemon.send(
    { ...call, type: REPLY, status: ERROR },
    Buffer.concat([
      word(42),
      word(10),
      some(text("Domain not found:\nno domain 'web'")),
      word(2),
      some(domainBytes("web", UUID, 3)),
      ...details,
      word(-1),
      word(-1),
      some(Buffer.concat([text("net"), Buffer.alloc(16)])),
    ]),
  );
  const error = await answer;
  expect(error).toBeInstanceOf(LibvirtError);
  expect(error).toMatchObject({ code: 42, domain: 10, procedure: "DomainLookupByName" });
  expect(error.message).toBe("DomainLookupByName failed: Domain not found: no domain 'web'; no such thing (on kvm1)");
});

test("tells a refusal that has no message", async () => {
  const { daemon, connection } = openFake();
  const answer = failure(connection.call("ConnectGetUri", []));
  daemon.send(
    { ...(await daemon.next()), type: REPLY, status: ERROR },
    Buffer.concat([word(38), word(0), none, word(2), none, none, none, none, word(0), word(0), none]),
  );
  expect((await answer).message).toBe("ConnectGetUri failed: error 38 without a message (on kvm1)");
});

test("rejects only the call whose reply cannot be read", async () => {
  const { daemon, connection } = openFake();
  const broken = failure(connection.call("ConnectGetUri", []));
  const whole = connection.call("ConnectGetHostname", []);
  daemon.reply(await daemon.next(), word(0xffff_ffff));
  daemon.reply(await daemon.next(), text("kvm1"));
  expect(await broken).toMatchObject({ name: "ConnectionError", phase: "framing" });
  expect((await broken).message).toContain("ConnectGetUri sent what cannot be read: a string declares 4294967295 bytes");
  expect(await whole).toBe("kvm1");
});

test("rejects a call whose error cannot be read, and one whose status is unknown", async () => {
  const { daemon, connection } = openFake();
  const broken = failure(connection.call("ConnectGetUri", []));
  const strange = failure(connection.call("ConnectGetUri", []));
  daemon.send({ ...(await daemon.next()), type: REPLY, status: ERROR }, word(1));
  daemon.send({ ...(await daemon.next()), type: REPLY, status: 7 });
  expect(await broken).toMatchObject({ phase: "framing" });
  expect((await strange).message).toBe("ConnectGetUri: the reply has the unknown status 7 (on kvm1)");
});

test("drops a reply to a serial or a procedure that was not asked, and packets of unknown programs and types", async () => {
  const { daemon, connection } = openFake();
  const answer = connection.call("ConnectGetHostname", []);
  const call = await daemon.next();
  daemon.reply({ ...call, serial: 99 }, text("wrong serial"));
  daemon.reply({ ...call, procedure: 60 }, text("wrong procedure"));
  daemon.reply({ ...call, program: 0x20008087 }, text("wrong program"));
  daemon.send({ program: 1, procedure: 2, type: 9, serial: 3, status: 4 }, Buffer.alloc(5));
  daemon.send({ program: REMOTE_PROGRAM, procedure: 318, type: MESSAGE, serial: 0, status: OK }, Buffer.alloc(5));
  daemon.reply(call, text("kvm1"));
  expect(await answer).toBe("kvm1");
});

test("does not send an argument that does not fit, and goes on", async () => {
  const { daemon, connection } = openFake();
  await expect(connection.call("DomainLookupByName", ["a\0b"])).rejects.toThrow("a string for libvirt holds a NUL character");
  await expect(connection.call("DomainLookupByUUID", ["no-uuid"])).rejects.toThrow('"no-uuid" is no UUID');
  const answer = connection.call("ConnectGetHostname", []);
  daemon.reply(await daemon.next(), text("kvm1"));
  expect(await answer).toBe("kvm1");
});

test("answers a keepalive ping", async () => {
  const { daemon } = openFake();
  daemon.send({ program: KEEPALIVE_PROGRAM, procedure: 1, type: MESSAGE, serial: 0, status: OK });
  expect(await daemon.next()).toEqual({
    program: KEEPALIVE_PROGRAM,
    version: 1,
    procedure: 2,
    type: MESSAGE,
    serial: 0,
    status: OK,
    payload: Buffer.alloc(0),
  });
});

test.each([0, 27, 2 ** 32 - 1])("ends when a packet declares %i bytes", async (length) => {
  const { daemon, connection } = openFake();
  const answer = failure(connection.call("ConnectGetUri", []));
  daemon.sendBytes(word(length));
  expect(await answer).toMatchObject({ name: "ConnectionError", phase: "framing", host: "kvm1" });
  await connection.closed;
  expect(connection.isOpen).toBe(false);
  expect(daemon.isClosed).toBe(true);
});

test("rejects every waiter when the daemon dies, the queued ones too, and every call after", async () => {
  const { daemon, connection } = openFake();
  const { stream } = await openDownload(daemon, connection);
  const upload = await openUpload(daemon, connection);
  const waiting = [
    ...Array.from({ length: 8 }, () => connection.call("ConnectGetHostname", [])),
    stream.read(),
    upload.stream.finish(),
  ].map(failure);
  daemon.die();
  for (const error of await Promise.all(waiting)) expect(error).toMatchObject({ name: "ConnectionError", phase: "closed" });
  await connection.closed;
  expect(await failure(connection.call("ConnectGetHostname", []))).toMatchObject({ phase: "closed" });
  expect(await failure(stream.read())).toMatchObject({ phase: "closed" });
});

test("rejects every waiter when it is destroyed, which may happen twice", async () => {
  const { connection } = openFake();
  const answer = failure(connection.call("ConnectGetHostname", []));
  connection.destroy();
  connection.destroy();
  expect((await answer).message).toBe("the connection to libvirt was closed (on kvm1)");
  await connection.closed;
});

test("passes on what the transport says of its end", async () => {
  const { daemon, connection } = openFake();
  const answer = failure(connection.call("ConnectGetHostname", []));
  const why = new ConnectionError("virt-ssh-helper is not installed (on kvm1)", { host: "kvm1", phase: "daemon" });
  daemon.transport.destroy(why);
  expect(await answer).toBe(why);
});

test("names the reason when the transport breaks", async () => {
  const { daemon, connection } = openFake();
  const answer = failure(connection.call("ConnectGetHostname", []));
  daemon.transport.destroy(new Error("read ECONNRESET"));
  expect((await answer).message).toBe("the connection to libvirt broke: read ECONNRESET (on kvm1)");
});

test("gives a call up when its signal fires, but leaves its place taken until libvirt has answered", async () => {
  const { daemon, connection } = openFake();
  const given = new AbortController();
  const answer = failure(connection.call("ConnectGetHostname", [], given.signal));
  const others = Array.from({ length: 4 }, () => connection.call("ConnectGetHostname", []));
  const calls: SeenPacket[] = [];
  for (let index = 0; index < 4; index += 1) calls.push(await daemon.next());
  given.abort(new Error("the engine is gone"));
  expect(await answer).toMatchObject({ name: "ConnectionError", phase: "aborted" });
  expect((await answer).message).toBe("ConnectGetHostname was given up: the engine is gone (on kvm1)");
  expect(await daemon.isQuiet()).toBe(true);
  for (const call of calls) daemon.reply(call, text("kvm1"));
  daemon.reply(await daemon.next(), text("kvm1"));
  expect(await Promise.all(others)).toHaveLength(4);
});

test("never sends a queued call that was given up, nor one whose signal had fired before", async () => {
  const { daemon, connection } = openFake();
  const given = new AbortController();
  const others = Array.from({ length: 4 }, () => connection.call("ConnectGetHostname", []));
  const queued = failure(connection.call("ConnectGetUri", [], given.signal));
  given.abort();
  expect(await queued).toMatchObject({ phase: "aborted" });
  expect(await failure(connection.call("ConnectGetUri", [], given.signal))).toMatchObject({ phase: "aborted" });
  for (let index = 0; index < 4; index += 1) daemon.reply(await daemon.next(), text("kvm1"));
  expect(await Promise.all(others)).toHaveLength(4);
  expect(await daemon.isQuiet()).toBe(true);
});

test("hears messages from the moment it listens, even in the packet behind the reply, until it stops", async () => {
  const { daemon, connection } = openFake();
  const heard: number[] = [];
  const stop = connection.onMessage(318, int32, (number) => heard.push(number));
  const event = (number: number): Buffer =>
    packetBytes({ program: REMOTE_PROGRAM, procedure: 318, type: MESSAGE, serial: 0, status: OK }, word(number));
  const answer = connection.call("ConnectGetHostname", []);
  const call = await daemon.next();
  daemon.sendBytes(Buffer.concat([event(1), packetBytes({ ...call, type: REPLY }, text("kvm1")), event(2)]));
  await answer;
  expect(heard).toEqual([1, 2]);
  stop();
  daemon.sendBytes(event(3));
  const after = connection.call("ConnectGetHostname", []);
  daemon.reply(await daemon.next(), text("kvm1"));
  await after;
  expect(heard).toEqual([1, 2]);
});

test("ends when a message that somebody waits for cannot be read", async () => {
  const { daemon, connection } = openFake();
  connection.onMessage(318, int32, () => expect.fail("it was read"));
  daemon.send({ program: REMOTE_PROGRAM, procedure: 318, type: MESSAGE, serial: 0, status: OK }, Buffer.alloc(2));
  await connection.closed;
  expect((await failure(connection.call("ConnectGetUri", []))).message).toContain("the event 318 sent what cannot be read");
});

test("uploads in packets of at most 262,120 bytes and finishes when the daemon agrees", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openUpload(daemon, connection);
  const bytes = Buffer.from(Array.from({ length: 600_000 }, (_, index) => index % 251));
  const written = stream.write(bytes);
  bytes.fill(0, 0, 10);
  const packets = [await daemon.next(), await daemon.next(), await daemon.next()];
  await written;
  expect(packets.map(({ payload }) => payload.length)).toEqual([262_120, 262_120, 75_760]);
  for (const packet of packets)
    expect({ ...packet, payload: undefined }).toEqual({ ...call, type: STREAM, status: CONTINUE, payload: undefined });
  expect(packets[0]?.payload.subarray(0, 3)).toEqual(Buffer.from([0, 1, 2]));
  const finished = stream.finish();
  const finish = await daemon.next();
  expect(finish).toEqual({ ...call, type: STREAM, status: OK, payload: Buffer.alloc(0) });
  daemon.send(finish);
  await finished;
  await stream.finish();
  await stream.abort();
  expect(await daemon.isQuiet()).toBe(true);
});

test("sends a hole as its length and no bytes", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openUpload(daemon, connection);
  await stream.hole(0);
  await stream.hole(2 ** 40);
  expect(await daemon.next()).toEqual({ ...call, type: HOLE, status: CONTINUE, payload: Buffer.concat([long(2n ** 40n), word(0)]) });
});

test("makes a writer wait while the daemon does not read", async () => {
  const { daemon, connection } = openFake();
  const { stream } = await openUpload(daemon, connection);
  let isWritten = false;
  const written = stream.write(Buffer.alloc(200_000)).then(() => {
    isWritten = true;
  });
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(isWritten).toBe(false);
  await daemon.next();
  await written;
});

test("rejects a writer that waits, and every later one, when the daemon reports a failure", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openUpload(daemon, connection);
  const written = failure(stream.write(Buffer.alloc(600_000)));
  daemon.refuse(call, 38, "cannot write to stream: No space left on device", STREAM);
  expect(await written).toMatchObject({ name: "LibvirtError", code: 38, domain: 18, procedure: "StorageVolUpload" });
  expect(await failure(stream.write(Buffer.alloc(1)))).toMatchObject({ code: 38 });
  expect(await failure(stream.finish())).toMatchObject({ code: 38 });
  await stream.abort();
});

test("reports a failure that comes in place of the daemon's agreement, whatever its packet's type", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openUpload(daemon, connection);
  const finished = failure(stream.finish());
  await daemon.next();
  daemon.refuse(call, 38, "Input/output error", REPLY);
  expect((await finished).message).toBe("StorageVolUpload failed: Input/output error (on kvm1)");
});

test.each([
  ["agrees", (daemon: FakeLibvirtd, call: SeenPacket) => daemon.send({ ...call, type: STREAM, status: OK })],
  ["answers with an error", (daemon: FakeLibvirtd, call: SeenPacket) => daemon.refuse(call, 1, "stream aborted at client request", STREAM)],
  ["dies", (daemon: FakeLibvirtd) => daemon.die()],
])("aborts an upload and is done when the daemon %s", async (_name, answer) => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openUpload(daemon, connection);
  const written = failure(stream.write(Buffer.alloc(100_000)));
  let isAborted = false;
  const aborted = stream.abort("the source broke").then(() => {
    isAborted = true;
  });
  expect((await written).message).toBe("StorageVolUpload was given up: the source broke (on kvm1)");
  await daemon.next();
  expect(await daemon.next()).toEqual({ ...call, type: STREAM, status: ERROR, payload: Buffer.alloc(0) });
  expect(isAborted).toBe(false);
  answer(daemon, call);
  await aborted;
  await stream.abort();
});

test("aborts an open stream when its signal fires", async () => {
  const { daemon, connection } = openFake();
  const given = new AbortController();
  const opening = connection.openStream("StorageVolUpload", [VOLUME, 0, 0, 0], given.signal);
  const call = await daemon.next();
  daemon.reply(call);
  const { stream } = await opening;
  given.abort(new Error("the engine is gone"));
  expect(await daemon.next()).toEqual({ ...call, type: STREAM, status: ERROR, payload: Buffer.alloc(0) });
  expect(await failure(stream.write(Buffer.alloc(1)))).toMatchObject({ phase: "aborted" });
});

test("aborts a stream that opens after its opening was given up", async () => {
  const { daemon, connection } = openFake();
  const given = new AbortController();
  const opening = failure(connection.openStream("StorageVolUpload", [VOLUME, 0, 0, 0], given.signal));
  const call = await daemon.next();
  given.abort();
  expect(await opening).toMatchObject({ phase: "aborted" });
  daemon.reply(call);
  expect(await daemon.next()).toEqual({ ...call, type: STREAM, status: ERROR, payload: Buffer.alloc(0) });
});

test("reads data and holes, then the end, and confirms it", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openDownload(daemon, connection);
  daemon.send({ ...call, type: STREAM, status: CONTINUE }, Buffer.from("abc"));
  daemon.send({ ...call, type: HOLE, status: CONTINUE }, Buffer.concat([long(4096n), word(0)]));
  daemon.send({ ...call, type: STREAM, status: CONTINUE });
  expect(await stream.read()).toEqual({ data: Buffer.from("abc") });
  expect(await stream.read()).toEqual({ hole: 4096 });
  expect(await stream.read()).toBeUndefined();
  expect(await stream.read()).toBeUndefined();
  const finished = stream.finish();
  expect(await daemon.next()).toEqual({ ...call, type: STREAM, status: OK, payload: Buffer.alloc(0) });
  daemon.send({ ...call, type: STREAM, status: OK });
  await finished;
});

test("takes stream packets that arrive together with the reply that opens the stream", async () => {
  const { daemon, connection } = openFake();
  const opening = connection.openStream("StorageVolDownload", [VOLUME, 0, 0, 0]);
  const call = await daemon.next();
  const piece = packetBytes({ ...call, type: STREAM, status: CONTINUE }, Buffer.from("abc"));
  daemon.sendBytes(Buffer.concat([packetBytes({ ...call, type: REPLY }, Buffer.alloc(0)), piece]));
  const { stream } = await opening;
  expect(await stream.read()).toEqual({ data: Buffer.from("abc") });
});

test("keeps stream packets that overtake the reply that opens the stream", async () => {
  const { daemon, connection } = openFake();
  const opening = connection.openStream("DomainScreenshot", [{ name: "web", uuid: UUID, id: 1 }, 0, 0]);
  const call = await daemon.next();
  daemon.send({ ...call, type: STREAM, status: CONTINUE }, Buffer.from("abc"));
  daemon.send({ ...call, type: STREAM, status: CONTINUE });
  daemon.reply(call, some(text("image/png")));
  const { result, stream } = await opening;
  expect(result).toBe("image/png");
  expect(await stream.read()).toEqual({ data: Buffer.from("abc") });
  expect(await stream.read()).toBeUndefined();
});

test("ends when a stream's packets overtake the reply without end", async () => {
  const { daemon, connection } = openFake();
  const opening = failure(connection.openStream("StorageVolDownload", [VOLUME, 0, 0, 0]));
  const call = await daemon.next();
  for (let sent = 0; sent <= 64; sent += 1) daemon.send({ ...call, type: STREAM, status: CONTINUE }, Buffer.alloc(1024 * 1024));
  expect(await opening).toMatchObject({ name: "ConnectionError", phase: "framing" });
});

test("gives a waiting reader what comes", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openDownload(daemon, connection);
  const first = stream.read();
  daemon.send({ ...call, type: STREAM, status: CONTINUE }, Buffer.from("abc"));
  expect(await first).toEqual({ data: Buffer.from("abc") });
  const second = failure(stream.read());
  daemon.refuse(call, 38, "Input/output error", STREAM);
  expect(await second).toMatchObject({ code: 38 });
});

test("stops reading from the daemon while nobody reads the stream, and goes on with the reader", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openDownload(daemon, connection);
  const chunk = Buffer.alloc(256 * 1024);
  for (let index = 0; index < 40; index += 1) daemon.send({ ...call, type: STREAM, status: CONTINUE }, chunk);
  daemon.send({ ...call, type: STREAM, status: CONTINUE });
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(daemon.untakenBytes).toBeGreaterThan(6 * 1024 * 1024);
  let readBytes = 0;
  for (let piece = await stream.read(); piece !== undefined; piece = await stream.read())
    readBytes += "data" in piece ? piece.data.length : 0;
  expect(readBytes).toBe(40 * chunk.length);
  expect(daemon.untakenBytes).toBe(0);
});

test("reads on for the others when a full stream is aborted", async () => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openDownload(daemon, connection);
  for (let index = 0; index < 40; index += 1) daemon.send({ ...call, type: STREAM, status: CONTINUE }, Buffer.alloc(256 * 1024));
  await new Promise((resolve) => setTimeout(resolve, 20));
  const aborted = stream.abort();
  daemon.send({ ...call, type: STREAM, status: OK });
  await aborted;
  const answer = connection.call("ConnectGetHostname", []);
  await daemon.next();
  daemon.reply(await daemon.next(), text("kvm1"));
  expect(await answer).toBe("kvm1");
});

test.each([
  ["negative", Buffer.concat([long(-1n), word(0)])],
  ["beyond 2^53", Buffer.concat([long(2n ** 60n), word(0)])],
  ["cut off", word(0)],
])("breaks only the stream whose hole is %s", async (_name, payload) => {
  const { daemon, connection } = openFake();
  const { call, stream } = await openDownload(daemon, connection);
  const piece = failure(stream.read());
  daemon.send({ ...call, type: HOLE, status: CONTINUE }, payload);
  expect(await piece).toMatchObject({ name: "ConnectionError", phase: "framing" });
  expect(connection.isOpen).toBe(true);
});

test("rejects an opening that libvirt refuses, in either type of packet", async () => {
  const { daemon, connection } = openFake();
  for (const type of [REPLY, STREAM]) {
    const opening = failure(connection.openStream("StorageVolDownload", [VOLUME, 0, 0, 0]));
    daemon.send({ ...(await daemon.next()), type, status: ERROR }, errorBytes(50, 18, "Storage volume not found"));
    expect(await opening).toMatchObject({ code: 50 });
  }
});

test("says the same in a recorded conversation, byte for byte, however the answers are cut", async () => {
  const conversation = await readConversation();
  const replay = async (pieceBytes: number): Promise<readonly unknown[]> => {
    const said: Buffer[] = [];
    let position = 0;
    const answerWhatIsDue = (): void => {
      for (let due = conversation[position]; due?.from === "daemon"; due = conversation[(position += 1)]) {
        for (let start = 0; start < due.bytes.length; start += pieceBytes) transport.push(due.bytes.subarray(start, start + pieceBytes));
      }
    };
    const transport = new Duplex({
      read: () => undefined,
      write: (chunk: Buffer, _encoding, callback) => {
        said.push(chunk);
        expect(chunk).toEqual(conversation[position]?.bytes);
        position += 1;
        callback();
        answerWhatIsDue();
      },
    });
    const heard = await converse(transport);
    expect(said).toEqual(conversation.filter(({ from }) => from === "client").map(({ bytes }) => bytes));
    return heard;
  };
  const whole = await replay(Number.MAX_SAFE_INTEGER);
  expect(whole).toContainEqual({ name: "test", uuid: UUID, id: 1 });
  expect(whole).toContain("DomainLookupByName failed: Domain not found (on the test driver)");
  expect(whole.at(-1)).toMatchObject({ event: 2 });
  for (const pieceBytes of [1, 3, 28, 100]) expect(await replay(pieceBytes)).toEqual(whole);
});
