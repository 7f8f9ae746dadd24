/** A machine that runs: starting, stopping, its addresses, and waiting for what it shows. */
import { setTimeout as sleep } from "node:timers/promises";
import { CommandError, LibvirtError } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import type { Libvirt } from "../libvirt/client.ts";
import { DOMAIN_START, DOMAIN_STATE, INTERFACE_ADDRESSES_SOURCE, LIBVIRT_ERROR } from "../libvirt/constants.ts";
import type { Domain } from "../libvirt/procedures.ts";
import type { Context } from "./resource.ts";
import type { Wait } from "./virtual-machine-schema.ts";

const POLL_MS = 500;
/** A guest that is still booting does not hear that it is to shut down: it is asked again after this time. */
const ASK_AGAIN_MS = 10_000;
/** Much more than what a guest writes while it boots. */
const SERIAL_TAIL_BYTES = 1024 * 1024;

export type PowerState = "running" | "paused" | "stopped";

/** A machine and what is needed to talk about it. */
export interface Guest {
  readonly context: Context;
  readonly host: Host;
  readonly libvirt: Libvirt;
  readonly domain: Domain;
}

/** The guest did not do in time what it was to do. The message says what was seen. */
export class GuestTimeout extends Error {
  override readonly name = "GuestTimeout";
}

export async function powerStateOf({ libvirt, domain }: Pick<Guest, "libvirt" | "domain">): Promise<PowerState> {
  const { state } = await libvirt.domainGetState(domain);
  if (state === DOMAIN_STATE.paused || state === DOMAIN_STATE.pmSuspended) return "paused";
  return state === DOMAIN_STATE.shutoff || state === DOMAIN_STATE.crashed || state === DOMAIN_STATE.none ? "stopped" : "running";
}

/** Starts or resumes it. Resolves with whether it did anything. Throws LibvirtError, which says what to do where libvirt's log daemon is missing. */
export async function startGuest(guest: Guest): Promise<boolean> {
  const power = await powerStateOf(guest);
  if (power === "stopped") await starting(guest.libvirt.domainCreate(guest.domain));
  if (power === "paused") await guest.libvirt.domainResume(guest.domain);
  return power !== "running";
}

/** Starts it without letting it run, or stops its CPUs. Resolves with whether it did anything. Throws as `startGuest` does. */
export async function pauseGuest(guest: Guest): Promise<boolean> {
  const power = await powerStateOf(guest);
  if (power === "stopped") await starting(guest.libvirt.domainCreateWithFlags(guest.domain, DOMAIN_START.paused));
  if (power === "running") await guest.libvirt.domainSuspend(guest.domain);
  return power !== "paused";
}

/** libvirt has no code for it but that of every failed system call: `Failed to connect socket to '/run/libvirt/virtlogd-sock': ...`. */
const LOG_SOCKET = /'[^']*\/virtlogd-sock'/;

/** Source of the remedy: libvirt's qemu.conf, stdio_handler, `logd` by default. */
async function starting(start: Promise<unknown>): Promise<void> {
  try {
    await start;
  } catch (error) {
    if (!(error instanceof LibvirtError) || error.code !== LIBVIRT_ERROR.systemError || !LOG_SOCKET.test(error.message)) throw error;
    const { code, domain, procedure } = error;
    throw new LibvirtError(
      `${error.message}: virtlogd, which keeps what machines write to their consoles, does not run there; start it by systemctl enable --now virtlogd.socket, or set stdio_handler = "file" in /etc/libvirt/qemu.conf and restart libvirt's daemon`,
      { code, domain, procedure },
    );
  }
}

/** Asks the guest to shut down and, after the time, cuts its power or throws GuestTimeout. A cut is always logged. */
export async function stopGuest(
  guest: Guest,
  policy: { readonly timeoutSeconds: number; readonly onTimeout: "fail" | "cut" },
): Promise<void> {
  const { context, host, libvirt, domain } = guest;
  const power = await powerStateOf(guest);
  if (power === "stopped") return;
  if (power === "paused") await libvirt.domainResume(domain);
  const deadline = performance.now() + policy.timeoutSeconds * 1000;
  let askedMs = Number.NEGATIVE_INFINITY;
  while (performance.now() < deadline) {
    if (performance.now() - askedMs >= ASK_AGAIN_MS) {
      await askToShutDown(guest);
      askedMs = performance.now();
    }
    await sleep(POLL_MS, undefined, { signal: context.signal });
    if ((await powerStateOf(guest)) === "stopped") return;
  }
  const seen = `${domain.name} on ${host.label} did not shut down within ${policy.timeoutSeconds} s of being asked`;
  if (policy.onTimeout === "fail") {
    throw new GuestTimeout(`${seen}: shut it down from inside, or set \`onShutdownTimeout: "cut"\``);
  }
  context.log("warn", `${seen}: its power was cut`);
  await unlessStopped(libvirt.domainDestroy(domain));
}

/** By its agent where one answers, else by the power button: 0 leaves the choice to libvirt. */
async function askToShutDown({ libvirt, domain }: Guest): Promise<void> {
  await unlessStopped(libvirt.domainShutdownFlags(domain, 0));
}

/** A guest may stop by itself between the look at it and the call. */
async function unlessStopped(called: Promise<void>): Promise<void> {
  try {
    await called;
  } catch (error) {
    if (!(error instanceof LibvirtError) || error.code !== LIBVIRT_ERROR.operationInvalid) throw error;
  }
}

/**
 * Addresses that others can reach the guest at, IPv4 first: by its lease, else by its agent, else by its host's neighbour table, which knows only guests
 * that the host has spoken with. A lease knows the addresses of one kind only, so the others are asked until there are both or none is left.
 */
