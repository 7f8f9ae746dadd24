import { expect, test, vi } from "vitest";
import { ImageError } from "../../provider/image/parser.ts";
import { decodeText, parseXml } from "../../provider/image/xml.ts";

const MIB = 1024 * 1024;

/** What the largest document may take, on a machine that may be slow. */
const BOUND_MS = 20_000;
vi.setConfig({ testTimeout: 2 * BOUND_MS });

test("keeps local names, attributes, text and CDATA apart from their prefixes, and the namespaces that these stand for", () => {
  const root = parseXml(
    `<?xml version="1.0"?><!-- words --><o:a xmlns:o="x" o:id="1 &amp; 2" v:id="3">t&lt;&#10;<b><![CDATA[ &amp;<c> ]]></b>u&#x41;<o:b/></o:a>`,
    "it",
  );
  expect(root).toEqual({
    name: "a",
    namespace: "x",
    attributes: new Map([["id", "1 & 2"]]),
    text: "t<\nuA",
    children: [
      { name: "b", attributes: new Map(), children: [], text: "&amp;<c>" },
      { name: "b", namespace: "x", attributes: new Map(), children: [], text: "" },
    ],
  });
  const [inner, undeclared] = parseXml('<a xmlns="x"><p:b xmlns:p="y" xmlns=""><c/><p:d/></p:b><p:e/></a>', "it").children;
  expect([inner, ...inner!.children, undeclared].map((each) => each?.namespace)).toEqual(["y", undefined, "y", undefined]);
});

test("keeps numbers as they are written", () => {
  expect(parseXml("<a b='007'>1e3</a>", "it")).toMatchObject({ attributes: new Map([["b", "007"]]), text: "1e3" });
});

test.each(["&lol;", "&#0;", "&#x110000;", "&#99999999;", "&constructor;"])("refuses the entity %s", (entity) => {
  expect(() => parseXml(`<a>${entity}</a>`, "it")).toThrow(ImageError);
});

test.each([
  ["one tag of spaces", `<a ${" ".repeat(4 * MIB - 100)}/>`],
  ["one endless name", `<${"a".repeat(4 * MIB - 100)}/>`],
  ["very many attributes", `<a ${Array.from({ length: 200_000 }, (_, index) => `b${index}="1"`).join(" ")}/>`],
  ["very many references", `<a>${"&amp;".repeat(800_000)}</a>`],
  ["very many open tags", "<a".repeat(190_000)],
  ["very many comments that never end", `<a>${"<!--".repeat(190_000)}</a>`],
  ["very many CDATA sections", `<a>${"<![CDATA[x]]>".repeat(190_000)}</a>`],
  ["very many brackets", `<a>${"]]>".repeat(MIB)}</a>`],
])("is done with %s in bounded time", (_, text) => {
  const start = performance.now();
  let refusal: unknown;
  try {
    parseXml(text, "it");
  } catch (error) {
    refusal = error;
  }
  expect(refusal === undefined || refusal instanceof ImageError).toBe(true);
  expect(performance.now() - start).toBeLessThan(BOUND_MS);
});

test("decodes UTF-8 and UTF-16 with and without a byte order mark", () => {
  expect(decodeText(Buffer.from("é"), "it")).toBe("é");
  expect(decodeText(Buffer.from("\uFEFFé"), "it")).toBe("é");
  expect(decodeText(Buffer.from("\uFEFFé", "utf16le"), "it")).toBe("é");
  expect(decodeText(Buffer.from("\uFEFFé", "utf16le").swap16(), "it")).toBe("é");
  expect(() => decodeText(Buffer.from([0xc3]), "it")).toThrow(new ImageError("it is not text in UTF-8: it is damaged"));
});
