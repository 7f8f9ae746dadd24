/** Brings a running machine to its definition as far as libvirt can without a restart. Knows no properties: it compares hardware. */
import { setTimeout as sleep } from "node:timers/promises";
import { LibvirtError } from "../errors.ts";
import type { Libvirt } from "../libvirt/client.ts";
import {
  DOMAIN_AFFECT,
  DOMAIN_BLOCK_RESIZE,
  DOMAIN_DEVICE_MODIFY,
  DOMAIN_MEMORY,
  DOMAIN_VCPU,
  LIBVIRT_ERROR,
} from "../libvirt/constants.ts";
import type { DiskSpec, InterfaceSpec, ObservedDisk, ObservedInterface } from "../libvirt/domain-devices.ts";
import { type GivenDevices, hasDisk, hasInterface } from "../libvirt/domain-keep.ts";
import { type DomainSpec, type ObservedDomain, parseDomain, renderDisk, renderInterface } from "../libvirt/domain.ts";
import type { Domain } from "../libvirt/procedures.ts";
import { isSame } from "../libvirt/same.ts";
import { canPlugDisk, canPlugInterface, canUnplugDisk, canUpdateInterface, isSameDisk, isSameDrive } from "./virtual-machine-changes.ts";
import { type Guest, powerStateOf } from "./virtual-machine-guest.ts";
import type { VolumePlan } from "./virtual-machine-spec.ts";
import { sizesOf } from "./virtual-machine-volumes.ts";

/** A guest that lets a device go does so within a second; one that still boots, or has no driver for it, never hears that it is asked. */
const UNPLUG_TIMEOUT_MS = 20_000;
const ASK_AGAIN_MS = 5000;

/** One call that changes the running machine. */
interface Step {
  run(): Promise<void>;
  /** Takes it back after a later step failed; undefined where nothing can. */
  readonly undo?: () => Promise<void>;
}

/**
 * Changes what runs. A device that the guest does not let go stays, with a warning: it goes at the next start, as everything does that libvirt cannot
 * change while the guest runs. `given` are the devices that our last definition had, undefined: all that are there. Throws what libvirt throws, after having taken back what was done before.
 */
export async function changeLive(guest: Guest, wanted: DomainSpec, given: GivenDevices | undefined): Promise<void> {
  const found = parseDomain(await guest.libvirt.domainGetXMLDesc(guest.domain));
  const live = given === undefined ? found : { ...found, ...ownDevices(found, given, wanted) };
  const steps = [diskSteps, interfaceSteps, pinningSteps, sizeSteps].flatMap((stepsOf) => stepsOf(guest, live, wanted));
  const done: Step[] = [];
  try {
    for (const step of steps) {
      if (await isSupported(step.run())) done.push(step);
    }
  } catch (error) {
    for (const { undo } of done.toReversed()) {
      await undo?.().catch((failure: unknown) => {
        const reason = failure instanceof Error ? failure.message : String(failure);
        guest.context.log("warn", `${guest.domain.name}: a change to the running machine could not be taken back: ${reason}`);
      });
    }
    throw error;
  }
}

/** The devices that are ours, or are to be: others are not touched. */
function ownDevices(live: ObservedDomain, given: GivenDevices, wanted: GivenDevices): Pick<ObservedDomain, "disks" | "interfaces"> {
  return {
    disks: live.disks.filter((disk) => hasDisk(given, disk) || hasDisk(wanted, disk)),
    interfaces: live.interfaces.filter(({ mac }) => hasInterface(given, mac) || hasInterface(wanted, mac)),
  };
}

/** False where libvirt's driver knows no such call at all, as its test driver: the change then comes with the next start. */
async function isSupported(called: Promise<void>): Promise<boolean> {
  try {
    await called;
    return true;
  } catch (error) {
    if (error instanceof LibvirtError && error.code === LIBVIRT_ERROR.noSupport) return false;
    throw error;
  }
}

const LIVE = DOMAIN_DEVICE_MODIFY.live;

