/** The first bytes of a guest's disk, read through the image's tables. */
import type { Run, RunList } from "../image/image.ts";
import { ImageError } from "../image/parser.ts";
import { inflateRun } from "./decode.ts";
import type { OpenSource, SourceFile } from "./source.ts";

/**
 * The first `lengthBytes` of the disk, holes as zeros. `runs` are the image's.
 * undefined when what is compressed there is damaged: the import will say where. Throws DiskError when a file cannot be read.
 */
export async function readGuestStart({ image, files }: OpenSource, runs: RunList, lengthBytes: number): Promise<Buffer | undefined> {
  const start = Buffer.alloc(lengthBytes);
  try {
    for (const run of runs) {
      const wantedBytes = lengthBytes - run.virtualOffset;
      if (wantedBytes <= 0) continue;
      const bytes = await guestBytes(files[run.file]!, run, image.virtualSizeBytes, wantedBytes);
      start.set(bytes.subarray(0, wantedBytes), run.virtualOffset);
    }
  } catch (error) {
    if (error instanceof ImageError) return undefined;
    throw error;
  }
  return start;
}

async function guestBytes(file: SourceFile, run: Run, virtualSizeBytes: number, wantedBytes: number): Promise<Buffer> {
  if (run.encoding === "plain") return file.read(run.fileOffset, Math.min(run.lengthBytes, wantedBytes));
  return inflateRun(run, await file.read(run.fileOffset, run.storedBytes), virtualSizeBytes);
}
