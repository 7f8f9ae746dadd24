/** The hosts of this process: each is opened once, however many resources name it. */
import type { Host, Hosts, HostsOptions, HostSpec } from "./hosts.ts";
import { LocalHost } from "./local.ts";
import { SshHost } from "./ssh.ts";
import { parseUri } from "./uri.ts";

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
