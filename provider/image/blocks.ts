/** What VHD, VHDX and VDI have in common: a flat table that says where in the file each block of the guest's disk lies. Knows no entry format. */
import { viewOf } from "./bytes.ts";
import type { RunList } from "./image.ts";
import { ImageError, type Parser, readExactly } from "./parser.ts";
import { RunListBuilder } from "./runs.ts";

/** How much of a table is read by one ask. A multiple of every entry size. */
const TABLE_PIECE_BYTES = 1024 * 1024;

export interface BlockTable {
  /** Size of the whole file, in bytes. */
  readonly sizeBytes: number;
  readonly virtualSizeBytes: number;
  readonly blockBytes: number;
  /** Where the table begins in the file, in bytes; its entries follow each other without gaps. */
  readonly offset: number;
  readonly entryCount: number;
  /** 4 or 8. */
  readonly entryBytes: number;
  /** Where in the file data may lie: from `start` up to, not including, `end`. */
  readonly data: { readonly start: number; readonly end: number };
  /** Reads entry `index` at `offset` of the view. undefined: no data, the block reads as zeros. Throws ImageError on an entry that means nothing. */
  readonly locate: (view: DataView, offset: number, index: number) => BlockPlace | undefined;
}

/** Block number `block` of the guest's disk lies at `fileOffset`. */
export interface BlockPlace {
  readonly block: number;
  readonly fileOffset: number;
}

/**
 * Reads the table in pieces of 1 MiB and collects the blocks that hold data; the disk's last block may be cut by the disk's end.
 *
 * Throws ImageError when the table or a block lies outside the file or the part of it that holds data, or when two blocks share bytes.
 */
export function* readBlocks(table: BlockTable): Parser<RunList> {
  const { sizeBytes, virtualSizeBytes, blockBytes, entryBytes, data } = table;
  const runs = new RunListBuilder({ files: [{ sizeBytes }], virtualSizeBytes });
  // Blocks that share bytes are found only when all are known; until then their sum says when there are more than the file can hold.
  let roomBytes = data.end - data.start;
  const tableBytes = table.entryCount * entryBytes;
  for (let done = 0; done < tableBytes; done += TABLE_PIECE_BYTES) {
    const length = Math.min(TABLE_PIECE_BYTES, tableBytes - done);
    const view = viewOf(yield* readExactly("", table.offset + done, length, "the image's block table"));
    for (let offset = 0; offset < length; offset += entryBytes) {
      const place = table.locate(view, offset, (done + offset) / entryBytes);
      if (place === undefined) continue;
      const virtualOffset = place.block * blockBytes;
      const lengthBytes = Math.min(blockBytes, virtualSizeBytes - virtualOffset);
      if (place.fileOffset < data.start || place.fileOffset + lengthBytes > data.end) {
        throw new ImageError(
          `block ${place.block} should lie at file offset ${place.fileOffset}, outside the data of the file (${data.start} to ${data.end}): the image is truncated or damaged`,
        );
      }
      roomBytes -= lengthBytes;
      if (roomBytes < 0) throw new ImageError("the image's block table names more blocks than the file can hold: it is damaged or crafted");
      runs.add({ file: 0, fileOffset: place.fileOffset, storedBytes: lengthBytes, virtualOffset, lengthBytes, encoding: "plain" });
    }
  }
  return runs.finish();
}
