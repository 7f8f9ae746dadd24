/** The thread behind `HashThread`: takes pieces of one stream in order, gives their memory back, and ends with the digests. */
import { createHash } from "node:crypto";
import { parentPort, workerData } from "node:worker_threads";

/** Bytes that come next, in the first `length` of `memory`, or as a frame, whose own digest is wanted besides; or the stream's end. */
export type HashQuestion =
  | { readonly memory: ArrayBuffer; readonly length: number }
  | { readonly frame: Uint8Array<SharedArrayBuffer> }
  | "digest";

/** The memory of a piece that was hashed; a frame's SHA-256 in hex; or, at the end, the digests in hex in the order of the algorithms. */
export type HashAnswer = { readonly memory: ArrayBuffer } | { readonly frameDigest: string } | { readonly digests: readonly string[] };

/** Names as `crypto.createHash` takes them. */
export interface HashWorkerData {
  readonly algorithms: readonly string[];
}

/** What all hashes take in before the next bytes: it stays in the processor's cache meanwhile. */
const CACHED_BYTES = 128 * 1024;

const port = parentPort;
if (port === null) throw new Error("this module is a thread's");
const hashes = (workerData as HashWorkerData).algorithms.map((algorithm) => createHash(algorithm));
port.on("message", (question: HashQuestion) => {
  if (question === "digest") {
    port.postMessage({ digests: hashes.splice(0).map((hash) => hash.digest("hex")) } satisfies HashAnswer);
    return;
  }
  if ("frame" in question) {
    const hash = createHash("sha256");
    for (let at = 0; at < question.frame.length; at += CACHED_BYTES) {
      const piece = question.frame.subarray(at, at + CACHED_BYTES);
      for (const each of [hash, ...hashes]) each.update(piece);
    }
    port.postMessage({ frameDigest: hash.digest("hex") } satisfies HashAnswer);
    return;
  }
  const { memory, length } = question;
  for (const hash of hashes) hash.update(new Uint8Array(memory, 0, length));
  port.postMessage({ memory } satisfies HashAnswer, [memory]);
});
