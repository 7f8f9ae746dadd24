/** A host over SSH: commands and libvirt as channels of few connections. */
import { PassThrough } from "node:stream";
import type { ClientChannel } from "ssh2";
import { CommandError, ConnectionError } from "../errors.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { Command, type HostProcess, type ProcessEnd, runToEnd, settlesWithin } from "./command.ts";
import { daemonFailure, DaemonDoor, daemonMissing, daemonSockets, type DaemonTransport } from "./daemon.ts";
import type { Host, HostsOptions, HostSpec, HostStream, RunOptions } from "./hosts.ts";
import { quoteCommand } from "./quote.ts";
import { absolutePath, resolveSshConfig, type SshSettings } from "./ssh-config.ts";
import { openSshConnection, type SshConnection, type SshHop } from "./ssh-connection.ts";
import type { HostAddress, SshAddress } from "./uri.ts";

/** sshd takes 10 sessions on a connection (MaxSessions); two stay free for killing what runs on the others. */
const MAX_CHANNELS = 8;

/** When the channels of all connections are in use, another one is opened: long streams must not keep each other from running a command. */
const MAX_CONNECTIONS = 16;

const MAX_JUMPS = 8;

/** How long to wait for a process's id before its channel is closed without killing it. */
const PID_TIMEOUT_MS = 2000;
const KILL_TIMEOUT_MS = 3000;

/** SSH_OPEN_ADMINISTRATIVELY_PROHIBITED and SSH_OPEN_CONNECT_FAILED of RFC 4254 5.1: what sshd answers beyond MaxSessions. */
const NO_MORE_SESSIONS: ReadonlySet<unknown> = new Set([1, 2]);

const PID_MARKER = "virtlift-pid";
const MAX_PREAMBLE_CHARACTERS = 64 * 1024;

/** Tells the process group's id, then becomes the command. sshd makes each command the leader of a group (session.c do_exec_no_pty). */
const START_SCRIPT = `echo "${PID_MARKER} $$" >&2; exec "$@"`;

const REMOTE_RUNTIME_DIRECTORIES = ["/run/libvirt", "/var/run/libvirt"];

/**
 * Prints how the daemon is reached: `helper`, `nc <socket>`, `nc-q0 <socket>`, `socat <socket>`, `forward <socket>`, or `none`.
 * Arguments: 1 to look for virt-ssh-helper, the netcat command, sockets. Source of the -q test: libvirt's virnetclient.c virNetClientSSHHelperCommand.
 */
const PROBE_SCRIPT = `
helper=$1 netcat=$2; shift 2
if [ "$helper" = 1 ] && command -v virt-ssh-helper >/dev/null 2>&1; then echo helper; exit 0; fi
for socket in "$@"; do
  [ -S "$socket" ] || continue
  if command -v "$netcat" >/dev/null 2>&1; then
    if "$netcat" -q 2>&1 | grep -q "requires an argument"; then echo "nc-q0 $socket"; else echo "nc $socket"; fi
  elif command -v socat >/dev/null 2>&1; then echo "socat $socket"
  else echo "forward $socket"
  fi
  exit 0
done
echo none`;

const WAYS: ReadonlySet<string> = new Set(["helper", "nc", "nc-q0", "socat", "forward", "none"]);

/** A connection and how many of its channels are in use. `capacity` shrinks when the server allows fewer. */
interface Lane {
  readonly connection: SshConnection;
  used: number;
  capacity: number;
}

/** Opens nothing by itself; the constructor reads ssh_config. Throws ConnectionError (phase "resolve") when that cannot be obeyed. */
export class SshHost implements Host {
  readonly spec: HostSpec;
  readonly options: HostsOptions;
  readonly label: string;
  readonly isLocal = false;
  readonly #address: HostAddress & { readonly ssh: SshAddress };
  readonly #hops: readonly SshHop[];
  readonly #user: string;
  readonly #sudo: boolean;
  readonly #door: DaemonDoor;
  readonly #lanes: Lane[] = [];
  readonly #waiting: (() => void)[] = [];
  #opening: Promise<void> | undefined;
  #way: Promise<string> | undefined;
  #generation = 0;

