/** Reads the lower level of two-level tables: many small tables, scattered over a file. Knows no format. */
import { ImageError, type Parser, readExactly } from "./parser.ts";

/** Tables that follow each other are read by one ask, up to this. */
const BATCH_BYTES = 1024 * 1024;

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
 * Reads all tables. What is read is at most the file's size, whatever the upper table says.
 *
 * Throws ImageError when a table lies outside the file, or when two places of the upper table name the same one.
 */
export function* readLowerTables(tables: LowerTables): Parser<void> {
  const { file, fileSizeBytes, offsets, tableBytes, what } = tables;
  refuseRepeats(offsets, what);
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
