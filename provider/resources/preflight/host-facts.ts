/**
 * What is known of a host, asked once and only by reading. What stays as it is while a daemon runs is kept; what changes is asked again after a few
 * seconds, and at once after a change of our own.
 */
import { posix } from "node:path";
import { CommandError, ConnectionError, isNotFound, LibvirtError } from "../../errors.ts";
import type { Host } from "../../host/hosts.ts";
import { parseXml, type XmlElement } from "../../image/xml.ts";
import {
  type HostSecurity,
  type MachineOffer,
  parseDomainTypes,
  parseHostUuid,
  parseOffer,
  parseSecurity,
  parseTakesVlan,
} from "../../libvirt/capabilities.ts";
import type { Libvirt } from "../../libvirt/client.ts";
import { COMPARE_CPU, DOMAIN_XML, LIBVIRT_ERROR } from "../../libvirt/constants.ts";
import { type ObservedCpu, type ObservedDomain, parseDomain, renderCpu } from "../../libvirt/domain.ts";
import type { Domain } from "../../libvirt/procedures.ts";
import { WORK_FOLDER } from "../../transfer/part-file.ts";
import { lookAtPlace, type Place, type PlacedDisk } from "../place.ts";
import { type ActivePool, activePool } from "../pool.ts";

/** How long an answer that may change is taken for true. */
const LIFE_MS = 5000;

/** A name that no disk has. */
const NOBODY = ".virtlift-nobody";

/** How much is carried to measure a connection, and for how long at most. */
const SAMPLE_BYTES = 8 * 1024 * 1024;
const SAMPLE_MS = 500;

/** A machine of the host, ours or not, by its definition. */
export interface HostMachine extends ObservedDomain {
  readonly isRunning: boolean;
  /** Every absolute path among its disks, running or defined, with backing chains and mirrors. */
  readonly diskPaths: ReadonlySet<string>;
}

export interface HostNetwork {
  readonly name: string;
  readonly isActive: boolean;
}

/** What never changes while a host's daemon runs. */
export interface HostNature {
  /** For messages: `root@kvm1`, `this machine`. */
  readonly label: string;
  /** Whether files on the host are files of this process. */
  readonly isLocal: boolean;
  readonly uuid: string | undefined;
  /** What the host calls itself, by libvirt. */
  readonly name: string;
  readonly domainTypes: ReadonlySet<string>;
  readonly security: HostSecurity;
  readonly memoryMiB: number;
  readonly cpus: number;
  /** As libvirt counts: major * 1,000,000 + minor * 1,000 + release. */
  readonly libvirtVersion: number;
  readonly hypervisorVersion: number;
}

/** What only a shell on the host can tell. */
export interface HostSystem {
  readonly bridges: ReadonlySet<string>;
  /** Every network device, bridges among them. */
  readonly networkDevices: ReadonlySet<string>;
  /** How many huge pages are reserved, in use or not, by their size in KiB; the host's default size is the first. */
  readonly hugepages: ReadonlyMap<number, number>;
  /** The sizes in KiB of the huge pages that are mounted somewhere, where QEMU can take them from. */
  readonly mountedHugepagesKiB: ReadonlySet<number>;
  /** How far the host's clock is ahead of ours, give or take the time of the question. */
  readonly clockAheadSeconds: number;
}

/** A folder of the host and the way to it. */
export interface HostFolder {
  readonly path: string;
  /** The names in it. */
  readonly names: ReadonlySet<string>;
  /** Bytes allocated by unfinished imports, by import id. */
  readonly parts: ReadonlyMap<string, number>;
  /** Bytes that the user may still write; undefined when the host's df does not say. */
  readonly freeBytes: number | undefined;
  /** The file system's kind in stat's words: `ext2/ext3`, `nfs`, `tmpfs`. */
  readonly fileSystem: string;
  /** The number of the device that the file system is on. */
  readonly device: string;
  /** The folder and its parents up to the root. */
  readonly steps: readonly FolderStep[];
}

