/** The provider as programs and the command line find it: by its name at run time, as the engine's own provider process does. */
import { createRequire } from "node:module";
import type * as provider from "../provider/index.ts";

/** Loads it at once, without any package of its own: each of its functions loads what it needs. */
export function loadProvider(): typeof provider {
  return createRequire(import.meta.url)("virtlift/provider") as typeof provider;
}
