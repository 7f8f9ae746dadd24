/** The only place where an argv becomes a line for a shell. */

/** Words that mean themselves in sh, bash, zsh, csh and fish alike. A leading `=` or `~`, and `%`, would not everywhere. */
const PLAIN_WORD = /^[A-Za-z0-9_@+:,./-]+$/;

/** One word for a shell on the other side: comes out of `sh -c` as the same bytes. Throws TypeError on a NUL, which no argv can carry. */
export function quoteArgument(argument: string): string {
  if (argument.includes("\0")) throw new TypeError("an argument of a command holds a NUL byte");
  return PLAIN_WORD.test(argument) ? argument : `'${argument.replaceAll("'", String.raw`'\''`)}'`;
}

/** A whole argv as one line. */
export function quoteCommand(argv: readonly string[]): string {
  return argv.map(quoteArgument).join(" ");
}
