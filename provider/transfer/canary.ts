/** Whether a host's QEMU reads compressed clusters that were not made for it. */
import { createHash } from "node:crypto";
import { deflateRawSync } from "node:zlib";
import { CommandError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { Qcow2Writer } from "../image/qcow2-writer.ts";

const CLUSTER_BYTES = 65_536;

/** How far back the canary refers: nearly as far as deflate can, and much farther than the 4 KiB that QEMU's own clusters do. */
const DISTANCE_BYTES = 32_000;

/** Prints what qemu-img reads from the qcow2 on stdin; nothing where there is no qemu-img, or when it fails. Leaves nothing. */
const READ_BACK = `
command -v qemu-img >/dev/null 2>&1 || exit 0
folder=$(mktemp -d) || exit 0
trap 'rm -rf -- "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cat >"$folder/canary.qcow2"
qemu-img convert -f qcow2 -O raw "$folder/canary.qcow2" "$folder/canary.raw" 2>/dev/null && cat "$folder/canary.raw"
exit 0
`;

const answers = new WeakMap<Host, Promise<boolean>>();

/**
 * Lets the host's qemu-img read one cluster whose deflate stream refers back as far as those of a VMDK's grains may (32 KiB). QEMU deflates with a
 * window of 4 KiB and inflates with zlib's `inflateInit2(-12)` (block/qcow2-threads.c), which follows farther references as long as they stay in the
 * output of one call; a zlib built with INFLATE_STRICT refuses them.
 *
 * Asked once for each Host. False where there is no qemu-img. Throws ConnectionError.
 */
export async function readsFarReferences(host: Host): Promise<boolean> {
  let answer = answers.get(host);
  if (answer === undefined) {
    answer = ask(host);
    answers.set(host, answer);
    // Who asks hears of it; the next one asks anew.
    answer.catch(() => answers.delete(host));
  }
  return answer;
}

async function ask(host: Host): Promise<boolean> {
  const guest = canaryCluster();
  try {
    const { stdout } = await host.run(["sh", "-c", READ_BACK], { input: canaryImage(guest) });
    return guest.equals(stdout);
  } catch (error) {
    if (error instanceof CommandError) return false;
    throw error;
  }
}

/** Noise, and the same noise again DISTANCE_BYTES later. The same bytes each time. */
function canaryCluster(): Buffer {
  const noise = Buffer.alloc(DISTANCE_BYTES);
  for (let at = 0; at < noise.length; at += 32) createHash("sha256").update(String(at)).digest().copy(noise, at);
  return Buffer.alloc(CLUSTER_BYTES, noise);
}

function canaryImage(guest: Buffer): Buffer {
  const writer = new Qcow2Writer({ virtualSizeBytes: CLUSTER_BYTES, clusterBytes: CLUSTER_BYTES, layout: "compressed" });
  const data = writer.writeCompressed(0, deflateRawSync(guest, { windowBits: 15 }));
  const { writes, fileSizeBytes } = writer.finish();
  const image = Buffer.alloc(fileSizeBytes);
  for (const { offset, bytes } of [...data, ...writes, writer.header(new Uint8Array())]) image.set(bytes, offset);
  return image;
}
