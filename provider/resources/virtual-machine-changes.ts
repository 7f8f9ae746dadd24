/** What a change of a machine takes: the one table behind diff, update, refusals and `docs/changes.md`. Pure. */
import type { DiskSpec, InterfaceSpec, ObservedDisk } from "../libvirt/domain-devices.ts";
import { isSame } from "../libvirt/same.ts";
import { daemonOf } from "./connect.ts";
import type { PropertyChange } from "./resource.ts";
import { hasUnknown } from "./unknown.ts";
import {
  diskSpecs,
  domainSpec,
  hasHardware,
  interfaceSpec,
  isWindows,
  type MachineInputs,
  type PlacedNetwork,
} from "./virtual-machine-spec.ts";

/** `live`: at once, whether the guest runs or not. `restart`: at its next start. `replace`: by another machine. `refused`: not at all. */
export type ChangeEffect = PropertyChange["effect"] | "refused";

/** One kind of change of one property. */
export interface ChangeCase {
  /** For the page of changes: what is changed, in words that follow the property's name. Empty: any change. */
  readonly what: string;
  readonly effect: ChangeEffect;
  /** One sentence without its period. */
  readonly why?: string | undefined;
}

interface Found<Name extends string> {
  readonly name: Name;
  /** The user's path below the property: `[1].size`. */
  readonly at?: string;
}

interface ChangeRule {
  readonly cases: readonly ChangeCase[];
  /** The cases that a change is made of, with the user's path to each; never empty. Both values are known. */
  readonly of: (olds: MachineInputs, news: MachineInputs) => readonly (ChangeCase & { readonly at: string })[];
}

/** A property whose every change takes the same. */
function always(effect: ChangeEffect, why?: string): ChangeRule {
  const only: ChangeCase = { what: "", effect, why };
  return { cases: [only], of: () => [{ ...only, at: "" }] };
}

/** A property of which it depends. `of` names the cases that a change is made of; where it names none, the last of them is meant. */
function depends<const Cases extends Readonly<Record<string, ChangeCase>>>(
  cases: Cases,
  of: (olds: MachineInputs, news: MachineInputs) => readonly Found<keyof Cases & string>[],
): ChangeRule {
  const all = Object.values(cases);
  return {
    cases: all,
    of: (olds, news) => {
      const found = of(olds, news).map(({ name, at = "" }) => ({ ...cases[name]!, at }));
      return found.length > 0 ? found : [{ ...all.at(-1)!, at: "" }];
    },
  };
}

const AT_START = "a running guest sees it at its next start";
const hardware = always("restart", AT_START);
const setting = always("live");
const maximum = (kind: "Vcpus" | "MemoryMiB") =>
  depends(
    {
      said: { what: "said, where it was so without", effect: "live" },
      changed: { what: "changed", effect: "restart", why: "what a guest can be given is fixed at its start" },
    },
    (olds, news) => {
      const most = (inputs: MachineInputs): number =>
        kind === "Vcpus" ? (inputs.maxVcpus ?? inputs.vcpus) : (inputs.maxMemoryMiB ?? inputs.memoryMiB);
      return [{ name: most(olds) === most(news) ? "said" : "changed" }];
    },
  );

