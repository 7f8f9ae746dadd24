/** A web server of a test's own: serves bytes as a good server does, and as bad ones do. */
import { execFile } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { createServer as createSecureServer } from "node:https";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { promisify } from "node:util";

export interface ServedFile {
  readonly bytes: Buffer;
  /** Default: a strong one. */
  readonly etag?: string | undefined;
  /** Whether Range is obeyed. Default true. */
  readonly ranges?: boolean;
  /** Whether the answer tells its length. Default true. */
  readonly sized?: boolean;
  /** Closes the connection after that many bytes of a body, for as many answers as there are entries. */
  readonly cuts?: number[];
  /** Answers in place of the file. */
  readonly answer?: (request: IncomingMessage, response: ServerResponse) => void;
}

export interface WebServer extends AsyncDisposable {
  readonly origin: string;
  /** May be changed while the server runs. */
  readonly files: Map<string, ServedFile>;
  /** What was asked for: `GET /disk bytes=0-1`. */
  readonly log: string[];
  /** The headers of the last request for a path. */
  readonly headers: Map<string, IncomingMessage["headers"]>;
}

/** Listens on a free port of an address, 127.0.0.1 by default; with TLS where a certificate is given. */
export async function openWebServer(
  options: { readonly tls?: { readonly key: Buffer; readonly cert: Buffer }; readonly address?: string } = {},
): Promise<WebServer> {
  const files = new Map<string, ServedFile>();
  const log: string[] = [];
  const headers = new Map<string, IncomingMessage["headers"]>();
  const serve = (request: IncomingMessage, response: ServerResponse): void => {
    const path = new URL(request.url ?? "/", "http://server").pathname;
    log.push(`${request.method} ${path} ${request.headers.range ?? "all"}`);
    headers.set(path, request.headers);
    const file = files.get(path);
    if (!file) return void response.writeHead(404).end("nothing here");
    if (file.answer) return file.answer(request, response);
    sendFile(file, request, response);
  };
  const server: Server = options.tls ? createSecureServer(options.tls, serve) : createServer(serve);
  server.listen(0, options.address ?? "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  return {
    origin: `${options.tls ? "https" : "http"}://${options.address ?? "127.0.0.1"}:${port}`,
    files,
    log,
    headers,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      server.close();
      await once(server, "close");
    },
  };
}

function sendFile(file: ServedFile, request: IncomingMessage, response: ServerResponse): void {
  const { bytes, ranges = true, sized = true, cuts = [] } = file;
  const etag = "etag" in file ? file.etag : '"first"';
  const match = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "");
  const isPartial = ranges && match !== null && (request.headers["if-range"] === undefined || request.headers["if-range"] === etag);
  const start = isPartial ? Number(match[1]) : 0;
  const end = isPartial && match[2] !== "" ? Math.min(Number(match[2]) + 1, bytes.length) : bytes.length;
  const body = bytes.subarray(start, end);
  response.writeHead(isPartial ? 206 : 200, {
    ...(etag !== undefined && { etag }),
    ...(isPartial && { "content-range": `bytes ${start}-${end - 1}/${bytes.length}` }),
    ...(sized && { "content-length": body.length }),
  });
  const cut = body.length > 300_000 ? cuts.shift() : undefined;
  if (cut === undefined) response.end(body);
  else response.write(body.subarray(0, cut), () => setTimeout(() => response.destroy(), 20));
}

/** An authority of the test's own and a certificate by it for 127.0.0.1. */
export async function makeCertificate(folder: string): Promise<{ readonly caFile: string; readonly key: Buffer; readonly cert: Buffer }> {
  const execute = promisify(execFile);
  const path = (name: string) => join(folder, name);
  const authority = [
    "req",
    "-x509",
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
    "-days",
    "1",
    "-subj",
    "/CN=Test authority",
  ];
  await execute("openssl", [...authority, "-keyout", path("ca.key"), "-out", path("ca.pem")]);
  const wish = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=127.0.0.1"];
  await execute("openssl", [...wish, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path("server.key"), "-out", path("server.csr")]);
  const sign = ["x509", "-req", "-days", "1", "-copy_extensions", "copy", "-CA", path("ca.pem"), "-CAkey", path("ca.key")];
  await execute("openssl", [...sign, "-in", path("server.csr"), "-out", path("server.pem")]);
  return { caFile: path("ca.pem"), key: await readFile(path("server.key")), cert: await readFile(path("server.pem")) };
}