  constructor(spec: HostSpec, address: HostAddress & { readonly ssh: SshAddress }, options: HostsOptions) {
    this.spec = spec;
    this.options = options;
    this.#address = address;
    this.#hops = planHops(spec, address.ssh, options);
    const last = this.#hops.at(-1);
    this.label = last?.label ?? address.ssh.host;
    this.#user = last?.settings.user ?? options.userName;
    this.#sudo = spec.sudo ?? address.sudo ?? false;
    this.#door = new DaemonDoor(this.label, address.localUri, () => this.#openTransport());
  }

  async run(argv: readonly string[], options: RunOptions = {}): Promise<{ readonly stdout: Buffer; readonly stderr: string }> {
    return this.#run(argv, this.#sudo, options);
  }

  async stream(argv: readonly string[], options: { readonly signal?: AbortSignal } = {}): Promise<HostStream> {
    return this.#start(argv, this.#sudo, options.signal);
  }

  async libvirt(): Promise<Libvirt> {
    return this.#door.shared();
  }

  async openLibvirt(): Promise<Libvirt> {
    return this.#door.open();
  }

  async close(): Promise<void> {
    this.#generation += 1;
    await this.#door.close();
    await this.#opening?.catch(() => {
      // Who asked for the connection hears of it.
    });
    for (const lane of this.#lanes.toReversed()) lane.connection.close();
  }

  async #run(argv: readonly string[], sudo: boolean, options: RunOptions): Promise<{ readonly stdout: Buffer; readonly stderr: string }> {
    return runToEnd(await this.#start(argv, sudo, options.signal), { argv, label: this.label, sudo }, options);
  }

  async #start(argv: readonly string[], sudo: boolean, signal?: AbortSignal): Promise<Command> {
    const line = quoteCommand(["exec", "env", "LC_ALL=C", "sh", "-c", START_SCRIPT, "sh", ...(sudo ? ["sudo", "-n"] : []), ...argv]);
    const process = await this.#openChannel((connection) => startRemote(connection, line, sudo), signal);
    return new Command(process, { argv, label: this.label, sudo }, signal);
  }

  /** Opens a channel on the first connection that has room, and gives the room back when the process has ended. */
  async #openChannel(open: (connection: SshConnection) => Promise<HostProcess>, signal?: AbortSignal): Promise<HostProcess> {
    for (;;) {
      const lane = await this.#acquire(signal);
      try {
        const process = await open(lane.connection);
        const release = (): void => this.#release(lane);
        process.ended.then(release, release);
        return process;
      } catch (error) {
        this.#release(lane);
        const reason = error instanceof Error && "reason" in error ? error.reason : undefined;
        if (NO_MORE_SESSIONS.has(reason) && lane.used > 0) {
          lane.capacity = lane.used;
          continue;
        }
        if (error instanceof ConnectionError) throw error;
        const message = `${this.label} opens no session: ${error instanceof Error ? error.message : String(error)}; is the login allowed to run commands?`;
        throw new ConnectionError(message, { host: this.label, phase: reason === undefined ? "closed" : "login", cause: error });
      }
    }
  }

  async #acquire(signal?: AbortSignal): Promise<Lane> {
    for (;;) {
      if (signal?.aborted) throw this.#aborted();
      const lane = this.#lanes.find((each) => each.used < each.capacity);
      if (lane !== undefined) {
        lane.used += 1;
        return lane;
      }
      if (this.#lanes.length < MAX_CONNECTIONS) await this.#unlessAborted(this.#openLane(), signal);
      else await this.#unlessAborted(new Promise<void>((resolve) => this.#waiting.push(resolve)), signal);
    }
  }

  #release(lane: Lane): void {
    lane.used -= 1;
    // All are woken: one of them may have been aborted meanwhile.
    for (const wake of this.#waiting.splice(0)) wake();
  }

  /** Opens one more connection; who asks meanwhile waits for the same one. */
  async #openLane(): Promise<void> {
    this.#opening ??= this.#connect().finally(() => (this.#opening = undefined));
    return this.#opening;
  }

  async #connect(): Promise<void> {
    const generation = this.#generation;
    const connection = await openSshConnection(this.#hops);
    if (generation !== this.#generation) {
      connection.close();
      throw new ConnectionError(`the connection to ${this.label} was closed`, { host: this.label, phase: "closed" });
    }
    const lane: Lane = { connection, used: 0, capacity: MAX_CHANNELS };
    this.#lanes.push(lane);
    connection.onLost(() => {
      this.#lanes.splice(this.#lanes.indexOf(lane), 1);
      for (const wake of this.#waiting.splice(0)) wake();
    });
  }

  async #unlessAborted(promise: Promise<void>, signal: AbortSignal | undefined): Promise<void> {
    if (signal === undefined) return promise;
    const stopListening = new AbortController();
    const aborted = new Promise<never>((_resolve, reject) => {
      signal.addEventListener("abort", () => reject(this.#aborted()), { signal: stopListening.signal });
    });
    try {
      await Promise.race([promise, aborted]);
    } finally {
      stopListening.abort();
    }
  }

  #aborted(): ConnectionError {
    return new ConnectionError(`a command was stopped before it started (on ${this.label})`, { host: this.label, phase: "aborted" });
  }

  async #openTransport(): Promise<DaemonTransport> {
    const sockets = daemonSockets(this.#address, REMOTE_RUNTIME_DIRECTORIES);
    const [kind = "", socket = ""] = (await this.#findWay(sockets)).split(" ");
    const { netcat } = this.#address.ssh;
    switch (kind) {
      case "helper": {
        const mode = this.#address.mode === "auto" ? "" : `?mode=${this.#address.mode}`;
        return this.#openHelper(["virt-ssh-helper", `${this.#address.localUri}${mode}`], sockets);
      }
      case "nc-q0":
        return this.#openHelper([netcat, "-q0", "-U", socket], sockets);
      case "nc":
        return this.#openHelper([netcat, "-U", socket], sockets);
      case "socat":
        return this.#openHelper(["socat", "-", `UNIX-CONNECT:${socket}`], sockets);
      case "forward":
        return this.#openForward(socket);
      default:
        this.#way = undefined;
        if (this.#address.scope === "session" && this.#address.socket === undefined) {
          const message = `the session daemon of ${this.label} needs virt-ssh-helper there: install libvirt-daemon, or set socket in the URI`;
          throw new ConnectionError(message, { host: this.label, phase: "daemon" });
        }
        if (this.#address.ssh.proxy === "native") {
          const message = `virt-ssh-helper is not installed on ${this.label}: install libvirt-daemon there, or drop proxy=native from the URI`;
          throw new ConnectionError(message, { host: this.label, phase: "daemon" });
        }
        throw daemonMissing(this.label, sockets);
    }
  }

  /** Asked once, and again after a failure: the host may have got its daemon meanwhile. */
  async #findWay(sockets: readonly string[]): Promise<string> {
    const { proxy, netcat } = this.#address.ssh;
    // virt-ssh-helper knows the usual sockets only.
    const mayHelp = proxy !== "netcat" && this.#address.socket === undefined;
    const isNative = proxy === "native" || (this.#address.scope === "session" && this.#address.socket === undefined);
    const argv = ["sh", "-c", PROBE_SCRIPT, "sh", mayHelp ? "1" : "0", netcat, ...(isNative ? [] : sockets)];
    this.#way ??= this.#probeWay(argv).then(async (way) => way ?? this.#findWayWithoutShell(isNative ? [] : sockets));
    const pending = this.#way;
    pending.catch(() => {
      if (this.#way === pending) this.#way = undefined;
    });
    return pending;
  }

  /** What PROBE_SCRIPT says; undefined where the login runs no commands, or another one in their place. */
  async #probeWay(argv: readonly string[]): Promise<string | undefined> {
    try {
      const way = (await this.#run(argv, false, {})).stdout.toString("utf8").trim();
      return WAYS.has(way.split(" ", 1)[0] ?? "") ? way : undefined;
    } catch (error) {
      if (error instanceof CommandError || (error instanceof ConnectionError && error.phase === "login")) return undefined;
      throw error;
    }
  }

  /** A login without a shell may forward to the daemon's socket, or be forced to run virt-ssh-helper whatever it asks for. */
  async #findWayWithoutShell(sockets: readonly string[]): Promise<string> {
    for (const socket of sockets) {
      try {
        (await this.#openChannel((connection) => forwardToSocket(connection, this.label, socket))).kill();
        return `forward ${socket}`;
      } catch (error) {
        // Refused, or no such socket: then perhaps the next one.
        if (!(error instanceof ConnectionError) || error.phase !== "daemon") throw error;
      }
    }
    return "helper";
  }

  async #openHelper(argv: readonly string[], sockets: readonly string[]): Promise<DaemonTransport> {
    const command = await this.#start(argv, this.#sudo);
    const done = command.done.catch((error: unknown) => {
      this.#way = undefined;
      throw daemonFailure(this.label, this.#user, sockets, error);
    });
    done.catch(() => {});
    return { io: command.io, done };
  }

  async #openForward(socket: string): Promise<DaemonTransport> {
    const process = await this.#openChannel((connection) => forwardToSocket(connection, this.label, socket));
    const command = new Command(process, { argv: ["forward", socket], label: this.label, sudo: false });
    return { io: command.io, done: command.done };
  }
}

/** The way to the host: the jump hosts in order, then the host itself, each with its own ssh_config. */
function planHops(spec: HostSpec, address: SshAddress, options: HostsOptions): readonly SshHop[] {
  const knownHostsFile = spec.knownHostsFile ?? address.knownHostsFile;
  const hostKeyPolicy = spec.hostKeyPolicy ?? address.hostKeyPolicy;
  const identityFile = spec.identityFile ?? address.keyFile;
  const settle = (settings: SshSettings): SshSettings => ({
    ...settings,
    ...(knownHostsFile !== undefined && {
      userKnownHostsFiles: [absolutePath(knownHostsFile, options.homeDirectory)],
      globalKnownHostsFiles: [],
    }),
    ...(hostKeyPolicy !== undefined && { hostKeyPolicy }),
  });
  const credentials = {
    ...(identityFile !== undefined && { identityFile: absolutePath(identityFile, options.homeDirectory) }),
    ...(spec.passphrase !== undefined && { passphrase: spec.passphrase }),
  };
  const jumpHops = (jumps: readonly string[], depth: number): readonly SshHop[] => {
    if (depth > MAX_JUMPS || jumps.length > MAX_JUMPS) {
      throw new ConnectionError(`the jump hosts of ${address.host} lead in a circle, or are more than ${MAX_JUMPS}`, {
        host: address.host,
        phase: "resolve",
      });
    }
    return jumps.flatMap((jump, index) => {
      const { host, ...given } = parseJump(jump);
      const settings = settle(resolveSshConfig(host, given, options));
      const hop: SshHop = { label: labelOf(host, settings), settings, credentials };
      // Only the first one may need a jump of its own: the others are reached through it. Source: ssh_config(5) ProxyJump.
      return index === 0 ? [...jumpHops(settings.proxyJump, depth + 1), hop] : [hop];
    });
  };
  const settings = settle(resolveSshConfig(address.host, { user: address.user, port: address.port }, options));
  return [
    ...jumpHops(spec.jumpHosts ?? settings.proxyJump, 0),
    {
      label: labelOf(address.host, settings),
      settings,
      // A password is for the host alone; a jump host that asks for it does not get it.
      credentials: { ...credentials, ...(spec.password !== undefined && { password: spec.password }) },
      ...(spec.fingerprint !== undefined && { fingerprint: spec.fingerprint }),
    },
  ];
}

function labelOf(host: string, settings: SshSettings): string {
  return `${settings.user}@${host.includes(":") ? `[${host}]` : host}${settings.port === 22 ? "" : `:${settings.port}`}`;
}

/** `host`, `user@host`, `user@host:port`, `ssh://user@host:port`; IPv6 in brackets. */
function parseJump(jump: string): { readonly host: string; readonly user?: string; readonly port?: number } {
  const match = /^(?:ssh:\/\/)?(?:([^@\s]+)@)?(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/[\]-][^\s:@/[\]]*))(?::(\d{1,5}))?\/?$/.exec(jump);
  const host = match?.[2] ?? match?.[3];
  if (match === null || host === undefined) {
    throw new ConnectionError(`the jump host "${jump}" is none: write user@host:port`, { host: jump, phase: "resolve" });
  }
  return { host, ...(match[1] !== undefined && { user: match[1] }), ...(match[4] !== undefined && { port: Number(match[4]) }) };
}

