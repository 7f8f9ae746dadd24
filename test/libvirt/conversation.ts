/**
 * A conversation with libvirt's test driver, recorded from libvirtd 9.0, and the calls that made it.
 *
 * To record anew: `node test/libvirt/conversation.ts <socket of libvirtd>`. Names and UUIDs are the test driver's own and stay the same.
 */
import { readFile, writeFile } from "node:fs/promises";
import { createConnection } from "node:net";
import { Duplex } from "node:stream";
import { Libvirt } from "../../provider/libvirt/client.ts";

const FIXTURE = new URL("../fixtures/libvirt/test-driver.json", import.meta.url);

/** One packet of either side, whole. */
export interface Utterance {
  readonly from: "client" | "daemon";
  readonly bytes: Buffer;
}

export async function readConversation(): Promise<readonly Utterance[]> {
  const recorded = JSON.parse(await readFile(FIXTURE, "utf8")) as { readonly from: "client" | "daemon"; readonly hex: string }[];
  return recorded.map(({ from, hex }) => ({ from, bytes: Buffer.from(hex, "hex") }));
}

/** Opens the test driver, asks it things that it always answers alike, and closes. Resolves with all that it said. */
export async function converse(transport: Duplex): Promise<readonly unknown[]> {
  const libvirt = await Libvirt.open(transport, { uri: "test:///default", host: "the test driver" });
  const heard: unknown[] = [];
  const stopListening = await libvirt.onDomainEvent("lifecycle", (event) => heard.push(event));
  const domain = await libvirt.domainLookupByName("test");
  const pool = await libvirt.storagePoolLookupByName("default-pool");
  const said = [
    domain,
    pool,
    await libvirt.connectGetType(),
    await libvirt.connectListAllDomains(),
    await libvirt.domainIsActive(domain),
    await libvirt.storagePoolGetInfo(pool),
    await libvirt.nodeGetInfo(),
    await libvirt.domainLookupByName("nobody").catch((error: Error) => error.message),
    await libvirt.storagePoolGetXMLDesc(pool),
    await libvirt.domainDestroy(domain),
    await libvirt.domainGetState(domain),
    await libvirt.domainCreate(domain),
  ];
  await stopListening();
  await libvirt.close();
  return [...said, ...heard];
}

/** Passes everything on to libvirtd, and writes down who said what. */
async function record(socketPath: string): Promise<void> {
  const socket = createConnection(socketPath);
  const utterances: { from: "client" | "daemon"; hex: string }[] = [];
  const tap = new Duplex({
    read: () => undefined,
    write: (chunk: Buffer, _encoding, callback) => {
      utterances.push({ from: "client", hex: chunk.toString("hex") });
      socket.write(chunk, callback);
    },
    destroy: (error, callback) => {
      socket.destroy();
      callback(error);
    },
  });
  let pending = Buffer.alloc(0);
  socket.on("data", (chunk) => {
    pending = Buffer.concat([pending, chunk]);
    while (pending.length >= 4 && pending.length >= pending.readUInt32BE(0)) {
      const length = pending.readUInt32BE(0);
      utterances.push({ from: "daemon", hex: pending.subarray(0, length).toString("hex") });
      pending = pending.subarray(length);
    }
    tap.push(chunk);
  });
  await converse(tap);
  await writeFile(FIXTURE, `[\n${utterances.map((utterance) => `  ${JSON.stringify(utterance)}`).join(",\n")}\n]\n`);
}

const socketPath = process.argv[2];
if (import.meta.main && socketPath !== undefined) await record(socketPath);