/** Every key of the inputs and what its change takes. */
export const MACHINE_CHANGES: Readonly<Record<keyof MachineInputs, ChangeRule>> = {
  host: depends(
    {
      way: { what: "another way to the same host (user, port, key, jump hosts)", effect: "live" },
      host: { what: "another host", effect: "replace", why: "another host runs another machine" },
    },
    (olds, news) => [{ name: daemonOf(olds.host) === daemonOf(news.host) ? "way" : "host" }],
  ),
  name: always("replace", "another name is another machine"),
  uuid: always("replace", "another UUID is another machine"),
  importedDisk: depends(
    {
      described: { what: "what is known about the disk (source, migrationRef)", effect: "live" },
      moved: { what: "another file, or another format", effect: "restart", why: AT_START },
    },
    ({ importedDisk: old }, { importedDisk: disk }) => {
      const isSameFile = old !== undefined && disk !== undefined && old.path === disk.path && old.format === disk.format;
      return [{ name: isSameFile ? "described" : "moved" }];
    },
  ),
  image: depends(
    {
      grown: { what: "a larger `capacity`", effect: "live", why: "the disk grows; the guest's file systems are the guest's to grow" },
      shrunk: { what: "a smaller `capacity`", effect: "refused", why: "a disk that shrinks loses what is at its end" },
      silent: { what: "no `capacity` any more", effect: "live", why: "the disk stays as it is" },
      other: {
        what: "another template, pool or mode",
        effect: "replace",
        why: "the boot disk is made anew, and what the guest wrote goes",
      },
    },
    ({ image: old }, { image }) => {
      if (!old || !image || !isSame({ ...old, capacity: undefined }, { ...image, capacity: undefined })) return [];
      if (image.capacity === undefined) return [{ name: "silent" }];
      return [{ name: image.capacity < (old.capacity ?? 0) ? "shrunk" : "grown", at: ".capacity" }];
    },
  ),
  bootDisk: hardware,
  disks: depends(
    {
      plugged: { what: "a disk more, on virtio, or on scsi beside another one", effect: "live" },
      fitted: {
        what: "a disk more, on another bus, or the first on scsi",
        effect: "restart",
        why: "the bus takes no disks while the guest runs",
      },
      unplugged: { what: "a disk less, on virtio or scsi", effect: "live", why: "the guest is asked to let it go" },
      taken: { what: "a disk less, on another bus", effect: "restart", why: "the bus lets no disks go while the guest runs" },
      grown: { what: "a larger `size`", effect: "live", why: "the disk grows; the guest's file systems are the guest's to grow" },
      shrunk: { what: "a smaller `size`", effect: "refused", why: "a disk that shrinks loses what is at its end" },
      medium: { what: "another medium in a CD-ROM drive, or none", effect: "live" },
      served: { what: "how a disk is served (bus, cache, io, discard, serial, readOnly, ...)", effect: "restart", why: AT_START },
      described: { what: "what is known about an imported disk, or the order of the list", effect: "live" },
    },
    diskCases,
  ),
  vcpus: depends(
    {
      raised: { what: "more, up to `maxVcpus`", effect: "live" },
      other: { what: "fewer, or more than `maxVcpus` was", effect: "restart", why: "a running guest keeps the CPUs that it has" },
    },
    (olds, news) => {
      const isSameMaximum = (olds.maxVcpus ?? olds.vcpus) === (news.maxVcpus ?? news.vcpus);
      return [{ name: isSameMaximum && news.vcpus > olds.vcpus ? "raised" : "other" }];
    },
  ),
  maxVcpus: maximum("Vcpus"),
  cpuTopology: hardware,
  cpuPinning: always("live", "the host moves the guest's CPUs, and the guest sees nothing of it"),
  memoryMiB: depends(
    {
      within: { what: "more or less, up to `maxMemoryMiB`", effect: "live", why: "by the balloon, where the guest has its driver" },
      beyond: { what: "more than `maxMemoryMiB` was, or without ballooning", effect: "restart", why: AT_START },
    },
    (olds, news) => {
      const isSameMaximum = (olds.maxMemoryMiB ?? olds.memoryMiB) === (news.maxMemoryMiB ?? news.memoryMiB);
      return [{ name: isSameMaximum && news.ballooning !== false ? "within" : "beyond" }];
    },
  ),
  maxMemoryMiB: maximum("MemoryMiB"),
  ballooning: hardware,
  hugepages: hardware,
  guest: depends(
    {
      other: { what: "another Windows, or another that is none", effect: "live" },
      windows: { what: "Windows where none was, or the reverse", effect: "restart", why: "its clock and its enlightenments are others" },
    },
    (olds, news) => [{ name: isWindows(olds.guest) === isWindows(news.guest) ? "other" : "windows" }],
  ),
  clock: hardware,
  hyperv: hardware,
  machine: hardware,
  firmware: hardware,
  secureBoot: hardware,
  loader: hardware,
  tpm: hardware,
  smbios: hardware,
  cpu: hardware,
  domainType: hardware,
  bus: hardware,
  graphics: hardware,
  video: hardware,
  rng: hardware,
  watchdog: hardware,
  cloudInit: depends(
    {
      medium: {
        what: 'another seed, with `onChange: "update"`',
        effect: "live",
        why: "the guest's cloud-init looks at it at the next start",
      },
      anew: { what: 'another seed, with `onChange: "replace"`', effect: "replace", why: "the machine is to be made anew with it" },
      drive: { what: "a seed where none was, or none any more", effect: "restart", why: "its drive comes and goes at a start only" },
      policy: { what: 'another policy, or another seed with `onChange: "ignore"`', effect: "live" },
    },
    ({ cloudInit: old }, { cloudInit: seed }) => {
      if (!old || !seed) return [{ name: "drive" }];
      if (old.volumePath === seed.volumePath) return [{ name: "policy" }];
      return [{ name: seed.onChange === "replace" ? "anew" : "medium" }];
    },
  ),
  networks: depends(
    {
      plugged: { what: "an interface more (on q35: virtio or e1000e)", effect: "live" },
      fitted: {
        what: "an interface more of another model",
        effect: "restart",
        why: "the model's card is not plugged in while the guest runs",
      },
      unplugged: { what: "an interface less (on q35: virtio or e1000e)", effect: "live", why: "the guest is asked to let it go" },
      taken: {
        what: "an interface less of another model",
        effect: "restart",
        why: "the model's card is not taken out while the guest runs",
      },
      link: { what: "`link`", effect: "live" },
      moved: { what: "another network or bridge", effect: "live" },
      other: { what: "MAC, model, VLAN, MTU, queues, or to or from `direct` and `user`", effect: "restart", why: AT_START },
      ordered: {
        what: "the order of the list, or a default that is said",
        effect: "live",
        why: "each keeps its MAC address and its place on the bus",
      },
    },
    networkCases,
  ),
  powerState: setting,
  autostart: setting,
  title: setting,
  description: setting,
  tags: setting,
  waitFor: setting,
  onRestartRequired: setting,
  shutdownTimeoutSeconds: setting,
  onShutdownTimeout: setting,
  preflight: setting,
  serialLog: hardware,
  xmlPatches: hardware,
  adopt: always("live", "it counts at creation only"),
  origin: setting,
  macAddresses: hardware,
  diskPaths: hardware,
  diskTargets: hardware,
  declared: setting,
};

