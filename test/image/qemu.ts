/** Images for the tests, made by the real qemu-img. */
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { promisify } from "node:util";

const run = promisify(execFile);

/** Runs qemu-img with an argv; gives its stdout. Throws with its stderr when it does not exit 0. */
export async function qemuImg(...argv: readonly string[]): Promise<string> {
  const { stdout } = await run("qemu-img", [...argv], { maxBuffer: 64 * 1024 * 1024 });
  return stdout;
}

/** Runs commands of qemu-io on an image. */
export async function qemuIo(path: string, format: string, ...commands: readonly string[]): Promise<void> {
  await run("qemu-io", ["-f", format, ...commands.flatMap((command) => ["-c", command]), path]);
}

/** What qemu reads from the image: the guest's disk. */
export async function guestByQemu(path: string, format: string, scratch: string): Promise<Buffer> {
  await qemuImg("convert", "-f", format, "-O", "raw", path, scratch);
  return readFile(scratch);
}

/** A piece of a guest's disk for `writeRaw`: noise does not compress, text does, zeros are written as such. */
export interface Piece {
  readonly offset: number;
  readonly length: number;
  readonly content: "noise" | "text" | "zeros";
}

/** The bytes of a guest's disk: zeros but for the pieces. */
export function guestOf(sizeBytes: number, pieces: readonly Piece[]): Buffer {
  const guest = Buffer.alloc(sizeBytes);
  for (const { offset, length, content } of pieces) {
    if (content === "noise") randomBytes(length).copy(guest, offset);
    if (content === "text") guest.fill(`Guest text at ${offset}. `, offset, offset + length);
  }
  return guest;
}

const MIB = 1024 * 1024;

/** A disk of 20 MiB and a bit with data at its start, in the middle, over cluster borders, and in its last sectors. */
export function mixedGuest(): Buffer {
  const sizeBytes = 20 * MIB + 3 * 512;
  return guestOf(sizeBytes, [
    { offset: 0, length: 4096, content: "noise" },
    { offset: MIB + 512, length: 300_000, content: "text" },
    { offset: 3 * MIB - 1024, length: 700_000, content: "noise" },
    { offset: 9 * MIB, length: 2 * MIB, content: "text" },
    { offset: 17 * MIB + 65_536, length: 512, content: "noise" },
    { offset: sizeBytes - 1024, length: 1024, content: "noise" },
  ]);
}

/** Writes the guest's disk as a raw file and gives the path back. */
export async function writeRaw(path: string, guest: Uint8Array): Promise<string> {
  await writeFile(path, guest);
  return path;
}
