import { closeSync, openSync, writeSync } from "node:fs";
import { join } from "node:path";
import { deflateRawSync } from "node:zlib";
import { expect, test } from "vitest";
import { parseQcow2, readStamp } from "../../provider/image/qcow2.ts";
import { type Layout, Qcow2Writer, type Write } from "../../provider/image/qcow2-writer.ts";
import { openDirectory } from "../bed/directory.ts";
import { drive, fromFile, readGuest } from "./drive.ts";
import { mixedGuest, qemuImg, writeRaw } from "./qemu.ts";

const STAMP = new TextEncoder().encode('{"importId":"1"}');

/** Takes writes as a pipe would: each must begin where the last one ended. The header may go back. */
function openSink(path: string, start: number): { take(writes: Iterable<Write>): void; end: number } & Disposable {
  const descriptor = openSync(path, "w");
  return {
    end: start,
    take(writes) {
      for (const { offset, bytes } of writes) {
        if (offset !== 0) {
          expect(offset).toBe(this.end);
          this.end += bytes.length;
        }
        writeSync(descriptor, bytes, 0, bytes.length, offset);
      }
    },
    [Symbol.dispose]: () => closeSync(descriptor),
  };
}

interface Result {
  readonly path: string;
  readonly check: string;
}

/** Writes a guest's disk as a qcow2 by the pieces, and lets qemu check it and compare it. Gives what `qemu-img check` said. */
async function prove(
  directory: string,
  guest: Buffer,
  options: {
    readonly layout: Layout;
    readonly clusterBytes?: number;
    readonly pieces?: readonly { virtualOffset: number; lengthBytes: number }[];
    readonly announce?: boolean;
  },
): Promise<Result> {
  const { layout, clusterBytes, announce } = options;
  const pieces = options.pieces ?? [{ virtualOffset: 0, lengthBytes: guest.length }];
  const writer = new Qcow2Writer({
    virtualSizeBytes: guest.length,
    layout,
    ...(clusterBytes === undefined ? {} : { clusterBytes }),
    ...(announce === true ? { pieces } : {}),
  });
  const path = join(directory, `${layout}-${clusterBytes}.qcow2`);
  using sink = openSink(path, writer.clusterBytes);
  for (const { virtualOffset, lengthBytes } of pieces) {
    for (let at = virtualOffset; at < virtualOffset + lengthBytes; at += writer.clusterBytes) {
      const bytes = guest.subarray(at, Math.min(at + writer.clusterBytes, virtualOffset + lengthBytes));
      const isWhole = bytes.length === writer.clusterBytes && at % writer.clusterBytes === 0;
      const packed = layout === "compressed" && isWhole && !bytes.equals(Buffer.alloc(bytes.length)) ? deflateRawSync(bytes) : undefined;
      sink.take(packed !== undefined && packed.length < bytes.length ? writer.writeCompressed(at, packed) : writer.write(at, bytes));
    }
  }
  const { writes, fileSizeBytes } = writer.finish();
  sink.take(writes);
  expect(sink.end).toBe(fileSizeBytes);
  sink.take([writer.header(STAMP)]);
  return { path, check: await qemuImg("check", "-f", "qcow2", path) };
}

const CLUSTERS = [512, 4096, 65_536, 2 * 1024 * 1024];
const LAYOUTS: readonly Layout[] = ["sparse", "compressed", "full"];

test.each(LAYOUTS.flatMap((layout) => CLUSTERS.map((clusterBytes) => ({ layout, clusterBytes }))))(
  "writes what qemu reads and finds clean: $layout with clusters of $clusterBytes",
  async ({ layout, clusterBytes }) => {
    await using directory = await openDirectory();
    const guest = mixedGuest();
    const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
    const { path, check } = await prove(directory.path, guest, { layout, clusterBytes });
    expect(check).toContain("No errors were found on the image.");
    expect(check).not.toContain("leaked");
    expect(check.includes("100.00% allocated")).toBe(layout === "full");
    expect(await qemuImg("compare", "-f", "raw", "-F", "qcow2", raw, path)).toContain("Images are identical.");
    const source = fromFile(path);
    const image = drive(parseQcow2(source.size("")!), source);
    expect(readGuest(image, source).equals(guest)).toBe(true);
    expect(Buffer.from(drive(readStamp(), source) ?? []).equals(STAMP)).toBe(true);
  },
);
