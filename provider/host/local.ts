/** This machine as a host: processes of our own, and libvirt's unix socket. */
import { type ChildProcess, spawn } from "node:child_process";
import { constants } from "node:fs";
import { access, mkdir } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { CommandError, ConnectionError } from "../errors.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { Command, type HostProcess, type ProcessEnd, runToEnd } from "./command.ts";
import { daemonFailure, daemonForbidden, daemonMissing, daemonSockets, DaemonDoor, type DaemonTransport } from "./daemon.ts";
import type { Host, HostsOptions, HostSpec, HostStream, RunOptions } from "./hosts.ts";
import type { HostAddress } from "./uri.ts";

const LABEL = "this machine";

/** Where a daemon of the system makes its sockets. Source: libvirt's remote_sockets.c; /var/run is a link to /run nearly everywhere. */
const SYSTEM_RUNTIME_DIRECTORIES = ["/run/libvirt", "/var/run/libvirt"];

/** Where distributions install the daemons, which are seldom on a user's path. */
const DAEMON_DIRECTORIES = ["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/libexec/libvirt"];

/** libvirt's own bound on the start of a session daemon. Source: virnetsocket.c virNetSocketNewConnectUNIX, 30 s. */
const DAEMON_START_TIMEOUT_MS = 30_000;
const DAEMON_START_POLL_MS = 50;

/** What a session daemon gets of our environment. Source: virnetsocket.c virNetSocketForkDaemon and vircommand.c virCommandAddEnvPassCommon. */
const DAEMON_ENVIRONMENT = [
  "PATH",
  "HOME",
  "USER",
  "LOGNAME",
  "TMPDIR",
  "LD_PRELOAD",
  "LD_LIBRARY_PATH",
  "XDG_CACHE_HOME",
  "XDG_CONFIG_HOME",
  "XDG_RUNTIME_DIR",
];

/** Opens nothing by itself. `spec.uri` must be what `address` was parsed from. */
export class LocalHost implements Host {
  readonly spec: HostSpec;
  readonly options: HostsOptions;
  readonly label = LABEL;
  readonly isLocal = true;
  readonly #address: HostAddress;
  readonly #sudo: boolean;
  readonly #door: DaemonDoor;
  readonly #running = new Set<Command>();

  constructor(spec: HostSpec, address: HostAddress, options: HostsOptions) {
    this.spec = spec;
    this.#address = address;
    this.options = options;
    this.#sudo = spec.sudo ?? address.sudo ?? false;
    this.#door = new DaemonDoor(LABEL, address.localUri, () => this.#openTransport());
  }

