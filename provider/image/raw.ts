/** A raw image: the file is the disk. */
import type { DiskImage, RunList } from "./image.ts";
import { ImageError, type Parser } from "./parser.ts";
import { RunListBuilder } from "./runs.ts";

const SECTOR_BYTES = 512;

/**
 * Takes the file as the guest's disk, byte for byte; nothing is read. Its holes are not known here.
 *
 * Throws ImageError when the file is empty or does not consist of whole sectors of 512 bytes: nothing else would show that it was cut.
 */
export function rawImage(sizeBytes: number): DiskImage {
  if (sizeBytes === 0) throw new ImageError("the file is empty");
  if (sizeBytes % SECTOR_BYTES !== 0) {
    throw new ImageError(
      `the file has ${sizeBytes} bytes, which is no multiple of ${SECTOR_BYTES}: it is truncated or no raw disk (truncate -s %${SECTOR_BYTES} pads it when it is whole)`,
    );
  }
  const files = [{ name: "", sizeBytes }];
  return {
    format: "raw",
    variant: "raw",
    virtualSizeBytes: sizeBytes,
    files,
    granularityBytes: SECTOR_BYTES,
    notes: [],
    // oxlint-disable-next-line require-yield -- a raw image has no table to ask for
    *runs(): Parser<RunList> {
      const runs = new RunListBuilder({ files, virtualSizeBytes: sizeBytes });
      runs.add({ file: 0, fileOffset: 0, storedBytes: sizeBytes, virtualOffset: 0, lengthBytes: sizeBytes, encoding: "plain" });
      return runs.finish();
    },
  };
}
