/** The contract of a host: a machine with libvirt on it, and the two ways of reaching it. */
import type { Duplex } from "node:stream";
import type { Libvirt } from "../libvirt/client.ts";

/** How a user names a host: a libvirt URI and what a URI cannot say. Shapes and defaults: `HostSchema` in `resources/schema.ts`. */
export interface HostSpec {
  /** `qemu:///system`, `qemu:///session`, `test:///default`, `qemu+unix:///system?socket=/path`, `qemu+ssh://user@host:port/system`. */
  readonly uri: string;
  /** Path of the private key; default: what ssh_config and the agent offer. */
  readonly identityFile?: string;
  /** Passphrase of the identity file. A secret: never logged, never in argv. */
  readonly passphrase?: string;
  /** Password for the login. A secret. */
  readonly password?: string;
  /** Path of a known_hosts file; default: what ssh_config says, else ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts. */
  readonly knownHostsFile?: string;
  /** `SHA256:...` as ssh-keygen -l prints it: the only key that is accepted. */
  readonly fingerprint?: string;
  /** `strict` (default) accepts known keys only; `accept-new` writes an unknown key down and refuses a changed one. */
  readonly hostKeyPolicy?: "strict" | "accept-new";
  /** `user@host:port` of the jump hosts, first hop first; default: ssh_config's ProxyJump. */
  readonly jumpHosts?: readonly string[];
  /** Run commands and the libvirt helper through `sudo -n`. Default false. */
  readonly sudo?: boolean;
}

/** What the process knows about itself; nothing below reads it from the process. */
export interface HostsOptions {
  /** Used: SSH_AUTH_SOCK, XDG_RUNTIME_DIR, XDG_CACHE_HOME, PATH, VIRTD_PATH, LIBVIRTD_PATH, LIBVIRT_AUTOSTART, `${NAME}` in ssh_config; local commands inherit all. */
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** Where `~` and `.ssh` are. */
  readonly homeDirectory: string;
  /** Who runs this process: the default user of SSH. */
  readonly userName: string;
  /** Its effective user id: root has no session daemon of its own. */
  readonly userId: number;
  /** ssh_config files, the first one wins. Default: `~/.ssh/config`, then `/etc/ssh/ssh_config`. */
  readonly sshConfigFiles?: readonly string[];
}

export interface RunOptions {
  /** Written to the command's stdin, which is then closed. Default: nothing. */
  readonly input?: Uint8Array | string;
  readonly signal?: AbortSignal;
  /** Default 60,000. */
  readonly timeoutMs?: number;
}

/** A running command. stdout and stdin are the Duplex; `done` settles when it has ended: void on exit 0, CommandError or ConnectionError else. */
export interface HostStream extends AsyncDisposable {
  readonly io: Duplex;
  readonly done: Promise<void>;
  /** Ends the command: closes the channel (SSH) or kills the process group (local). May be called twice. */
  kill(): void;
}

/** An open host. Shared by every resource of the process that names it. */
export interface Host {
  readonly spec: HostSpec;
  /** What it was opened with: another process that is given both opens the same host. */
  readonly options: HostsOptions;
  /** For messages: `root@kvm1`, `root@kvm1:2222`, or `this machine`. */
  readonly label: string;
  /** Whether files on the host are files of this process. */
  readonly isLocal: boolean;
  /** Runs argv to its end, with LC_ALL=C. At most 16 MiB of stdout are kept, more is an error. Throws CommandError when it does not exit 0. */
  run(argv: readonly string[], options?: RunOptions): Promise<{ readonly stdout: Buffer; readonly stderr: string }>;
  /** Starts argv for bulk bytes in either direction, with back-pressure. */
  stream(argv: readonly string[], options?: { readonly signal?: AbortSignal }): Promise<HostStream>;
  /** The shared libvirt connection, opened on first use and again after it ended. Callers do not close it. */
  libvirt(): Promise<Libvirt>;
  /** A libvirt connection of the caller's own, for bulk streams and long calls. The caller closes it. */
  openLibvirt(): Promise<Libvirt>;
  close(): Promise<void>;
}

/** Opens each host once: two equal specs share one Host. */
export interface Hosts {
  /** Never connects by itself: the first use does. Throws ConnectionError (phase "resolve") on a URI that is none. */
  open(spec: HostSpec): Host;
  close(): Promise<void>;
}
