import { execFileSync } from "node:child_process";
import { expect, test } from "vitest";
import { quoteArgument, quoteCommand } from "../../provider/host/quote.ts";

/** A small generator with a fixed seed (mulberry32), so that a failure can be seen again. */
function* randomNumbers(seed: number): Generator<number, never> {
  let state = seed;
  for (;;) {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    yield (mixed ^ (mixed >>> 14)) >>> 0;
  }
}

test.each(["sh", "bash"])("every argument comes out of %s -c as it went in", (shell) => {
  const numbers = randomNumbers(7);
  const nasty = [
    "'",
    '"',
    "\\",
    "$",
    "`",
    "\n",
    "\r",
    "\t",
    " ",
    "*",
    "~",
    "!",
    "#",
    ";",
    "&",
    "|",
    "=",
    "-",
    "ä",
    "€",
    "\u{1F4BE}",
    "\x01",
    "\x7f",
  ];
  const words = Array.from({ length: 300 }, () => {
    const length = numbers.next().value % 24;
    return Array.from({ length }, () => {
      const number = numbers.next().value;
      return number % 2 === 0 ? (nasty[number % nasty.length] ?? "") : String.fromCharCode(1 + (number % 126));
    }).join("");
  });
  const arguments_ = ["", "~", "=x", "-n", "a=b", "%1", "'''", ...nasty, ...words];
  const out = execFileSync(shell, ["-c", quoteCommand(["printf", String.raw`%s\0`, ...arguments_])], { encoding: "utf8" });
  expect(out.split("\0").slice(0, -1)).toEqual(arguments_);
});

test("plain words stay readable", () => {
  expect(quoteCommand(["cat", "/var/lib/x-1.qcow2", "user@host:22"])).toBe("cat /var/lib/x-1.qcow2 user@host:22");
});

test("refuses a NUL", () => {
  expect(() => quoteArgument("a\0b")).toThrow("NUL");
});
