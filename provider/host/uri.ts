/** libvirt's connection URIs: what they say about the way to a daemon. Pure: opens nothing. */
import { ConnectionError } from "../errors.ts";

/** Which daemon: the one for QEMU alone (virtqemud), the old one for all (libvirtd), or whichever has a socket. */
type DaemonMode = "auto" | "direct" | "legacy";

/** How the daemon's socket is reached on the far side: virt-ssh-helper, netcat or its like, or the first that is there. */
type ProxyMode = "auto" | "native" | "netcat";

/** The way over SSH, as far as the URI says it. */
export interface SshAddress {
  /** A name, an alias of ssh_config, or an address; IPv6 without brackets. */
  readonly host: string;
  readonly user?: string;
  readonly port?: number;
  readonly keyFile?: string;
  readonly knownHostsFile?: string;
  readonly hostKeyPolicy?: "strict" | "accept-new";
  readonly proxy: ProxyMode;
  /** The netcat command. Default `nc`. */
  readonly netcat: string;
}

/** A parsed URI. `ssh` is absent when the daemon is on this machine. */
export interface HostAddress {
  readonly driver: "qemu" | "test";
  /** `system` or `session` for qemu; for the test driver `system`, too. */
  readonly scope: "system" | "session";
  /** The URI as the daemon itself knows it, for ConnectOpen: `qemu:///system`. */
  readonly localUri: string;
  /** Absolute path of the daemon's socket, when it is not the usual one. */
  readonly socket?: string;
  readonly mode: DaemonMode;
  readonly sudo?: boolean;
  readonly ssh?: SshAddress;
}

