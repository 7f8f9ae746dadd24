import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { placeStamp, readStamp, removeStampFrom } from "../../provider/image/qcow2.ts";
import type { Write } from "../../provider/image/qcow2-writer.ts";
import type { Parser } from "../../provider/image/parser.ts";
import { openDirectory } from "../bed/directory.ts";
import { qemuImg } from "./qemu.ts";

const STAMP = Buffer.from(JSON.stringify({ importId: "0123456789abcdef", origin: "organization/project/stack/web" }));

function drive<T>(parser: Parser<T>, bytes: Buffer): T {
  for (let step = parser.next(); ;) {
    if (step.done) return step.value;
    const ask = step.value;
    step = parser.next(ask.kind === "size" ? bytes.length : bytes.subarray(ask.offset, ask.offset + ask.length));
  }
}

function written(bytes: Buffer, writes: readonly Write[]): Buffer {
  const copy = Buffer.from(bytes);
  for (const write of writes) copy.set(write.bytes, write.offset);
  return copy;
}

describe("a stamp in a qcow2 of another program", () => {
  for (const options of [
    "compat=1.1",
    "compat=0.10",
    "compat=1.1,cluster_size=4k",
    "compat=1.1,extended_l2=on",
    "compat=1.1,lazy_refcounts=on",
  ]) {
    it(`is put in and taken out again, and the image is whole at any time (${options})`, async () => {
      await using directory = await openDirectory("stamp");
      const path = join(directory.path, "disk.qcow2");
      await qemuImg("create", "-f", "qcow2", "-o", options, path, "8M");
      const before = await readFile(path);
      const [body, head] = drive(placeStamp(STAMP), before);
      expect(head.bytes.length).toBe(8);
      expect(Math.floor(head.offset / 512)).toBe(Math.floor((head.offset + 7) / 512));
      for (const [writes, found] of [
        [[body], undefined],
        [[body, head], STAMP],
      ] as const) {
        const image = written(before, writes);
        const stamp = drive(readStamp(), image);
        expect(stamp && Buffer.from(stamp).toString()).toBe(found?.toString());
        await writeFile(path, image);
        await qemuImg("check", "-f", "qcow2", path);
      }
      const stamped = await readFile(path);
      expect(() => drive(placeStamp(STAMP), stamped)).toThrow("carries a stamp already");
      const free = written(stamped, [drive(removeStampFrom(), stamped)!]);
      expect(drive(readStamp(), free)).toBeUndefined();
      expect(drive(removeStampFrom(), free)).toBeUndefined();
      await writeFile(path, free);
      await qemuImg("check", "-f", "qcow2", path);
    });
  }

  it("is refused where there is no room for it, and in an image that is not read", async () => {
    await using directory = await openDirectory("stamp");
    const path = join(directory.path, "disk.qcow2");
    await qemuImg("create", "-f", "qcow2", "-o", "cluster_size=512", path, "1M");
    expect(() => drive(placeStamp(STAMP), Buffer.from("no qcow2 at all"))).toThrow(/qcow2 header ends early|magic is missing/);
    const small = await readFile(path);
    expect(() => drive(placeStamp(Buffer.alloc(600)), small)).toThrow(/does not fit the header's cluster/);
    await qemuImg("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path, "1M");
    const backed = await readFile(path);
    expect(() => drive(placeStamp(STAMP), backed)).toThrow(/backing file/);
    expect(drive(removeStampFrom(), Buffer.from("raw"))).toBeUndefined();
  });
});