async function startRemote(connection: SshConnection, line: string, sudo: boolean): Promise<HostProcess> {
  const channel = await openChannel(connection, (callback) => connection.client.exec(line, callback));
  const stderr = new PassThrough();
  const pid = extractPid(channel, stderr);
  const ended = channelEnd(connection, channel);
  let isKilled = false;
  const kill = async (): Promise<void> => {
    if (isKilled) return;
    isKilled = true;
    await settlesWithin(Promise.race([pid, ended]), PID_TIMEOUT_MS);
    const group = await Promise.race([pid, Promise.resolve(undefined)]);
    if (group !== undefined && connection.isOpen) await settlesWithin(killRemote(connection, group, sudo), KILL_TIMEOUT_MS);
    channel.close();
    channel.resume();
  };
  return { stdin: channel, stdout: channel, stderr, ended, kill: () => void kill() };
}

/** SSH's own signal request is refused by sshd for root (session.c session_signal_req), so another channel runs kill(1). */
async function killRemote(connection: SshConnection, group: number, sudo: boolean): Promise<void> {
  // sudo passes SIGTERM on to its command; SIGKILL would leave that behind.
  const argv = sudo ? ["sudo", "-n", "kill", "-TERM", "--", `-${group}`] : ["kill", "-KILL", "--", `-${group}`];
  const channel = await openChannel(connection, (callback) => connection.client.exec(quoteCommand(argv), callback));
  channel.resume();
  channel.stderr.resume();
  await channelEnd(connection, channel);
}

