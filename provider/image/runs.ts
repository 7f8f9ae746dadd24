/** Collects the runs of an image compactly, then sorts and proves them. Knows no format. */
import type { Encoding, Run, RunList } from "./image.ts";
import { ImageError } from "./parser.ts";

/** Runs in one chunk of columns: growing adds a chunk and copies nothing. */
const CHUNK_RUNS = 1 << 14;
const CHUNK_SHIFT = 14;

/** A chunk takes 30 bytes a run. */
interface Chunk {
  readonly fileOffset: Float64Array;
  readonly virtualOffset: Float64Array;
  readonly lengthBytes: Float64Array;
  /** Of runs that are not plain; a plain run stores its length. */
  readonly storedBytes: Uint32Array;
  /** The file's index, then two bits of encoding. */
  readonly kind: Uint16Array;
}

const ENCODINGS: readonly Encoding[] = ["plain", "grain", "deflate", "zstd"];

/** The most files that one image may consist of: what 14 bits can index. */
export const MAX_IMAGE_FILES = 1 << 14;

/** The most runs that are kept, 480 MB of them: whoever crafts more is refused. Enough for 1 TiB of data in lone 64 KiB clusters. */
const MAX_RUNS = 1 << 24;

/** Compressed clusters of a qcow2 begin at any byte, but their end is known by the sector only, so two may share one. Source: QEMU docs/interop/qcow2. */
const SHARED_SECTOR_BYTES = 512;

/** What the runs are proved against: the parts of `DiskImage` that bound them. */
export interface RunBounds {
  readonly files: readonly { readonly sizeBytes: number }[];
  readonly virtualSizeBytes: number;
}

/**
 * Takes the runs of an image in any order, quickest in the guest's or the file's, and gives them back as `DiskImage.runs` promises.
 *
 * Memory: 30 bytes a run, and 4 more for each of the two orders, the file's and the guest's, in which they did not come; twice that for a moment in
 * `finish`.
 */
export class RunListBuilder {
  readonly #bounds: RunBounds;
  readonly #chunks: Chunk[] = [];
  readonly #tables = { files: [] as number[], starts: [] as number[], ends: [] as number[] };
  #count = 0;
  #dataBytes = 0;

  /** Throws ImageError when there are more than MAX_IMAGE_FILES files. */
  constructor(bounds: RunBounds) {
    if (bounds.files.length > MAX_IMAGE_FILES)
      throw new ImageError(`the image consists of ${bounds.files.length} files; at most ${MAX_IMAGE_FILES} are read`);
    this.#bounds = bounds;
  }

  /**
   * Adds a run; one that ends beyond the disk is cut at the disk's end, as the last cluster or grain often is. A plain run that goes on where
   * the last one added ends, in the file and in the guest's disk, is joined to it. The bound of a run that is not plain is cut at the file's end.
   *
   * Throws ImageError when it begins beyond the disk's end, or lies outside its file, or when there are too many.
   */
  add(run: Run): void {
    const { virtualSizeBytes, files } = this.#bounds;
    if (!(run.virtualOffset >= 0 && run.virtualOffset < virtualSizeBytes)) {
      throw new ImageError(
        `the image's tables hold data for guest offset ${run.virtualOffset}, but the disk has only ${virtualSizeBytes} bytes`,
      );
    }
    const lengthBytes = Math.min(run.lengthBytes, virtualSizeBytes - run.virtualOffset);
    const fileSizeBytes = files[run.file]?.sizeBytes ?? 0;
    const storedBytes = run.encoding === "plain" ? lengthBytes : Math.min(run.storedBytes, Math.max(1, fileSizeBytes - run.fileOffset));
    if (!(run.fileOffset >= 0 && run.fileOffset + storedBytes <= fileSizeBytes)) {
      throw new ImageError(
        `the data of guest offset ${run.virtualOffset} should lie at file offset ${run.fileOffset} (${storedBytes} bytes), but the file ends at ${fileSizeBytes}: the image is truncated or damaged`,
      );
    }
    if (lengthBytes <= 0) return;
    this.#dataBytes += lengthBytes;
    const last = this.#count - 1;
    if (run.encoding === "plain" && this.#count > 0 && this.#continues(last, run)) {
      const chunk = this.#chunk(last);
      chunk.lengthBytes[last % CHUNK_RUNS]! += lengthBytes;
      return;
    }
    this.#append(run, lengthBytes, storedBytes);
  }

