import { createHash } from "node:crypto";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { openSource } from "../../provider/transfer/source.ts";
import { verifyContent } from "../../provider/transfer/content.ts";
import type { GuestOnHost } from "../../provider/transfer/part.ts";
import { openDirectory } from "../bed/directory.ts";
import { guestOf, mixedGuest, qemuImg, qemuIo, writeRaw } from "../image/qemu.ts";

const MIB = 1024 * 1024;

/** A host that holds these bytes and knows of data in these places; `asked` is what it was asked for. */
function hostWith(guest: Buffer, extents: GuestOnHost["extents"]) {
  const asked: (readonly [number, number])[] = [];
  const view: GuestOnHost = {
    sizeBytes: guest.length,
    extents,
    digest: async (offset, lengthBytes) => {
      asked.push([offset, lengthBytes]);
      return createHash("sha256")
        .update(guest.subarray(offset, offset + lengthBytes))
        .digest("hex");
    },
  };
  return { view, asked };
}

async function verify(file: string, guest: GuestOnHost, capacityBytes = guest.sizeBytes): Promise<void> {
  await using source = await openSource({ file });
  const options = { capacityBytes, place: "kvm1", path: "/pool/disk.qcow2", signal: new AbortController().signal };
  await verifyContent(guest, source, await source.runs(), options);
}

describe("the comparison of a disk's content", () => {
  for (const [kind, convert] of [
    ["raw", ["-O", "raw"]],
    ["streamOptimized", ["-O", "vmdk", "-o", "subformat=streamOptimized"]],
    ["compressed qcow2", ["-O", "qcow2", "-c"]],
    ["scattered qcow2", ["-O", "qcow2", "-o", "cluster_size=4096"]],
  ] as const) {
    it(`finds a ${kind} source equal to its guest's disk, and every changed byte`, async () => {
      await using directory = await openDirectory("content");
      const file = join(directory.path, "image");
      const guest = mixedGuest();
      await qemuImg("convert", "-f", "raw", ...convert, await writeRaw(join(directory.path, "disk.raw"), guest), file);
      await verify(file, hostWith(guest, []).view);
      for (const at of [0, MIB + 512, 3 * MIB + 5, 17 * MIB + 65_536, guest.length - 1]) {
        const changed = Buffer.from(guest);
        changed[at]! ^= 1;
        const refusal = /^\/pool\/disk\.qcow2 on kvm1 is not what its source is: its guest would read other bytes between \d+ and \d+/;
        await expect(verify(file, hostWith(changed, []).view)).rejects.toThrow(refusal);
      }
    });
  }

  it("reads a disk whose clusters lie in another order than the guest's", async () => {
    await using directory = await openDirectory("content");
    const file = join(directory.path, "disk.qcow2");
    await qemuImg("create", "-f", "qcow2", file, "8M");
    await qemuIo(file, "qcow2", "write -P 3 6M 1M", "write -P 1 0 64k", "write -P 2 3M 200k");
    const guest = Buffer.alloc(8 * MIB);
    guest
      .fill(3, 6 * MIB, 7 * MIB)
      .fill(1, 0, 65_536)
      .fill(2, 3 * MIB, 3 * MIB + 200 * 1024);
    await expect(verify(file, hostWith(guest, []).view)).resolves.toBeUndefined();
  });

  it("finds data that only the host has", async () => {
    await using directory = await openDirectory("content");
    const guest = guestOf(64 * MIB, [{ offset: 0, length: MIB, content: "noise" }]);
    const file = join(directory.path, "image.qcow2");
    await qemuImg("convert", "-f", "raw", "-O", "qcow2", await writeRaw(join(directory.path, "disk.raw"), guest), file);
    const more = Buffer.from(guest);
    more[40 * MIB] = 1;
    const { view } = hostWith(more, [{ offset: 40 * MIB, lengthBytes: 4096 }]);
    await expect(verify(file, view)).rejects.toThrow(`between ${40 * MIB} and ${40 * MIB + 4096}`);
  });

  it("asks only for what either side has, joined and cut", async () => {
    await using directory = await openDirectory("content");
    const guest = guestOf(256 * MIB, [
      { offset: 0, length: 65_536, content: "noise" },
      { offset: 196_608, length: 65_536, content: "noise" },
      { offset: 60 * MIB, length: 8 * MIB, content: "text" },
    ]);
    const file = join(directory.path, "image.qcow2");
    await qemuImg("convert", "-f", "raw", "-O", "qcow2", await writeRaw(join(directory.path, "disk.raw"), guest), file);
    const { view, asked } = hostWith(guest, [{ offset: 200 * MIB, lengthBytes: 512 }]);
    await verify(file, view);
    expect(asked).toEqual([
      [0, 262_144],
      [60 * MIB, 4 * MIB],
      [64 * MIB, 4 * MIB],
      [200 * MIB, 512],
    ]);
  });

  it("refuses a disk of another size", async () => {
    await using directory = await openDirectory("content");
    const guest = mixedGuest();
    const file = await writeRaw(join(directory.path, "disk.raw"), guest);
    await expect(verify(file, hostWith(guest, []).view, 64 * MIB)).rejects.toThrow(
      `it has ${guest.length} bytes for its guest instead of ${64 * MIB}`,
    );
  });
});
