/** A source that the host itself fetches from a web server, by its curl, into the work folder of its import. */
import { posix } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { CommandError, ConnectionError, DiskError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { quoteArgument, quoteCommand } from "../host/quote.ts";
import { shownUrl, type WebSpec } from "./http.ts";
import { watchFile } from "./on-host.ts";
import type { OnProgress } from "./progress.ts";
import { openPartFile, type PartFile, WORK_FOLDER } from "./part-file.ts";

/** What the host reads of the file to tell what it is. */
const HEAD_BYTES = 256 * 1024;
const MAX_REDIRECTS = 10;
const SILENCE_SECONDS = 60;
const LOOK_MS = 120_000;

const MAX_ATTEMPTS = 5;
const FIRST_PAUSE_MS = 500;

/** What a server tells the host about a file. */
export interface HostDownload {
  /** The first bytes, at most 256 KiB. */
  readonly head: Buffer;
  /** undefined when the server does not say. */
  readonly sizeBytes: number | undefined;
  /** What may stand in If-Range; undefined when the server gives nothing that may. */
  readonly validator: string | undefined;
}

/**
 * Has the host ask for the first bytes. Throws DiskError (step "source") when the host has no curl, cannot reach the server, or is refused by it;
 * ConnectionError when the host itself cannot be reached.
 */
export async function lookFromHost(host: Host, spec: WebSpec): Promise<HostDownload> {
  const shown = shownUrl(spec.url);
  const refused = (reason: string, cause?: unknown): DiskError =>
    new DiskError(`${host.label} cannot fetch ${shown}: ${reason}`, { step: "source", path: shown, cause });
  // A server without ranges sends all there is: the pipe is closed on it.
  const script = `${quoteCommand([...curl(spec), "--include", "--range", `0-${HEAD_BYTES - 1}`])} | head -c ${HEAD_BYTES * 2}`;
  let answer: { readonly stdout: Buffer; readonly stderr: string };
  try {
    answer = await host.run(["sh", "-c", `command -v curl >/dev/null 2>&1 || exit 127; ${script}`], {
      input: config(spec),
      timeoutMs: LOOK_MS,
    });
  } catch (error) {
    if (error instanceof CommandError && error.exitCode === 127)
      throw refused('it has no curl: install it, or let this machine fetch (`fetch: "client"`)', error);
    throw error;
  }
  const { headers, status, body } = parseAnswer(answer.stdout);
  if (status === undefined) throw refused(lastLine(answer.stderr) || "the server gives no answer");
  if (status >= 300 && status < 400) {
    const unfollowed = 'the server redirects, and headers are sent to no other address: let this machine fetch (`fetch: "client"`)';
    throw refused(spec.headers === undefined ? lastLine(answer.stderr) || "the server redirects to nowhere" : unfollowed);
  }
  if (status === 404 || status === 410) throw refused(`there is nothing (HTTP ${status})`);
  if (status === 401 || status === 403)
    throw refused(`it is refused without other rights (HTTP ${status}): give what the server wants as \`headers\``);
  if (status !== 200 && status !== 206) throw refused(`the server answers HTTP ${status}`);
  const total =
    /^bytes 0-\d{1,15}\/(\d{1,15})$/.exec(headers.get("content-range") ?? "")?.[1] ??
    (status === 200 ? headers.get("content-length") : undefined);
  if (status === 206 && total === undefined) throw refused("the server answers with a range that it was not asked for");
  const etag = headers.get("etag");
  return {
    head: body.subarray(0, HEAD_BYTES),
    sizeBytes: total === undefined ? undefined : Number(total),
    validator: etag !== undefined && !etag.startsWith("W/") ? etag : headers.get("last-modified"),
  };
}

export interface HostFetchOptions {
  readonly id: string;
  readonly finalPath: string;
  readonly signal: AbortSignal;
  /** Told now and then, of the whole where the server says a size. Default: nobody is told. */
  readonly onProgress?: OnProgress | undefined;
}

/**
 * Has the host fetch the whole file under the lock of its import; resolves with its path there, in the work folder. It goes when the import is
 * published or discarded. What an interrupted run fetched is gone on with, as long as the server says that the file is the same.
 *
 * Throws as `lookFromHost`; ConnectionError when the server breaks off again and again: what came stays.
 */
export async function fetchOnHost(host: Host, spec: WebSpec, options: HostFetchOptions): Promise<string> {
  const { onProgress } = options;
  const { validator, sizeBytes } = await lookFromHost(host, spec);
  const path = posix.join(posix.dirname(options.finalPath), WORK_FOLDER, `${options.id}.source`);
  await using part = await openPartFile(host, options);
  await part.run(`${keepOnly(validator)} exec true`);
  for (let attempt = 1; ; attempt++) {
    try {
      const fetching = fetchRest(part, spec, validator, sizeBytes);
      await (onProgress ? watchFile(host, path, { totalBytes: sizeBytes, onProgress }, fetching) : fetching);
      return path;
    } catch (error) {
      options.signal.throwIfAborted();
      if (!(error instanceof DiskError)) throw error;
      if (attempt === MAX_ATTEMPTS) {
        const message = `${host.label} cannot fetch ${shownUrl(spec.url)}: ${reasonOf(error)}`;
        throw new ConnectionError(message, { host: host.label, phase: "closed", cause: error });
      }
      await sleep(FIRST_PAUSE_MS * 2 ** (attempt - 1), undefined, { signal: options.signal });
      // Without a way to tell the same file from another one, half a file is of no use.
      if (validator === undefined) await part.run(`${keepOnly(undefined)} exec true`);
    }
  }
}

/** Removes what came of another state of the file, and writes down which one comes now. */
function keepOnly(validator: string | undefined): string {
  if (validator === undefined) return 'rm -f -- "$fetched" "$fetched.etag";';
  const wanted = quoteArgument(validator);
  return `[ "$(cat -- "$fetched.etag" 2>/dev/null)" = ${wanted} ] || rm -f -- "$fetched"; printf %s ${wanted} >"$fetched.etag";`;
}

async function fetchRest(part: PartFile, spec: WebSpec, validator: string | undefined, sizeBytes: number | undefined): Promise<void> {
  const argv = [...curl(spec), "--fail", "--continue-at", "-", "--speed-limit", "1", "--speed-time", String(SILENCE_SECONDS)];
  const isWhole = sizeBytes === undefined ? "" : `[ "$(stat -c %s -- "$fetched" 2>/dev/null)" != ${sizeBytes} ] || exit 0; `;
  await part.run(`${isWhole}exec ${quoteCommand([...argv, "--output"])} "$fetched"`, config(spec, validator));
}

/** No secrets: they are in the configuration on its stdin. Source: curl(1). */
function curl({ url, headers }: WebSpec): readonly string[] {
  // To another address curl would take headers along that it does not know as secrets.
  const redirects = headers === undefined ? ["--location", "--max-redirs", String(MAX_REDIRECTS)] : [];
  const protocols = url.startsWith("https:") ? "=https" : "=http,https";
  return ["curl", "--config", "-", "--silent", "--show-error", "--globoff", ...redirects, "--proto", protocols, "--proto-redir", protocols];
}

function config({ url, headers = {} }: WebSpec, validator?: string): string {
  const lines = [
    `url = ${quoted(new URL(url).href)}`,
    ...Object.entries(headers).map(([name, value]) => `header = ${quoted(`${name}: ${value}`)}`),
  ];
  if (validator !== undefined) lines.push(`header = ${quoted(`If-Range: ${validator}`)}`);
  return `${lines.join("\n")}\n`;
}

/** A value in curl's configuration: in double quotes, with backslashes before those and itself. */
function quoted(value: string): string {
  if (/[\r\n\0]/.test(value)) throw new DiskError("a header of the source has several lines", { step: "source", path: "headers" });
  return `"${value.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
}

/** The last head of an answer with redirects, and what follows it. */
function parseAnswer(bytes: Buffer) {
  let rest = bytes;
  let status: number | undefined;
  let headers = new Map<string, string>();
  while (rest.subarray(0, 5).toString("latin1") === "HTTP/" && (status === undefined || status < 200 || (status >= 300 && status < 400))) {
    const end = rest.indexOf("\r\n\r\n");
    if (end === -1) break;
    const [first = "", ...lines] = rest.subarray(0, end).toString("latin1").split("\r\n");
    status = Number(/^HTTP\/\S+ (\d{3})/.exec(first)?.[1]);
    headers = new Map(lines.map((line) => [line.slice(0, line.indexOf(":")).toLowerCase(), line.slice(line.indexOf(":") + 1).trim()]));
    rest = rest.subarray(end + 4);
    // A redirect that is followed may bring a page of its own, which curl leaves out.
  }
  return { status, headers, body: rest };
}

function lastLine(text: string): string {
  return text.trim().split("\n").at(-1) ?? "";
}

/** What curl said, without our own words around it. */
function reasonOf(error: DiskError): string {
  return /curl: .*$/s.exec(error.message)?.[0] ?? error.message;
}
