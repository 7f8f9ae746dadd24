/** A file that lies in a pool already becomes a disk of ours, and stops being one: all that is written is its stamp. */
import { posix } from "node:path";
import { DiskError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { placeStamp, removeStampFrom } from "../image/qcow2.ts";
import type { Write } from "../image/qcow2-writer.ts";
import { type ImportOptions, type ImportResult, stampOf } from "./import.ts";
import { digestOnHost, HostFolder, type HostSource } from "./on-host.ts";
import { WORK_FOLDER } from "./part-file.ts";
import { probe, removeStamp } from "./probe.ts";
import { drive } from "./range.ts";

const WRITE = 'dd of="$1" bs=65536 oflag=seek_bytes seek="$2" iflag=fullblock conv=notrunc,nocreat,fsync status=none';

/** As the receiver keeps the stamp of a raw part: with the file's inode. */
const KEEP_STAMP = `
set -e
umask 077
mkdir -p -- "$1"
{ stat -c %i -- "$3"; cat; } >"$1/$2.stamp"
sync -- "$1/$2.stamp" "$1"
`;

const CLOSE = 'touch -d "@$2" -- "$1" && sync -- "$1" && stat -c %b -- "$1"';

/**
 * Makes a disk of the file at `finalPath`, which is the source itself, whole at any time: a run that was interrupted is begun anew.
 *
 * Throws DiskError: step "source" when its digest is another than promised or it changes meanwhile, step "publish" when somebody else adopts it at
 * the same time.
 */
export async function adoptOnHost(host: Host, { source, folder }: HostSource, options: ImportOptions): Promise<ImportResult> {
  const { finalPath, format, id, signal } = options;
  const sourceDigest = `sha256:${await digestOnHost(host, finalPath, source.files[0]?.expected, signal)}`;
  await folder.assertUnchanged();
  if (format === "qcow2") await eraseStamp(host, finalPath);
  const contentDigest =
    format === "raw" ? sourceDigest : `sha256:${await digestFrom(host, finalPath, source.image.granularityBytes, signal)}`;
  const importedAt = Math.floor(Date.now() / 1000);
  const stamp = stampOf(options, { sourceDigest, contentDigest, importedAt });
  if (format === "raw") {
    await host.run(["sh", "-c", KEEP_STAMP, "virtlift", posix.join(posix.dirname(finalPath), WORK_FOLDER), id, finalPath], {
      input: stamp,
    });
  } else {
    const header = new HostFolder(host, finalPath);
    await writeAll(host, finalPath, await drive(placeStamp(stamp), (name) => header.file(name)));
  }
  const { stdout } = await host.run(["sh", "-c", CLOSE, "virtlift", finalPath, String(importedAt)]);
  const { file } = await probe(host, finalPath, id);
  if (file?.stamp?.importId !== id) {
    throw new DiskError(`${finalPath} on ${host.label} was adopted by another program at the same time: run up again`, {
      step: "publish",
      path: finalPath,
    });
  }
  const [virtualSizeBytes, allocatedBytes] = [options.capacityBytes, Number(stdout.toString("latin1")) * 512];
  return { virtualSizeBytes, sourceDigest, contentDigest, allocatedBytes, sentBytes: 0, keptBytes: 0, importedAt };
}

/** Takes our stamp off a file that stays, so that it may be adopted again. Does nothing to one that is not ours, or is gone. */
export async function releaseOnHost(host: Host, path: string, id: string): Promise<void> {
  const { file } = await probe(host, path, id);
  if (file?.stamp?.importId !== id) return;
  await eraseStamp(host, path);
  await removeStamp(host, path, id);
}

/** From a qcow2's header; any other file has none inside. */
async function eraseStamp(host: Host, path: string): Promise<void> {
  const header = new HostFolder(host, path);
  const write = await drive(removeStampFrom(), (name) => header.file(name));
  if (write) await writeAll(host, path, [write]);
}

async function writeAll(host: Host, path: string, writes: readonly Write[]): Promise<void> {
  for (const { offset, bytes } of writes) await host.run(["sh", "-c", WRITE, "virtlift", path, String(offset)], { input: bytes });
}

const DIGEST_FROM = `
if command -v openssl >/dev/null 2>&1; then sha='openssl dgst -sha256 -r'; else sha=sha256sum; fi
dd if="$1" bs=1048576 iflag=skip_bytes skip="$2" status=none | $sha
`;

const LONG_MS = 24 * 60 * 60 * 1000;

async function digestFrom(host: Host, path: string, offset: number, signal: AbortSignal): Promise<string> {
  const { stdout } = await host.run(["sh", "-c", DIGEST_FROM, "virtlift", path, String(offset)], { signal, timeoutMs: LONG_MS });
  return stdout.toString("latin1").slice(0, 64);
}