  async run(argv: readonly string[], options: RunOptions = {}): Promise<{ readonly stdout: Buffer; readonly stderr: string }> {
    return runToEnd(this.#start(argv, options.signal), { argv, label: LABEL, sudo: this.#sudo }, options);
  }

  async stream(argv: readonly string[], options: { readonly signal?: AbortSignal } = {}): Promise<HostStream> {
    return this.#start(argv, options.signal);
  }

  async libvirt(): Promise<Libvirt> {
    return this.#door.shared();
  }

  async openLibvirt(): Promise<Libvirt> {
    return this.#door.open();
  }

  async close(): Promise<void> {
    await this.#door.close();
    await Promise.all([...this.#running].map((command) => command[Symbol.asyncDispose]()));
  }

  #start(argv: readonly string[], signal?: AbortSignal): Command {
    const command = new Command(startProcess(argv, this.#sudo, this.options.environment), { argv, label: LABEL, sudo: this.#sudo }, signal);
    this.#running.add(command);
    void command.done.catch(() => {}).finally(() => this.#running.delete(command));
    return command;
  }

  async #openTransport(): Promise<DaemonTransport> {
    if (this.#sudo) {
      if (this.#address.socket !== undefined) return this.#openHelper(["nc", "-U", this.#address.socket]);
      return this.#openHelper(["virt-ssh-helper", this.#address.localUri]);
    }
    const { userId, environment, homeDirectory } = this.options;
    // root's session is the system's daemon. Source: remote_sockets.c remoteGetURIDaemonInfo.
    const isSession = this.#address.scope === "session" && userId !== 0 && this.#address.socket === undefined;
    // Source: glib's g_get_user_runtime_dir: the cache folder where there is no XDG_RUNTIME_DIR.
    const runtimeDirectory = environment["XDG_RUNTIME_DIR"] ?? environment["XDG_CACHE_HOME"] ?? join(homeDirectory, ".cache");
    const directories = isSession ? [join(runtimeDirectory, "libvirt")] : SYSTEM_RUNTIME_DIRECTORIES;
    const sockets = daemonSockets(this.#address, directories);
    const found = await this.#connectFirst(sockets);
    if (found !== undefined) return found;
    if (!isSession || environment["LIBVIRT_AUTOSTART"] === "0") throw daemonMissing(LABEL, sockets);
    await mkdir(runtimeDirectory, { recursive: true, mode: 0o700 });
    return this.#startSessionDaemon(sockets);
  }

  #openHelper(argv: readonly string[]): DaemonTransport {
    const command = this.#start(argv);
    const done = command.done.catch((error: unknown) => {
      throw daemonFailure(LABEL, this.options.userName, daemonSockets(this.#address, SYSTEM_RUNTIME_DIRECTORIES), error);
    });
    done.catch(() => {});
    return { io: command.io, done };
  }

  /** The first socket that somebody listens on; undefined when there is none. Throws ConnectionError when one is there and refuses this user. */
  async #connectFirst(sockets: readonly string[]): Promise<DaemonTransport | undefined> {
    for (const path of sockets) {
      const socket = createConnection({ path });
      try {
        await new Promise<void>((resolve, reject) => {
          socket.once("connect", resolve);
          socket.once("error", reject);
        });
      } catch (error) {
        const code = errorCode(error);
        if (code === "ENOENT" || code === "ECONNREFUSED") continue;
        if (code === "EACCES" || code === "EPERM") throw daemonForbidden(LABEL, this.options.userName, error);
        throw new ConnectionError(`libvirt's socket ${path} cannot be opened: ${code ?? String(error)}`, {
          host: LABEL,
          phase: "daemon",
          cause: error,
        });
      }
      const done = new Promise<void>((resolve, reject) => {
        socket.once("close", resolve);
        socket.once("error", (error) => {
          reject(
            new ConnectionError(`the connection to libvirt on ${LABEL} broke: ${error.message}`, {
              host: LABEL,
              phase: "closed",
              cause: error,
            }),
          );
        });
      });
      done.catch(() => {});
      return { io: socket, done };
    }
    return undefined;
  }

  /** Starts the user's own daemon as libvirt's C client does: it serves until nobody has used it for 120 s, and outlives this process. */
  async #startSessionDaemon(sockets: readonly string[]): Promise<DaemonTransport> {
    const path = await this.#findDaemon();
    const inherited = DAEMON_ENVIRONMENT.map((name) => [name, this.options.environment[name]] as const);
    const daemon = spawn(path, ["--timeout=120"], {
      detached: true,
      stdio: "ignore",
      env: Object.fromEntries(inherited.filter(([, value]) => value !== undefined)),
    });
    const exited = new Promise<string>((resolve) => {
      daemon.once("error", (error) => resolve(error.message));
      daemon.once("exit", (code, signal) => resolve(`it ended (${signal ?? `exit ${code}`})`));
    });
    daemon.unref();
    const deadline = performance.now() + DAEMON_START_TIMEOUT_MS;
    for (;;) {
      const found = await this.#connectFirst(sockets);
      if (found !== undefined) return found;
      const failure = await Promise.race([exited, sleep(DAEMON_START_POLL_MS)]);
      if (failure === undefined && performance.now() < deadline) continue;
      // Another process may have started the same daemon: then ours ends and the other's socket is there.
      const other = failure === undefined ? undefined : await this.#connectFirst(sockets);
      if (other !== undefined) return other;
      const reason = failure ?? `no socket after ${DAEMON_START_TIMEOUT_MS / 1000} s`;
      const message = `the session daemon ${path} did not come up: ${reason}; run ${path} by hand to see why`;
      throw new ConnectionError(message, { host: LABEL, phase: "daemon" });
    }
  }

  /** Source: remote_sockets.c remoteGetDaemonPathEnv: VIRTD_PATH, then LIBVIRTD_PATH, name the daemon; else it is looked for. */
  async #findDaemon(): Promise<string> {
    const { environment } = this.options;
    const named = environment["VIRTD_PATH"] ?? environment["LIBVIRTD_PATH"];
    if (named !== undefined) return named;
    const names = this.#address.driver === "qemu" && this.#address.mode !== "legacy" ? ["virtqemud", "libvirtd"] : ["libvirtd"];
    const directories = [...(environment["PATH"] ?? "").split(":").filter((each) => each !== ""), ...DAEMON_DIRECTORIES];
    for (const path of names.flatMap((name) => directories.map((directory) => join(directory, name)))) {
      try {
        await access(path, constants.X_OK);
        return path;
      } catch {
        // ENOENT or EACCES: not this one.
      }
    }
    throw new ConnectionError(
      `no libvirt daemon (${names.join(", ")}) is installed on ${LABEL}: install libvirt, or name a host by qemu+ssh`,
      {
        host: LABEL,
        phase: "daemon",
      },
    );
  }
}

/** Starts argv in a process group of its own, so that all it starts can be ended with it. */
function startProcess(argv: readonly string[], sudo: boolean, environment: HostsOptions["environment"]): HostProcess {
  const [program = "", ...rest] = sudo ? ["sudo", "-n", ...argv] : argv;
  const child = spawn(program, rest, { detached: true, stdio: ["pipe", "pipe", "pipe"], env: { ...environment, LC_ALL: "C" } });
  const ended = new Promise<ProcessEnd>((resolve, reject) => {
    child.once("error", (error) => {
      const message =
        errorCode(error) === "ENOENT"
          ? `${program} is not installed on ${LABEL}, or not on the path`
          : `${program} cannot be started on ${LABEL}: ${error.message}`;
      reject(new CommandError(message, { argv, stderrTail: "" }));
    });
    child.once("close", (code, signal) => resolve({ exitCode: code ?? undefined, signal: signal ?? undefined }));
  });
  return { stdin: child.stdin, stdout: child.stdout, stderr: child.stderr, ended, kill: () => killGroup(child, sudo) };
}

function killGroup(child: ChildProcess, sudo: boolean): void {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return;
  try {
    // sudo passes SIGTERM on to its command; SIGKILL would leave that behind.
    process.kill(-child.pid, sudo ? "SIGTERM" : "SIGKILL");
  } catch (error) {
    // ESRCH: it ended just now. EPERM: a sudo that runs as root, which only sudo itself may signal.
    if (errorCode(error) === "EPERM")
      spawn("sudo", ["-n", "kill", "-TERM", "--", `-${child.pid}`], { stdio: "ignore" }).once("error", () => {});
  }
}

function errorCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}
