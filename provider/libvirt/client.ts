/** libvirt as methods: one for each procedure, named as libvirt names it, arguments in libvirt's order. Holds no state of the host. */
import type { Duplex } from "node:stream";
import { ConnectionError, LibvirtError } from "../errors.ts";
import { Connection } from "./connection.ts";
import { STORAGE_VOL_TRANSFER } from "./constants.ts";
import {
  DOMAIN_EVENTS,
  NETWORK_EVENTS,
  STORAGE_POOL_EVENTS,
  type DomainEvents,
  type NetworkEvents,
  type StoragePoolEvents,
} from "./events.ts";
import type {
  Arguments,
  Domain,
  DomainBlockInfo,
  DomainBlockJobInfo,
  DomainInfo,
  DomainInterface,
  DomainSnapshot,
  DomainStateInfo,
  Network,
  NetworkDhcpLease,
  NodeInfo,
  ProcedureName,
  Result,
  SecurityModel,
  StoragePool,
  StoragePoolInfo,
  StorageVol,
  StorageVolInfo,
  TypedParameter,
} from "./procedures.ts";
import { StreamDuplex, type CallStream, type Piece } from "./stream.ts";
import { Subscriptions } from "./subscriptions.ts";

/** remote_auth_type of remote_protocol.x. */
const AUTH = { none: 0, sasl: 1, polkit: 2 } as const;

/** How long `close` waits for libvirt's goodbye. */
const GOODBYE_MS = 1000;

export interface OpenOptions {
  /** The URI as the daemon itself knows it: `qemu:///system`, `test:///default`. */
  readonly uri: string;
  /** For messages: `root@kvm1`. */
  readonly host: string;
  /** Gives up the opening; what was opened is not touched by it. */
  readonly signal?: AbortSignal;
}

/** Bytes on their way into a volume. It must be brought to its end by `finish` or `abort`. */
export interface Upload {
  /** Sends a copy of `bytes`; resolves when more may be written. Throws what libvirt reports: LibvirtError 38 when the pool is full. */
  write(bytes: Uint8Array): Promise<void>;
  /** Skips `lengthBytes` zeros without sending them. Only for an upload with the flag `sparse`. */
  hole(lengthBytes: number): Promise<void>;
  /** Resolves when libvirt has taken everything. It then refreshes the pool in the background: sizes may lag. */
  finish(): Promise<void>;
  /** Gives up; resolves when libvirt has too. What was written stays. May be called twice, also after `finish`. */
  abort(reason?: unknown): Promise<void>;
}

/** Bytes on their way out, to be read once. Leaving the loop early aborts; the end of the loop means that libvirt has confirmed the end. */
export interface Download extends AsyncIterable<Piece> {
  abort(reason?: unknown): Promise<void>;
}

/**
 * An open connection to libvirt.
 *
 * Every method throws LibvirtError when libvirt refuses (`code` says why), and ConnectionError when the answer did not come: phase "closed", "framing" or
 * "aborted". At most four calls are under way at a time, more wait. A bulk stream holds up every call behind it, and a stream that is not read holds up all:
 * give such streams, and calls that last (StorageVolCreateXMLFrom), a connection of their own.
 *
 * Sizes are in bytes unless the method says KiB. `flags` are the constants of `constants.ts`.
 */
export class Libvirt implements AsyncDisposable {
  readonly #connection: Connection;
  readonly #subscriptions: Subscriptions;
  readonly #signal: AbortSignal | undefined;

  private constructor(connection: Connection, subscriptions: Subscriptions, signal: AbortSignal | undefined) {
    this.#connection = connection;
    this.#subscriptions = subscriptions;
    this.#signal = signal;
  }

  /**
   * Logs in and opens `uri`. The transport belongs to the result, and is destroyed when opening fails.
   *
   * Throws ConnectionError (phase "login") when libvirt refuses the user or wants what we do not speak, else as every method does.
   */
  static async open(transport: Duplex, options: OpenOptions): Promise<Libvirt> {
    const connection = new Connection(transport, options.host);
    try {
      await authenticate(connection, options);
      await connection.call("ConnectOpen", [options.uri, 0], options.signal);
    } catch (error) {
      connection.destroy();
      throw error;
    }
    return new Libvirt(connection, new Subscriptions(connection), undefined);
  }

