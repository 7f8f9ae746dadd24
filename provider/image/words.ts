/** Foreign words in our messages. */

const MAX_CHARACTERS = 80;

/** The text in quotes, on one line and at most 80 characters of it. */
export function quoted(text: string): string {
  return JSON.stringify(text.length > MAX_CHARACTERS ? `${text.slice(0, MAX_CHARACTERS)}...` : text);
}
