/** XML as a plain tree of local names, within bounds: no DTD, no entities but XML's own. Knows no vocabulary. */
import { XMLParser, XMLValidator } from "fast-xml-parser";
import { ImageError } from "./parser.ts";
import { quoted } from "./words.ts";

/** The largest document that is read, in bytes or characters. A real OVF descriptor has some tens of KiB. */
export const MAX_XML_BYTES = 4 * 1024 * 1024;
const MAX_TAGS = 200_000;
const MAX_DEPTH = 64;

/** An element. Names are without their prefix; of two attributes that differ only in their prefix the first stays. */
export interface XmlElement {
  readonly name: string;
  /** The URI of its namespace; undefined: none, or its prefix is not declared. */
  readonly namespace?: string | undefined;
  readonly attributes: ReadonlyMap<string, string>;
  readonly children: readonly XmlElement[];
  /** The text and CDATA directly inside, trimmed. */
  readonly text: string;
}

/** The URIs of the namespaces that an element declares by their prefixes, the default one's empty, within those of the elements around it. */
interface Namespaces {
  readonly declared: ReadonlyMap<string, string>;
  readonly outer: Namespaces | undefined;
}

const TEXT = "#text";
const CDATA = "#cdata";
const ATTRIBUTES = ":@";

/** Decodes text as programs write it: UTF-16 by its byte order mark, else UTF-8. Throws ImageError naming `what` when they are neither. */
export function decodeText(bytes: Uint8Array, what: string): string {
  const encoding = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : bytes[0] === 0xfe && bytes[1] === 0xff ? "utf-16be" : "utf-8";
  try {
    return new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch (error) {
    // TextDecoder throws TypeError on bytes that mean nothing, and nothing else.
    if (!(error instanceof TypeError)) throw error;
    throw new ImageError(`${what} is not text in ${encoding.toUpperCase()}: it is damaged`);
  }
}

/** Parses a document and gives its root. Throws ImageError naming `what` when it is no well-formed XML, has a DTD, or passes the bounds above. */
export function parseXml(text: string, what: string): XmlElement {
  if (text.length > MAX_XML_BYTES) throw new ImageError(`${what} has ${text.length} characters; at most ${MAX_XML_BYTES} are read`);
  if (/<!(?:DOCTYPE|ENTITY)/i.test(text)) throw new ImageError(`${what} has a document type declaration, which is not allowed`);
  if (countTags(text) > MAX_TAGS) throw new ImageError(`${what} has more than ${MAX_TAGS} tags, which are not read`);
  const valid = XMLValidator.validate(text);
  if (valid !== true) throw new ImageError(`${what} is not well-formed XML: ${oneLine(valid.err.msg)} (line ${valid.err.line})`);
  const elements = elementsIn(parseOrdered(text, what), what, undefined);
  const root = elements.find(({ name }) => name !== "?xml");
  if (root === undefined) throw new ImageError(`${what} holds no XML element`);
  return root;
}

function countTags(text: string): number {
  let count = 0;
  for (let index = text.indexOf("<"); index !== -1 && count <= MAX_TAGS; index = text.indexOf("<", index + 1)) count++;
  return count;
}

function parseOrdered(text: string, what: string): unknown {
  const parser = new XMLParser({
    preserveOrder: true,
    ignoreAttributes: false,
    attributeNamePrefix: "",
    textNodeName: TEXT,
    cdataPropName: CDATA,
    processEntities: false,
    parseTagValue: false,
    trimValues: false,
    maxNestedTags: MAX_DEPTH,
    ignorePiTags: true,
  });
  try {
    return parser.parse(text);
  } catch (error) {
    throw new ImageError(`${what} is not readable XML: ${oneLine(error instanceof Error ? error.message : "the parser failed")}`);
  }
}

/** Nodes as fast-xml-parser gives them in order: each is one key with its children, and `:@` with its attributes. */
function elementsIn(nodes: unknown, what: string, outer: Namespaces | undefined): readonly XmlElement[] {
  if (!Array.isArray(nodes)) return [];
  return nodes.flatMap((node: unknown) => {
    const name = tagOf(node);
    return name === undefined || name === TEXT || name === CDATA ? [] : [elementOf(node, name, what, outer)];
  });
}

function elementOf(node: unknown, name: string, what: string, outer: Namespaces | undefined): XmlElement {
  const inner = property(node, name);
  const declared = property(node, ATTRIBUTES);
  const attributes = new Map<string, string>();
  const uris = new Map<string, string>();
  for (const [key, value] of Object.entries(typeof declared === "object" && declared !== null ? declared : {})) {
    if (typeof value !== "string") continue;
    const local = localName(key);
    if (key.startsWith("xmlns")) uris.set(key.slice("xmlns:".length), decodeEntities(value, what));
    else if (!attributes.has(local)) attributes.set(local, decodeEntities(value, what));
  }
  const namespaces = uris.size > 0 ? { declared: uris, outer } : outer;
  const namespace = namespaceOf(name.slice(0, Math.max(0, name.indexOf(":"))), namespaces);
  return {
    name: localName(name),
    ...(namespace !== undefined && { namespace }),
    attributes,
    children: elementsIn(inner, what, namespaces),
    text: textIn(inner, what).trim(),
  };
}

function namespaceOf(prefix: string, namespaces: Namespaces | undefined): string | undefined {
  for (let scope = namespaces; scope !== undefined; scope = scope.outer) {
    const uri = scope.declared.get(prefix);
    if (uri !== undefined) return uri === "" ? undefined : uri;
  }
  return undefined;
}

function textIn(nodes: unknown, what: string): string {
  if (!Array.isArray(nodes)) return "";
  return nodes
    .map((node: unknown) => {
      const text = property(node, TEXT);
      if (typeof text === "string") return decodeEntities(text, what);
      const cdata: unknown = property(node, CDATA);
      const first: unknown = Array.isArray(cdata) ? cdata[0] : undefined;
      const raw = property(first, TEXT);
      return typeof raw === "string" ? raw : "";
    })
    .join("");
}

function tagOf(node: unknown): string | undefined {
  return typeof node === "object" && node !== null ? Object.keys(node).find((key) => key !== ATTRIBUTES) : undefined;
}

function property(node: unknown, key: string): unknown {
  return typeof node === "object" && node !== null && Object.hasOwn(node, key) ? Reflect.get(node, key) : undefined;
}

function localName(name: string): string {
  return name.slice(name.indexOf(":") + 1);
}

const ENTITIES: Readonly<Record<string, string>> = { lt: "<", gt: ">", amp: "&", quot: '"', apos: "'" };

/** Character references and the five entities that every XML document has. */
function decodeEntities(text: string, what: string): string {
  return text.replace(/&([^;&]{0,16});?/g, (whole, name: string) => {
    const number = /^#(?:x([0-9a-f]{1,6})|([0-9]{1,7}))$/i.exec(name);
    const code = number === null ? undefined : Number.parseInt(number[1] ?? number[2]!, number[1] === undefined ? 10 : 16);
    const character = code === undefined ? (Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : undefined) : characterOf(code);
    if (character === undefined || !whole.endsWith(";"))
      throw new ImageError(`${what} uses the entity ${quoted(whole)}, which is not known`);
    return character;
  });
}

function characterOf(code: number): string | undefined {
  return code > 0 && code <= 0x10_ffff ? String.fromCodePoint(code) : undefined;
}

function oneLine(text: string): string {
  return text.replace(/\s+/g, " ").slice(0, 200);
}
