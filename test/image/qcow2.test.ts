import { statSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parseQcow2 } from "../../provider/image/qcow2.ts";
import { openDirectory } from "../bed/directory.ts";
import { drive, fromFile, readGuest } from "./drive.ts";
import { mixedGuest, qemuImg, writeRaw } from "./qemu.ts";

const VARIANTS: readonly { readonly options: string; readonly compressed?: boolean; readonly granularity: number }[] = [
  { options: "compat=0.10", granularity: 65_536 },
  { options: "compat=1.1", granularity: 65_536 },
  { options: "compat=1.1,cluster_size=512", granularity: 512 },
  { options: "compat=1.1,cluster_size=4096", granularity: 4096 },
  { options: "compat=1.1,cluster_size=2M", granularity: 2 * 1024 * 1024 },
  { options: "compat=1.1,extended_l2=on", granularity: 2048 },
  { options: "compat=1.1,extended_l2=on,cluster_size=16k", granularity: 512 },
  { options: "compat=1.1,lazy_refcounts=on,refcount_bits=1", granularity: 65_536 },
  { options: "compat=0.10", compressed: true, granularity: 65_536 },
  { options: "compat=1.1", compressed: true, granularity: 65_536 },
  { options: "compat=1.1,compression_type=zstd", compressed: true, granularity: 65_536 },
  { options: "compat=1.1,cluster_size=512", compressed: true, granularity: 512 },
  { options: "compat=1.1,cluster_size=2M", compressed: true, granularity: 2 * 1024 * 1024 },
  { options: "compat=1.1,extended_l2=on,cluster_size=64k", compressed: true, granularity: 2048 },
  { options: "compat=1.1,preallocation=metadata", granularity: 65_536 },
  { options: "compat=1.1,preallocation=full", granularity: 65_536 },
];

test.each(VARIANTS)("reads what qemu reads: $options compressed=$compressed", async ({ options, compressed, granularity }) => {
  await using directory = await openDirectory();
  const guest = mixedGuest();
  const raw = await writeRaw(join(directory.path, "guest.raw"), guest);
  const path = join(directory.path, "guest.qcow2");
  await qemuImg("convert", ...(compressed === true ? ["-c"] : []), "-f", "raw", "-O", "qcow2", "-o", options, raw, path);
  const source = fromFile(path);
  const image = drive(parseQcow2(statSync(path).size), source);
  expect(image).toMatchObject({ format: "qcow2", virtualSizeBytes: guest.length, granularityBytes: granularity, notes: [] });
  expect(readGuest(image, source).equals(guest)).toBe(true);
});
