/** The errors of the provider, told apart by their fields. Knows nothing of Pulumi, libvirt or SSH. */

/** libvirt said no. `code` and `domain` are virErrorNumber and virErrorDomain of virterror.h; `procedure` is the RPC procedure's name. */
export class LibvirtError extends Error {
  override readonly name = "LibvirtError";
  readonly code: number;
  readonly domain: number;
  readonly procedure: string;

  constructor(message: string, detail: { readonly code: number; readonly domain: number; readonly procedure: string }) {
    super(message);
    this.code = detail.code;
    this.domain = detail.domain;
    this.procedure = detail.procedure;
  }
}

/** A process on a host failed. `stderrTail` is at most the last 4 KiB of what it wrote to stderr. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  readonly argv: readonly string[];
  readonly exitCode: number | undefined;
  readonly signal: string | undefined;
  readonly stderrTail: string;

  constructor(
    message: string,
    detail: {
      readonly argv: readonly string[];
      readonly exitCode?: number | undefined;
      readonly signal?: string | undefined;
      readonly stderrTail: string;
    },
  ) {
    super(message);
    this.argv = detail.argv;
    this.exitCode = detail.exitCode;
    this.signal = detail.signal;
    this.stderrTail = detail.stderrTail;
  }
}

/** Where a conversation broke: finding the host, proving who it is or who we are, opening the daemon, reading packets, or later. */
export type ConnectionPhase = "resolve" | "connect" | "host key" | "login" | "daemon" | "framing" | "closed" | "timeout" | "aborted";

/** We could not talk: nothing is known about what the other side holds, least of all that something is gone. */
export class ConnectionError extends Error {
  override readonly name = "ConnectionError";
  readonly host: string;
  readonly phase: ConnectionPhase;

  constructor(message: string, detail: { readonly host: string; readonly phase: ConnectionPhase; readonly cause?: unknown }) {
    super(message, detail.cause === undefined ? undefined : { cause: detail.cause });
    this.host = detail.host;
    this.phase = detail.phase;
  }
}

/** Which part of the way of a disk failed: reading its header, its source, its transfer, the comparison, or the publication. */
export type DiskStep = "header" | "source" | "transfer" | "verify" | "publish";

/** Bytes are wrong, or are not where they should be. `path` is the file or volume that shows it. */
export class DiskError extends Error {
  override readonly name = "DiskError";
  readonly step: DiskStep;
  readonly path: string;

  constructor(message: string, detail: { readonly step: DiskStep; readonly path: string; readonly cause?: unknown }) {
    super(message, detail.cause === undefined ? undefined : { cause: detail.cause });
    this.step = detail.step;
    this.path = detail.path;
  }
}

/** VIR_ERR_NO_DOMAIN, NO_NETWORK, NO_STORAGE_VOL, NO_DOMAIN_SNAPSHOT of virterror.h. NO_STORAGE_POOL (49) is left out: without its pool a volume is unknown, not gone. */
const NOT_FOUND_CODES: ReadonlySet<number> = new Set([42, 43, 50, 72]);

/** Whether libvirt itself said that the thing does not exist. A refused or broken connection never is. */
export function isNotFound(error: unknown): boolean {
  return error instanceof LibvirtError && NOT_FOUND_CODES.has(error.code);
}

/** VIR_ERR_OPERATION_TIMEOUT, RESOURCE_BUSY, AGENT_UNRESPONSIVE. */
const RETRYABLE_CODES: ReadonlySet<number> = new Set([68, 86, 87]);

/** Whether trying the same again later can succeed without a change by a human. Host keys and logins never heal by themselves. */
export function isRetryable(error: unknown): boolean {
  if (error instanceof LibvirtError) return RETRYABLE_CODES.has(error.code);
  return error instanceof ConnectionError && ["resolve", "connect", "closed", "timeout"].includes(error.phase);
}

/** An error as plain data, for another process. */
export interface PackedError {
  readonly name: string;
  readonly message: string;
  /** The fields of one of ours. */
  readonly detail: object;
}

export function packError(error: unknown): PackedError {
  if (!(error instanceof Error)) return { name: "Error", message: String(error), detail: {} };
  const { name, message } = error;
  return { name, message, detail: name in OURS ? Object.fromEntries(Object.entries(error)) : {} };
}

/** One of ours again, or a plain Error. */
export function unpackError({ name, message, detail }: PackedError): Error {
  const open = OURS[name as keyof typeof OURS] as (new (message: string, detail: object) => Error) | undefined;
  return open === undefined ? new Error(message) : new open(message, detail);
}

const OURS = { LibvirtError, CommandError, ConnectionError, DiskError };