const URI_SHAPE =
  /^(qemu|test)(?:\+([a-z0-9]+))?:\/\/(?:([^/?#@]*)@)?(\[[0-9A-Fa-f:.]+(?:%25[\w.]+)?\]|[^/?#@:[\]]*)(?::(\d*))?(\/[^?#]*)?(?:\?([^#]*))?$/;

/** Transports that libvirt runs over SSH by one library or another; all are the same to us. */
const SSH_TRANSPORTS: ReadonlySet<string> = new Set(["ssh", "libssh", "libssh2"]);

/** A path that netcat, socat and a URI's query all take as it is. */
const SOCKET_PATH = /^\/[\w.@+=/-]+$/;

const MAX_URI_CHARACTERS = 4096;

/**
 * Parses `qemu:///system`, `qemu:///session`, `test:///default`, `qemu+unix:///system?socket=/p`, `qemu+ssh://user@host:port/system?keyfile=/p`.
 *
 * Parameters: `socket`, `mode`, `keyfile`, `known_hosts`, `known_hosts_verify` (normal, auto), `proxy`, `netcat`, `no_tty` as libvirt has them,
 * and `sudo` (0 or 1), which is ours.
 * Throws ConnectionError (phase "resolve") on everything else, never quoting a password.
 * Source: libvirt's docs/uri.rst; remote_sockets.c remoteSplitURIScheme; virURIParse splits the query at & and ; and takes + as itself.
 */
export function parseUri(uri: string): HostAddress {
  const shown = redact(uri);
  const refuse = (reason: string): never => {
    throw new ConnectionError(`the host URI ${shown} ${reason}`, { host: shown, phase: "resolve" });
  };
  if (uri.length > MAX_URI_CHARACTERS) return refuse(`is longer than ${MAX_URI_CHARACTERS} characters`);
  const match = URI_SHAPE.exec(uri);
  if (match === null) return refuse("is none that is supported: give one such as qemu:///system or qemu+ssh://user@host/system");
  const [, driver, transport, user, bracketedHost = "", port, path = "", query] = match;
  const host = bracketedHost.replace(/^\[|\]$/g, "").replace("%25", "%");
  const decode = (text: string): string => {
    try {
      return decodeURIComponent(text);
    } catch {
      // A % that is not followed by two hex digits of UTF-8.
      return refuse(`has a wrong escape in "${text}"`);
    }
  };

  const isSsh = transport !== undefined && SSH_TRANSPORTS.has(transport);
  if (transport === "tcp" || transport === "tls" || (transport === undefined && host !== "")) {
    return refuse("means TCP or TLS, which is not supported: use qemu+ssh://user@host/system");
  }
  if (transport !== undefined && transport !== "unix" && !isSsh) return refuse(`has the unknown transport ${transport}: use ssh or unix`);
  if (isSsh && host === "") return refuse("names no host: write qemu+ssh://user@host/system");
  if (!isSsh && (host !== "" || user !== undefined || port !== undefined))
    return refuse("names a host but is local: use qemu+ssh://user@host/system");
  if (host.startsWith("-") || user?.startsWith("-")) return refuse("has a user or host that begins with a dash");
  if (user?.includes(":")) return refuse("holds a password: give it as the host's password property, as a secret");
  const portNumber = port === undefined || port === "" ? undefined : Number(port);
  if (portNumber !== undefined && (portNumber < 1 || portNumber > 65_535)) return refuse("has a port that is not in 1 to 65535");

  const isQemu = driver === "qemu";
  if (isQemu && path !== "/system" && path !== "/session") return refuse('has a path that is neither "/system" nor "/session"');
  if (!isQemu && path.length < 2) return refuse('lacks the test driver\'s path: write "/default"');

  const parameters = new Map<string, string>();
  for (const pair of (query ?? "").split(/[&;]/).filter((each) => each !== "")) {
    const [name = "", ...value] = pair.split("=");
    parameters.set(decode(name), decode(value.join("=")));
  }
  const take = (name: string): string | undefined => {
    const value = parameters.get(name);
    parameters.delete(name);
    return value === "" ? undefined : value;
  };
  const takeOneOf = <Value extends string>(name: string, values: readonly Value[]): Value | undefined => {
    const value = take(name);
    const known = values.find((each) => each === value);
    if (value !== undefined && known === undefined) return refuse(`has ${name}=${value}, which is none of ${values.join(", ")}`);
    return known;
  };

  const socket = take("socket");
  if (socket !== undefined && !SOCKET_PATH.test(socket)) {
    return refuse("has a socket that is no absolute path of letters, digits and . _ @ + = / -");
  }
  const mode = takeOneOf("mode", ["auto", "direct", "legacy"]) ?? "auto";
  const sudo = takeOneOf("sudo", ["0", "1"]);
  let ssh: SshAddress | undefined;
  if (isSsh) {
    if (parameters.has("no_verify")) {
      return refuse('has no_verify, which would trust any host: set hostKeyPolicy to "accept-new", or pin the fingerprint');
    }
    const verify = take("known_hosts_verify");
    if (verify === "ignore") {
      return refuse('has known_hosts_verify=ignore, which would trust any host: set hostKeyPolicy to "accept-new", or pin the fingerprint');
    }
    if (verify !== undefined && verify !== "normal" && verify !== "auto")
      return refuse(`has known_hosts_verify=${verify}, which is neither normal nor auto`);
    const proxy = takeOneOf("proxy", ["auto", "native", "netcat"]) ?? "auto";
    const netcat = take("netcat");
    if (proxy === "native" && (netcat !== undefined || socket !== undefined)) {
      return refuse("asks for virt-ssh-helper (proxy=native), which takes neither a netcat nor a socket");
    }
    take("no_tty");
    const keyFile = take("keyfile");
    const knownHostsFile = take("known_hosts");
    ssh = {
      host: decode(host),
      ...(user !== undefined && user !== "" && { user: decode(user) }),
      ...(portNumber !== undefined && { port: portNumber }),
      ...(keyFile !== undefined && { keyFile }),
      ...(knownHostsFile !== undefined && { knownHostsFile }),
      ...(verify !== undefined && { hostKeyPolicy: verify === "auto" ? "accept-new" : "strict" }),
      proxy,
      netcat: netcat ?? "nc",
    };
  }
  const [unknown] = parameters.keys();
  if (unknown !== undefined) return refuse(`has the parameter ${unknown}, which is not supported here`);
  return {
    driver: isQemu ? "qemu" : "test",
    scope: path === "/session" && isQemu ? "session" : "system",
    localUri: `${driver}://${path}`,
    mode,
    ...(socket !== undefined && { socket }),
    ...(sudo !== undefined && { sudo: sudo === "1" }),
    ...(ssh !== undefined && { ssh }),
  };
}

/** The URI without what follows a colon in its user part, shortened to what fits a sentence. */
function redact(uri: string): string {
  return uri.slice(0, 200).replace(/(:\/\/[^/?#@:]*):[^/?#]*@/, "$1:***@");
}
