/** Small changes to XML that is about to be written: each names one element by a path and says what becomes of it. Pure; knows no vocabulary. */
import { ImageError } from "../image/parser.ts";
import { parseXml } from "../image/xml.ts";
import { type Element, element, type RawXml } from "./render.ts";

/** A change to one element. Exactly one of `set`, `text`, `add` and `remove` is given. */
export interface XmlPatch {
  /**
   * Names from the root's children down, with `/` between them: `devices/video/model`. `[@type='vnc']` and `[target/@dev='sda']` after a name choose
   * among several, the first that fits is taken. Empty: the root.
   */
  readonly path: string;
  /** Attributes to write or write over. */
  readonly set?: Readonly<Record<string, string>> | undefined;
  /** The element's text, in place of what is in it. */
  readonly text?: string | undefined;
  /** An element as XML, added as the last child. Where elements on the way to it are missing, they are made. */
  readonly add?: string | undefined;
  /** Removes the element. */
  readonly remove?: true | undefined;
}

/** A patch that fits nothing or is none. `index` is its place in the list. The message says what is wrong with which part of it. */
export class PatchError extends Error {
  override readonly name = "PatchError";
  readonly index: number;

  constructor(index: number, message: string) {
    super(message);
    this.index = index;
  }
}

interface Step {
  readonly name: string;
  /** The child in which the attribute is; undefined: the element itself. */
  readonly child?: string | undefined;
  readonly attribute?: string | undefined;
  readonly value?: string | undefined;
}

/** Applies the patches in their order. Throws PatchError. */
export function patchXml(root: Element, patches: readonly XmlPatch[]): Element {
  return patches.reduce((patched, patch, index) => {
    const steps = parsePath(patch.path, index);
    if (patch.remove && steps.length === 0) throw new PatchError(index, "the root cannot be removed");
    const changed = patchAt(patched, steps, patch, index);
    if (changed === undefined) throw new PatchError(index, `there is no element ${patch.path}`);
    return changed;
  }, root);
}

const STEP = /^([A-Za-z_][\w.-]*)(?:\[(?:([A-Za-z_][\w.-]*)\/)?@([A-Za-z_][\w:.-]*)=(?:'([^']*)'|"([^"]*)")\])?(?:\/|$)/;

function parsePath(path: string, index: number): readonly Step[] {
  const steps: Step[] = [];
  for (let rest = path; rest !== "";) {
    const match = STEP.exec(rest);
    if (!match) throw new PatchError(index, `the path ${JSON.stringify(path)} is no path: write names with / between them`);
    steps.push({ name: match[1]!, child: match[2], attribute: match[3], value: match[4] ?? match[5] });
    rest = rest.slice(match[0].length);
  }
  return steps;
}

/** The element with the patch applied at the end of the path; undefined when the path ends before that. */
function patchAt(parent: Element, steps: readonly Step[], patch: XmlPatch, index: number): Element | undefined {
  const [step, ...further] = steps;
  if (step === undefined) return changed(parent, patch, index);
  const at = parent.children.findIndex((each) => isElement(each) && fits(each, step));
  const found = parent.children[at];
  if (found === undefined || !isElement(found)) {
    if (patch.add === undefined || step.attribute !== undefined) return undefined;
    const made = patchAt(element(step.name), further, patch, index);
    return made && { ...parent, children: [...parent.children, made] };
  }
  if (patch.remove && further.length === 0) return { ...parent, children: parent.children.toSpliced(at, 1) };
  const inner = patchAt(found, further, patch, index);
  return inner && { ...parent, children: parent.children.with(at, inner) };
}

function changed(target: Element, patch: XmlPatch, index: number): Element {
  if (patch.set) return { ...target, attributes: { ...target.attributes, ...patch.set } };
  if (patch.text !== undefined) return { ...target, children: [patch.text] };
  try {
    parseXml(patch.add ?? "", "what is added");
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    throw new PatchError(index, error.message);
  }
  return { ...target, children: [...target.children, { raw: patch.add ?? "" }] };
}

function fits(each: Element, { name, child, attribute, value }: Step): boolean {
  if (each.name !== name) return false;
  if (attribute === undefined) return true;
  const holders = child === undefined ? [each] : each.children.filter(isElement).filter((inner) => inner.name === child);
  return holders.some(({ attributes }) => String(attributes[attribute]) === value);
}

function isElement(each: Element | RawXml | string): each is Element {
  return typeof each === "object" && "name" in each;
}
