/** Where libvirt's daemons listen, what is wrong when they do not answer, and the connection that all users of a host share. */
import type { Duplex } from "node:stream";
import { CommandError, ConnectionError } from "../errors.ts";
import { Libvirt } from "../libvirt/client.ts";
import { lastLine, settlesWithin } from "./command.ts";
import type { HostAddress } from "./uri.ts";

/** How long a transport may take to say why it ended, once the connection over it has failed. */
const REASON_TIMEOUT_MS = 2000;

/** A way to the daemon: bytes, and a promise that rejects with the reason when the way breaks. */
export interface DaemonTransport {
  readonly io: Duplex;
  readonly done: Promise<void>;
}

/**
 * Paths of the daemon's socket in a runtime folder such as `/run/libvirt`, the likeliest first.
 *
 * Source: libvirt's remote_sockets.c remoteGetUNIXSocket: virtqemud before libvirtd. The test driver is in libvirtd and virtproxyd alone.
 */
export function daemonSockets(address: HostAddress, runtimeDirectories: readonly string[]): readonly string[] {
  if (address.socket !== undefined) return [address.socket];
  const names = [
    ...(address.mode !== "legacy" && address.driver === "qemu" ? ["virtqemud-sock"] : []),
    ...(address.mode !== "direct" ? ["libvirt-sock"] : []),
  ];
  return names.flatMap((name) => runtimeDirectories.map((directory) => `${directory}/${name}`));
}

/** No socket is there, or nobody listens on it. */
export function daemonMissing(label: string, sockets: readonly string[], cause?: unknown): ConnectionError {
  const shown = sockets.filter((path) => !path.startsWith("/var/run/"));
  const message = `no libvirt daemon answers on ${label} at ${(shown.length > 0 ? shown : sockets).join(" or ")}: start it there, by systemctl enable --now virtqemud.socket or libvirtd.socket`;
  return new ConnectionError(message, { host: label, phase: "daemon", cause });
}

/** The socket is there and refuses this user. */
export function daemonForbidden(label: string, user: string, cause?: unknown): ConnectionError {
  const message = `${user} may not open libvirt's socket on ${label}: add ${user} to the group libvirt there and log in anew, or set sudo`;
  return new ConnectionError(message, { host: label, phase: "daemon", cause });
}

/** Turns the failure of a helper such as virt-ssh-helper or nc, run with LC_ALL=C, into one sentence. A ConnectionError is returned as it is. */
export function daemonFailure(label: string, user: string, sockets: readonly string[], error: unknown): unknown {
  if (!(error instanceof CommandError)) return error;
  const { stderrTail } = error;
  if (/permission denied/i.test(stderrTail)) return daemonForbidden(label, user, error);
  if (/no such file or directory|connection refused/i.test(stderrTail)) return daemonMissing(label, sockets, error);
  const said = lastLine(stderrTail);
  const message = error.message.includes(said) || said === "" ? error.message : `${error.message}: ${said}`;
  return new ConnectionError(message, { host: label, phase: "daemon", cause: error });
}

/** Opens libvirt connections over a host's transport, and keeps one that all share. */
export class DaemonDoor {
  readonly #label: string;
  readonly #uri: string;
  readonly #openTransport: () => Promise<DaemonTransport>;
  #shared: Promise<Libvirt> | undefined;

  constructor(label: string, uri: string, openTransport: () => Promise<DaemonTransport>) {
    this.#label = label;
    this.#uri = uri;
    this.#openTransport = openTransport;
  }

  /** The shared connection: opened once, however many ask at the same time, and again after it ended or could not be opened. */
  async shared(): Promise<Libvirt> {
    const pending = this.#shared;
    if (pending !== undefined) {
      const libvirt = await pending;
      if (libvirt.isOpen) return libvirt;
      // Of all who see it closed, the first opens a new one and the others find that.
      if (this.#shared !== pending) return this.shared();
    }
    const opening = this.open();
    this.#shared = opening;
    opening.catch(() => {
      if (this.#shared === opening) this.#shared = undefined;
    });
    return opening;
  }

  /** A connection of the caller's own, who closes it. Throws ConnectionError (phase "daemon") when there is no daemon, or LibvirtError when it refuses the URI. */
  async open(): Promise<Libvirt> {
    const transport = await this.#openTransport();
    try {
      return await Libvirt.open(transport.io, { uri: this.#uri, host: this.#label });
    } catch (error) {
      transport.io.destroy();
      // The transport's own reason, where it has one, says more than "closed".
      const broke = error instanceof ConnectionError && error.phase === "closed";
      if (broke && (await settlesWithin(transport.done, REASON_TIMEOUT_MS))) await transport.done;
      throw error;
    }
  }

  async close(): Promise<void> {
    const pending = this.#shared;
    this.#shared = undefined;
    const libvirt = await pending?.catch(() => undefined);
    await libvirt?.close();
  }
}