export interface FolderStep {
  readonly path: string;
  /** As ls writes it: `drwx--x--x`, with a `+` where there is an access control list. */
  readonly mode: string;
  readonly uid: number;
  readonly gid: number;
}

/** A measured connection. */
export interface LinkSpeed {
  readonly bytesPerSecond: number;
  /** What it was measured with. */
  readonly sampleBytes: number;
}

/** The facts of one host. Throws what the host throws; a failed question is asked again the next time. */
export class HostFacts {
  readonly #host: Host;
  #connection: Libvirt | undefined;
  readonly #kept = new Map<string, Promise<unknown>>();
  readonly #recent = new Map<string, { readonly until: number; readonly answer: Promise<unknown> }>();

  constructor(host: Host) {
    this.#host = host;
  }

  /** Forgets what a change of ours may have made untrue. */
  forget(): void {
    this.#recent.clear();
  }

  nature(): Promise<HostNature> {
    return this.#keep("nature", async () => {
      const libvirt = await this.#host.libvirt();
      const [capabilities, name, node, libvirtVersion, hypervisorVersion] = await Promise.all([
        libvirt.connectGetCapabilities(),
        libvirt.connectGetHostname(),
        libvirt.nodeGetInfo(),
        libvirt.connectGetLibVersion(),
        libvirt.connectGetVersion(),
      ]);
      return {
        label: this.#host.label,
        isLocal: this.#host.isLocal,
        uuid: parseHostUuid(capabilities),
        name,
        domainTypes: parseDomainTypes(capabilities),
        security: parseSecurity(capabilities),
        memoryMiB: Math.floor(node.memory / 1024),
        cpus: node.cpus,
        libvirtVersion,
        hypervisorVersion,
      };
    });
  }

  /** `unsupported` when the host has no such machines; undefined where the driver cannot tell, as libvirt's test driver. */
  offer(machine: string, domainType: string): Promise<MachineOffer | "unsupported" | undefined> {
    return this.#keep(`offer ${machine} ${domainType}`, async () => {
      const libvirt = await this.#host.libvirt();
      try {
        return parseOffer(await libvirt.connectGetDomainCapabilities(undefined, "x86_64", machine, domainType));
      } catch (error) {
        if (!(error instanceof LibvirtError)) throw error;
        if (error.code === LIBVIRT_ERROR.noSupport) return undefined;
        if (error.code === LIBVIRT_ERROR.invalidArg) return "unsupported";
        throw error;
      }
    });
  }

  /**
   * Features of a CPU that neither the host's processor has nor its hypervisor makes up for, which keep a machine of that kind from its start; empty also
   * where libvirt cannot tell. `usable="no"` of the domain capabilities says less: such models start too, without what they lack. Source:
   * qemuProcessUpdateGuestCPU in qemu_process.c, and VIR_QEMU_CAPS_HOST_CPU_FULL.
   */
  cpuGaps(machine: string, domainType: string, cpu: ObservedCpu): Promise<readonly string[]> {
    const xml = renderCpu(cpu);
    return this.#keep(`cpu ${machine} ${domainType} ${xml}`, async () => {
      const libvirt = await this.#host.libvirt();
      const flags = COMPARE_CPU.failIncompatible;
      const [ofProcessor, ofHypervisor] = await Promise.all([
        missingFeatures(libvirt.connectCompareCPU(xml, flags)),
        missingFeatures(libvirt.connectCompareHypervisorCPU(undefined, "x86_64", machine, domainType, xml, flags)),
      ]);
      return ofProcessor.filter((feature) => ofHypervisor.includes(feature));
    });
  }

  /** undefined where the host gives no shell. */
  system(): Promise<HostSystem | undefined> {
    return this.#keep("system", async () => {
      const askedMs = Date.now();
      const output = await this.#read(SYSTEM, []);
      if (output === undefined) return undefined;
      const now = Number(valuesOf(output, "now")[0] ?? Number.NaN);
      return {
        bridges: new Set(valuesOf(output, "bridge")),
        networkDevices: new Set(valuesOf(output, "device")),
        hugepages: new Map(valuesOf(output, "hugepages").map((line) => line.split(" ").map(Number) as [number, number])),
        mountedHugepagesKiB: new Set(valuesOf(output, "hugetlbfs").map((bytes) => Number(bytes) / 1024)),
        clockAheadSeconds: Number.isNaN(now) ? 0 : now - (askedMs + Date.now()) / 2000,
      };
    });
  }

  /** undefined where the host gives no shell, or there is no such folder. */
  folder(path: string): Promise<HostFolder | undefined> {
    return this.#ask(`folder ${path}`, async () => {
      const output = await this.#read(FOLDER, [path]);
      if (output === undefined || valuesOf(output, "step").length === 0) return undefined;
      const free = Number.parseInt(valuesOf(output, "free")[0] ?? "", 10);
      return {
        path,
        names: new Set(valuesOf(output, "name")),
        parts: new Map(valuesOf(output, "part").map(parsePart)),
        freeBytes: Number.isNaN(free) ? undefined : free,
        fileSystem: valuesOf(output, "kind")[0] ?? "",
        device: valuesOf(output, "device")[0] ?? "",
        steps: valuesOf(output, "step").flatMap(parseStep),
      };
    });
  }

  /** Every machine of the host. */
  machines(): Promise<readonly HostMachine[]> {
    return this.#ask("machines", async () => {
      const libvirt = await this.#host.libvirt();
      const machines = await Promise.all((await libvirt.connectListAllDomains()).map((domain) => machineOf(libvirt, domain)));
      return machines.filter((machine) => machine !== undefined);
    });
  }

  networks(): Promise<readonly HostNetwork[]> {
    return this.#ask("networks", async () => {
      const libvirt = await this.#host.libvirt();
      const networks = (await libvirt.connectListAllNetworks()).map(async (network) => ({
        name: network.name,
        isActive: await libvirt.networkIsActive(network),
      }));
      return Promise.all(networks);
    });
  }

  /** Whether the network's interfaces may have VLAN tags on whatever version of libvirt: it is Open vSwitch's, or hands out devices. False when there is no such network. */
  takesVlan(network: string): Promise<boolean> {
    return this.#ask(`vlan ${network}`, async () => {
      const libvirt = await this.#host.libvirt();
      try {
        return parseTakesVlan(await libvirt.networkGetXMLDesc(await libvirt.networkLookupByName(network)));
      } catch (error) {
        if (isNotFound(error)) return false;
        throw error;
      }
    });
  }

  /** The names of a pool's volumes as libvirt saw them last. */
  volumeNames(pool: string): Promise<ReadonlySet<string>> {
    return this.#ask(`volumes ${pool}`, async () => {
      const libvirt = await this.#host.libvirt();
      const volumes = await libvirt.storagePoolListAllVolumes(await libvirt.storagePoolLookupByName(pool));
      return new Set(volumes.map(({ name }) => name));
    });
  }

  /** An active pool. Throws PoolError. */
  pool(name: string): Promise<ActivePool> {
    return this.#ask(`pool ${name}`, () => activePool(this.#host, name));
  }

  /** Where a disk will lie. Looked at once for all disks of a pool, and by itself only where something of its own is there. Throws PoolError. */
  async place(disk: PlacedDisk): Promise<Place> {
    const folder = posix.dirname(disk.path);
    const nobody: PlacedDisk = { ...disk, importId: NOBODY, volumeName: NOBODY, path: posix.join(folder, NOBODY) };
    const [empty, there] = await Promise.all([
      this.#ask(`place ${disk.pool} ${folder}`, () => lookAtPlace(this.#host, nobody)),
      this.folder(folder),
    ]);
    const isAlone = there !== undefined && !there.names.has(disk.volumeName) && !there.parts.has(disk.importId);
    return isAlone && empty.uploadReason === undefined ? empty : lookAtPlace(this.#host, disk);
  }

  /** What the connection carries from the host to us, measured once for half a second at most; undefined where the host is this machine or gives no shell. */
  link(): Promise<LinkSpeed | undefined> {
    return this.#keep("link", async () => (this.#host.isLocal || (await this.system()) === undefined ? undefined : measure(this.#host)));
  }

  /** Remembers the answer for as long as the connection lives: another daemon may answer otherwise. */
  async #keep<Answer>(question: string, ask: () => Promise<Answer>): Promise<Answer> {
    await this.#notice();
    const known = this.#kept.get(question) as Promise<Answer> | undefined;
    if (known !== undefined) return known;
    const answer = ask();
    this.#kept.set(question, answer);
    answer.catch(() => this.#kept.delete(question));
    return answer;
  }

  async #ask<Answer>(question: string, ask: () => Promise<Answer>): Promise<Answer> {
    await this.#notice();
    const known = this.#recent.get(question);
    if (known !== undefined && known.until > performance.now()) return known.answer as Promise<Answer>;
    const answer = ask();
    this.#recent.set(question, { until: performance.now() + LIFE_MS, answer });
    answer.catch(() => this.#recent.delete(question));
    return answer;
  }

  /** Forgets everything when the connection was made anew. */
  async #notice(): Promise<void> {
    const libvirt = await this.#host.libvirt();
    if (libvirt === this.#connection) return;
    this.#connection = libvirt;
    this.#kept.clear();
    this.#recent.clear();
  }

  /** The output of a script that only reads; undefined when the host gives no shell to run it. */
  async #read(script: string, argv: readonly string[]): Promise<string | undefined> {
    try {
      const { stdout } = await this.#host.run(["sh", "-c", script, "virtlift", ...argv]);
      const output = stdout.toString("utf8");
      // A forced command answers with words of its own.
      return output.startsWith("virtlift\n") ? output : undefined;
    } catch (error) {
      // libvirt answers, so that nothing can be run is what the host allows, not a broken connection.
      if (error instanceof CommandError || (error instanceof ConnectionError && error.phase === "login")) return undefined;
      throw error;
    }
  }
}

