/** A real sshd for one test: its own keys, its own port on loopback, no system service. */
import { chmod, mkdir, readFile, writeFile } from "node:fs/promises";
import { createConnection, createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { once } from "node:events";
import { join } from "node:path";
import { userInfo } from "node:os";
import { runCommand } from "../../scripts/setup/command.ts";
import { type Daemon, openDaemon } from "./daemon.ts";
import { openDirectory } from "./directory.ts";

/** A port that another process takes between our look and sshd's bind is tried again with another one. */
const MAX_START_ATTEMPTS = 3;
const BANNER_TIMEOUT_MS = 1000;

export type SshKeyType = "ed25519" | "ecdsa" | "rsa";

export interface SshKey {
  readonly type: SshKeyType;
  /** Path of the private key, mode 0600; the public one lies beside it with `.pub`. */
  readonly path: string;
  /** `ssh-ed25519 AAAA...`, without comment. */
  readonly publicKey: string;
  /** `SHA256:...` as ssh-keygen -l prints it. */
  readonly fingerprint: string;
}

export interface SshdOptions {
  /** Default: one ed25519 key. */
  readonly hostKeyTypes?: readonly SshKeyType[];
  /** Host keys to use instead of new ones, so that a server can come back as itself. */
  readonly hostKeys?: readonly SshKey[];
  /** Key that may log in, instead of a new one. */
  readonly clientKey?: SshKey;
  /** Further public keys that may log in, besides `Sshd.clientKey`. */
  readonly authorizedKeys?: readonly string[];
  /** Lines of sshd_config(5) that are put before ours, and so win. */
  readonly config?: readonly string[];
  /** Default: a free one. */
  readonly port?: number;
  /** Default 127.0.0.1. */
  readonly listenAddress?: string;
  /** Put before sshd's argv: a command that runs it elsewhere, such as nsenter(1). Default: nothing. */
  readonly prefix?: readonly string[];
}

export interface Sshd extends AsyncDisposable {
  readonly address: string;
  readonly port: number;
  /** The user that may log in: the one that runs the test. */
  readonly user: string;
  readonly hostKeys: readonly SshKey[];
  /** An ed25519 key without passphrase that is authorized. */
  readonly clientKey: SshKey;
  /** A known_hosts file that holds this server's keys, and only those. */
  readonly knownHostsFile: string;
  readonly daemon: Daemon;
  /** The server's folder, removed on dispose; a test may put its own files there. `home` in it is the user's HOME in sessions. */
  readonly directory: string;
}

/** Starts `/usr/sbin/sshd` and waits until its port answers. Throws Error with sshd's own words when it does not start. */
export async function openSshd(options: SshdOptions = {}): Promise<Sshd> {
  await using stack = new AsyncDisposableStack();
  const directory = stack.use(await openDirectory("sshd")).path;
  // sshd reads authorized_keys as the user who logs in.
  await chmod(directory, 0o711);
  await mkdir(join(directory, "home"));
  const address = options.listenAddress ?? "127.0.0.1";
  const hostKeys =
    options.hostKeys ??
    (await Promise.all((options.hostKeyTypes ?? ["ed25519"]).map((type) => makeSshKey(join(directory, `host-${type}`), { type }))));
  const clientKey = options.clientKey ?? (await makeSshKey(join(directory, "client")));
  await writeFile(join(directory, "authorized_keys"), [clientKey.publicKey, ...(options.authorizedKeys ?? []), ""].join("\n"));
  // sshd refuses to start as root without its privilege separation folder, which the system's service makes at boot.
  if (process.getuid?.() === 0) await mkdir("/run/sshd", { recursive: true, mode: 0o755 });

  const start = async (attempt: number): Promise<{ readonly port: number; readonly daemon: Daemon }> => {
    const port = options.port ?? (await findFreePort(address));
    const configPath = join(directory, "sshd_config");
    await writeFile(configPath, renderSshdConfig({ ...options, directory, address, port, hostKeys }));
    try {
      return {
        port,
        daemon: await openDaemon([...(options.prefix ?? []), "/usr/sbin/sshd", "-D", "-e", "-f", configPath], {
          ready: () => isListening(address, port),
        }),
      };
    } catch (error) {
      const portTaken = error instanceof Error && error.message.includes("Address already in use");
      if (!portTaken || options.port !== undefined || attempt === MAX_START_ATTEMPTS) throw error;
      return start(attempt + 1);
    }
  };
  const { port, daemon } = await start(1);
  stack.use(daemon);

  const knownHostsFile = join(directory, "known_hosts");
  await writeFile(knownHostsFile, hostKeys.map((key) => `${renderKnownHost(address, port)} ${key.publicKey}\n`).join(""));
  const held = stack.move();
  return {
    address,
    port,
    user: userInfo().username,
    hostKeys,
    clientKey,
    knownHostsFile,
    daemon,
    directory,
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** A host's name as known_hosts(5) wants it: `[address]:port` unless the port is 22. */
export function renderKnownHost(address: string, port: number): string {
  return port === 22 ? address : `[${address}]:${port}`;
}

/** Makes a key pair at `path` with ssh-keygen. Default: ed25519, no passphrase. */
export async function makeSshKey(
  path: string,
  options: { readonly type?: SshKeyType; readonly passphrase?: string } = {},
): Promise<SshKey> {
  const type = options.type ?? "ed25519";
  await runCommand(["ssh-keygen", "-q", "-t", type, "-N", options.passphrase ?? "", "-C", "", "-f", path]);
  const publicKey = (await readFile(`${path}.pub`, "utf8")).trim();
  const { stdout } = await runCommand(["ssh-keygen", "-l", "-f", `${path}.pub`]);
  const fingerprint = stdout.split(" ")[1];
  if (fingerprint === undefined) throw new Error(`ssh-keygen -l printed no fingerprint: ${stdout.trim()}`);
  return { type, path, publicKey, fingerprint };
}

/** A TCP port that nobody listens on at this moment. */
export async function findFreePort(address = "127.0.0.1"): Promise<number> {
  const server = createServer().listen(0, address);
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

async function isListening(address: string, port: number): Promise<boolean> {
  const socket = createConnection({ host: address, port });
  try {
    await once(socket, "data", { signal: AbortSignal.timeout(BANNER_TIMEOUT_MS) });
    return true;
  } finally {
    socket.destroy();
  }
}

/** sshd_config(5): the first value of a keyword wins, so the caller's lines come first. */
function renderSshdConfig(server: {
  readonly directory: string;
  readonly address: string;
  readonly port: number;
  readonly hostKeys: readonly SshKey[];
  readonly config?: readonly string[];
}): string {
  return [
    ...(server.config ?? []),
    `ListenAddress ${server.address}`,
    `Port ${server.port}`,
    ...server.hostKeys.map((key) => `HostKey ${key.path}`),
    `AuthorizedKeysFile ${join(server.directory, "authorized_keys")}`,
    `PidFile ${join(server.directory, "sshd.pid")}`,
    "PermitRootLogin yes",
    "PasswordAuthentication no",
    "UsePAM no",
    "StrictModes no",
    "PrintMotd no",
    "PrintLastLog no",
    "LogLevel VERBOSE",
    "Subsystem sftp internal-sftp",
    // A session's shell would read the real user's start-up files: slow, unknown, and not ours to be killed in the middle of.
    `Match User ${userInfo().username}`,
    `  SetEnv HOME=${join(server.directory, "home")}`,
    "",
  ].join("\n");
}
