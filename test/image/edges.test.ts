/** Every byte of every structure, one after the other, is set to values at which bounds break, under checksums that fit: what no random mutation gets to. */
import { readFileSync } from "node:fs";
import { expect, test, vi } from "vitest";
import type { DiskImage } from "../../provider/image/image.ts";
import { openOva } from "../../provider/image/ova.ts";
import { parseOvf } from "../../provider/image/ovf.ts";
import { ImageError, type Parser } from "../../provider/image/parser.ts";
import { parseVdi } from "../../provider/image/vdi.ts";
import { parseVhd } from "../../provider/image/vhd.ts";
import { parseVhdx } from "../../provider/image/vhdx.ts";
import { type Budget, drive, fromBytes } from "./drive.ts";
import {
  dynamicVhdSeed,
  fixedVhdSeed,
  ovaSeed,
  sealTarHeader,
  sealVhd,
  sealVhdx,
  vdiSeed,
  VHDX_METADATA_OFFSET,
  VHDX_TABLE_OFFSET,
  vhdxSeed,
} from "./seeds.ts";

const BUDGET: Budget = { asks: 5000, bytes: 16 * 1024 * 1024 };
const VALUES = [0x00, 0x01, 0x7f, 0x80, 0xff];
const KIB = 1024;

// Thousands of parses each, on machines that may be slow.
vi.setConfig({ testTimeout: 120_000 });

/** From offset to offset. */
type Span = readonly [number, number];

/** Sets each byte of the spans to each value, seals, and tries; gives what was thrown and is no ImageError of one line. */
function tryAll(
  bytes: Buffer,
  spans: readonly Span[],
  seal: (bytes: Buffer, offset: number) => unknown,
  attempt: (bytes: Buffer) => unknown,
): unknown[] {
  const surprises: unknown[] = [];
  const whole = Buffer.from(bytes);
  for (const [start, end] of spans) {
    for (let offset = start; offset < end; offset++) {
      for (const value of VALUES.filter((candidate) => candidate !== whole.readUInt8(offset))) {
        bytes.writeUInt8(value, offset);
        seal(bytes, offset);
        try {
          attempt(bytes);
        } catch (error) {
          if (!(error instanceof ImageError) || error.message.includes("\n")) surprises.push(`${offset} = ${value}: ${String(error)}`);
        }
      }
      bytes.writeUInt8(whole.readUInt8(offset), offset);
      seal(bytes, offset);
    }
  }
  return surprises;
}

function openDisk(parse: (sizeBytes: number) => Parser<DiskImage>): (bytes: Buffer) => void {
  return (bytes) => {
    const source = fromBytes(bytes);
    drive(drive(parse(bytes.length), source, BUDGET).runs(), source, BUDGET);
  };
}

test("a fixed VHD", () => {
  const bytes = fixedVhdSeed();
  expect(tryAll(bytes, [[bytes.length - 512, bytes.length]], sealVhd, openDisk(parseVhd))).toEqual([]);
});

test("a dynamic VHD", () => {
  const bytes = dynamicVhdSeed();
  // The footer's copy is made to agree, so that what both say is tried too.
  const seal = (copy: Buffer): Buffer => sealVhd(copy.fill(copy.subarray(0, 512), copy.length - 512));
  expect(tryAll(bytes, [[0, 1536 + 24]], seal, openDisk(parseVhd))).toEqual([]);
});

test("a VHDX", () => {
  const headers: readonly Span[] = [[128 * KIB, 128 * KIB + 80]];
  const regions: readonly Span[] = [[192 * KIB, 192 * KIB + 80]];
  const metadata: readonly Span[] = [
    [VHDX_METADATA_OFFSET, VHDX_METADATA_OFFSET + 192],
    [VHDX_METADATA_OFFSET + 64 * KIB, VHDX_METADATA_OFFSET + 64 * KIB + 80],
    [VHDX_TABLE_OFFSET, VHDX_TABLE_OFFSET + 48],
  ];
  const seal = (bytes: Buffer, offset: number): void => void (offset < 512 * KIB && sealVhdx(bytes));
  expect(tryAll(vhdxSeed(), [...headers, ...regions, ...metadata], seal, openDisk(parseVhdx))).toEqual([]);
});

test("a VDI", () => {
  expect(tryAll(vdiSeed(), [[64, 512 + 24]], () => {}, openDisk(parseVdi))).toEqual([]);
});

test("an OVA's tar headers", () => {
  const bytes = ovaSeed();
  const headers = [0, 1024, 1536, 2048, 2560, 3072, 3584].filter(
    (offset) => bytes.toString("latin1", offset + 257, offset + 262) === "ustar",
  );
  expect(headers).toHaveLength(3);
  const seal = (copy: Buffer, offset: number): void =>
    void (offset % 512 < 148 || offset % 512 >= 156 ? sealTarHeader(copy.subarray(offset - (offset % 512))) : undefined);
  const spans = headers.map((offset): Span => [offset, offset + 270]);
  expect(tryAll(bytes, spans, seal, (copy) => drive(openOva(copy.length), fromBytes(copy), BUDGET))).toEqual([]);
});

test.each(["vmware", "virtualbox", "ovirt", "xenserver", "aws"])("the text of %s's descriptor", (name) => {
  const text = readFileSync(new URL(`../fixtures/ovf/${name}.ovf`, import.meta.url), "utf8");
  const surprises: unknown[] = [];
  for (let offset = 0; offset < text.length; offset += 31) {
    for (const changed of [
      text.slice(0, offset) + text.slice(offset + 1),
      `${text.slice(0, offset)}<${text.slice(offset)}`,
      `${text.slice(0, offset)}9${text.slice(offset)}`,
    ]) {
      try {
        parseOvf(changed);
      } catch (error) {
        if (!(error instanceof ImageError) || error.message.includes("\n")) surprises.push(`${offset}: ${String(error)}`);
      }
    }
  }
  expect(surprises).toEqual([]);
});