/** What a comparison of CPUs says is missing. libvirt names the features in its message only; an error of another kind says nothing about them. */
async function missingFeatures(comparison: Promise<unknown>): Promise<readonly string[]> {
  try {
    await comparison;
    return [];
  } catch (error) {
    if (!(error instanceof LibvirtError)) throw error;
    if (error.code !== LIBVIRT_ERROR.cpuIncompatible) return [];
    return /required features: ([\w.+-]+(?:, [\w.+-]+)*)/.exec(error.message)?.[1]?.split(", ") ?? [];
  }
}

const known = new WeakMap<Host, HostFacts>();

/** The facts of an open host, shared by every resource that names it. */
export function factsOf(host: Host): HostFacts {
  let facts = known.get(host);
  if (facts === undefined) {
    facts = new HostFacts(host);
    known.set(host, facts);
  }
  return facts;
}

/** Runs a change of ours on the host; what was known of it before is then asked again. */
export async function changing<Result>(host: Host, change: () => Promise<Result>): Promise<Result> {
  try {
    return await change();
  } finally {
    factsOf(host).forget();
  }
}

/** Sources: the kernel's sysfs-class-net (a bridge has a folder `bridge`) and its hugetlbpage.rst; a hugetlbfs has blocks of its pages' size. */
const SYSTEM = `
echo virtlift
printf 'now %s\\n' "$(date +%s.%N)"
for bridge in /sys/class/net/*/bridge; do
  [ -d "$bridge" ] && bridge=\${bridge%/bridge} && printf 'bridge %s\\n' "\${bridge##*/}"
done
for device in /sys/class/net/*; do printf 'device %s\\n' "\${device##*/}"; done
default=$(sed -n 's/^Hugepagesize: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
for pages in "/sys/kernel/mm/hugepages/hugepages-\${default}kB" /sys/kernel/mm/hugepages/*; do
  size=\${pages##*-}
  [ -r "$pages/nr_hugepages" ] && printf 'hugepages %s %s\\n' "\${size%kB}" "$(cat "$pages/nr_hugepages")"
done
while read -r _ folder kind _; do
  [ "$kind" = hugetlbfs ] && printf 'hugetlbfs %s\\n' "$(stat -f -c %s -- "$folder")"
done < /proc/mounts
exit 0
`;

