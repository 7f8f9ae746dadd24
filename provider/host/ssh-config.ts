/** ssh_config(5): what it says about one host. Reads files and connects to nothing. The parsing and the matching are the ssh-config package's. */
import { readdirSync, readFileSync, statSync } from "node:fs";
import { basename, dirname, isAbsolute, join } from "node:path";
import SSHConfig, { glob, LineType, type Line } from "ssh-config";
import { ConnectionError } from "../errors.ts";

/** OpenSSH's own bound. Source: readconf.c READCONF_MAX_DEPTH. */
const MAX_INCLUDE_DEPTH = 16;
const MAX_FILES = 256;
const MAX_FILE_BYTES = 1024 * 1024;
const DEFAULT_PORT = 22;
const DEFAULT_CONNECT_TIMEOUT_MS = 30_000;

/** Default identities in the order of ssh(1) -i; kinds that need a security key are left out. */
const DEFAULT_IDENTITIES = ["~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519"];
const DEFAULT_USER_KNOWN_HOSTS = ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"];
const DEFAULT_GLOBAL_KNOWN_HOSTS = ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"];

/** Who asks: what `~`, `${NAME}` and the %-tokens stand for. */
export interface SshConfigContext {
  readonly environment: Readonly<Record<string, string | undefined>>;
  readonly homeDirectory: string;
  readonly userName: string;
  readonly userId: number;
  /** Default: `~/.ssh/config`, then `/etc/ssh/ssh_config`. */
  readonly sshConfigFiles?: readonly string[];
}

/** How to reach one host, all defaults filled in. Paths are absolute, with tokens replaced. */
export interface SshSettings {
  /** The name or address to connect to, in lower case. */
  readonly hostName: string;
  readonly port: number;
  readonly user: string;
  /** Private keys to try; those that were not named by the user need not exist. */
  readonly identityFiles: readonly string[];
  readonly identitiesOnly: boolean;
  /** The agent's socket; absent when there is none or it is switched off. */
  readonly agentSocket?: string;
  /** `user@host:port`, first hop first. */
  readonly proxyJump: readonly string[];
  /** The first one is where new keys are written. */
  readonly userKnownHostsFiles: readonly string[];
  readonly globalKnownHostsFiles: readonly string[];
  readonly hostKeyPolicy: "strict" | "accept-new";
  /** The name that known_hosts files have for the host, without a port. */
  readonly hostKeyAlias?: string;
  readonly hashKnownHosts: boolean;
  readonly connectTimeoutMs: number;
}

/**
 * What ssh_config says about `alias`; `user` and `port` are the caller's and win.
 *
 * Obeyed: Host, Match (all, host, originalhost, user, localuser, final), Include, HostName, Port, User, IdentityFile, IdentitiesOnly, IdentityAgent,
 * ProxyJump, UserKnownHostsFile, GlobalKnownHostsFile, StrictHostKeyChecking (`no` and `off` count as accept-new, `ask` as yes), HostKeyAlias,
 * HashKnownHosts, ConnectTimeout. `Match exec` never matches and names are not canonicalised: both would start programs.
 * Throws ConnectionError (phase "resolve") on a file that cannot be read or parsed, on an unknown token, and on a ProxyCommand.
 */