export async function addressesOf({ libvirt, domain }: Pick<Guest, "libvirt" | "domain">): Promise<readonly string[]> {
  const found = new Map<string, number>();
  for (const source of [INTERFACE_ADDRESSES_SOURCE.lease, INTERFACE_ADDRESSES_SOURCE.agent, INTERFACE_ADDRESSES_SOURCE.arp]) {
    try {
      const interfaces = await libvirt.domainInterfaceAddresses(domain, source);
      const addresses = interfaces.flatMap(({ addrs }) => addrs).filter(({ addr }) => isReachable(addr));
      const known = new Set(found.values());
      for (const { addr, type } of addresses) if (!known.has(type)) found.set(addr, type);
    } catch (error) {
      // No agent, no lease file for this kind of network, or not running: then this source tells nothing.
      if (!(error instanceof LibvirtError)) throw error;
    }
    if (new Set(found.values()).size > 1) break;
  }
  return [...found].toSorted(([, one], [, other]) => one - other).map(([address]) => address);
}

/** What the guest calls itself, by its agent, else by its lease; undefined when neither tells. */
export async function hostnameOf({ libvirt, domain }: Pick<Guest, "libvirt" | "domain">): Promise<string | undefined> {
  for (const source of [HOSTNAME_SOURCE.agent, HOSTNAME_SOURCE.lease]) {
    try {
      const name = await libvirt.domainGetHostname(domain, source);
      if (name !== "") return name;
    } catch (error) {
      // As with addresses: this source tells nothing.
      if (!(error instanceof LibvirtError)) throw error;
    }
  }
  return undefined;
}

/** virDomainGetHostnameFlags of libvirt-domain.h. */
const HOSTNAME_SOURCE = { lease: 1, agent: 2 } as const;

/** Not loopback and not link-local: RFC 1122, 3927, 4291. */
function isReachable(address: string): boolean {
  return !/^(127\.|169\.254\.|0\.0\.0\.0$|::1?$|fe[89ab])/i.test(address);
}

/** Waits for each in turn. Throws GuestTimeout with what was seen when one does not come in its time. */
export async function waitForGuest(guest: Guest, waits: readonly Wait[], serialLog: string): Promise<void> {
  for (const wait of waits) {
    if (wait.type === "delay") await sleep(wait.seconds * 1000, undefined, { signal: guest.context.signal });
    else await waitFor(guest, wait, serialLog);
  }
}

/** What a look found: what is waited for, or a few words about what there is in its place. */
interface Look {
  readonly isThere: boolean;
  readonly seen: string;
}

type Awaited = Exclude<Wait, { type: "delay" }>;

async function waitFor(guest: Guest, wait: Awaited, serialLog: string): Promise<void> {
  const { context, host, domain } = guest;
  const what = missing(wait);
  const startedMs = performance.now();
  while (true) {
    // Before the look: what a guest wrote until it stopped is all there then.
    const isStopped = (await powerStateOf(guest)) === "stopped";
    const { isThere, seen } = await look(guest, wait, serialLog);
    if (isThere) return;
    if (isStopped) throw new GuestTimeout(`${domain.name} on ${host.label} stopped and showed ${what}: ${seen}`);
    if (performance.now() - startedMs >= wait.timeoutSeconds * 1000) {
      throw new GuestTimeout(`${domain.name} on ${host.label} runs, but showed ${what} within ${wait.timeoutSeconds} s: ${seen}`);
    }
    await sleep(POLL_MS, undefined, { signal: context.signal });
  }
}

function missing(wait: Awaited): string {
  switch (wait.type) {
    case "ipv4":
      return "no IPv4 address";
    case "ipv6":
      return "no IPv6 address";
    case "agent":
      return "no guest agent";
    case "serial":
      return `no ${JSON.stringify(wait.text)} on its serial console`;
  }
}

function look(guest: Guest, wait: Awaited, serialLog: string): Promise<Look> {
  switch (wait.type) {
    case "ipv4":
      return lookForAddress(guest, (address) => !address.includes(":"));
    case "ipv6":
      return lookForAddress(guest, (address) => address.includes(":"));
    case "agent":
      return lookForAgent(guest);
    case "serial":
      return lookForText(guest, wait.text, serialLog);
  }
}

async function lookForAgent({ libvirt, domain }: Guest): Promise<Look> {
  try {
    await libvirt.domainAgentCommand(domain, '{"execute":"guest-ping"}', AGENT_TIMEOUT_SECONDS);
    return { isThere: true, seen: "it answers" };
  } catch (error) {
    if (!(error instanceof LibvirtError)) throw error;
    return { isThere: false, seen: error.message };
  }
}

/** An agent that is there answers at once. */
const AGENT_TIMEOUT_SECONDS = 5;

async function lookForAddress(guest: Guest, isWanted: (address: string) => boolean): Promise<Look> {
  const addresses = await addressesOf(guest);
  const seen =
    addresses.length > 0
      ? `it has ${addresses.join(", ")}`
      : "it has no lease, no guest agent that answers, and no place in its host's neighbour table";
  return { isThere: addresses.some(isWanted), seen };
}

async function lookForText({ host }: Guest, text: string, serialLog: string): Promise<Look> {
  try {
    const { stdout } = await host.run(["tail", "-c", String(SERIAL_TAIL_BYTES), "--", serialLog]);
    const written = stdout.toString("utf8");
    const lastLine = written.trimEnd().split(/\r?\n/).at(-1)?.slice(0, 200);
    return {
      isThere: written.includes(text),
      seen: lastLine ? `the last line of ${serialLog} is ${JSON.stringify(lastLine)}` : `${serialLog} is empty`,
    };
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    return { isThere: false, seen: error.message };
  }
}
