import { expect, test } from "vitest";
import { hasRoom } from "../../sdk/batch/limits.ts";
import { parseManifest } from "../../sdk/batch/manifest.ts";

const { machines } = parseManifest(
  `
hosts: { one: { uri: "qemu:///system", maxConcurrent: 1 }, two: { uri: "qemu+ssh://kvm2/system" } }
limits: { perHost: 2 }
machines:
  a: { source: { ova: /nfs1/a.ova }, host: one }
  b: { source: { vmx: /nfs1/b.vmx }, host: one }
  c: { source: { file: /nfs1/c.vmdk }, host: two }
  d: { source: { ova: /nfs2/d.ova }, host: two }
  e: { source: { ova: /nfs3/e.ova }, host: two }
  f: { source: { url: "https://x/f.qcow2" }, host: "qemu:///session" }
  g: { source: { url: "https://x/g.qcow2" }, host: "qemu:///session" }
`,
  "/m.yaml",
);
const unlimited = { total: 64, perSource: 64 };
const mayStart = (name: string, beside: string, limits = unlimited): boolean =>
  hasRoom(
    machines.find((machine) => machine.name === name)!,
    machines.filter((machine) => beside.includes(machine.name)),
    limits,
  );

test("starts no more machines on a host than it may have, by its own limit or the common one", () => {
  expect(mayStart("a", "cde")).toBe(true);
  expect(mayStart("a", "b")).toBe(false);
  expect(mayStart("c", "d")).toBe(true);
  expect(mayStart("c", "de")).toBe(false);
});

test("starts no more machines from a folder than may be read from it", () => {
  const limits = { ...unlimited, perSource: 1 };
  expect(mayStart("c", "b", limits)).toBe(false);
  expect(mayStart("d", "b", limits)).toBe(true);
  expect(mayStart("f", "g", limits)).toBe(true);
});

test("starts no more machines than there may be in all", () => {
  expect(mayStart("a", "cd", { ...unlimited, total: 2 })).toBe(false);
  expect(mayStart("a", "c", { ...unlimited, total: 2 })).toBe(true);
});