async function forwardToSocket(connection: SshConnection, label: string, socket: string): Promise<HostProcess> {
  const channel = await openChannel(connection, (callback) => connection.client.openssh_forwardOutStreamLocal(socket, callback)).catch(
    (error: unknown) => {
      if (error instanceof ConnectionError) throw error;
      const reason = error instanceof Error ? error.message.replace("(SSH) Channel open failure: ", "") : String(error);
      const message = `${label} forwards nothing to libvirt's socket ${socket}: ${reason}; install virt-ssh-helper, nc or socat there, or set AllowStreamLocalForwarding in its sshd_config`;
      throw new ConnectionError(message, { host: label, phase: "daemon", cause: error });
    },
  );
  const stderr = new PassThrough();
  stderr.end();
  const ended = channelEnd(connection, channel).then(() => ({ exitCode: 0 }));
  return {
    stdin: channel,
    stdout: channel,
    stderr,
    ended,
    kill: () => {
      channel.close();
      channel.resume();
    },
  };
}

/** Opens a channel. Throws ConnectionError (phase "closed") when the connection is gone, and ssh2's error, with its `reason`, when the server refuses. */
async function openChannel(
  connection: SshConnection,
  open: (callback: (error: Error | undefined, channel: ClientChannel) => void) => unknown,
): Promise<ClientChannel> {
  return new Promise((resolve, reject) => {
    const stopListening = connection.onLost(reject);
    if (!connection.isOpen) return;
    open((error, channel) => {
      stopListening();
      if (error) {
        reject(error);
        return;
      }
      channel.on("error", () => {
        // Whatever breaks a channel also closes it.
      });
      resolve(channel);
    });
  });
}

