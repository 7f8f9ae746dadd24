/** The thread behind `HashThread`: takes pieces of one stream in order, gives their memory back, and ends with the digests. */
import { createHash } from "node:crypto";
import { parentPort, workerData } from "node:worker_threads";

/** Bytes that come next, in the first `length` of `memory`; or the stream's end. */
export type HashQuestion = { readonly memory: ArrayBuffer; readonly length: number } | "digest";

/** The memory of a piece that was hashed; or, at the end, the digests in hex in the order of the algorithms. */
export type HashAnswer = { readonly memory: ArrayBuffer } | { readonly digests: readonly string[] };

/** Names as `crypto.createHash` takes them. */
export interface HashWorkerData {
  readonly algorithms: readonly string[];
}

const port = parentPort;
if (port === null) throw new Error("this module is a thread's");
const hashes = (workerData as HashWorkerData).algorithms.map((algorithm) => createHash(algorithm));
port.on("message", (question: HashQuestion) => {
  if (question === "digest") {
    port.postMessage({ digests: hashes.map((hash) => hash.digest("hex")) } satisfies HashAnswer);
    port.close();
    return;
  }
  const { memory, length } = question;
  for (const hash of hashes) hash.update(new Uint8Array(memory, 0, length));
  port.postMessage({ memory } satisfies HashAnswer, [memory]);
});
