/** Writes XML: elements as plain values, every text and attribute escaped. Knows no vocabulary. */

/** An element to be written. Children are elements, or one text. */
export interface Element {
  readonly name: string;
  readonly attributes: Readonly<Record<string, string | number | undefined>>;
  readonly children: readonly (Element | RawXml | string)[];
}

/** Well-formed XML that is written word for word. */
export interface RawXml {
  readonly raw: string;
}

/** An element; attributes and children that are undefined are left out. */
export function element(
  name: string,
  attributes: Readonly<Record<string, string | number | undefined>> = {},
  ...children: readonly (Element | string | undefined)[]
): Element {
  return { name, attributes, children: children.filter((child) => child !== undefined) };
}

/** The document, two spaces a level, with a newline at its end. Throws RangeError on a character that XML cannot hold. */
export function renderXml(root: Element): string {
  return `${lines(root, "").join("\n")}\n`;
}

function lines({ name, attributes, children }: Element, indent: string): readonly string[] {
  const written = Object.entries(attributes)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => ` ${key}="${escapeXml(String(value))}"`)
    .join("");
  if (children.length === 0) return [`${indent}<${name}${written}/>`];
  if (children.every((child) => typeof child === "string")) {
    return [`${indent}<${name}${written}>${escapeXml(children.join(""))}</${name}>`];
  }
  const inner = children.flatMap((child) => {
    if (typeof child === "string") return [`${indent}  ${escapeXml(child)}`];
    return "raw" in child ? [`${indent}  ${child.raw.trim()}`] : lines(child, `${indent}  `);
  });
  return [`${indent}<${name}${written}>`, ...inner, `${indent}</${name}>`];
}

const ESCAPES: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;" };

function escapeXml(text: string): string {
  const unfit = UNFIT.exec(text);
  if (unfit) throw new RangeError(`XML cannot hold the character U+${unfit[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  // Line breaks and tabs are written as references: plain ones in an attribute are read back as spaces.
  return text.replace(/[&<>"'\t\n\r]/g, (character) => ESCAPES[character] ?? `&#${character.charCodeAt(0)};`);
}

/** What XML 1.0 has no form for: control characters but tab, line feed and carriage return, U+FFFE, U+FFFF, and lone surrogates. */
const UNFIT = /[^\t\n\r\u{20}-\u{D7FF}\u{E000}-\u{FFFD}\u{10000}-\u{10FFFF}]/u;

/** Whether XML can hold the text. */
export function fitsXml(text: string): boolean {
  return !UNFIT.test(text);
}
