/** Disk images made by the real qemu-img, for the formats' tests. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, openSync, closeSync, rmSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const MIB = 1024 * 1024;

/** A folder with `disk.raw`: sparse, with pseudo-random pieces that begin and end inside of blocks, at the start and at the very end. */
export function makeDisk(sizeBytes: number): { readonly folder: string; readonly raw: string } & Disposable {
  const folder = mkdtempSync(join(tmpdir(), "virtlift-image-"));
  const raw = join(folder, "disk.raw");
  writeFileSync(raw, "");
  truncateSync(raw, sizeBytes);
  const descriptor = openSync(raw, "r+");
  for (const [offset, length] of [
    [0, 70_000],
    [3 * MIB - 512, 1024],
    [9 * MIB + 4096, 5 * MIB],
    [sizeBytes - 1536, 1536],
  ] as const) {
    writeSync(descriptor, noise(length), 0, length, offset);
  }
  closeSync(descriptor);
  return { folder, raw, [Symbol.dispose]: () => rmSync(folder, { recursive: true }) };
}

/** Converts the raw disk with qemu-img and gives the new file's path. `options` as `-o` takes them. */
export function convert(raw: string, format: string, options: string): string {
  const path = `${raw}.${format}`;
  qemuImg("convert", "-f", "raw", "-O", format, ...(options === "" ? [] : ["-o", options]), raw, path);
  return path;
}

/** The virtual size that qemu-img sees, in bytes. */
export function virtualSizeOf(path: string, format: string): number {
  const info: unknown = JSON.parse(qemuImg("info", "-f", format, "--output=json", path));
  if (typeof info !== "object" || info === null || !("virtual-size" in info) || typeof info["virtual-size"] !== "number")
    throw new Error(`qemu-img info says nothing about ${path}`);
  return info["virtual-size"];
}

function qemuImg(...argv: readonly string[]): string {
  return execFileSync("qemu-img", argv, { encoding: "utf8" });
}

/** The same for the same length: a linear congruential generator. */
function noise(length: number): Buffer {
  const bytes = Buffer.alloc(length);
  let state = length;
  for (let index = 0; index < length; index++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    bytes[index] = (state >>> 24) | 1;
  }
  return bytes;
}
