/** From what a user wrote to typed arguments: zod's findings in the user's own property names, unknown values left alone. */
import type { z } from "zod";
import type { CheckFailure } from "./resource.ts";
import { hasUnknown } from "./unknown.ts";

export interface Parsed<T> {
  /** The arguments, defaults filled and canonicalised; undefined when something is wrong or not known yet. */
  readonly args: T | undefined;
  readonly failures: readonly CheckFailure[];
  /** Top-level properties that hold an unknown value: they are not judged. */
  readonly unknown: ReadonlySet<string>;
}

/** Parses what a user declared. Keys that no schema knows are failures: a typo must not be silently ignored. */
export function parseArgs<T>(schema: z.ZodType<T>, news: Readonly<Record<string, unknown>>): Parsed<T> {
  const unknown = new Set(Object.keys(news).filter((key) => hasUnknown(news[key])));
  const result = schema.safeParse(news);
  if (result.success) return { args: unknown.size === 0 ? result.data : undefined, failures: [], unknown };
  const failures = result.error.issues
    .filter((issue) => !unknown.has(String(issue.path[0])))
    .map((issue): CheckFailure => {
      const property = issue.code === "unrecognized_keys" ? propertyPath([...issue.path, issue.keys[0] ?? ""]) : propertyPath(issue.path);
      const reason =
        issue.code === "unrecognized_keys"
          ? `${property}: there is no such property: remove it, or mend its name`
          : `${property}: ${issue.message}`;
      return { property, reason };
    });
  return { args: undefined, failures, unknown };
}

/** `networks[0].mac`. */
function propertyPath(path: readonly PropertyKey[]): string {
  return path.map((key, index) => (typeof key === "number" ? `[${key}]` : index === 0 ? String(key) : `.${String(key)}`)).join("");
}
