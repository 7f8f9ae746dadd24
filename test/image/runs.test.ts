import { expect, test } from "vitest";
import type { Encoding, Run } from "../../provider/image/image.ts";
import { ImageError } from "../../provider/image/parser.ts";
import { MAX_IMAGE_FILES, RunListBuilder } from "../../provider/image/runs.ts";

const K = 1024;

function builder(virtualSizeBytes = 1024 * K, files = [{ sizeBytes: 1024 * K }, { sizeBytes: 1024 * K }]): RunListBuilder {
  return new RunListBuilder({ files, virtualSizeBytes });
}

/** A run of 4 KiB unless told otherwise; places in KiB. */
function run(virtualKiB: number, fileKiB: number, more: Partial<Run> = {}): Run {
  const base = {
    file: 0,
    fileOffset: fileKiB * K,
    virtualOffset: virtualKiB * K,
    lengthBytes: 4 * K,
    storedBytes: 4 * K,
    encoding: "plain" as Encoding,
  };
  return { ...base, ...more };
}

test("joins plain runs that are neighbours in the file and in the guest's disk, and no others", () => {
  const runs = builder();
  runs.add(run(0, 100));
  runs.add(run(4, 104));
  runs.add(run(8, 112));
  runs.add(run(16, 116));
  runs.add(run(20, 0, { file: 1 }));
  const list = runs.finish();
  expect([...list].map(({ fileOffset, lengthBytes, file }) => [file, fileOffset / K, lengthBytes / K])).toEqual([
    [0, 100, 8],
    [0, 112, 4],
    [0, 116, 4],
    [1, 0, 4],
  ]);
  expect(list).toMatchObject({ count: 4, dataBytes: 20 * K });
});

test("sorts by file and offset whatever order the runs come in, over many chunks", () => {
  const count = 50_000;
  const runs = builder(count * 8 * K, [{ sizeBytes: count * 8 * K }]);
  for (let index = 0; index < count; index++) {
    const place = (index * 7919) % count;
    runs.add(run(index * 8, place * 8));
  }
  let previous = -1;
  let seen = 0;
  const guestOffsets = new Set<number>();
  for (const { fileOffset, virtualOffset } of runs.finish()) {
    if (fileOffset > previous) seen++;
    previous = fileOffset;
    guestOffsets.add(virtualOffset);
  }
  expect([seen, guestOffsets.size]).toEqual([count, count]);
});

test("may be iterated twice", () => {
  const runs = builder();
  runs.add(run(0, 8));
  runs.add(run(4, 0));
  const list = runs.finish();
  expect([...list]).toEqual([...list]);
});

test("cuts the last run at the disk's end", () => {
  const runs = builder(10 * K);
  runs.add(run(8, 0));
  expect([...runs.finish()]).toEqual([run(8, 0, { lengthBytes: 2 * K, storedBytes: 2 * K })]);
});

test("cuts the bound of a grain where the next grain or table begins, and of the last one at the file's end", () => {
  const runs = builder();
  const grain = { encoding: "grain" as Encoding, storedBytes: 128 * K };
  runs.add(run(0, 100, grain));
  runs.add(run(4, 102, grain));
  runs.add(run(8, 1020, grain));
  runs.reserve(0, 110 * K, 512, "a table");
  expect([...runs.finish()].map((each) => each.storedBytes / K)).toEqual([2, 8, 4]);
});

test("lets two compressed clusters share a sector, and no more", () => {
  const cluster = { encoding: "deflate" as Encoding, storedBytes: 1 * K };
  const sharing = builder();
  sharing.add(run(0, 0, cluster));
  sharing.add(run(4, 0.75, cluster));
  expect(sharing.finish().count).toBe(2);
  const overlapping = builder();
  overlapping.add(run(0, 0, cluster));
  overlapping.add(run(4, 0.5, cluster));
  expect(() => overlapping.finish()).toThrow("the bytes at file offset 512 are used for guest offsets 0 and 4096");
});

test.each<{ readonly name: string; readonly fill: (runs: RunListBuilder) => void; readonly says: string }>([
  {
    name: "a run behind the disk's end",
    fill: (runs) => runs.add(run(1024, 0)),
    says: "guest offset 1048576, but the disk has only 1048576 bytes",
  },
  {
    name: "a run that ends behind its file",
    fill: (runs) => runs.add(run(0, 1022)),
    says: "but the file ends at 1048576: the image is truncated",
  },
  {
    name: "a compressed run that begins at its file's end",
    fill: (runs) => runs.add(run(0, 1024, { encoding: "zstd" })),
    says: "the file ends at",
  },
  { name: "a run in a file that is none", fill: (runs) => runs.add(run(0, 0, { file: 2 })), says: "the file ends at 0" },
  { name: "a run at a negative offset", fill: (runs) => runs.add(run(0, -4)), says: "should lie at file offset -4096" },
  { name: "a run at no number", fill: (runs) => runs.add(run(0, Number.NaN)), says: "should lie at file offset NaN" },
  { name: "a guest offset twice", fill: (runs) => (runs.add(run(0, 0)), runs.add(run(0, 8))), says: "guest offset 0 twice" },
  {
    name: "a guest offset within another run",
    fill: (runs) => (runs.add(run(4, 0)), runs.add(run(2, 8))),
    says: "guest offset 4096 twice",
  },
  {
    name: "file bytes used twice",
    fill: (runs) => (runs.add(run(0, 2)), runs.add(run(8, 0))),
    says: "are used for guest offsets 8192 and 0",
  },
  {
    name: "data in a table",
    fill: (runs) => (runs.reserve(0, 2 * K, 512, "a table"), runs.add(run(0, 0))),
    says: "where the image's own tables are",
  },
  {
    name: "tables that overlap",
    fill: (runs) => (runs.reserve(0, K, K, "a table"), runs.reserve(0, 0, 1025, "a table")),
    says: "tables overlap",
  },
  {
    name: "a table behind its file",
    fill: (runs) => runs.reserve(0, 1023 * K, 2 * K, "the map"),
    says: "the map should lie at file offset 1047552",
  },
])("refuses $name", ({ fill, says }) => {
  const runs = builder();
  const attempt = (): void => {
    fill(runs);
    runs.finish();
  };
  expect(attempt).toThrow(ImageError);
  expect(() => {
    const again = builder();
    fill(again);
    again.finish();
  }).toThrow(says);
});

test("refuses more files than it can index", () => {
  const files = Array.from({ length: MAX_IMAGE_FILES + 1 }, () => ({ sizeBytes: 0 }));
  expect(() => builder(K, files)).toThrow("at most 16384 are read");
});
