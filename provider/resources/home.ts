/** The host that a resource was made on. A URI such as `qemu:///system` names another one on each computer, and only the same one can tell that a thing is gone. */
import type { Host } from "../host/hosts.ts";
import { factsOf } from "./preflight/host-facts.ts";

/** What states keep of their host. */
export interface Home {
  /** The host's UUID from libvirt's capabilities; undefined where libvirt tells none, and in states from before it was kept. */
  readonly hostUuid?: string | undefined;
}

export async function homeOf(host: Host): Promise<Home> {
  const { uuid } = await factsOf(host).nature();
  return { hostUuid: uuid };
}

/** For what was not found. Throws Error when it was made on another host than this one. */
export async function assertHome(host: Host, name: string, { hostUuid: expected }: Home): Promise<void> {
  const { hostUuid: actual } = await homeOf(host);
  if (expected === undefined || actual === undefined || expected === actual) return;
  throw new Error(
    `${host.spec.uri} leads to another host here (UUID ${actual}) than the one that ${name} was made on (UUID ${expected}): name that one in \`host\`, as by qemu+ssh://, or run pulumi state delete if it is no more`,
  );
}
