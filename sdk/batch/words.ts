/** Sizes, times and tables as people read them. */

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"] as const;

/** `355 MiB`, `1.4 GiB`: three significant digits at most. */
export function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toPrecision(value >= 10 ? 3 : 2)} ${UNITS[unit]}`;
}

/** `0.7 s`, `8 s`, `3 min 20 s`, `2 h 5 min`; at least `0.1 s` where it took any time at all. */
export function formatSeconds(seconds: number): string {
  if (seconds > 0 && seconds < 0.95) return `${Math.max(0.1, seconds).toFixed(1)} s`;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Rows under a heading, each column as wide as its widest cell, two spaces between them; cells of numbers stand on the right. */
export function formatTable(heading: readonly string[], rows: readonly (readonly string[])[]): readonly string[] {
  const widths = heading.map((title, column) => Math.max(title.length, ...rows.map((row) => row[column]?.length ?? 0)));
  const line = (cells: readonly string[]): string =>
    widths
      .map((width, column) => {
        const cell = cells[column] ?? "";
        return /^[~\d]/.test(cell) && rows.includes(cells) ? cell.padStart(width) : cell.padEnd(width);
      })
      .join("  ")
      .trimEnd();
  return [line(heading), ...rows.map(line)];
}

const RATE_UNITS = { "": 1, KB: 1e3, MB: 1e6, GB: 1e9, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 } as const;

/** The slowest rate that the provider takes. */
const MIN_RATE = 1024;

/** Whole bytes per second of `50MiB`, `1.5 GB/s` or a number; undefined when it is no rate from 1 KiB/s on. */
export function parseRate(rate: string | number): number | undefined {
  const [, number, unit] = /^\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]i?B)?(?:\/s)?\s*$/.exec(String(rate)) ?? [];
  if (number === undefined) return undefined;
  const bytes = Math.floor(Number(number) * RATE_UNITS[(unit ?? "") as keyof typeof RATE_UNITS]);
  return bytes >= MIN_RATE && bytes < 1e15 ? bytes : undefined;
}

/** Without control characters: what a guest, a host or a file named may hold escape sequences, which a terminal would obey. */
export function printable(text: string): string {
  return text.replaceAll(/\p{Cc}/gu, " ");
}