const FOLDER = `
echo virtlift
folder=$1
[ -d "$folder" ] || exit 0
printf 'free %s\\n' "$(df --output=avail -B1 -- "$folder" 2>/dev/null | tail -n 1)"
printf 'kind %s\\n' "$(stat -f -c %T -- "$folder" 2>/dev/null)"
printf 'device %s\\n' "$(stat -c %d -- "$folder" 2>/dev/null)"
step=$folder
while :; do
  printf 'step %s\\t%s\\n' "$step" "$(ls -ldn -- "$step" 2>/dev/null)"
  [ "$step" != / ] || break
  step=$(dirname -- "$step")
done
for part in "$folder/${WORK_FOLDER}"/*.part; do
  [ -f "$part" ] && printf 'part %s %s\\n' "$(($(stat -c %b -- "$part") * 512))" "\${part##*/}"
done
ls -A1 -- "$folder" 2>/dev/null | sed 's/^/name /'
exit 0
`;

function valuesOf(output: string, key: string): readonly string[] {
  return output
    .split("\n")
    .filter((line) => line.startsWith(`${key} `))
    .map((line) => line.slice(key.length + 1).trim());
}

function parsePart(text: string): readonly [string, number] {
  const [bytes = "0", ...name] = text.split(" ");
  return [name.join(" ").replace(/\.part$/, ""), Number(bytes)];
}

