/** What the parts of a copy cost by themselves, in seconds of one processor: what is left of an import's time is its own. */
import { createHash } from "node:crypto";
import { inflateRun } from "../../provider/transfer/decode.ts";
import { openSource } from "../../provider/transfer/source.ts";
import type { BenchDisk } from "./disks.ts";

const HASHED_BYTES = 256 * 1024 * 1024;
const PIECE_BYTES = 1024 * 1024;

export interface Costs {
  /** To inflate all that the disk's VMDK holds. */
  readonly inflateSeconds: number;
  readonly sha256SecondsPerByte: number;
}

export async function measureCosts({ vmdk }: BenchDisk): Promise<Costs> {
  await using source = await openSource({ file: vmdk });
  const [file] = source.files;
  if (file === undefined) throw new Error(`${vmdk} has no file`);
  let inflateSeconds = 0;
  for (const run of await source.runs()) {
    const stored = await file.read(run.fileOffset, run.storedBytes);
    inflateSeconds += await processorSeconds(() => inflateRun(run, stored, source.image.virtualSizeBytes));
  }
  const piece = Buffer.alloc(PIECE_BYTES, 1);
  const hash = createHash("sha256");
  const hashSeconds = await processorSeconds(() => {
    for (let at = 0; at < HASHED_BYTES; at += PIECE_BYTES) hash.update(piece);
  });
  return { inflateSeconds, sha256SecondsPerByte: hashSeconds / HASHED_BYTES };
}

/** Of this process with all its threads. */
async function processorSeconds(work: () => unknown): Promise<number> {
  const before = process.cpuUsage();
  await work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e6;
}
