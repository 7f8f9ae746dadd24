/** Where each cluster of a guest's disk lies: one word of 64 bits for each, kept compactly while they are set in any order. Knows no format. */

/** Words of a page: what one touched cluster costs is a page of 128 bytes. */
const PAGE_WORDS = 16;
const WORD_BYTES = 8;
const PAGE_BYTES = PAGE_WORDS * WORD_BYTES;

/** A pool's chunk is 1 MiB. */
const CHUNK_PAGES = 8192;

/** Pages of one directory: 512 MiB of disk in clusters of 64 KiB. */
const DIRECTORY_PAGES = 512;

/**
 * A sparse array of big-endian 64-bit words, 0 where nothing was set. Memory: 8 bytes a word where they are dense, 128 where they are far apart,
 * and 2 KiB for each stretch of 8192 words that any is in.
 */
export class ClusterMap {
  readonly #chunks: Uint8Array[] = [];
  /** Of each page its number in the pool plus one, 0 where there is none. */
  readonly #directories = new Map<number, Uint32Array>();
  #pages = 0;
  #count = 0;

  /** How many words were set. */
  get count(): number {
    return this.#count;
  }

  has(index: number): boolean {
    const page = this.#page(Math.floor(index / PAGE_WORDS));
    if (page === undefined) return false;
    const start = (index % PAGE_WORDS) * WORD_BYTES;
    return page.subarray(start, start + WORD_BYTES).some((byte) => byte !== 0);
  }

  /** Sets a word that is not set yet to one that is not 0, given by its upper and lower 32 bits. */
  set(index: number, high: number, low: number): void {
    const page = this.#openPage(Math.floor(index / PAGE_WORDS));
    const view = new DataView(page.buffer, page.byteOffset + (index % PAGE_WORDS) * WORD_BYTES, WORD_BYTES);
    view.setUint32(0, high);
    view.setUint32(4, low);
    this.#count++;
  }

  /** Whether any of `count` words from `first` on is set. Both are multiples of 16. */
  hasAny(first: number, count: number): boolean {
    return this.#setPages(first, count).next().done !== true;
  }

  /** A copy of `count` words from `first` on, as bytes. Both are multiples of 16. */
  copy(first: number, count: number): Uint8Array {
    const words = new Uint8Array(count * WORD_BYTES);
    for (const number of this.#setPages(first, count)) words.set(this.#page(number)!, (number * PAGE_WORDS - first) * WORD_BYTES);
    return words;
  }

  *#setPages(first: number, count: number): Generator<number, void> {
    const end = (first + count) / PAGE_WORDS;
    for (let number = first / PAGE_WORDS; number < end;) {
      const key = Math.floor(number / DIRECTORY_PAGES);
      const directoryEnd = Math.min(end, (key + 1) * DIRECTORY_PAGES);
      const directory = this.#directories.get(key);
      if (directory === undefined) number = directoryEnd;
      for (; number < directoryEnd; number++) if (directory?.[number % DIRECTORY_PAGES] !== 0) yield number;
    }
  }

  #page(number: number): Uint8Array | undefined {
    const place = this.#directories.get(Math.floor(number / DIRECTORY_PAGES))?.[number % DIRECTORY_PAGES] ?? 0;
    return place === 0 ? undefined : this.#pageAt(place - 1);
  }

  #openPage(number: number): Uint8Array {
    const key = Math.floor(number / DIRECTORY_PAGES);
    let directory = this.#directories.get(key);
    if (directory === undefined) {
      directory = new Uint32Array(DIRECTORY_PAGES);
      this.#directories.set(key, directory);
    }
    if (directory[number % DIRECTORY_PAGES] === 0) {
      if (this.#pages % CHUNK_PAGES === 0) this.#chunks.push(new Uint8Array(CHUNK_PAGES * PAGE_BYTES));
      directory[number % DIRECTORY_PAGES] = ++this.#pages;
    }
    return this.#pageAt(directory[number % DIRECTORY_PAGES]! - 1);
  }

  #pageAt(place: number): Uint8Array {
    const start = (place % CHUNK_PAGES) * PAGE_BYTES;
    return this.#chunks[Math.floor(place / CHUNK_PAGES)]!.subarray(start, start + PAGE_BYTES);
  }
}
