/** What a user sees of a copy: lines at every tenth, sizes and rates in words. */

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

/** `vmdk streamOptimized`; `raw` where the format has no kinds. */
export function formatKind({ format, variant }: { readonly format: string; readonly variant: string }): string {
  return format === variant ? format : `${format} ${variant}`;
}

/**
 * How a disk came: `64.0 MiB virtual arrived as 10.7 MiB on the wire (83 % of its size saved)`. What an interrupted run had brought, in
 * bytes of the volume, is told apart from what was sent now, and does not count as saved.
 */
export function formatArrival({
  virtualSizeBytes,
  sentBytes,
  keptBytes,
}: {
  readonly virtualSizeBytes: number;
  readonly sentBytes: number;
  readonly keptBytes: number;
}): string {
  const percent = Math.floor((1 - (sentBytes + keptBytes) / virtualSizeBytes) * 100);
  const saving = percent > 0 ? `${percent} % of its size saved` : "nothing saved";
  const sent = `${formatBytes(sentBytes)} on the wire`;
  const came = keptBytes > 0 ? `: ${sent} now, ${formatBytes(keptBytes)} resumed from an interrupted run` : ` as ${sent}`;
  return `${formatBytes(virtualSizeBytes)} virtual arrived${came} (${saving})`;
}

/** No line earlier than this after the last: a quick copy needs none. */
const QUIET_MS = 2000;

/** Told how far a work is; `totalBytes` is undefined where nobody knows it before the end. */
export type OnProgress = (doneBytes: number, totalBytes: number | undefined) => void;

/**
 * A progress callback that says one line for every tenth of the way at most, each naming the disk. Without a total it says what was written, and again
 * when that has doubled.
 */
export function tellProgress(name: string, say: (line: string) => void): OnProgress {
  const startedMs = performance.now();
  let saidMs = startedMs;
  let saidTenths = 0;
  let saidBytes = 0;
  return (doneBytes, totalBytes) => {
    const nowMs = performance.now();
    if (nowMs - saidMs < QUIET_MS) return;
    const rate = (doneBytes / (nowMs - startedMs)) * 1000;
    if (totalBytes === undefined || totalBytes === 0) {
      if (doneBytes === 0 || doneBytes < 2 * saidBytes) return;
      saidBytes = doneBytes;
      saidMs = nowMs;
      say(`${name}: ${formatBytes(doneBytes)} written so far, ${formatBytes(rate)}/s`);
      return;
    }
    const tenths = Math.floor((doneBytes / totalBytes) * 10);
    if (tenths <= saidTenths || tenths >= 10) return;
    saidTenths = tenths;
    saidMs = nowMs;
    say(
      `${name}: ${tenths}0 % of ${formatBytes(totalBytes)}, ${formatBytes(rate)}/s, ${formatSeconds((totalBytes - doneBytes) / rate)} left`,
    );
  };
}