/** What follows from other properties, and would only repeat them. */
export const DERIVED: ReadonlySet<keyof MachineInputs> = new Set(["macAddresses", "diskPaths", "diskTargets", "declared"]);

/** A change of a property. */
export interface MachineChange {
  readonly property: keyof MachineInputs;
  readonly effect: ChangeEffect;
  readonly why?: string | undefined;
  /** The user's path to what is refused; of any other change the property. */
  readonly path: string;
}

const STRENGTH: readonly ChangeEffect[] = ["live", "restart", "replace", "refused"];

/** What differs, of what a machine is made of, each property with the most that its change takes. Unknown values may differ, and never replace. */
export function changesOf(olds: { readonly [Key in keyof MachineInputs]: unknown }, news: MachineInputs): readonly MachineChange[] {
  const changed = (Object.keys(MACHINE_CHANGES) as (keyof MachineInputs)[]).filter(
    (property) => !DERIVED.has(property) && !isSame(olds[property], news[property]),
  );
  return changed.map((property): MachineChange => {
    const { cases, of } = MACHINE_CHANGES[property];
    if (hasUnknown(news[property]) || hasUnknown(olds[property])) {
      return { property, effect: cases.some(({ effect }) => effect === "restart") ? "restart" : "live", path: property };
    }
    const found = of(olds as MachineInputs, news).toSorted((one, other) => STRENGTH.indexOf(other.effect) - STRENGTH.indexOf(one.effect));
    const [{ effect, why, at }] = found as [ChangeCase & { readonly at: string }];
    if (effect === "restart" && isSameHardware(olds as MachineInputs, property, news)) return { property, effect: "live", path: property };
    return { property, effect, why, path: property + at };
  });
}

/** Whether the guest would see nothing of it, as when a default is said. */
function isSameHardware(olds: MachineInputs, property: keyof MachineInputs, news: MachineInputs): boolean {
  const changed = { ...olds, [property]: news[property], diskTargets: property === "disks" ? news.diskTargets : olds.diskTargets };
  return hasHardware(domainSpec(changed, []), domainSpec(olds, []));
}

type DiskCase = "plugged" | "fitted" | "unplugged" | "taken" | "grown" | "shrunk" | "medium" | "served" | "described";