function diskSteps(guest: Guest, live: ObservedDomain, wanted: DomainSpec): readonly Step[] {
  const { libvirt, domain } = guest;
  // What only moves to another bus stays where it is until the next start: it may be what the guest runs from.
  const gone = live.disks.filter(
    (disk) => canUnplugDisk(disk) && !wanted.disks.some((each) => isSameDrive(each, disk) || isSameDisk(each, disk)),
  );
  const steps: Step[] = gone.map((disk) => ({
    run: () => unplug(guest, diskDevice(disk)),
    undo: () => libvirt.domainAttachDeviceFlags(domain, renderDisk(disk as DiskSpec), LIVE),
  }));
  for (const disk of wanted.disks) {
    const old = live.disks.find((each) => isSameDrive(each, disk));
    const isElsewhere = live.disks.some((each) => isSameDisk(each, disk));
    if (!old && !isElsewhere && canPlugDisk(disk, live.disks)) steps.push(plugStep(guest, diskDevice(disk)));
    else if (old && isOtherMedium(old, disk)) {
      // The drive's door may be locked by the guest: the medium goes as if its button had been held.
      const change = (each: DiskSpec) => libvirt.domainUpdateDeviceFlags(domain, renderDisk(each), LIVE | DOMAIN_DEVICE_MODIFY.force);
      steps.push({ run: () => change(disk), undo: () => change({ ...disk, path: old.path }) });
    }
  }
  return steps;
}

function isOtherMedium(old: ObservedDisk, disk: DiskSpec): boolean {
  return old.path !== disk.path && isSame({ ...old, path: undefined, format: undefined }, { ...disk, path: undefined, format: undefined });
}

function interfaceSteps(guest: Guest, live: ObservedDomain, wanted: DomainSpec): readonly Step[] {
  const { libvirt, domain } = guest;
  const gone = live.interfaces.filter(
    ({ mac, model }) => canPlugInterface(model, live.machine) && !wanted.interfaces.some((each) => each.mac === mac),
  );
  const steps: Step[] = gone.map((each) => ({
    run: () => unplug(guest, interfaceDevice(each)),
    undo: () => libvirt.domainAttachDeviceFlags(domain, renderInterface(each as InterfaceSpec), LIVE),
  }));
  for (const each of wanted.interfaces) {
    const old = live.interfaces.find(({ mac }) => mac === each.mac);
    if (!old && canPlugInterface(each.model, live.machine)) steps.push(plugStep(guest, interfaceDevice(each)));
    else if (old && !isSame(old, each) && canUpdateInterface(old, each)) {
      const change = (wish: ObservedInterface) => libvirt.domainUpdateDeviceFlags(domain, renderInterface(wish as InterfaceSpec), LIVE);
      // libvirt takes a missing link state for no change.
      steps.push({ run: () => change(each), undo: () => change(old) });
    }
  }
  return steps;
}

/**
 * Memory and CPUs: of what the guest was started with. A CPU cannot be taken back, so it comes last.
 * QEMU gives no word when an emulated guest has let a CPU go, and dies of the next one that is plugged in (seen with QEMU 7.2 under libvirt 9.0).
 */
function sizeSteps({ libvirt, domain }: Guest, live: ObservedDomain, wanted: DomainSpec): readonly Step[] {
  const steps: Step[] = [];
  const isSameMemory = (live.maxMemoryKiB ?? live.memoryKiB) === (wanted.maxMemoryKiB ?? wanted.memoryKiB);
  if (isSameMemory && live.hasBalloon && live.memoryKiB !== wanted.memoryKiB) {
    const give = (memoryKiB: number) => libvirt.domainSetMemoryFlags(domain, memoryKiB, DOMAIN_MEMORY.live);
    steps.push({ run: () => give(wanted.memoryKiB), undo: () => give(live.memoryKiB) });
  }
  const isSameCount = (live.maxVcpus ?? live.vcpus) === (wanted.maxVcpus ?? wanted.vcpus);
  if (isSameCount && live.vcpus < wanted.vcpus) {
    steps.push({ run: () => libvirt.domainSetVcpusFlags(domain, wanted.vcpus, DOMAIN_VCPU.live) });
  }
  return steps;
}

/** The CPUs of the host on which those of the guest run. Where that is not said, they may run on all. */
function pinningSteps({ libvirt, domain }: Guest, live: ObservedDomain, wanted: DomainSpec): readonly Step[] {
  const cpusOf = ({ pinning }: Pick<ObservedDomain, "pinning">, vcpu: number) => pinning?.find((pin) => pin.vcpu === vcpu)?.cpus;
  const pin = async (vcpu: number, cpus: string | undefined): Promise<void> => {
    const { nodes, sockets, cores, threads } = await libvirt.nodeGetInfo();
    const all = `0-${nodes * sockets * cores * threads - 1}`;
    await libvirt.domainPinVcpuFlags(domain, vcpu, encodeCpuMap(cpus ?? all), DOMAIN_AFFECT.live);
  };
  const vcpus = [...new Set([...(live.pinning ?? []), ...(wanted.pinning ?? [])].map(({ vcpu }) => vcpu))];
  return vcpus
    .filter((vcpu) => cpusOf(live, vcpu) !== cpusOf(wanted, vcpu))
    .map((vcpu) => ({ run: () => pin(vcpu, cpusOf(wanted, vcpu)), undo: () => pin(vcpu, cpusOf(live, vcpu)) }));
}