  get isOpen(): boolean {
    return this.#connection.isOpen;
  }

  /** Resolves when the connection has ended, for whatever reason. Never rejects. */
  get closed(): Promise<void> {
    return this.#connection.closed;
  }

  /** The same connection; calls through it are given up, and streams aborted, when the signal fires. libvirt still does what it was asked before. */
  withSignal(signal: AbortSignal): Libvirt {
    return new Libvirt(this.#connection, this.#subscriptions, signal);
  }

  /** Says goodbye, for a second at most, and ends the connection. Whoever waits for an answer is rejected. May be called twice. */
  async close(): Promise<void> {
    const goodbye = this.#connection.call("ConnectClose", [], AbortSignal.timeout(GOODBYE_MS));
    await goodbye.catch(() => {
      // The connection has ended already, or libvirt has no time for it.
    });
    this.#connection.destroy();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** virDrvFeature: 14 event callbacks, 16 the documented order of arguments in NetworkUpdate. */
  connectSupportsFeature(feature: number): Promise<boolean> {
    return this.#call("ConnectSupportsFeature", feature);
  }

  /** The driver: `QEMU`, `TEST`. */
  connectGetType(): Promise<string> {
    return this.#call("ConnectGetType");
  }

  /** The hypervisor's version: major * 1,000,000 + minor * 1000 + release. */
  connectGetVersion(): Promise<number> {
    return this.#call("ConnectGetVersion");
  }

  /** libvirt's version: major * 1,000,000 + minor * 1000 + release. */
  connectGetLibVersion(): Promise<number> {
    return this.#call("ConnectGetLibVersion");
  }

  connectGetHostname(): Promise<string> {
    return this.#call("ConnectGetHostname");
  }

  connectGetUri(): Promise<string> {
    return this.#call("ConnectGetUri");
  }

  /** XML. Takes more than a second on QEMU: ask once for each connection. */
  connectGetCapabilities(): Promise<string> {
    return this.#call("ConnectGetCapabilities");
  }

  /** What the hypervisor would be started with, for one of its formats, such as `qemu-argv`. The definition is checked as by a define, and nothing changes. */
  connectDomainXMLToNative(nativeFormat: string, domainXml: string, flags = 0): Promise<string> {
    return this.#call("ConnectDomainXMLToNative", nativeFormat, domainXml, flags);
  }

  /** XML. What is left out is the host's default. */
  connectGetDomainCapabilities(emulatorbin?: string, arch?: string, machine?: string, virttype?: string, flags = 0): Promise<string> {
    return this.#call("ConnectGetDomainCapabilities", emulatorbin, arch, machine, virttype, flags);
  }

  /** virCPUCompareResult: whether the host's processor is the CPU of the XML: 0 no, 1 exactly, 2 with more. */
  connectCompareCPU(xmlDesc: string, flags = 0): Promise<number> {
    return this.#call("ConnectCompareCPU", xmlDesc, flags);
  }

  /** virCPUCompareResult: whether machines of that kind can have the CPU of the XML on this host: 0 no, 1 exactly, 2 with more. What is left out is the host's default. */
  connectCompareHypervisorCPU(
    emulator: string | undefined,
    arch: string | undefined,
    machine: string | undefined,
    virttype: string | undefined,
    xmlCPU: string,
    flags = 0,
  ): Promise<number> {
    return this.#call("ConnectCompareHypervisorCPU", emulator, arch, machine, virttype, xmlCPU, flags);
  }

  /** XML. */
  connectGetStoragePoolCapabilities(flags = 0): Promise<string> {
    return this.#call("ConnectGetStoragePoolCapabilities", flags);
  }

  /** `memory` in KiB. */
  nodeGetInfo(): Promise<NodeInfo> {
    return this.#call("NodeGetInfo");
  }

  nodeGetFreeMemory(): Promise<number> {
    return this.#call("NodeGetFreeMemory");
  }

  nodeGetSecurityModel(): Promise<SecurityModel> {
    return this.#call("NodeGetSecurityModel");
  }

  /** Flags: LIST_STORAGE_POOLS; 0 is all. */
  connectListAllStoragePools(flags = 0): Promise<readonly StoragePool[]> {
    return this.#call("ConnectListAllStoragePools", true, flags);
  }

  storagePoolLookupByName(name: string): Promise<StoragePool> {
    return this.#call("StoragePoolLookupByName", name);
  }

  storagePoolLookupByUUID(uuid: string): Promise<StoragePool> {
    return this.#call("StoragePoolLookupByUUID", uuid);
  }

  storagePoolLookupByVolume(volume: StorageVol): Promise<StoragePool> {
    return this.#call("StoragePoolLookupByVolume", volume);
  }

  /** The active pool whose target is this directory. */
  storagePoolLookupByTargetPath(path: string): Promise<StoragePool> {
    return this.#call("StoragePoolLookupByTargetPath", path);
  }

  storagePoolDefineXML(xml: string, flags = 0): Promise<StoragePool> {
    return this.#call("StoragePoolDefineXML", xml, flags);
  }

  /** Makes a pool that vanishes when it stops. */
  storagePoolCreateXML(xml: string, flags = 0): Promise<StoragePool> {
    return this.#call("StoragePoolCreateXML", xml, flags);
  }

  /** Flags: STORAGE_POOL_BUILD. */
  storagePoolBuild(pool: StoragePool, flags = 0): Promise<void> {
    return this.#call("StoragePoolBuild", pool, flags);
  }

  /** Starts it. */
  storagePoolCreate(pool: StoragePool, flags = 0): Promise<void> {
    return this.#call("StoragePoolCreate", pool, flags);
  }

  /** Stops it; its storage stays. */
  storagePoolDestroy(pool: StoragePool): Promise<void> {
    return this.#call("StoragePoolDestroy", pool);
  }

  /** Deletes its storage: a directory, which must be empty. */
  storagePoolDelete(pool: StoragePool, flags = 0): Promise<void> {
    return this.#call("StoragePoolDelete", pool, flags);
  }

  storagePoolUndefine(pool: StoragePool): Promise<void> {
    return this.#call("StoragePoolUndefine", pool);
  }

  /** Code 1 "has asynchronous jobs running" while an upload or a clone is under way. */
  storagePoolRefresh(pool: StoragePool, flags = 0): Promise<void> {
    return this.#call("StoragePoolRefresh", pool, flags);
  }

  storagePoolGetInfo(pool: StoragePool): Promise<StoragePoolInfo> {
    return this.#call("StoragePoolGetInfo", pool);
  }

  storagePoolGetXMLDesc(pool: StoragePool, flags = 0): Promise<string> {
    return this.#call("StoragePoolGetXMLDesc", pool, flags);
  }

  storagePoolGetAutostart(pool: StoragePool): Promise<boolean> {
    return this.#call("StoragePoolGetAutostart", pool);
  }

  storagePoolSetAutostart(pool: StoragePool, autostart: boolean): Promise<void> {
    return this.#call("StoragePoolSetAutostart", pool, autostart);
  }

  storagePoolIsActive(pool: StoragePool): Promise<boolean> {
    return this.#call("StoragePoolIsActive", pool);
  }

  storagePoolListAllVolumes(pool: StoragePool, flags = 0): Promise<readonly StorageVol[]> {
    return this.#call("StoragePoolListAllVolumes", pool, true, flags);
  }

  storageVolLookupByName(pool: StoragePool, name: string): Promise<StorageVol> {
    return this.#call("StorageVolLookupByName", pool, name);
  }

  storageVolLookupByKey(key: string): Promise<StorageVol> {
    return this.#call("StorageVolLookupByKey", key);
  }

  /** Finds what the last refresh of its pool saw. */
  storageVolLookupByPath(path: string): Promise<StorageVol> {
    return this.#call("StorageVolLookupByPath", path);
  }

  /** Flags: STORAGE_VOL_CREATE. Code 90 when the name is taken. */
  storageVolCreateXML(pool: StoragePool, xml: string, flags = 0): Promise<StorageVol> {
    return this.#call("StorageVolCreateXML", pool, xml, flags);
  }

  /** Copies and converts on the host, and answers when it is done: minutes for a large disk. Flags: STORAGE_VOL_CREATE. */
  storageVolCreateXMLFrom(pool: StoragePool, xml: string, source: StorageVol, flags = 0): Promise<StorageVol> {
    return this.#call("StorageVolCreateXMLFrom", pool, xml, source, flags);
  }

  /** Writes into the volume from `offset`, at most `length` bytes, 0 for no limit. It is not truncated. Flags: STORAGE_VOL_TRANSFER. */
  async storageVolUpload(volume: StorageVol, offset = 0, length = 0, flags = 0): Promise<Upload> {
    const { stream } = await this.#connection.openStream("StorageVolUpload", [volume, offset, length, flags], this.#signal);
    const isSparse = (flags & STORAGE_VOL_TRANSFER.sparse) !== 0;
    return {
      write: (bytes) => stream.write(bytes),
      hole: async (lengthBytes) => {
        if (!isSparse) throw new RangeError("a hole was sent to an upload without the flag sparse");
        await stream.hole(lengthBytes);
      },
      finish: () => stream.finish(),
      abort: (reason) => stream.abort(reason),
    };
  }

  /** Reads the volume from `offset`, at most `length` bytes, 0 for all. Holes come with the flag sparse only. Flags: STORAGE_VOL_TRANSFER. */
  async storageVolDownload(volume: StorageVol, offset = 0, length = 0, flags = 0): Promise<Download> {
    const { stream } = await this.#connection.openStream("StorageVolDownload", [volume, offset, length, flags], this.#signal);
    return downloadOf(stream);
  }

  /** Flags: STORAGE_VOL_DELETE. */
  storageVolDelete(volume: StorageVol, flags = 0): Promise<void> {
    return this.#call("StorageVolDelete", volume, flags);
  }

  storageVolGetInfo(volume: StorageVol): Promise<StorageVolInfo> {
    return this.#call("StorageVolGetInfo", volume);
  }

  /** Flags: STORAGE_VOL_INFO. */
  storageVolGetInfoFlags(volume: StorageVol, flags: number): Promise<StorageVolInfo> {
    return this.#call("StorageVolGetInfoFlags", volume, flags);
  }

  storageVolGetXMLDesc(volume: StorageVol, flags = 0): Promise<string> {
    return this.#call("StorageVolGetXMLDesc", volume, flags);
  }

  storageVolGetPath(volume: StorageVol): Promise<string> {
    return this.#call("StorageVolGetPath", volume);
  }

  /** Only while no running domain uses it (else DomainBlockResize). Flags: STORAGE_VOL_RESIZE. */
  storageVolResize(volume: StorageVol, capacity: number, flags = 0): Promise<void> {
    return this.#call("StorageVolResize", volume, capacity, flags);
  }

  /** Overwrites all of it with zeros. */
  storageVolWipe(volume: StorageVol, flags = 0): Promise<void> {
    return this.#call("StorageVolWipe", volume, flags);
  }

  /** Flags: LIST_DOMAINS; 0 is all. */
  connectListAllDomains(flags = 0): Promise<readonly Domain[]> {
    return this.#call("ConnectListAllDomains", true, flags);
  }

  domainLookupByName(name: string): Promise<Domain> {
    return this.#call("DomainLookupByName", name);
  }

  domainLookupByUUID(uuid: string): Promise<Domain> {
    return this.#call("DomainLookupByUUID", uuid);
  }

  domainDefineXML(xml: string): Promise<Domain> {
    return this.#call("DomainDefineXML", xml);
  }

  /** A domain of the same name and UUID is replaced in one step. Flags: DOMAIN_DEFINE. */
  domainDefineXMLFlags(xml: string, flags = 0): Promise<Domain> {
    return this.#call("DomainDefineXMLFlags", xml, flags);
  }

  /** Starts a domain that vanishes when it stops. Flags: DOMAIN_START. */
  domainCreateXML(xml: string, flags = 0): Promise<Domain> {
    return this.#call("DomainCreateXML", xml, flags);
  }

  /** Starts it. */
  domainCreate(domain: Domain): Promise<void> {
    return this.#call("DomainCreate", domain);
  }

  /** Starts it. Flags: DOMAIN_START. */
  domainCreateWithFlags(domain: Domain, flags = 0): Promise<Domain> {
    return this.#call("DomainCreateWithFlags", domain, flags);
  }

  /** Flags: DOMAIN_XML. */
  domainGetXMLDesc(domain: Domain, flags = 0): Promise<string> {
    return this.#call("DomainGetXMLDesc", domain, flags);
  }

  domainGetState(domain: Domain, flags = 0): Promise<DomainStateInfo> {
    return this.#call("DomainGetState", domain, flags);
  }

  /** Memory in KiB. */
  domainGetInfo(domain: Domain): Promise<DomainInfo> {
    return this.#call("DomainGetInfo", domain);
  }

  domainIsActive(domain: Domain): Promise<boolean> {
    return this.#call("DomainIsActive", domain);
  }

  domainIsPersistent(domain: Domain): Promise<boolean> {
    return this.#call("DomainIsPersistent", domain);
  }

  /** Whether the definition was changed since the domain started. */
  domainIsUpdated(domain: Domain): Promise<boolean> {
    return this.#call("DomainIsUpdated", domain);
  }

  domainSuspend(domain: Domain): Promise<void> {
    return this.#call("DomainSuspend", domain);
  }

  domainResume(domain: Domain): Promise<void> {
    return this.#call("DomainResume", domain);
  }

  /** Asks the guest, and does not wait for it. */
  domainShutdown(domain: Domain): Promise<void> {
    return this.#call("DomainShutdown", domain);
  }

  /** Asks the guest, and does not wait for it. Flags: DOMAIN_SHUTDOWN. */
  domainShutdownFlags(domain: Domain, flags = 0): Promise<void> {
    return this.#call("DomainShutdownFlags", domain, flags);
  }

  /** Flags: DOMAIN_SHUTDOWN. */
  domainReboot(domain: Domain, flags = 0): Promise<void> {
    return this.#call("DomainReboot", domain, flags);
  }

  /** Pulls the reset line. */
  domainReset(domain: Domain, flags = 0): Promise<void> {
    return this.#call("DomainReset", domain, flags);
  }

  /** Cuts the power. */
  domainDestroy(domain: Domain): Promise<void> {
    return this.#call("DomainDestroy", domain);
  }

  /** Cuts the power. Flags: DOMAIN_DESTROY. */
  domainDestroyFlags(domain: Domain, flags = 0): Promise<void> {
    return this.#call("DomainDestroyFlags", domain, flags);
  }

  /** Code 55 when there is an NVRAM, a saved image or a snapshot: then DomainUndefineFlags says what becomes of it. */
  domainUndefine(domain: Domain): Promise<void> {
    return this.#call("DomainUndefine", domain);
  }

  /** Flags: DOMAIN_UNDEFINE. */
  domainUndefineFlags(domain: Domain, flags: number): Promise<void> {
    return this.#call("DomainUndefineFlags", domain, flags);
  }

  /** Only while it does not run. */
  domainRename(domain: Domain, newName: string, flags = 0): Promise<number> {
    return this.#call("DomainRename", domain, newName, flags);
  }

  domainGetAutostart(domain: Domain): Promise<boolean> {
    return this.#call("DomainGetAutostart", domain);
  }

  domainSetAutostart(domain: Domain, autostart: boolean): Promise<void> {
    return this.#call("DomainSetAutostart", domain, autostart);
  }

  /** `type`: DOMAIN_METADATA; `metadata` undefined removes it; `key` (the prefix) and `uri` (the namespace) for an element. Flags: DOMAIN_DEVICE_MODIFY. */
  domainSetMetadata(domain: Domain, type: number, metadata?: string, key?: string, uri?: string, flags = 0): Promise<void> {
    return this.#call("DomainSetMetadata", domain, type, metadata, key, uri, flags);
  }

  /** Code 80 when there is none. */
  domainGetMetadata(domain: Domain, type: number, uri?: string, flags = 0): Promise<string> {
    return this.#call("DomainGetMetadata", domain, type, uri, flags);
  }

  domainSetVcpus(domain: Domain, count: number): Promise<void> {
    return this.#call("DomainSetVcpus", domain, count);
  }

  /** Flags: DOMAIN_VCPU. */
  domainSetVcpusFlags(domain: Domain, count: number, flags: number): Promise<void> {
    return this.#call("DomainSetVcpusFlags", domain, count, flags);
  }

  /** Flags: DOMAIN_VCPU. */
  domainGetVcpusFlags(domain: Domain, flags: number): Promise<number> {
    return this.#call("DomainGetVcpusFlags", domain, flags);
  }

  /** `cpuMap` has a bit for each CPU of the host, the lowest bit of its first byte for CPU 0. Flags: DOMAIN_AFFECT. */
  domainPinVcpuFlags(domain: Domain, vcpu: number, cpuMap: Uint8Array, flags: number): Promise<void> {
    return this.#call("DomainPinVcpuFlags", domain, vcpu, cpuMap, flags);
  }

  domainSetMemory(domain: Domain, memoryKiB: number): Promise<void> {
    return this.#call("DomainSetMemory", domain, memoryKiB);
  }

  /** Flags: DOMAIN_MEMORY. */
  domainSetMemoryFlags(domain: Domain, memoryKiB: number, flags: number): Promise<void> {
    return this.#call("DomainSetMemoryFlags", domain, memoryKiB, flags);
  }

  domainSetMaxMemory(domain: Domain, memoryKiB: number): Promise<void> {
    return this.#call("DomainSetMaxMemory", domain, memoryKiB);
  }

  domainAttachDevice(domain: Domain, xml: string): Promise<void> {
    return this.#call("DomainAttachDevice", domain, xml);
  }

  /** Flags: DOMAIN_DEVICE_MODIFY. */
  domainAttachDeviceFlags(domain: Domain, xml: string, flags = 0): Promise<void> {
    return this.#call("DomainAttachDeviceFlags", domain, xml, flags);
  }

  /** Asks the guest: done when the event `deviceRemoved` comes. */
  domainDetachDevice(domain: Domain, xml: string): Promise<void> {
    return this.#call("DomainDetachDevice", domain, xml);
  }

  /** Asks a running guest: done when the event `deviceRemoved` comes. Flags: DOMAIN_DEVICE_MODIFY. */
  domainDetachDeviceFlags(domain: Domain, xml: string, flags = 0): Promise<void> {
    return this.#call("DomainDetachDeviceFlags", domain, xml, flags);
  }

  /** Asks a running guest: done when the event `deviceRemoved` comes. Flags: DOMAIN_DEVICE_MODIFY. */
  domainDetachDeviceAlias(domain: Domain, alias: string, flags = 0): Promise<void> {
    return this.#call("DomainDetachDeviceAlias", domain, alias, flags);
  }

  /** Changes a medium, or an interface's link or network. Flags: DOMAIN_DEVICE_MODIFY. */
  domainUpdateDeviceFlags(domain: Domain, xml: string, flags = 0): Promise<void> {
    return this.#call("DomainUpdateDeviceFlags", domain, xml, flags);
  }

  /** `size` in KiB, in bytes with the flag `bytes`. `disk` is a target (`vda`) or a path. Flags: DOMAIN_BLOCK_RESIZE. */
  domainBlockResize(domain: Domain, disk: string, size: number, flags = 0): Promise<void> {
    return this.#call("DomainBlockResize", domain, disk, size, flags);
  }

  domainGetBlockInfo(domain: Domain, path: string, flags = 0): Promise<DomainBlockInfo> {
    return this.#call("DomainGetBlockInfo", domain, path, flags);
  }

  /** Mirrors a disk of a running domain into the one that `destinationXml` describes; the event `blockJob` tells of it. */
  domainBlockCopy(domain: Domain, path: string, destinationXml: string, params: readonly TypedParameter[] = [], flags = 0): Promise<void> {
    return this.#call("DomainBlockCopy", domain, path, destinationXml, params, flags);
  }

  domainGetBlockJobInfo(domain: Domain, path: string, flags = 0): Promise<DomainBlockJobInfo> {
    return this.#call("DomainGetBlockJobInfo", domain, path, flags);
  }

  /** `source`: INTERFACE_ADDRESSES_SOURCE. */
  domainInterfaceAddresses(domain: Domain, source: number, flags = 0): Promise<readonly DomainInterface[]> {
    return this.#call("DomainInterfaceAddresses", domain, source, flags);
  }

  domainGetHostname(domain: Domain, flags = 0): Promise<string> {
    return this.#call("DomainGetHostname", domain, flags);
  }

  /** What the guest's agent knows, by libvirt's keys (`os.id`, `fs.count`). `types`: virDomainGuestInfoTypes, 0 for all. */
  async domainGetGuestInfo(domain: Domain, types = 0, flags = 0): Promise<ReadonlyMap<string, string | number | boolean>> {
    const params = await this.#call("DomainGetGuestInfo", domain, types, flags);
    return new Map(params.map(({ field, value }) => [field, value]));
  }

  /** Without mount points all file systems. Resolves with how many were frozen. */
  domainFsfreeze(domain: Domain, mountpoints: readonly string[] = [], flags = 0): Promise<number> {
    return this.#call("DomainFsfreeze", domain, mountpoints, flags);
  }

  domainFsthaw(domain: Domain, mountpoints: readonly string[] = [], flags = 0): Promise<number> {
    return this.#call("DomainFsthaw", domain, mountpoints, flags);
  }

  domainHasManagedSaveImage(domain: Domain, flags = 0): Promise<boolean> {
    return this.#call("DomainHasManagedSaveImage", domain, flags);
  }

  domainManagedSaveRemove(domain: Domain, flags = 0): Promise<void> {
    return this.#call("DomainManagedSaveRemove", domain, flags);
  }

  /** A picture of the screen; `mime` says in which format. */
  async domainScreenshot(
    domain: Domain,
    screen = 0,
    flags = 0,
  ): Promise<{ readonly mime: string | undefined; readonly picture: Download }> {
    const { result, stream } = await this.#connection.openStream("DomainScreenshot", [domain, screen, flags], this.#signal);
    return { mime: result, picture: downloadOf(stream) };
  }

  /** The console's bytes in both directions; ending the writable side closes it. `devName` undefined is the first console. Flags: DOMAIN_CONSOLE. */
  async domainOpenConsole(domain: Domain, devName?: string, flags = 0): Promise<Duplex> {
    const { stream } = await this.#connection.openStream("DomainOpenConsole", [domain, devName, flags], this.#signal);
    return new StreamDuplex(stream);
  }

  /** Taints and deprecations, one sentence each. */
  domainGetMessages(domain: Domain, flags = 0): Promise<readonly string[]> {
    return this.#call("DomainGetMessages", domain, flags);
  }

  /** Gives JSON to QEMU's guest agent and resolves with its answer. `timeoutSeconds` -2 waits for ever, -1 is libvirt's default, 0 does not wait. */
  domainAgentCommand(domain: Domain, command: string, timeoutSeconds = -1, flags = 0): Promise<string | undefined> {
    return this.#call("DomainAgentCommand", domain, command, timeoutSeconds, flags);
  }

  /** virConnectListAllNetworksFlags: 1 inactive, 2 active; 0 is all. */
  connectListAllNetworks(flags = 0): Promise<readonly Network[]> {
    return this.#call("ConnectListAllNetworks", true, flags);
  }

  networkLookupByName(name: string): Promise<Network> {
    return this.#call("NetworkLookupByName", name);
  }

  networkLookupByUUID(uuid: string): Promise<Network> {
    return this.#call("NetworkLookupByUUID", uuid);
  }

  networkIsActive(network: Network): Promise<boolean> {
    return this.#call("NetworkIsActive", network);
  }

  /** Starts it. */
  networkCreate(network: Network): Promise<void> {
    return this.#call("NetworkCreate", network);
  }

  networkGetXMLDesc(network: Network, flags = 0): Promise<string> {
    return this.#call("NetworkGetXMLDesc", network, flags);
  }

  networkGetBridgeName(network: Network): Promise<string> {
    return this.#call("NetworkGetBridgeName", network);
  }

  networkGetAutostart(network: Network): Promise<boolean> {
    return this.#call("NetworkGetAutostart", network);
  }

  /** Of all guests, or of the one with this MAC address. */
  networkGetDhcpLeases(network: Network, mac?: string, flags = 0): Promise<readonly NetworkDhcpLease[]> {
    return this.#call("NetworkGetDhcpLeases", network, mac, true, flags);
  }

  /** virNetworkUpdateCommand and virNetworkUpdateSection. Daemons without feature 16 take the two in the other order. */
  networkUpdate(network: Network, command: number, section: number, parentIndex: number, xml: string, flags = 0): Promise<void> {
    return this.#call("NetworkUpdate", network, command, section, parentIndex, xml, flags);
  }

  /** Flags: DOMAIN_SNAPSHOT_CREATE. */
  domainSnapshotCreateXML(domain: Domain, xml: string, flags = 0): Promise<DomainSnapshot> {
    return this.#call("DomainSnapshotCreateXML", domain, xml, flags);
  }

  domainListAllSnapshots(domain: Domain, flags = 0): Promise<readonly DomainSnapshot[]> {
    return this.#call("DomainListAllSnapshots", domain, true, flags);
  }

  domainSnapshotLookupByName(domain: Domain, name: string, flags = 0): Promise<DomainSnapshot> {
    return this.#call("DomainSnapshotLookupByName", domain, name, flags);
  }

  domainSnapshotGetXMLDesc(snapshot: DomainSnapshot, flags = 0): Promise<string> {
    return this.#call("DomainSnapshotGetXMLDesc", snapshot, flags);
  }

  domainRevertToSnapshot(snapshot: DomainSnapshot, flags = 0): Promise<void> {
    return this.#call("DomainRevertToSnapshot", snapshot, flags);
  }

  /** Flags: DOMAIN_SNAPSHOT_DELETE. */
  domainSnapshotDelete(snapshot: DomainSnapshot, flags = 0): Promise<void> {
    return this.#call("DomainSnapshotDelete", snapshot, flags);
  }

  /** Hears what happens to any domain, from the moment it resolves until the returned function is called. The listener must not throw. */
  onDomainEvent<Kind extends keyof DomainEvents>(kind: Kind, listener: (event: DomainEvents[Kind]) => void): Promise<() => Promise<void>> {
    return this.#subscriptions.add<DomainEvents, Kind>(DOMAIN_EVENTS, kind, listener);
  }

  /** As `onDomainEvent`, for pools. */
  onStoragePoolEvent<Kind extends keyof StoragePoolEvents>(
    kind: Kind,
    listener: (event: StoragePoolEvents[Kind]) => void,
  ): Promise<() => Promise<void>> {
    return this.#subscriptions.add<StoragePoolEvents, Kind>(STORAGE_POOL_EVENTS, kind, listener);
  }

  /** As `onDomainEvent`, for networks. */
  onNetworkEvent<Kind extends keyof NetworkEvents>(
    kind: Kind,
    listener: (event: NetworkEvents[Kind]) => void,
  ): Promise<() => Promise<void>> {
    return this.#subscriptions.add<NetworkEvents, Kind>(NETWORK_EVENTS, kind, listener);
  }

  #call<Name extends ProcedureName>(name: Name, ...args: Arguments<Name>): Promise<Result<Name>> {
    return this.#connection.call(name, args, this.#signal);
  }
}

async function authenticate(connection: Connection, { host, signal }: OpenOptions): Promise<void> {
  const types = await connection.call("AuthList", [], signal);
  if (types.includes(AUTH.none)) return;
  if (!types.includes(AUTH.polkit)) {
    const wanted = types.includes(AUTH.sasl) ? "a SASL login" : `a login of the unknown kind ${types.join(", ")}`;
    throw new ConnectionError(
      `libvirt wants ${wanted}, which is not supported; let root or the group libvirt in by its socket's mode, or use polkit (on ${host})`,
      {
        host,
        phase: "login",
      },
    );
  }
  try {
    await connection.call("AuthPolkit", [], signal);
  } catch (error) {
    if (!(error instanceof LibvirtError)) throw error;
    throw new ConnectionError(
      `polkit does not let this user manage libvirt: ${error.message}; log in as root or as a member of the group libvirt`,
      {
        host,
        phase: "login",
        cause: error,
      },
    );
  }
}

function downloadOf(stream: CallStream): Download {
  return { abort: (reason) => stream.abort(reason), [Symbol.asyncIterator]: () => pieces(stream) };
}

async function* pieces(stream: CallStream): AsyncGenerator<Piece, void, undefined> {
  try {
    for (let piece = await stream.read(); piece !== undefined; piece = await stream.read()) yield piece;
    await stream.finish();
  } finally {
    await stream.abort("its reader stopped early");
  }
}
