/** The host that a resource was made on. A URI such as `qemu:///system` names another one on each computer, and only the same one can tell that a thing is gone. */
import type { Host } from "../host/hosts.ts";
import { factsOf } from "./preflight/host-facts.ts";

/**
 * What states keep of their host. Only both together tell hosts apart: libvirt's UUID of a host that names none to it (no `host_uuid` in libvirtd.conf, and
 * no DMI table that the daemon may read, as a user's own may not) is another one after each start of the daemon, and a host may be renamed.
 * Source: virGetHostUUID in libvirt's viruuid.c.
 */
export interface Home {
  /** The host's UUID from libvirt's capabilities; undefined where libvirt tells none, and in states from before it was kept. */
  readonly hostUuid?: string | undefined;
  /** What the host calls itself, by libvirt; undefined in states from before it was kept. */
  readonly hostName?: string | undefined;
}

export async function homeOf(host: Host): Promise<Home> {
  const { uuid, name } = await factsOf(host).nature();
  return { hostUuid: uuid, hostName: name };
}

/** For what was not found. Throws Error when it was made on another host than this one: of another UUID, and another name where that was kept. */
export async function assertHome(host: Host, name: string, made: Home): Promise<void> {
  const here = await homeOf(host);
  if (made.hostUuid === undefined || here.hostUuid === undefined || made.hostUuid === here.hostUuid) return;
  if (made.hostName !== undefined && made.hostName === here.hostName) return;
  throw new Error(
    `${host.spec.uri} leads to another host here (${inWords(here)}) than the one that ${name} was made on (${inWords(made)}): name that one in \`host\`, as by qemu+ssh://, or run pulumi state delete if it is no more`,
  );
}

function inWords({ hostName, hostUuid }: Home): string {
  return hostName === undefined ? `UUID ${hostUuid}` : `${hostName}, UUID ${hostUuid}`;
}
