/** Fails every test during which something was written by `console`: what the user is told goes through the context, and tests see it there. */
import { afterEach } from "vitest";

const METHODS = ["debug", "error", "info", "log", "warn"] as const;
const written: string[] = [];

for (const method of METHODS) {
  console[method] = (...values: readonly unknown[]) => void written.push(`console.${method}: ${values.map(String).join(" ")}`);
}

afterEach(() => {
  const told = written.splice(0);
  if (told.length > 0) throw new Error(`the test wrote by console, which nobody sees: ${told.join(" | ")}`);
});