  /**
   * Says that the image's own header or tables lie there: no run may. Neighbours are joined.
   *
   * Throws ImageError, naming `what`, when the place is outside the file.
   */
  reserve(file: number, fileOffset: number, lengthBytes: number, what: string): void {
    const fileSizeBytes = this.#bounds.files[file]?.sizeBytes ?? 0;
    if (!(fileOffset >= 0 && fileOffset + lengthBytes <= fileSizeBytes)) {
      throw new ImageError(
        `${what} should lie at file offset ${fileOffset} (${lengthBytes} bytes), but the file ends at ${fileSizeBytes}: the image is truncated or damaged`,
      );
    }
    const { files, starts, ends } = this.#tables;
    const last = starts.length - 1;
    if (files[last] === file && ends[last] === fileOffset) {
      ends[last] = fileOffset + lengthBytes;
      return;
    }
    files.push(file);
    starts.push(fileOffset);
    ends.push(fileOffset + lengthBytes);
  }

  /**
   * Sorts and checks what was added. To be called once; the builder is spent. The bound of a `grain` run is cut where the next run or table
   * begins, so a parser may add grains with the most that one can take.
   *
   * Throws ImageError when two runs cover the same bytes of the guest's disk, or take the same bytes of a file (but for the sector that two
   * compressed clusters may share), or when a run lies in a table, or two tables in each other.
   */
  finish(): RunList {
    const byGuest = ascendingOrder(this.#count, (a, b) => this.#virtualOffset(a) - this.#virtualOffset(b));
    let guestEnd = 0;
    for (let place = 0; place < this.#count; place++) {
      const index = byGuest?.[place] ?? place;
      const start = this.#virtualOffset(index);
      if (start < guestEnd) throw new ImageError(`the image's tables give guest offset ${start} twice: they are damaged or crafted`);
      guestEnd = start + this.#chunk(index).lengthBytes[index % CHUNK_RUNS]!;
    }
    const byFile = ascendingOrder(this.#count, (a, b) => this.#file(a) - this.#file(b) || this.#fileOffset(a) - this.#fileOffset(b));
    this.#proveFiles(byFile);
    return new SortedRuns(
      this.#count,
      this.#dataBytes,
      (place) => this.#run(byFile?.[place] ?? place),
      (place) => this.#run(byGuest?.[place] ?? place),
    );
  }

  #continues(index: number, run: Run): boolean {
    const { kind, fileOffset, virtualOffset, lengthBytes } = this.#chunk(index);
    const row = index % CHUNK_RUNS;
    const length = lengthBytes[row]!;
    return kind[row] === kindOf(run) && fileOffset[row]! + length === run.fileOffset && virtualOffset[row]! + length === run.virtualOffset;
  }

  #append(run: Run, lengthBytes: number, storedBytes: number): void {
    if (this.#count === MAX_RUNS) throw new ImageError(`the image is in more than ${MAX_RUNS} pieces: convert it with qemu-img first`);
    const row = this.#count % CHUNK_RUNS;
    if (row === 0) {
      this.#chunks.push({
        fileOffset: new Float64Array(CHUNK_RUNS),
        virtualOffset: new Float64Array(CHUNK_RUNS),
        lengthBytes: new Float64Array(CHUNK_RUNS),
        storedBytes: new Uint32Array(CHUNK_RUNS),
        kind: new Uint16Array(CHUNK_RUNS),
      });
    }
    const chunk = this.#chunk(this.#count);
    chunk.fileOffset[row] = run.fileOffset;
    chunk.virtualOffset[row] = run.virtualOffset;
    chunk.lengthBytes[row] = lengthBytes;
    chunk.storedBytes[row] = run.encoding === "plain" ? 0 : storedBytes;
    chunk.kind[row] = kindOf(run);
    this.#count++;
  }

  #proveFiles(byFile: Uint32Array | undefined): void {
    const { files, starts, ends } = this.#tables;
    const byStart = ascendingOrder(starts.length, (a, b) => files[a]! - files[b]! || starts[a]! - starts[b]!);
    const tableAt = (place: number): number => byStart?.[place] ?? place;
    for (let place = 1; place < starts.length; place++) {
      const [before, table] = [tableAt(place - 1), tableAt(place)];
      if (files[before] === files[table] && ends[before]! > starts[table]!) {
        throw new ImageError(`two of the image's own tables overlap at file offset ${starts[table]}: they are damaged or crafted`);
      }
    }
    let nextTable = 0;
    for (let place = 0; place < this.#count; place++) {
      const index = byFile?.[place] ?? place;
      const run = this.#run(index);
      const isBehind = (table: number): boolean =>
        files[table]! < run.file || (files[table] === run.file && ends[table]! <= run.fileOffset);
      while (nextTable < starts.length && isBehind(tableAt(nextTable))) nextTable++;
      const table = tableAt(nextTable);
      const tableStart = nextTable < starts.length && files[table] === run.file ? starts[table]! : Infinity;
      const follower = place + 1 < this.#count ? this.#run(byFile?.[place + 1] ?? place + 1) : undefined;
      const nextStart = follower?.file === run.file ? follower.fileOffset : Infinity;
      const isGrain = run.encoding === "grain";
      const storedBytes = isGrain
        ? Math.min(run.storedBytes, Math.max(1, Math.min(nextStart, tableStart) - run.fileOffset))
        : run.storedBytes;
      if (isGrain) this.#chunk(index).storedBytes[index % CHUNK_RUNS] = storedBytes;
      const end = run.fileOffset + storedBytes;
      if (tableStart < end) {
        throw new ImageError(
          `the data of guest offset ${run.virtualOffset} should lie at file offset ${run.fileOffset}, where the image's own tables are: it is damaged or crafted`,
        );
      }
      const mayShare =
        isCluster(run) &&
        follower !== undefined &&
        isCluster(follower) &&
        nextStart > run.fileOffset &&
        end - nextStart < SHARED_SECTOR_BYTES;
      if (nextStart < end && !mayShare) {
        throw new ImageError(
          `the bytes at file offset ${nextStart} are used for guest offsets ${run.virtualOffset} and ${follower?.virtualOffset}: the image's tables are damaged or crafted`,
        );
      }
    }
  }

  #chunk(index: number): Chunk {
    return this.#chunks[index >>> CHUNK_SHIFT]!;
  }

  #virtualOffset(index: number): number {
    return this.#chunk(index).virtualOffset[index % CHUNK_RUNS]!;
  }

  #fileOffset(index: number): number {
    return this.#chunk(index).fileOffset[index % CHUNK_RUNS]!;
  }

  #file(index: number): number {
    return this.#chunk(index).kind[index % CHUNK_RUNS]! >>> 2;
  }

  #run(index: number): Run {
    const chunk = this.#chunk(index);
    const row = index % CHUNK_RUNS;
    const encoding = ENCODINGS[chunk.kind[row]! & 3]!;
    const lengthBytes = chunk.lengthBytes[row]!;
    return {
      file: chunk.kind[row]! >>> 2,
      fileOffset: chunk.fileOffset[row]!,
      storedBytes: encoding === "plain" ? lengthBytes : chunk.storedBytes[row]!,
      virtualOffset: chunk.virtualOffset[row]!,
      lengthBytes,
      encoding,
    };
  }
}

