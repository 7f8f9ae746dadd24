/** The hosts of this process: each is opened once, however many resources name it. */
import type { Host, Hosts, HostSpec } from "./hosts.ts";
import { LocalHost } from "./local.ts";
import { SshHost } from "./ssh.ts";
import { parseUri } from "./uri.ts";

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

/** Opens nothing yet. The result is to be closed; hosts that are opened later are new ones. */
export function createHosts(options: HostsOptions): Hosts {
  const hosts = new Map<string, Host>();
  return {
    open(spec) {
      const given = Object.entries(spec).filter(([, value]) => value !== undefined);
      const key = JSON.stringify(given.toSorted(([a], [b]) => (a < b ? -1 : 1)));
      const known = hosts.get(key);
      if (known !== undefined) return known;
      const host = openHost(spec, options);
      hosts.set(key, host);
      return host;
    },
    async close() {
      const open = [...hosts.values()];
      hosts.clear();
      await Promise.all(open.map((host) => host.close()));
    },
  };
}

function openHost(spec: HostSpec, options: HostsOptions): Host {
  const address = parseUri(spec.uri);
  return address.ssh === undefined ? new LocalHost(spec, address, options) : new SshHost(spec, { ...address, ssh: address.ssh }, options);
}