/** How a channel's process ended; rejects as soon as the connection is lost, whoever still reads. */
function channelEnd(connection: SshConnection, channel: ClientChannel): Promise<ProcessEnd> {
  const ended = new Promise<ProcessEnd>((resolve, reject) => {
    const stopListening = connection.onLost(reject);
    channel.on("close", (exitCode?: number | null, signal?: string) => {
      stopListening();
      resolve({ exitCode: exitCode ?? undefined, signal });
    });
  });
  ended.catch(() => {});
  return ended;
}

/** Takes START_SCRIPT's line out of stderr and passes on the rest, also what a login shell wrote before. Never settles when there is no such line. */
async function extractPid(channel: ClientChannel, rest: PassThrough): Promise<number> {
  let preamble: string | undefined = "";
  return new Promise((resolve) => {
    channel.stderr.setEncoding("utf8");
    channel.stderr.on("data", (text: string) => {
      if (preamble === undefined) {
        rest.write(text);
        return;
      }
      preamble += text;
      const match = new RegExp(`^${PID_MARKER} (\\d+)\\n`, "m").exec(preamble);
      if (match === null && preamble.length < MAX_PREAMBLE_CHARACTERS) return;
      if (match !== null) resolve(Number(match[1]));
      rest.write(match === null ? preamble : preamble.replace(match[0], ""));
      preamble = undefined;
    });
    channel.stderr.on("end", () => {
      rest.end(preamble);
    });
  });
}