/** `0-3,8` as libvirt's bits. */
function encodeCpuMap(cpus: string): Uint8Array {
  const ranges = cpus.split(",").map((range) => range.split("-").map(Number));
  const last = Math.max(...ranges.flat());
  const map = new Uint8Array(Math.floor(last / 8) + 1);
  for (const [from = 0, to = from] of ranges) for (let cpu = from; cpu <= to; cpu++) map[cpu >> 3]! |= 1 << (cpu & 7);
  return map;
}

/** A device that is plugged in or out. */
interface Device {
  /** For the user: `its disk vdb (/path)`. */
  readonly what: string;
  readonly xml: string;
  readonly isThere: (live: ObservedDomain) => boolean;
}

function diskDevice(disk: ObservedDisk): Device {
  return {
    what: `its disk ${disk.target} (${disk.path ?? "which is no file"})`,
    xml: renderDisk(disk as DiskSpec),
    isThere: ({ disks }) => disks.some(({ target }) => target === disk.target),
  };
}

function interfaceDevice(each: ObservedInterface): Device {
  return {
    what: `its interface ${each.mac}`,
    xml: renderInterface(each as InterfaceSpec),
    isThere: ({ interfaces }) => interfaces.some(({ mac }) => mac === each.mac),
  };
}

function plugStep(guest: Guest, device: Device): Step {
  return { run: () => guest.libvirt.domainAttachDeviceFlags(guest.domain, device.xml, LIVE), undo: () => unplug(guest, device) };
}

/** Asks the guest to let the device go and waits until it has. */
async function unplug({ context, host, libvirt, domain }: Guest, { what, xml, isThere }: Device): Promise<void> {
  const woken: { wake: () => void } = { wake: () => undefined };
  const stopListening = await libvirt.onDomainEvent("deviceRemoved", ({ dom }) => {
    if (dom.uuid === domain.uuid) woken.wake();
  });
  try {
    const deadline = performance.now() + UNPLUG_TIMEOUT_MS;
    while (performance.now() < deadline) {
      const removed = new Promise<void>((resolve) => (woken.wake = resolve));
      await askToLetGo(libvirt, domain, xml);
      // The event may be missed between two connections: after a while the machine itself is looked at.
      await Promise.race([removed, sleep(ASK_AGAIN_MS, undefined, { signal: context.signal })]);
      if (!isThere(parseDomain(await libvirt.domainGetXMLDesc(domain)))) return;
    }
  } finally {
    await stopListening();
  }
  context.log(
    "warn",
    `${domain.name} on ${host.label}: the guest did not let ${what} go within ${UNPLUG_TIMEOUT_MS / 1000} s: it goes at its next start`,
  );
}

async function askToLetGo(libvirt: Libvirt, domain: Domain, xml: string): Promise<void> {
  try {
    await libvirt.domainDetachDeviceFlags(domain, xml, LIVE);
  } catch (error) {
    // It is gone, or it was asked before and has not answered yet: the look at the machine tells.
    if (!(error instanceof LibvirtError) || (error.code !== LIBVIRT_ERROR.deviceMissing && error.code !== LIBVIRT_ERROR.operationFailed))
      throw error;
  }
}

/** Grows the volumes that are smaller than they are to be, under a running guest by its QEMU. Resolves with the paths of those that grew. */
export async function growVolumes(guest: Guest, volumes: readonly VolumePlan[], defined: ObservedDomain): Promise<readonly string[]> {
  const { libvirt, domain } = guest;
  const isStopped = (await powerStateOf(guest)) === "stopped";
  const sizes = await sizesOf(libvirt, volumes, defined);
  const grown: string[] = [];
  for (const { path, capacityBytes = 0 } of volumes) {
    const disk = defined.disks.find((each) => each.path === path);
    if (disk === undefined || (sizes.get(path) ?? capacityBytes) >= capacityBytes) continue;
    if (isStopped) await libvirt.storageVolResize(await libvirt.storageVolLookupByPath(path), capacityBytes);
    else await libvirt.domainBlockResize(domain, disk.target, capacityBytes, DOMAIN_BLOCK_RESIZE.bytes);
    grown.push(path);
  }
  return grown;
}
