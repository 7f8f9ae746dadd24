/** One SSH connection, through jump hosts where there are any: finding the host, proving who it is, logging in. Knows no commands. */
import { createConnection, type Socket } from "node:net";
import type { Duplex } from "node:stream";
import ssh2, { type Client, type ClientChannel } from "ssh2";
import { ConnectionError, type ConnectionPhase } from "../errors.ts";
import {
  addKnownHost,
  algorithmsByKind,
  fingerprintOf,
  type HostKeyAlgorithm,
  judgeHostKey,
  type KnownHostLine,
  type KnownHostName,
  keyTypeOf,
  knownHostName,
  offeredAlgorithms,
  readKnownHosts,
} from "./known-hosts.ts";
import { quoteArgument } from "./quote.ts";
import type { SshSettings } from "./ssh-config.ts";
import { type Credentials, type LoginPlan, planLogin } from "./ssh-login.ts";

const KEEPALIVE_INTERVAL_MS = 15_000;
const KEEPALIVE_COUNT_MAX = 3;

/**
 * Measured without ssh2's native binding, `cat` of 500 MiB over loopback: aes256-gcm 430 MiB/s, aes128-gcm 410, aes128-ctr 320, chacha20-poly1305 200.
 */
const CIPHERS = [
  "aes256-gcm@openssh.com",
  "aes128-gcm@openssh.com",
  "aes256-ctr",
  "aes192-ctr",
  "aes128-ctr",
  "chacha20-poly1305@openssh.com",
] as const;

/** One host on the way; the last one is where we want to be. */
export interface SshHop {
  /** `root@kvm1:2222`, for messages. */
  readonly label: string;
  readonly settings: SshSettings;
  readonly credentials: Credentials;
  /** The only key that is accepted, whatever known_hosts files say. */
  readonly fingerprint?: string;
}

/** A connection that is logged in. It ends by `close`, or by itself; then `onLost`'s callbacks hear why, once. */
export class SshConnection {
  readonly client: Client;
  readonly #label: string;
  readonly #listeners = new Set<(reason: ConnectionError) => void>();
  #lost: ConnectionError | undefined;