/** A path, and a line of `ls -ldn`: mode, links, user, group and more. */
function parseStep(text: string): readonly FolderStep[] {
  const [path = "", line = ""] = text.split("\t");
  const [mode, , uid, gid] = line.split(/\s+/);
  return mode === undefined || gid === undefined ? [] : [{ path, mode, uid: Number(uid), gid: Number(gid) }];
}

/** Undefined when another user removed it between the list and the look at it. */
async function machineOf(libvirt: Libvirt, domain: Domain): Promise<HostMachine | undefined> {
  try {
    const isRunning = domain.id >= 0;
    const [defined, live] = await Promise.all([
      libvirt.domainGetXMLDesc(domain, DOMAIN_XML.inactive),
      isRunning ? libvirt.domainGetXMLDesc(domain) : undefined,
    ]);
    const diskPaths = [defined, live].flatMap((xml) => (xml === undefined ? [] : diskPathsIn(parseXml(xml, domain.name))));
    return { ...parseDomain(defined), isRunning, diskPaths: new Set(diskPaths) };
  } catch (error) {
    if (isNotFound(error)) return undefined;
    throw error;
  }
}

function diskPathsIn(root: XmlElement): readonly string[] {
  const devices = root.children.find(({ name }) => name === "devices");
  return devices?.children.filter(({ name }) => name === "disk").flatMap(pathsIn) ?? [];
}

function pathsIn({ attributes, text, children }: XmlElement): readonly string[] {
  return [...[...attributes.values(), text].filter((value) => value.startsWith("/")), ...children.flatMap(pathsIn)];
}

/** Carries zeros from the host for a moment. */
async function measure(host: Host): Promise<LinkSpeed | undefined> {
  await using stream = await host.stream(["head", "-c", String(SAMPLE_BYTES), "/dev/zero"]);
  stream.done.catch(() => undefined);
  let sampleBytes = 0;
  let startedMs: number | undefined;
  try {
    for await (const chunk of stream.io as AsyncIterable<Buffer>) {
      // The first chunk's way includes the start of the command.
      if (startedMs === undefined) startedMs = performance.now();
      else sampleBytes += chunk.length;
      if (performance.now() - startedMs > SAMPLE_MS) break;
    }
  } catch {
    // A host without a shell ends the stream, and its speed stays unknown.
    return undefined;
  }
  const seconds = (performance.now() - (startedMs ?? Number.NaN)) / 1000;
  return sampleBytes > 0 && seconds > 0 ? { bytesPerSecond: sampleBytes / seconds, sampleBytes } : undefined;
}
