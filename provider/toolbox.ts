/**
 * What is asked of the provider without an engine: by components before their disks start, and by the command line.
 * All in plain JSON, as whoever asks finds it by name at run time. Knows no Pulumi and no process.
 */
import { isNotFound } from "./errors.ts";
import type { Hosts } from "./host/hosts.ts";
import type { Libvirt } from "./libvirt/client.ts";
import type { Domain } from "./libvirt/procedures.ts";
import { openHost } from "./resources/connect.ts";
import { clearLeftovers, findLeftovers, type PoolLeftover } from "./resources/leftovers.ts";
import { type CheckReport, type CheckRequest, checkSource } from "./resources/preflight/check.ts";
import { ASSUMED_BYTES_PER_SECOND } from "./resources/preflight/disk-rules.ts";
import { directoryPools } from "./resources/pool.ts";
import type { Context } from "./resources/resource.ts";
import { HostSchema } from "./resources/schema.ts";
import { virtualMachine } from "./resources/virtual-machine.ts";
import { formatKind } from "./transfer/progress.ts";
import { openSource, type SourceSpec } from "./transfer/source.ts";
import { type SharedThrottle, shareThrottle } from "./transfer/throttle.ts";

/** What a copy of a source takes. */
export interface SourceMeasure {
  readonly path: string;
  /** `vmdk streamOptimized`, `raw`. */
  readonly format: string;
  readonly virtualSizeBytes: number;
  /** An upper bound of the guest's data in it: what a sparse volume of it takes, and what is sent for one. */
  readonly dataBytes: number;
  readonly notes: readonly string[];
}

/** What machines share on a host. */
export interface HostSurvey {
  /** `root@kvm1`, `this machine`. */
  readonly label: string;
  readonly memoryMiB: number;
  /** What the host's running machines may use of it. */
  readonly usedMemoryMiB: number;
  readonly cpus: number;
  /** The active directory pools. */
  readonly pools: readonly { readonly name: string; readonly folder: string; readonly freeBytes: number }[];
}

/** Everything wants a host as programs declare it: a URI, or the object. Close it with `await using`. */
export interface Toolbox extends AsyncDisposable {
  /** What previews assume of a copy, of which nothing was measured yet. */
  readonly assumedBytesPerSecond: number;
  /** Findings about a machine on its host, by the rules of the resource; `inputs` is as the class sends it. Empty when it may be made. */
  checkMachine(inputs: Readonly<Record<string, unknown>>): Promise<readonly string[]>;
  /** Reads a source's header and tables. Throws DiskError as an import of it would. */
  measureSource(source: SourceSpec): Promise<SourceMeasure>;
  /** What the rules say of an image or a package, were it brought to a host. */
  checkSource(request: CheckRequest): Promise<CheckReport>;
  surveyHost(host: unknown): Promise<HostSurvey>;
  /** What interrupted imports left in the host's pools. */
  findLeftovers(host: unknown): Promise<readonly PoolLeftover[]>;
  /** Removes what `findLeftovers` finds, but for what is being written. Resolves with what was removed. */
  clearLeftovers(host: unknown): Promise<readonly PoolLeftover[]>;
  /** A limit for the providers of other processes, which find it in VIRTLIFT_BANDWIDTH. Close it after them. */
  shareBandwidth(bytesPerSecond: number): Promise<SharedThrottle>;
}

/** `config` is the stack's configuration by full key, where there is a stack. The toolbox closes the hosts. */
export function createToolbox(hosts: Hosts, config: Context["config"]): Toolbox {
  const context: Context = { config, hosts, log: () => undefined, signal: new AbortController().signal };
  const open = (host: unknown) => openHost(context, HostSchema.parse(host));
  return {
    assumedBytesPerSecond: ASSUMED_BYTES_PER_SECOND,
    async checkMachine(inputs) {
      const { failures } = await virtualMachine.check(context, undefined, inputs);
      return failures.map(({ reason }) => reason);
    },
    async measureSource(source) {
      await using opened = await openSource(source);
      const { image, files, path, notes } = opened;
      const allocatedBytes = files.reduce((sum, file) => sum + file.allocatedBytes, 0);
      const { dataBytes } = await opened.runs();
      return {
        path,
        format: formatKind(image),
        virtualSizeBytes: image.virtualSizeBytes,
        // Plain data cannot be more than what the files occupy, holes left out.
        dataBytes: image.format === "raw" ? Math.min(dataBytes, allocatedBytes) : dataBytes,
        notes,
      };
    },
    checkSource: (request) => checkSource(context, request),
    async surveyHost(declared) {
      const host = open(declared);
      const libvirt = await host.libvirt();
      const { memory, cpus } = await libvirt.nodeGetInfo();
      const running = await Promise.all((await libvirt.connectListAllDomains(LIST_ACTIVE)).map((domain) => maximumKiB(libvirt, domain)));
      const pools = (await directoryPools(host)).map(async ({ name, folder }) => {
        const { available } = await libvirt.storagePoolGetInfo(await libvirt.storagePoolLookupByName(name));
        return { name, folder, freeBytes: available };
      });
      return {
        label: host.label,
        memoryMiB: Math.floor(memory / 1024),
        usedMemoryMiB: Math.ceil(running.reduce((sum, each) => sum + each, 0) / 1024),
        cpus,
        pools: await Promise.all(pools),
      };
    },
    findLeftovers: (host) => findLeftovers(open(host)),
    clearLeftovers: (host) => clearLeftovers(open(host)),
    shareBandwidth: shareThrottle,
    [Symbol.asyncDispose]: () => hosts.close(),
  };
}

/** VIR_CONNECT_LIST_DOMAINS_ACTIVE of libvirt-domain.h. */
const LIST_ACTIVE = 1;

async function maximumKiB(libvirt: Libvirt, domain: Domain): Promise<number> {
  try {
    return (await libvirt.domainGetInfo(domain)).maxMem;
  } catch (error) {
    // It may have ended between the list and the look at it.
    if (isNotFound(error)) return 0;
    throw error;
  }
}