export function resolveSshConfig(
  alias: string,
  given: { readonly user?: string | undefined; readonly port?: number | undefined },
  context: SshConfigContext,
): SshSettings {
  const refuse = (reason: string): never => {
    throw new ConnectionError(reason, { host: alias, phase: "resolve" });
  };
  const query = { Host: alias, ...(given.user !== undefined && { User: given.user }) };
  const values = readConfig(query, context, refuse).compute(query, { ignoreCase: true, matchExec: false });
  const all = (keyword: string): readonly string[] => {
    const value = values[keyword];
    return value === undefined ? [] : typeof value === "string" ? [value] : value;
  };
  const one = (keyword: string): string | undefined => all(keyword)[0];
  const isYes = (keyword: string): boolean => /^(yes|true)$/i.test(one(keyword) ?? "");
  const whole = (keyword: string, limit: number): number | undefined => {
    const text = one(keyword);
    if (text === undefined || (keyword === "connecttimeout" && text === "none")) return undefined;
    const number = Number(text);
    return Number.isInteger(number) && number > 0 && number <= limit
      ? number
      : refuse(`ssh_config has ${keyword} ${text} for ${alias}, which is not in 1 to ${limit}`);
  };

  const user = given.user ?? one("user") ?? context.userName;
  const port = given.port ?? whole("port", 65_535) ?? DEFAULT_PORT;
  const hostName = (one("hostname") ?? alias).replaceAll("%h", alias).replaceAll("%%", "%").toLowerCase();
  const hostKeyAlias = one("hostkeyalias");
  const tokens: Readonly<Record<string, string>> = {
    "%": "%",
    d: context.homeDirectory,
    h: hostName,
    i: String(context.userId),
    k: hostKeyAlias ?? alias,
    n: alias,
    p: String(port),
    r: user,
    u: context.userName,
  };
  const path = (text: string): string => {
    const expanded = text
      .replace(
        /%(.?)/g,
        (whole, token: string) => tokens[token] ?? refuse(`ssh_config has ${text} for ${alias}: the token ${whole} is not supported`),
      )
      .replace(
        /\$\{(\w+)\}/g,
        (_whole, name: string) => context.environment[name] ?? refuse(`ssh_config has ${text} for ${alias}, and ${name} is not set`),
      );
    return absolutePath(expanded, context.homeDirectory);
  };
  const files = (keyword: string, defaults: readonly string[]): readonly string[] => {
    const named = all(keyword);
    if (named.some((each) => each.toLowerCase() === "none")) return [];
    return (named.length > 0 ? named : defaults).map(path);
  };

  const jumps = one("proxyjump");
  const command = all("proxycommand").join(" ");
  if (jumps === undefined && command !== "" && command.toLowerCase() !== "none") {
    refuse(`ssh_config has a ProxyCommand for ${alias}, which is not supported: use ProxyJump, or set jumpHosts`);
  }
  const checking = (one("stricthostkeychecking") ?? "ask").toLowerCase();
  const timeoutSeconds = whole("connecttimeout", 3600);
  const agentSocket = findAgent(one("identityagent"), context, path);
  return {
    hostName,
    port,
    user,
    identityFiles: files("identityfile", DEFAULT_IDENTITIES),
    identitiesOnly: isYes("identitiesonly"),
    ...(agentSocket !== undefined && { agentSocket }),
    proxyJump:
      jumps === undefined || jumps.toLowerCase() === "none"
        ? []
        : jumps
            .split(",")
            .map((each) => each.trim())
            .filter((each) => each !== ""),
    userKnownHostsFiles: files("userknownhostsfile", DEFAULT_USER_KNOWN_HOSTS),
    globalKnownHostsFiles: files("globalknownhostsfile", DEFAULT_GLOBAL_KNOWN_HOSTS),
    hostKeyPolicy: ["accept-new", "no", "off"].includes(checking) ? "accept-new" : "strict",
    ...(hostKeyAlias !== undefined && { hostKeyAlias }),
    hashKnownHosts: isYes("hashknownhosts"),
    connectTimeoutMs: timeoutSeconds === undefined ? DEFAULT_CONNECT_TIMEOUT_MS : timeoutSeconds * 1000,
  };
}

/** `~` and `~/x` in the home folder; what is relative too. */
export function absolutePath(path: string, homeDirectory: string): string {
  if (path === "~" || path.startsWith("~/")) return join(homeDirectory, path.slice(1));
  return isAbsolute(path) ? path : join(homeDirectory, path);
}

function findAgent(setting: string | undefined, context: SshConfigContext, path: (text: string) => string): string | undefined {
  if (setting?.toLowerCase() === "none") return undefined;
  if (setting === undefined || setting === "SSH_AUTH_SOCK") return context.environment["SSH_AUTH_SOCK"];
  if (setting.startsWith("$") && !setting.startsWith("${")) return context.environment[setting.slice(1)];
  return path(setting);
}

