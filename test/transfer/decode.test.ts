import { deflateRawSync, deflateSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import type { Run } from "../../provider/image/image.ts";
import { ImageError } from "../../provider/image/parser.ts";
import { inflateRun } from "../../provider/transfer/decode.ts";

const CLUSTER_BYTES = 65_536;
const DISK_BYTES = 100 * CLUSTER_BYTES;

function runOf(encoding: "grain" | "deflate", storedBytes: number): Run {
  return { file: 0, fileOffset: 0, storedBytes, virtualOffset: 0, lengthBytes: CLUSTER_BYTES, encoding };
}

/** A grain as a VMDK holds it, of guest offset 0. */
function grain(stream: Buffer): Buffer {
  const marker = Buffer.alloc(12);
  marker.writeUInt32LE(stream.length, 8);
  return Buffer.concat([marker, stream]);
}

describe("a compressed run", () => {
  const good = Buffer.alloc(CLUSTER_BYTES, "guest data ");

  it("is inflated, whatever came before it in the same stream of Node's", async () => {
    const stored = grain(deflateSync(good));
    const bad: readonly Buffer[] = [
      grain(deflateSync(Buffer.alloc(CLUSTER_BYTES + 1))),
      grain(deflateSync(Buffer.alloc(20 * CLUSTER_BYTES))),
      grain(deflateSync(Buffer.alloc(CLUSTER_BYTES - 1))),
      grain(deflateSync(good).subarray(0, 40)),
      grain(Buffer.from("no stream at all")),
    ];
    for (const each of bad) {
      await expect(inflateRun(runOf("grain", each.length), each, DISK_BYTES)).rejects.toBeInstanceOf(ImageError);
      expect((await inflateRun(runOf("grain", stored.length), stored, DISK_BYTES)).equals(good)).toBe(true);
    }
  });

  it("may end before its bytes do, as those of a qcow2", async () => {
    const stream = deflateRawSync(good);
    for (const stored of [stream, Buffer.concat([stream, Buffer.alloc(300)]), stream]) {
      expect((await inflateRun(runOf("deflate", stored.length), stored, DISK_BYTES)).equals(good)).toBe(true);
    }
    const tooMuch = deflateRawSync(Buffer.alloc(CLUSTER_BYTES + 1));
    await expect(inflateRun(runOf("deflate", tooMuch.length), tooMuch, DISK_BYTES)).rejects.toThrow("inflates to more than 65536 bytes");
  });
});
