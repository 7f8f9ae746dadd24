/** A few bytes of a guest's disk, read through the image's tables. */
import type { Run, RunList } from "../image/image.ts";
import { ImageError } from "../image/parser.ts";
import { inflateRun } from "./decode.ts";
import type { OpenSource, SourceFile } from "./source.ts";

/** A range of the guest's disk. */
export interface GuestRange {
  readonly offset: number;
  readonly length: number;
}

/**
 * The bytes of each range, holes and what lies behind the disk as zeros. `runs` are the image's; they are walked once.
 * undefined when what is compressed there is damaged: the import will say where. Throws DiskError when a file cannot be read.
 */
export async function readGuest(
  { image, files }: OpenSource,
  runs: RunList,
  ranges: readonly GuestRange[],
): Promise<readonly Buffer[] | undefined> {
  const found = ranges.map(({ length }) => Buffer.alloc(length));
  try {
    for (const run of runs) {
      for (const [index, { offset, length }] of ranges.entries()) {
        const from = Math.max(offset, run.virtualOffset);
        const wantedBytes = Math.min(offset + length, run.virtualOffset + run.lengthBytes) - from;
        if (wantedBytes <= 0) continue;
        const bytes = await guestBytes(files[run.file]!, run, image.virtualSizeBytes, {
          offset: from - run.virtualOffset,
          length: wantedBytes,
        });
        found[index]!.set(bytes, from - offset);
      }
    }
  } catch (error) {
    if (error instanceof ImageError) return undefined;
    throw error;
  }
  return found;
}

/** `within` is a range of the run. */
async function guestBytes(file: SourceFile, run: Run, virtualSizeBytes: number, within: GuestRange): Promise<Buffer> {
  if (run.encoding === "plain") return file.read(run.fileOffset + within.offset, within.length);
  const bytes = await inflateRun(run, await file.read(run.fileOffset, run.storedBytes), virtualSizeBytes);
  return bytes.subarray(within.offset, within.offset + within.length);
}
