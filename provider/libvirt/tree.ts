/** Looking into parsed XML: each takes an element that may be missing and gives what may be missing. Knows no vocabulary. */
import type { XmlElement } from "../image/xml.ts";

/** The first child of that name. */
export function child(parent: XmlElement | undefined, name: string): XmlElement | undefined {
  return parent?.children.find((each) => each.name === name);
}

/** All children, or those of that name. */
export function childrenOf(parent: XmlElement | undefined, name?: string): readonly XmlElement[] {
  return (parent?.children ?? []).filter((each) => name === undefined || each.name === name);
}

export function attribute(each: XmlElement | undefined, name: string): string | undefined {
  return each?.attributes.get(name);
}

/** The text of the first child of that name. */
export function text(parent: XmlElement | undefined, name: string): string | undefined {
  return child(parent, name)?.text;
}
