/** Hosts that count what is asked of them. */
import type { Host, Hosts } from "../../../provider/host/hosts.ts";
import type { Libvirt } from "../../../provider/libvirt/client.ts";

export interface Count {
  /** Calls of libvirt's. */
  calls: number;
  /** Commands that were run or streamed. */
  commands: number;
  /** Connections to libvirt. */
  connections: number;
}

/** The same hosts, and the count, which goes on as they are used. */
export function countingHosts(hosts: Hosts): { readonly hosts: Hosts; readonly count: Readonly<Count> } {
  const count: Count = { calls: 0, commands: 0, connections: 0 };
  const wrapped = new Map<Host, Host>();
  return {
    count,
    hosts: {
      close: () => hosts.close(),
      open(spec) {
        const host = hosts.open(spec);
        const known = wrapped.get(host) ?? countingHost(host, count);
        wrapped.set(host, known);
        return known;
      },
    },
  };
}

function countingHost(host: Host, count: Count): Host {
  const libvirts = new WeakMap<Libvirt, Libvirt>();
  return {
    options: host.options,
    spec: host.spec,
    label: host.label,
    isLocal: host.isLocal,
    run(...args) {
      count.commands++;
      return host.run(...args);
    },
    stream(...args) {
      count.commands++;
      return host.stream(...args);
    },
    async libvirt() {
      const libvirt = await host.libvirt();
      const known = libvirts.get(libvirt);
      if (known) return known;
      count.connections++;
      const counted = countingCalls(libvirt, count);
      libvirts.set(libvirt, counted);
      return counted;
    },
    openLibvirt() {
      count.connections++;
      return host.openLibvirt();
    },
    close: () => host.close(),
  };
}

function countingCalls(libvirt: Libvirt, count: Count): Libvirt {
  return new Proxy(libvirt, {
    get(target, key) {
      const value: unknown = Reflect.get(target, key, target);
      if (typeof value !== "function") return value;
      return (...args: unknown[]): unknown => {
        count.calls++;
        return value.apply(target, args);
      };
    },
  });
}
