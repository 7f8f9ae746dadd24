/** Writes an initramfs: a gzipped cpio archive of the "newc" kind. Pure: files in, bytes out. */
import { gzipSync } from "node:zlib";

/** One file of the archive; folders on its path are added by themselves. `path` has no leading slash; `mode` is the permission bits, default 0644. */
export interface InitramfsFile {
  readonly path: string;
  readonly content: Uint8Array | string;
  readonly mode?: number;
}

const DIRECTORY_MODE = 0o040_755;
const FILE_TYPE = 0o100_000;
const ALIGNMENT_BYTES = 4;

/** The archive that the kernel unpacks as its root. Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. */
export function encodeInitramfs(files: readonly InitramfsFile[]): Buffer {
  const directories = new Set(files.flatMap((file) => parents(file.path)));
  const entries = [
    ...[...directories].toSorted().map((path) => encodeEntry(path, DIRECTORY_MODE, Buffer.alloc(0))),
    ...files.map((file) => encodeEntry(file.path, FILE_TYPE | (file.mode ?? 0o644), Buffer.from(file.content))),
    encodeEntry("TRAILER!!!", 0, Buffer.alloc(0)),
  ];
  return gzipSync(Buffer.concat(entries), { level: 9 });
}

function parents(path: string): readonly string[] {
  const parts = path.split("/").slice(0, -1);
  return parts.map((_, index) => parts.slice(0, index + 1).join("/"));
}

/** Header, name and content, each padded to four bytes. All numbers are eight hexadecimal digits; inode, owner, time and device are 0. */
function encodeEntry(path: string, mode: number, content: Buffer): Buffer {
  const name = Buffer.from(`${path}\0`);
  const numbers = [0, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, name.length, 0];
  const header = Buffer.from(`070701${numbers.map((each) => each.toString(16).padStart(8, "0")).join("")}`);
  return Buffer.concat([pad(Buffer.concat([header, name])), pad(content)]);
}

function pad(bytes: Buffer): Buffer {
  const missing = (ALIGNMENT_BYTES - (bytes.length % ALIGNMENT_BYTES)) % ALIGNMENT_BYTES;
  return Buffer.concat([bytes, Buffer.alloc(missing)]);
}