function diskCases(olds: MachineInputs, news: MachineInputs): readonly Found<DiskCase>[] {
  const further = (inputs: MachineInputs): readonly DiskSpec[] => diskSpecs(inputs).slice(1, 1 + inputs.disks.length);
  const before = further(olds);
  const after = further(news);
  const isAmong = (disks: readonly DiskSpec[], disk: DiskSpec): DiskSpec | undefined => disks.find((each) => isSameDrive(each, disk));
  const removed = before
    .filter((disk) => !isAmong(after, disk) && !after.some((each) => isSameDisk(each, disk)))
    .map((disk): Found<DiskCase> => ({ name: canUnplugDisk(disk) ? "unplugged" : "taken" }));
  const kept = after.flatMap((disk, index): readonly Found<DiskCase>[] => {
    const old = isAmong(before, disk) ?? before.find((each) => isSameDisk(each, disk));
    if (!old) return [{ name: canPlugDisk(disk, diskSpecs(olds)) ? "plugged" : "fitted" }];
    if (!isSame({ ...old, path: undefined, format: undefined }, { ...disk, path: undefined, format: undefined }))
      return [{ name: "served" }];
    if (old.path !== disk.path) return [{ name: "medium" }];
    const size = news.disks[index]?.size;
    const oldSize = olds.disks[before.indexOf(old)]?.size;
    if (size === undefined || oldSize === undefined || size === oldSize)
      return [{ name: old.format === disk.format ? "described" : "served" }];
    return [{ name: size < oldSize ? "shrunk" : "grown", at: `[${index}].size` }];
  });
  return [...removed, ...kept];
}

/** Whether it is one disk, or one CD-ROM drive with whatever medium, before and after a change. */
export function isSameDrive(one: ObservedDisk, other: ObservedDisk): boolean {
  return one.target === other.target && one.device === other.device && (one.device === "cdrom" || one.path === other.path);
}

/** Whether it is one disk, on whatever bus, before and after a change. */
export function isSameDisk(one: ObservedDisk, other: ObservedDisk): boolean {
  return one.device === "disk" && other.device === "disk" && one.path !== undefined && one.path === other.path;
}

/** Whether a machine with these disks takes one more while it runs: scsi needs its controller. Source: qemuDomainAttachDeviceDiskLive of qemu_hotplug.c. */
export function canPlugDisk(disk: Pick<DiskSpec, "bus" | "device">, present: readonly { readonly bus: string }[]): boolean {
  return disk.device === "disk" && (disk.bus === "virtio" || (disk.bus === "scsi" && present.some(({ bus }) => bus === "scsi")));
}

/** Whether a machine lets the disk go while it runs. Source: qemuDomainDetachPrepDisk of qemu_hotplug.c. */
export function canUnplugDisk({ bus, device }: { readonly bus: string; readonly device: string }): boolean {
  return device === "disk" && (bus === "virtio" || bus === "scsi");
}

/** Whether an interface comes and goes while the machine runs: a q35 has free slots for PCI Express cards only. */
export function canPlugInterface(model: string | undefined, machine: string): boolean {
  return machine === "pc" || model === "virtio" || model === "e1000e";
}

type NetworkCase = "plugged" | "fitted" | "unplugged" | "taken" | "link" | "moved" | "other" | "ordered";

function networkCases(olds: MachineInputs, news: MachineInputs): readonly Found<NetworkCase>[] {
  const among = (networks: readonly PlacedNetwork[], { mac }: PlacedNetwork) => networks.find((each) => each.mac === mac);
  const removed = olds.networks
    .filter((network) => !among(news.networks, network))
    .map(({ model }): Found<NetworkCase> => ({ name: canPlugInterface(model, olds.machine) ? "unplugged" : "taken" }));
  const kept = news.networks.flatMap((network): readonly Found<NetworkCase>[] => {
    const old = among(olds.networks, network);
    if (!old) return [{ name: canPlugInterface(network.model, olds.machine) ? "plugged" : "fitted" }];
    return [{ name: interfaceChange(interfaceSpec(old), interfaceSpec(network)) }];
  });
  return [...removed, ...kept];
}

/** Where both ends are a bridge of the host, libvirt moves the guest's cable. Source: qemuDomainChangeNet of qemu_hotplug.c. */
function interfaceChange(old: InterfaceSpec, wanted: InterfaceSpec): "link" | "moved" | "other" | "ordered" {
  if (isSame(old, wanted)) return "ordered";
  if (!canUpdateInterface(old, wanted)) return "other";
  return old.isLinkDown === wanted.isLinkDown ? "moved" : "link";
}

/** Whether a running machine's interface becomes the wanted one without being taken out. */
export function canUpdateInterface(
  old: Pick<InterfaceSpec, "source" | "isLinkDown"> & { readonly type: string },
  wanted: Pick<InterfaceSpec, "source" | "isLinkDown"> & { readonly type: string },
): boolean {
  const fixed = (each: object): object => ({ ...each, isLinkDown: undefined, type: undefined, source: undefined });
  const isSamePlace = old.type === wanted.type && old.source === wanted.source;
  const isBridged = ({ type }: { readonly type: string }): boolean => type === "network" || type === "bridge";
  return isSame(fixed(old), fixed(wanted)) && (isSamePlace || (isBridged(old) && isBridged(wanted)));
}
