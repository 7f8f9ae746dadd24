/** A machine as it is found, in the user's own properties: for drift, and for machines that are adopted. Pure. */
import type { ObservedDisk, ObservedInterface } from "../libvirt/domain-devices.ts";
import type { ObservedDomain } from "../libvirt/domain.ts";
import { isSame } from "../libvirt/same.ts";
import { definitionOf, diskSpecs, domainSpec, interfaceSpec, type IsSnapshot, type MachineInputs } from "./virtual-machine-spec.ts";

/** A property's part of the definition, and the property that a machine with that definition has. */
interface Property {
  readonly part: (domain: ObservedDomain) => unknown;
  readonly value: (domain: ObservedDomain) => unknown;
}

function property<Part>(part: (domain: ObservedDomain) => Part, value: (part: Part) => unknown = (each) => each): Property {
  return { part, value: (domain) => value(part(domain)) };
}

/** Of 2 MiB and 1 GiB the names; of another size none. */
const HUGEPAGES: ReadonlyMap<number | undefined, string> = new Map([
  [0, "default"],
  [2048, "2MiB"],
  [1024 * 1024, "1GiB"],
]);

/** What can be read off a definition alone. */
const PROPERTIES: Readonly<Partial<Record<keyof MachineInputs, Property>>> = {
  memoryMiB: property(
    ({ memoryKiB }) => memoryKiB,
    (memoryKiB) => memoryKiB / 1024,
  ),
  maxMemoryMiB: property(
    ({ memoryKiB, maxMemoryKiB = memoryKiB }) => maxMemoryKiB,
    (maxMemoryKiB) => maxMemoryKiB / 1024,
  ),
  ballooning: property(({ hasBalloon }) => hasBalloon),
  hugepages: property(
    ({ hugepagesKiB }) => hugepagesKiB,
    (hugepagesKiB) => HUGEPAGES.get(hugepagesKiB),
  ),
  vcpus: property(({ vcpus }) => vcpus),
  maxVcpus: property(({ vcpus, maxVcpus = vcpus }) => maxVcpus),
  cpuTopology: property(({ topology }) => topology),
  cpuPinning: property(
    ({ pinning }) => pinning,
    (pinning) => pinning && Object.fromEntries(pinning.map(({ vcpu, cpus }) => [String(vcpu), cpus])),
  ),
  machine: property(({ machine }) => machine),
  firmware: property(({ firmware }) => firmware),
  secureBoot: property(({ secureBoot }) => secureBoot),
  loader: property(({ loader }) => loader),
  tpm: property(({ hasTpm }) => hasTpm),
  smbios: property(({ smbios }) => smbios),
  cpu: property(
    ({ cpu }) => cpu,
    (cpu) => cpu && { mode: cpu.mode, model: cpu.model, features: cpu.features, migratable: cpu.isMigratable },
  ),
  clock: property(({ clock }) => clock),
  hyperv: property(({ hasHyperv }) => hasHyperv),
  graphics: property(
    ({ graphics }) => graphics,
    (graphics) => graphics ?? { type: "none" },
  ),
  video: property(({ video }) => video ?? "none"),
  rng: property(({ hasRng }) => hasRng),
  watchdog: property(({ watchdog }) => watchdog),
  title: property(({ title }) => title),
  description: property(({ description }) => description),
  tags: property(({ metadata }) => metadata?.tags ?? {}),
};

/**
 * What differs from the inputs: of every property that can be read off a definition, also of those that nobody declared. What is as it was is left out,
 * word for word; a value that is gone is there as undefined. `isSnapshot` says whether a file lies on top of a declared one; `sizes` are those of the
 * machine's own volumes, in bytes by path, as far as they are known.
 */
export function driftOf(
  inputs: MachineInputs,
  defined: ObservedDomain,
  { isSnapshot, sizes }: Found,
): Partial<Record<keyof MachineInputs, unknown>> {
  const expected = definitionOf(domainSpec(inputs, []));
  const drift: Partial<Record<keyof MachineInputs, unknown>> = {};
  for (const [name, { part, value }] of Object.entries(PROPERTIES) as [keyof MachineInputs, Property][]) {
    const found = part(defined);
    if (!isSame(part(expected), found)) drift[name] = value(defined);
  }
  const networks = networksOf(inputs, defined.interfaces);
  if (!isSame(networks, inputs.networks)) drift.networks = networks;
  return { ...drift, ...diskDrift(inputs, defined.disks, { isSnapshot, sizes }) };
}

/** What a definition does not say. */
interface Found {
  readonly isSnapshot: IsSnapshot;
  readonly sizes: ReadonlyMap<string, number>;
}

/** What an adopted machine is, in properties: what the user does not say stays as it is. The boot disk and the seed are the user's to say. */
export function propertiesOf(defined: ObservedDomain): Partial<Record<keyof MachineInputs, unknown>> {
  const bootDisk = bootDiskOf(defined);
  const values = Object.entries(PROPERTIES).map(([name, { value }]) => [name, value(defined)] as const);
  return {
    ...Object.fromEntries(values.filter(([, value]) => value !== undefined)),
    bus: bootDisk?.bus,
    networks: defined.interfaces.map(networkOf),
    disks: defined.disks.filter((disk) => disk !== bootDisk).map(diskOf),
  };
}