/** The finished list: may be iterated any number of times. */
class SortedRuns implements RunList {
  readonly count: number;
  readonly dataBytes: number;
  readonly #inFile: (place: number) => Run;
  readonly #inGuest: (place: number) => Run;

  constructor(count: number, dataBytes: number, inFile: (place: number) => Run, inGuest: (place: number) => Run) {
    this.count = count;
    this.dataBytes = dataBytes;
    this.#inFile = inFile;
    this.#inGuest = inGuest;
  }

  *[Symbol.iterator](): Iterator<Run> {
    for (let place = 0; place < this.count; place++) yield this.#inFile(place);
  }

  *inGuestOrder(): Generator<Run, void> {
    for (let place = 0; place < this.count; place++) yield this.#inGuest(place);
  }
}

function kindOf(run: Run): number {
  return (run.file << 2) | ENCODINGS.indexOf(run.encoding);
}

function isCluster(run: Run): boolean {
  return run.encoding === "deflate" || run.encoding === "zstd";
}

/**
 * The numbers 0 to count - 1 in ascending order by `compare`, or undefined when they are so already. A natural merge sort: what comes nearly
 * sorted, as tables do, is sorted in a pass or two.
 */
function ascendingOrder(count: number, compare: (a: number, b: number) => number): Uint32Array | undefined {
  let starts: number[] = [0];
  for (let index = 1; index < count; index++) if (compare(index - 1, index) > 0) starts.push(index);
  if (starts.length === 1) return undefined;
  let from = Uint32Array.from({ length: count }, (_, index) => index);
  let to = new Uint32Array(count);
  while (starts.length > 1) {
    const merged: number[] = [];
    for (let pair = 0; pair < starts.length; pair += 2) {
      const start = starts[pair]!;
      const middle = starts[pair + 1] ?? count;
      const end = starts[pair + 2] ?? count;
      merged.push(start);
      let left = start;
      let right = middle;
      for (let place = start; place < end; place++) {
        const takesLeft = left < middle && (right >= end || compare(from[left]!, from[right]!) <= 0);
        to[place] = takesLeft ? from[left++]! : from[right++]!;
      }
    }
    starts = merged;
    [from, to] = [to, from];
  }
  return from;
}
