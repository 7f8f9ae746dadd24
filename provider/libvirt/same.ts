/** Compares plain values. */
import { isDeepStrictEqual } from "node:util";

/** Whether two values are the same once they are stored: a key that is undefined counts as absent. */
export function isSame(one: unknown, other: unknown): boolean {
  return isDeepStrictEqual(asStored(one), asStored(other));
}

function asStored(value: unknown): unknown {
  return value === undefined ? undefined : (JSON.parse(JSON.stringify(value)) as unknown);
}
