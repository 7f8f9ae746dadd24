import { expect, test } from "vitest";
import type { ImageFormat } from "../../provider/image/image.ts";
import { openImage } from "../../provider/image/open.ts";
import { drive, fromBytes } from "./drive.ts";
import { dynamicVhdSeed, fixedVhdSeed, vdiSeed, vhdxSeed } from "./seeds.ts";
import { descriptorText, qcow2Seed, sparseVmdkSeed, streamVmdkSeed } from "./sparse-seeds.ts";

interface Known {
  readonly format: ImageFormat;
  readonly variant: string;
  readonly image: Buffer;
}

const FLAT = { "web-flat.vmdk": Buffer.alloc(4096) };

const KNOWN: readonly Known[] = [
  { format: "qcow2", variant: "v3", image: qcow2Seed() },
  { format: "vmdk", variant: "monolithicSparse", image: sparseVmdkSeed() },
  { format: "vmdk", variant: "streamOptimized", image: streamVmdkSeed() },
  { format: "vmdk", variant: "vmfs", image: Buffer.from(descriptorText("vmfs", ['RW 8 VMFS "web-flat.vmdk"'])) },
  { format: "vhd", variant: "dynamic", image: dynamicVhdSeed() },
  { format: "vhd", variant: "fixed", image: fixedVhdSeed() },
  { format: "vhdx", variant: "dynamic", image: vhdxSeed() },
  { format: "vdi", variant: "dynamic", image: vdiSeed() },
  { format: "raw", variant: "raw", image: Buffer.alloc(4096, 1) },
];

test.each(KNOWN)("tells $format ($variant) by its bytes", ({ format, variant, image }) => {
  expect(drive(openImage({ sizeBytes: image.length }), fromBytes(image, FLAT))).toMatchObject({ format, variant });
});

test.each(KNOWN)("reads $format ($variant) when it is declared so, and refuses it as another format", ({ format, variant, image }) => {
  expect(drive(openImage({ sizeBytes: image.length, format }), fromBytes(image, FLAT))).toMatchObject({ format, variant });
  const wrong = format === "vdi" ? "vhdx" : "vdi";
  expect(() => drive(openImage({ sizeBytes: image.length, format: wrong }), fromBytes(image, FLAT))).toThrow(
    `the image is declared as ${wrong}`,
  );
});

test("anything may be declared raw, and then no byte is looked at", () => {
  for (const { image } of KNOWN.filter((known) => known.image.length % 512 === 0)) {
    const opened = drive(openImage({ sizeBytes: image.length, format: "raw" }), fromBytes(image), { asks: 0, bytes: 0 });
    expect(opened).toMatchObject({ format: "raw", virtualSizeBytes: image.length });
  }
});