  constructor(client: Client, label: string) {
    this.client = client;
    this.#label = label;
    let cause: Error | undefined;
    client.on("error", (error) => (cause ??= error));
    client.on("close", () => this.#lose(`the connection to ${label} was lost${cause === undefined ? "" : `: ${cause.message}`}`, cause));
  }

  get isOpen(): boolean {
    return this.#lost === undefined;
  }

  /** Calls back when the connection has ended, at once when it has already. Returns how to stop listening. */
  onLost(listener: (reason: ConnectionError) => void): () => void {
    if (this.#lost !== undefined) listener(this.#lost);
    else this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  close(): void {
    this.client.end();
    this.#lose(`the connection to ${this.#label} was closed`, undefined);
  }

  #lose(message: string, cause: Error | undefined): void {
    if (this.#lost !== undefined) return;
    this.#lost = new ConnectionError(message, { host: this.#label, phase: "closed", cause });
    const listeners = [...this.#listeners];
    this.#listeners.clear();
    for (const listener of listeners) listener(this.#lost);
  }
}

/**
 * Connects to the last hop through the others.
 *
 * Throws ConnectionError: "resolve" (no such name), "connect" (nobody there), "timeout", "host key", "login". Nothing is left open then.
 */
export async function openSshConnection(hops: readonly SshHop[]): Promise<SshConnection> {
  const clients: Client[] = [];
  const close = (): void => clients.toReversed().forEach((client) => client.end());
  try {
    for (const [index, hop] of hops.entries()) {
      const previous = clients.at(-1);
      const before = hops[index - 1];
      const dial = previous === undefined || before === undefined ? () => dialTcp(hop) : () => dialThrough(previous, before, hop);
      clients.push(await openHop(hop, dial, hops.slice(0, index)));
    }
  } catch (error) {
    close();
    throw error;
  }
  const last = hops.at(-1);
  const client = clients.at(-1);
  if (last === undefined || client === undefined) throw new TypeError("a connection needs at least one host");
  client.on("close", close);
  return new SshConnection(client, last.label);
}

async function openHop(hop: SshHop, dial: () => Promise<Duplex>, jumps: readonly SshHop[]): Promise<Client> {
  const { settings, fingerprint } = hop;
  const plan = await planLogin(settings, hop.credentials, hop.label);
  if (fingerprint !== undefined) return openPinned(hop, fingerprint, plan, dial);
  const name = knownHostName(settings.hostName, settings.port, settings.hostKeyAlias);
  const lines = await readHopKnownHosts(hop);
  let accepted: Buffer | undefined;
  return logIn(hop, plan, await dial(), offeredAlgorithms(lines, name), async (key) => {
    // A later key exchange shows the same key again.
    if (accepted?.equals(key)) return;
    await checkHostKey(hop, name, lines, key, jumps);
    accepted = key;
  });
}

/** A fingerprint does not tell the kind of its key, and a server shows one key only: each kind is asked for in turn. */
async function openPinned(hop: SshHop, fingerprint: string, plan: LoginPlan, dial: () => Promise<Duplex>): Promise<Client> {
  const seen: string[] = [];
  for (const algorithms of algorithmsByKind()) {
    let shown: string | undefined;
    try {
      return await logIn(hop, plan, await dial(), algorithms, async (key) => {
        if (fingerprintOf(key) === fingerprint) return;
        shown = `${keyTypeOf(key)} ${fingerprintOf(key)}`;
        seen.push(shown);
        throw new Error("not the pinned key");
      });
    } catch (error) {
      const hasNoSuchKey = error instanceof ConnectionError && error.phase === "host key";
      if (shown === undefined && !hasNoSuchKey) throw error;
    }
  }
  const message = `the host key of ${hop.label} is not the pinned ${fingerprint}: it has ${seen.join(", ") || "no key of a known kind"}; compare with ssh-keygen -l on the host, then correct fingerprint`;
  throw new ConnectionError(message, { host: hop.label, phase: "host key" });
}

async function readHopKnownHosts(hop: SshHop): Promise<readonly KnownHostLine[]> {
  try {
    return await readKnownHosts([...hop.settings.userKnownHostsFiles, ...hop.settings.globalKnownHostsFiles]);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new ConnectionError(`the known_hosts files for ${hop.label} cannot be read: ${reason}`, {
      host: hop.label,
      phase: "host key",
      cause: error,
    });
  }
}

/** Throws ConnectionError (phase "host key") unless the key is known, or new and `accept-new` may write it down. */
async function checkHostKey(
  hop: SshHop,
  name: KnownHostName,
  lines: readonly KnownHostLine[],
  key: Buffer,
  jumps: readonly SshHop[],
): Promise<void> {
  const { label, settings } = hop;
  const shown = `${keyTypeOf(key)} ${fingerprintOf(key)}`;
  const refuse = (message: string): never => {
    throw new ConnectionError(message, { host: label, phase: "host key" });
  };
  const verdict = judgeHostKey(lines, name, key);
  switch (verdict.kind) {
    case "known":
      return;
    case "revoked":
      return refuse(`the host key of ${label} is revoked by ${verdict.place}: ${shown}; give the host a new key`);
    case "changed": {
      const known = verdict.lines
        .map((line) => `${line.place} has ${line.keyType} ${fingerprintOf(Buffer.from(line.key, "base64"))}`)
        .join(", ");
      const remedy = `if the host was reinstalled, run ssh-keygen -R ${quoteArgument(name.name)} and add its key again; if not, somebody is in between`;
      return refuse(`the host key of ${label} has changed: it shows ${shown}, but ${known}; ${remedy}`);
    }
    case "certificate-only":
      return refuse(
        `the host key of ${label} is known by a certificate authority only (${verdict.place}), which is not supported: add its plain key ${shown} to known_hosts, or pin the fingerprint`,
      );
    case "unknown": {
      const [file] = settings.userKnownHostsFiles;
      if (settings.hostKeyPolicy === "accept-new" && file !== undefined) {
        await addKnownHost(file, name, key, settings.hashKnownHosts);
        return;
      }
      const portOption = settings.port === 22 ? "" : ` -p ${settings.port}`;
      const scan =
        jumps.length === 0 && settings.hostKeyAlias === undefined
          ? `run ssh-keyscan${portOption} ${quoteArgument(settings.hostName)} >> ${file ?? "~/.ssh/known_hosts"}`
          : `log in once by ssh${portOption} ${quoteArgument(label.replace(/:\d+$/, ""))}`;
      return refuse(
        `the host key of ${label} is unknown: ${shown}; compare it with ssh-keygen -l on the host, then ${scan}, or set fingerprint`,
      );
    }
  }
}

async function dialTcp(hop: SshHop): Promise<Duplex> {
  const { hostName, port, connectTimeoutMs } = hop.settings;
  // Without noDelay each small call waits 40 ms for a delayed acknowledgement.
  const socket = createConnection({ host: hostName, port, noDelay: true, keepAlive: true });
  gatherWrites(socket);
  return new Promise((resolve, reject) => {
    const fail = (phase: ConnectionPhase, message: string, cause?: unknown): void => {
      socket.destroy();
      reject(new ConnectionError(message, { host: hop.label, phase, cause }));
    };
    const timer = setTimeout(
      () =>
        fail(
          "timeout",
          `${hop.label} did not answer on port ${port} within ${connectTimeoutMs / 1000} s: is the host up, does a firewall drop the port?`,
        ),
      connectTimeoutMs,
    );
    socket.once("connect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error");
      resolve(socket);
    });
    socket.on("error", (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      if (error.code === "ENOTFOUND" || error.code === "EAI_AGAIN" || error.code === "EAI_FAIL") {
        fail("resolve", `the name ${hostName} of ${hop.label} is not known to DNS: check its spelling, or give an address`, error);
      } else if (error.code === "ECONNREFUSED") {
        fail("connect", `nothing listens on port ${port} of ${hop.label}: is sshd running, is the port right?`, error);
      } else {
        fail(
          "connect",
          `${hop.label} cannot be reached on port ${port}: ${error.code ?? error.message}; is the host up and routed?`,
          error,
        );
      }
    });
  });
}

/** Has what is written in one turn leave in one system call: ssh2 writes each of its packets, of 32 KiB at most, in three pieces. */
function gatherWrites(socket: Socket): void {
  const write = socket.write.bind(socket) as (...args: readonly unknown[]) => boolean;
  let isGathering = false;
  socket.write = (...args: readonly unknown[]): boolean => {
    if (!isGathering) {
      isGathering = true;
      socket.cork();
      queueMicrotask(() => {
        isGathering = false;
        socket.uncork();
      });
    }
    return write(...args);
  };
}

async function dialThrough(client: Client, jump: SshHop, hop: SshHop): Promise<Duplex> {
  const { hostName, port, connectTimeoutMs } = hop.settings;
  return new Promise((resolve, reject) => {
    const fail = (phase: ConnectionPhase, reason: string, cause?: unknown): void =>
      reject(new ConnectionError(`the jump host ${jump.label} cannot reach ${hop.label}: ${reason}`, { host: hop.label, phase, cause }));
    const timer = setTimeout(() => fail("timeout", `no answer within ${connectTimeoutMs / 1000} s`), connectTimeoutMs);
    client.forwardOut("127.0.0.1", 0, hostName, port, (error, channel) => {
      clearTimeout(timer);
      if (error === undefined) resolve(channel);
      else
        fail(
          "connect",
          `${error.message.replace("(SSH) Channel open failure: ", "")}; is sshd up there, and is AllowTcpForwarding on?`,
          error,
        );
    });
  });
}

/** Handshake and login over a stream. The stream is closed when it fails. */
async function logIn(
  hop: SshHop,
  plan: LoginPlan,
  stream: Duplex,
  algorithms: HostKeyAlgorithm[],
  verify: (key: Buffer) => Promise<void>,
): Promise<Client> {
  const { label, settings } = hop;
  const client = new ssh2.Client();
  const tried: string[] = [];
  let accepts: readonly string[] = [];
  let refusal: unknown;
  let next = -1;
  const describe = (error: Error & { readonly level?: string }): ConnectionError => {
    if (refusal instanceof ConnectionError) return refusal;
    const fail = (phase: ConnectionPhase, message: string): ConnectionError =>
      new ConnectionError(message, { host: label, phase, cause: error });
    if (refusal !== undefined)
      return fail("host key", `the host key of ${label} could not be checked: ${refusal instanceof Error ? refusal.message : "unknown"}`);
    if (/no matching host key/.test(error.message))
      return fail("host key", `${label} has no host key of the kinds ${algorithms.join(", ")}`);
    if (error.level === "client-timeout")
      return fail("timeout", `${label} did not finish the login within ${settings.connectTimeoutMs / 1000} s`);
    if (next >= 0) return fail("login", loginRefused(hop, plan, tried, accepts, error));
    return fail(
      "connect",
      `${label} ended the connection before the login: ${error.message}; is it an SSH server, and not at its limit of logins (MaxStartups)?`,
    );
  };
  return new Promise((resolve, reject) => {
    const onError = (error: Error): void => {
      // An agent that fails to sign is one failed attempt: ssh2 goes on to the next.
      if ("level" in error && error.level === "agent") return;
      client.destroy();
      stream.destroy();
      reject(describe(error));
    };
    const onClose = (): void => onError(new Error("the other side closed the connection"));
    client.on("error", onError);
    client.on("close", onClose);
    // A jump host has no other listener once it is logged in; its end is seen by the connection that goes through it.
    client.on("error", () => {});
    client.once("ready", () => {
      client.off("error", onError);
      client.off("close", onClose);
      resolve(client);
    });
    client.connect({
      sock: stream as ClientChannel,
      username: settings.user,
      readyTimeout: settings.connectTimeoutMs,
      keepaliveInterval: KEEPALIVE_INTERVAL_MS,
      keepaliveCountMax: KEEPALIVE_COUNT_MAX,
      algorithms: { serverHostKey: algorithms, cipher: [...CIPHERS] },
      hostVerifier: (key: Buffer, answer: (accepted: boolean) => void): void => {
        verify(key).then(
          () => answer(true),
          (error: unknown) => {
            refusal = error;
            answer(false);
          },
        );
      },
      authHandler: (methodsLeft: readonly string[] | null) => {
        // "none" is asked first: the answer is the list of methods that the server takes.
        if (next < 0) {
          next = 0;
          return { type: "none", username: settings.user };
        }
        accepts = methodsLeft ?? accepts;
        while (next < plan.attempts.length) {
          const candidate = plan.attempts[next++];
          if (candidate === undefined || !accepts.includes(candidate.method)) continue;
          tried.push(candidate.name);
          return candidate.auth;
        }
        return false;
      },
    });
  });
}

function loginRefused(hop: SshHop, plan: LoginPlan, tried: readonly string[], accepts: readonly string[], error: Error): string {
  const attempts = tried.length === 0 ? "there was nothing to try" : `tried ${tried.join(", ")}`;
  const remarks = plan.remarks.map((remark) => `; ${remark}`).join("");
  const takes = accepts.length === 0 ? "" : `; it takes ${accepts.join(", ")}`;
  const reason = /authentication methods failed/.test(error.message) ? "" : ` (${error.message})`;
  return `${hop.label} refused the login${reason}: ${attempts}${takes}${remarks}; add a public key to its authorized_keys, or set identityFile or password`;
}