/** All files as one configuration: the first value of a keyword wins, so they simply follow each other. */
function readConfig(query: { readonly Host: string }, context: SshConfigContext, refuse: (reason: string) => never): SSHConfig {
  let filesLeft = MAX_FILES;
  const read = (path: string, baseDirectory: string, depth: number): readonly Line[] => {
    let text: string;
    try {
      if (statSync(path).size > MAX_FILE_BYTES) return refuse(`${path} is larger than ${MAX_FILE_BYTES} bytes`);
      text = readFileSync(path, "utf8");
    } catch (error) {
      if (error instanceof ConnectionError) throw error;
      // A configuration that is not there says nothing; ssh ignores it as well.
      if (error instanceof Error && "code" in error && error.code === "ENOENT") return [];
      return refuse(`${path} cannot be read: ${error instanceof Error ? error.message : String(error)}`);
    }
    filesLeft -= 1;
    if (filesLeft < 0 || depth > MAX_INCLUDE_DEPTH) return refuse(`${path} includes too many files, or itself`);
    let lines: SSHConfig;
    try {
      lines = SSHConfig.parse(text);
    } catch (error) {
      return refuse(`${path} cannot be parsed as ssh_config: ${error instanceof Error ? error.message : String(error)}`);
    }
    return expand([...lines], baseDirectory, depth);
  };
  const include = (line: Line, baseDirectory: string, depth: number): readonly Line[] => {
    if (line.type !== LineType.DIRECTIVE) return [];
    const patterns = typeof line.value === "string" ? [line.value] : line.value.map((each) => each.val);
    return patterns.flatMap((pattern) => {
      const path = pattern.startsWith("~")
        ? absolutePath(pattern, context.homeDirectory)
        : isAbsolute(pattern)
          ? pattern
          : join(baseDirectory, pattern);
      return expandPattern(path).flatMap((each) => read(each, baseDirectory, depth + 1));
    });
  };
  /** Puts included lines in place of Include. A section that holds an Include is split there, and left out where it does not match. */
  const expand = (lines: readonly Line[], baseDirectory: string, depth: number): readonly Line[] =>
    lines.flatMap((line) => {
      if (isInclude(line)) return include(line, baseDirectory, depth);
      if (!("config" in line)) return [line];
      if (!line.config.some(isInclude)) return [{ ...line, config: configOf([...line.config]) }];
      if (!matches(line, query)) return [];
      return line.config.flatMap((each): readonly Line[] => {
        if (isInclude(each)) return include(each, baseDirectory, depth);
        return [{ ...line, config: configOf([each]) }];
      });
    });

  const files = context.sshConfigFiles ?? [join(context.homeDirectory, ".ssh/config"), "/etc/ssh/ssh_config"];
  return configOf(files.flatMap((file) => read(file, dirname(file), 0)));
}

function isInclude(line: Line): boolean {
  return line.type === LineType.DIRECTIVE && /^include$/i.test(line.param);
}

/** Leaves out CanonicalizeHostname and its like, for which the package would start nslookup. */
function configOf(lines: readonly Line[]): SSHConfig {
  const config = SSHConfig.parse("");
  config.push(...lines.filter((line) => line.type !== LineType.DIRECTIVE || !/^canonical/i.test(line.param)));
  return config;
}

/** Whether a Host or Match section speaks of the host: a marker inside it comes out or does not. */
function matches(section: Line, query: { readonly Host: string }): boolean {
  const marker = SSHConfig.parse("VirtliftMarker yes");
  return "virtliftmarker" in configOf([{ ...section, config: marker } as Line]).compute(query, { ignoreCase: true, matchExec: false });
}

/** glob(7) in the last part of a path, sorted; a path without a pattern is itself. */
function expandPattern(path: string): readonly string[] {
  const pattern = basename(path);
  if (!/[*?]/.test(pattern)) return [path];
  try {
    return readdirSync(dirname(path))
      .filter((name) => !name.startsWith(".") && glob(pattern, name))
      .toSorted()
      .map((name) => join(dirname(path), name));
  } catch {
    // ENOENT: a folder of snippets that is not there holds none.
    return [];
  }
}
