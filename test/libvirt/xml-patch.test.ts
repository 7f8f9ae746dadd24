import { expect, test } from "vitest";
import { element, renderXml } from "../../provider/libvirt/render.ts";
import { PatchError, patchXml, type XmlPatch } from "../../provider/libvirt/xml-patch.ts";

const domain = element(
  "domain",
  {},
  element("name", {}, "web"),
  element(
    "devices",
    {},
    element("disk", { type: "file" }, element("target", { dev: "sda" })),
    element("disk", {}, element("target", { dev: "sdb" })),
  ),
);
const patched = (...patches: XmlPatch[]): string => renderXml(patchXml(domain, patches)).replaceAll(/\n\s*/g, "");

test.each<[string, XmlPatch, string]>([
  ["writes attributes of the first that fits", { path: "devices/disk", set: { type: "block" } }, '<disk type="block"><target dev="sda"/>'],
  ["chooses by an attribute of a child", { path: "devices/disk[target/@dev='sdb']", set: { a: "1" } }, '<disk a="1"><target dev="sdb"/>'],
  ["chooses by an attribute", { path: 'devices/disk[@type="file"]/target', set: { bus: "ide" } }, '<target dev="sda" bus="ide"/>'],
  ["writes text", { path: "name", text: "a & b" }, "<name>a &amp; b</name>"],
  ["adds an element word for word", { path: "", add: "<q:line xmlns:q='urn:q'/>" }, "<q:line xmlns:q='urn:q'/></domain>"],
  ["makes what is missing on the way", { path: "a/b", add: "<c/>" }, "<a><b><c/></b></a>"],
  ["removes", { path: "devices", remove: true }, "<domain><name>web</name></domain>"],
])("a patch %s", (_, patch, expected) => {
  expect(patched(patch)).toContain(expected);
});

test("patches are applied in their order, and what they were given stays as it was", () => {
  expect(patched({ path: "", add: "<x/>" }, { path: "name", remove: true })).not.toContain("<name>");
  expect(renderXml(domain)).toContain("<name>web</name>");
});

test.each<[XmlPatch, string]>([
  [{ path: "devices/video", set: {} }, "there is no element devices/video"],
  [{ path: "devices/disk[target/@dev='sdz']", add: "<x/>" }, "there is no element"],
  [{ path: "", remove: true }, "the root cannot be removed"],
  [{ path: "a//b", remove: true }, "is no path"],
  [{ path: "", add: "<!DOCTYPE x><x/>" }, "document type declaration"],
])("%j is refused, with its place", (patch, words) => {
  expect(() => patchXml(domain, [{ path: "name", text: "x" }, patch])).toThrow(PatchError);
  expect(() => patchXml(domain, [{ path: "name", text: "x" }, patch])).toThrow(
    expect.objectContaining({ index: 1, message: expect.stringContaining(words) }),
  );
});
