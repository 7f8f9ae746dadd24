/** Reads the lower level of two-level tables: many small tables, scattered over a file. Knows no format. */
import { ImageError, type Parser, readExactly } from "./parser.ts";

/** Tables that follow each other are read by one ask, up to this. */
const BATCH_BYTES = 1024 * 1024;

/** A file of holes can be of any size: no disk of less than 32 TiB in clusters of 64 KiB has more. */
const MAX_TABLES_BYTES = 4 * 1024 ** 3;

export interface LowerTables {
  /** Index into `DiskImage.files`, and that file's name and size. */
  readonly file: string;
  readonly fileSizeBytes: number;
  /** Where each table begins, in bytes; 0 where there is none. */
  readonly offsets: Float64Array;
  readonly tableBytes: number;
  /** Begins the sentence of an error: "a grain table". */
  readonly what: string;
  /** Called once for each table that exists, in the order of `offsets`. The bytes are only valid during the call. */
  readonly visit: (index: number, table: DataView) => void;
}

/**
 * Reads all tables; each only once, whatever the upper table says.
 *
 * Throws ImageError when a table lies outside the file, when two places of the upper table name the same one, or when all together are larger than
 * MAX_TABLES_BYTES.
 */
export function* readLowerTables(tables: LowerTables): Parser<void> {
  const { file, fileSizeBytes, offsets, tableBytes, what } = tables;
  refuseRepeats(offsets, what);
  const totalBytes = offsets.reduce((count, offset) => (offset === 0 ? count : count + 1), 0) * tableBytes;
  if (totalBytes > MAX_TABLES_BYTES)
    throw new ImageError(`the image has ${totalBytes} bytes of tables; at most ${MAX_TABLES_BYTES} are read`);
  for (let index = 0; index < offsets.length;) {
    const offset = offsets[index]!;
    if (offset === 0) {
      index++;
      continue;
    }
    let count = 1;
    while (offsets[index + count] === offset + count * tableBytes && (count + 1) * tableBytes <= BATCH_BYTES) count++;
    if (offset + count * tableBytes > fileSizeBytes) {
      throw new ImageError(
        `${what} should lie at file offset ${offset}, but the file ends at ${fileSizeBytes}: the image is truncated or damaged`,
      );
    }
    const bytes = yield* readExactly(file, offset, count * tableBytes, what);
    for (let place = 0; place < count; place++) {
      tables.visit(index + place, new DataView(bytes.buffer, bytes.byteOffset + place * tableBytes, tableBytes));
    }
    index += count;
  }
}

function refuseRepeats(offsets: Float64Array, what: string): void {
  const sorted = Float64Array.from(offsets).sort();
  for (let index = 1; index < sorted.length; index++) {
    if (sorted[index] !== 0 && sorted[index] === sorted[index - 1]) {
      throw new ImageError(`${what} at file offset ${sorted[index]} is used twice: the image's tables are damaged or crafted`);
    }
  }
}