/** The disk that a machine boots from: the first in its order, or the first there is. */
export function bootDiskOf({ disks }: ObservedDomain): ObservedDisk | undefined {
  const ordered = disks.filter(({ device, bootOrder }) => device === "disk" && bootOrder !== undefined);
  return (
    ordered.toSorted((one, other) => (one.bootOrder ?? 0) - (other.bootOrder ?? 0))[0] ?? disks.find(({ device }) => device === "disk")
  );
}

/** The networks as they are now; those that did not change stay word for word, in their order. */
function networksOf(inputs: MachineInputs, interfaces: readonly ObservedInterface[]): readonly unknown[] {
  const kept = inputs.networks.flatMap((network): readonly unknown[] => {
    const found = interfaces.find(({ mac }) => mac === network.mac);
    if (!found) return [];
    return [isSame(found, interfaceSpec(network)) ? network : networkOf(found)];
  });
  const others = interfaces.filter(({ mac }) => !inputs.networks.some((network) => network.mac === mac));
  return [...kept, ...others.map(networkOf)];
}

function networkOf({
  type,
  source,
  mac,
  model,
  mode,
  vlan,
  isLinkDown,
  mtu,
  queues,
}: ObservedInterface): Readonly<Record<string, unknown>> {
  const place = type === "user" ? { type } : { [type]: source };
  return present({ ...place, mac, model, mode, vlan, link: isLinkDown && "down", mtu, queues });
}

function diskDrift(
  inputs: MachineInputs,
  found: readonly ObservedDisk[],
  { isSnapshot, sizes }: Found,
): Partial<Record<keyof MachineInputs, unknown>> {
  const [boot, ...further] = diskSpecs(inputs);
  const isOn = (disk: ObservedDisk, declared: string): boolean =>
    disk.path === declared || (disk.path !== undefined && isSnapshot(disk.path, declared));
  const at = (target: string | undefined): ObservedDisk | undefined => found.find((disk) => disk.target === target);

  const disks = inputs.disks.flatMap((disk, index): readonly unknown[] => {
    const spec = further[index];
    const now = at(spec?.target);
    if (!spec || !now) return [];
    if (spec.path === undefined ? now.path !== undefined : !isOn(now, spec.path)) return [diskOf(now)];
    const served = (each: ObservedDisk) => ({ ...each, path: undefined, format: undefined });
    const resized = resizedTo(disk.path, disk.size, sizes);
    const changes = {
      ...(!isSame(served(now), served(spec)) && servingOf(now)),
      ...(resized !== undefined && { size: resized }),
    };
    return [{ ...disk, ...changes }];
  });
  const known = new Set([boot, ...further].map((disk) => disk?.target));
  const others = found.filter(({ target }) => !known.has(target)).map(diskOf);
  const all = [...disks, ...others];

  const { image } = inputs;
  const resized = image && resizedTo(image.volumePath, image.capacity, sizes);
  const bootNow = at(boot?.target);
  const isSwapped = boot?.path !== undefined && bootNow !== undefined && !isOn(bootNow, boot.path);
  return {
    ...(!isSame(all, inputs.disks) && { disks: all }),
    ...(resized !== undefined && { image: { ...image, capacity: resized } }),
    ...(isSwapped && inputs.importedDisk && { importedDisk: { ...inputs.importedDisk, path: bootNow.path, format: bootNow.format } }),
  };
}

const SECTOR_BYTES = 512;

/** The size in bytes that a disk got from somebody else; undefined where it is as declared, to the sector that it fills, or is not known. */
function resizedTo(path: string | undefined, declared: number | undefined, sizes: ReadonlyMap<string, number>): number | undefined {
  const size = path === undefined || declared === undefined ? undefined : sizes.get(path);
  return size === declared || size === Math.ceil((declared ?? 0) / SECTOR_BYTES) * SECTOR_BYTES ? undefined : size;
}

function diskOf(disk: ObservedDisk): Readonly<Record<string, unknown>> {
  return present({ path: disk.path, format: disk.format, device: disk.device, bus: disk.bus, pool: "default", ...servingOf(disk) });
}

function servingOf({
  device,
  cache,
  io,
  discard,
  serial,
  bootOrder,
  isReadOnly,
  isShareable,
}: ObservedDisk): Readonly<Record<string, unknown>> {
  const isDefault = device === "disk" ? discard === "unmap" : discard === undefined;
  return {
    cache,
    io,
    discard: isDefault ? undefined : (discard ?? "ignore"),
    serial,
    bootOrder,
    readOnly: device !== "cdrom" && isReadOnly,
    shareable: isShareable,
  };
}

function present(value: Readonly<Record<string, unknown>>): Readonly<Record<string, unknown>> {
  return Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined));
}
