/** One request over HTTP or HTTPS: redirects followed within bounds, certificates always checked, secrets kept where they belong. Knows no disk. */
import { readFileSync } from "node:fs";
import { type IncomingMessage, request as requestHttp } from "node:http";
import { request as requestHttps } from "node:https";
import { getCACertificates } from "node:tls";
import { ConnectionError, DiskError } from "../errors.ts";

const MAX_REDIRECTS = 10;
const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308]);

/** How long a server may be silent, unless told otherwise. */
const SILENCE_MS = 60_000;

/** What a program declares of a web server. */
export interface WebSpec {
  /** `http:` or `https:`, without user or password. */
  readonly url: string;
  /** Sent to the URL's own origin only. Their values are secrets: never in messages. */
  readonly headers?: Readonly<Record<string, string>> | undefined;
  /** Path of a PEM file with certificates that are trusted besides the system's. */
  readonly caFile?: string | undefined;
}

export interface WebOptions {
  readonly signal?: AbortSignal | undefined;
  /** How long a server may be silent before the request counts as broken. Default 60,000. */
  readonly silenceMs?: number | undefined;
}

/** The URL as messages show it: a query may hold a signature. */
export function shownUrl(url: string | URL): string {
  const parsed = typeof url === "string" ? parseUrl(url) : url;
  if (parsed === undefined) return "the URL";
  return `${parsed.protocol}//${parsed.host}${parsed.pathname}${parsed.search === "" ? "" : "?..."}`;
}

/** What is wrong with a declared URL, as the end of a sentence; undefined when nothing is. */
export function urlFault(text: string): string | undefined {
  const url = parseUrl(text);
  if (url === undefined) return "is no URL";
  if (url.protocol !== "http:" && url.protocol !== "https:") return `is of the kind ${url.protocol} where only http: and https: are read`;
  if (url.username !== "" || url.password !== "")
    return "holds a user or password, which would be stored and shown: give a header Authorization instead";
  return undefined;
}

/** The last part of the URL's path, as a file's name. */
export function urlFileName(url: string | URL): string {
  const { pathname } = new URL(url);
  const last = pathname.split("/").at(-1) ?? "";
  try {
    return decodeURIComponent(last).replaceAll(/[/\\\0]/g, "_") || "download";
  } catch {
    // A stray per cent sign: the name is only shown.
    return last;
  }
}

function parseUrl(text: string): URL | undefined {
  return URL.canParse(text) ? new URL(text) : undefined;
}

/** A server, asked again and again for one URL. */
export class WebClient {
  readonly #spec: WebSpec;
  readonly #options: WebOptions;
  readonly #ca: string[] | undefined;

  /** Throws DiskError (step "source") when the URL is none that is read, or the file of certificates cannot be. */
  constructor(spec: WebSpec, options: WebOptions = {}) {
    const fault = urlFault(spec.url);
    if (fault !== undefined) throw new DiskError(`${shownUrl(spec.url)} ${fault}`, { step: "source", path: shownUrl(spec.url) });
    this.#spec = spec;
    this.#options = options;
    this.#ca = spec.caFile === undefined ? undefined : [...getCACertificates("default"), readCertificates(spec.caFile)];
  }

  /** For messages. */
  get shown(): string {
    return shownUrl(this.#spec.url);
  }

  /** The same server and secrets for another URL. */
  at(url: URL): WebClient {
    const isOwn = url.origin === new URL(this.#spec.url).origin;
    return new WebClient({ ...this.#spec, url: url.href, headers: isOwn ? this.#spec.headers : undefined }, this.#options);
  }

  /**
   * Asks with GET and waits for the answer's head. The caller reads or destroys the body.
   *
   * Throws ConnectionError when the server cannot be reached or is silent, DiskError (step "source") on a redirect that is not followed. Any other
   * status is the caller's to judge.
   */
  async get(headers: Readonly<Record<string, string>> = {}): Promise<IncomingMessage> {
    let url = new URL(this.#spec.url);
    const { origin } = url;
    for (let redirects = 0; ; redirects++) {
      const own = url.origin === origin ? this.#spec.headers : undefined;
      const answer = await this.#ask(url, { ...own, "accept-encoding": "identity", "user-agent": "virtlift", ...headers });
      const { location } = answer.headers;
      if (!REDIRECTS.has(answer.statusCode ?? 0) || location === undefined) return answer;
      answer.destroy();
      if (redirects === MAX_REDIRECTS) throw this.#refused(`redirects more than ${MAX_REDIRECTS} times`);
      url = this.#redirected(url, location);
    }
  }

  #redirected(from: URL, location: string): URL {
    if (!URL.canParse(location, from.href)) throw this.#refused("redirects to something that is no URL");
    const to = new URL(location, from);
    const fault = urlFault(to.href);
    if (fault !== undefined) throw this.#refused(`redirects to ${shownUrl(to)}, which ${fault}`);
    if (from.protocol === "https:" && to.protocol === "http:")
      throw this.#refused(`redirects from https: to ${shownUrl(to)}, where nothing is proven`);
    return to;
  }

  #ask(url: URL, headers: Readonly<Record<string, string>>): Promise<IncomingMessage> {
    const { signal, silenceMs = SILENCE_MS } = this.#options;
    return new Promise((resolve, reject) => {
      const options = { headers, ...(signal && { signal }), ...(this.#ca && { ca: this.#ca }) };
      const request = url.protocol === "https:" ? requestHttps(url, options) : requestHttp(url, options);
      request.setTimeout(silenceMs, () => request.destroy(new Error(`nothing came for ${silenceMs / 1000} s`)));
      request.once("response", resolve);
      request.on("error", (error: NodeJS.ErrnoException) => {
        const reason = CERTIFICATE_ERRORS.has(error.code ?? "")
          ? `its certificate is not trusted (${error.message}): name its authority's file as \`caFile\``
          : error.message || (error.code ?? "unknown error");
        const phase = signal?.aborted ? "aborted" : "connect";
        reject(new ConnectionError(`cannot read ${this.shown}: ${reason}`, { host: url.host, phase, cause: error }));
      });
      request.end();
    });
  }

  #refused(reason: string): DiskError {
    return new DiskError(`${this.shown} ${reason}`, { step: "source", path: this.shown });
  }
}

/** Source: node's documentation of tls, "X509 certificate error codes". */
const CERTIFICATE_ERRORS: ReadonlySet<string> = new Set([
  "DEPTH_ZERO_SELF_SIGNED_CERT",
  "SELF_SIGNED_CERT_IN_CHAIN",
  "UNABLE_TO_GET_ISSUER_CERT",
  "UNABLE_TO_GET_ISSUER_CERT_LOCALLY",
  "UNABLE_TO_VERIFY_LEAF_SIGNATURE",
]);

function readCertificates(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new DiskError(`cannot read the certificates in ${path}: ${String(error)}`, { step: "source", path, cause: error });
  }
}
