/** libvirt's flags and states as they are used in calls and results. Flags are combined with `|`. Source: libvirt-domain.h, libvirt-storage.h, virterror.h. */

/** virErrorNumber, the ones that callers tell apart. */
export const LIBVIRT_ERROR = {
  internal: 1,
  noSupport: 3,
  invalidArg: 8,
  operationFailed: 9,
  systemError: 38,
  noDomain: 42,
  noNetwork: 43,
  noStoragePool: 49,
  noStorageVol: 50,
  operationInvalid: 55,
  operationTimeout: 68,
  noDomainSnapshot: 72,
  noDomainMetadata: 80,
  agentUnresponsive: 86,
  accessDenied: 88,
  storageVolExist: 90,
  cpuIncompatible: 91,
  deviceMissing: 99,
} as const;

/** virDomainState. */
export const DOMAIN_STATE = { none: 0, running: 1, blocked: 2, paused: 3, shutdown: 4, shutoff: 5, crashed: 6, pmSuspended: 7 } as const;

/** virConnectCompareCPUFlags: what is missing is said as an error, by its name. */
export const COMPARE_CPU = { failIncompatible: 1 } as const;

/** virDomainXMLFlags. */
export const DOMAIN_XML = { secure: 1, inactive: 2, updateCpu: 4, migratable: 8 } as const;

/** virDomainDefineFlags. */
export const DOMAIN_DEFINE = { validate: 1 } as const;

/** virDomainCreateFlags. */
export const DOMAIN_START = { paused: 1, autodestroy: 2, bypassCache: 4, forceBoot: 8, validate: 16, resetNvram: 32 } as const;

/** virDomainUndefineFlagsValues. */
export const DOMAIN_UNDEFINE = {
  managedSave: 1,
  snapshotsMetadata: 2,
  nvram: 4,
  keepNvram: 8,
  checkpointsMetadata: 16,
  tpm: 32,
  keepTpm: 64,
} as const;

/** virDomainModificationImpact: what runs, and what is defined. */
export const DOMAIN_AFFECT = { live: 1, config: 2 } as const;

/** virDomainDeviceModifyFlags. */
export const DOMAIN_DEVICE_MODIFY = { live: 1, config: 2, force: 4 } as const;

/** virDomainVcpuFlags. */
export const DOMAIN_VCPU = { live: 1, config: 2, maximum: 4, guest: 8, hotpluggable: 16 } as const;

/** virDomainMemoryModFlags. */
export const DOMAIN_MEMORY = { live: 1, config: 2, maximum: 4 } as const;

/** virDomainMetadataType. */
export const DOMAIN_METADATA = { description: 0, title: 1, element: 2 } as const;

/** virDomainBlockResizeFlags. Without `bytes` the size is in KiB. */
export const DOMAIN_BLOCK_RESIZE = { bytes: 1, capacity: 2 } as const;

/** virDomainInterfaceAddressesSource: a value, not a flag. */
export const INTERFACE_ADDRESSES_SOURCE = { lease: 0, agent: 1, arp: 2 } as const;

/** virConnectListAllDomainsFlags; virConnectListAllNetworksFlags and virConnectListAllStoragePoolsFlags have them the other way round. */
export const LIST_DOMAINS = { active: 1, inactive: 2 } as const;

/** virConnectListAllStoragePoolsFlags. */
export const LIST_STORAGE_POOLS = { inactive: 1, active: 2, dir: 64, fs: 128, netfs: 256, logical: 512 } as const;

/** virStoragePoolState. */
export const STORAGE_POOL_STATE = { inactive: 0, building: 1, running: 2, degraded: 3, inaccessible: 4 } as const;

/** virStorageVolType. */
export const STORAGE_VOL_TYPE = { file: 0, block: 1, dir: 2, network: 3, netdir: 4, ploop: 5 } as const;

/** virStorageVolUploadFlags and virStorageVolDownloadFlags. */
export const STORAGE_VOL_TRANSFER = { sparse: 1 } as const;

/** virStorageVolInfoFlags: the file's length in place of `allocation`. */
export const STORAGE_VOL_INFO = { physical: 1 } as const;

/** virStorageVolResizeFlags. */
export const STORAGE_VOL_RESIZE = { allocate: 1, delta: 2, shrink: 4 } as const;

/** virDomainEventType, in the event `lifecycle`. */
export const DOMAIN_LIFECYCLE = {
  defined: 0,
  undefined: 1,
  started: 2,
  suspended: 3,
  resumed: 4,
  stopped: 5,
  shutdown: 6,
  pmSuspended: 7,
  crashed: 8,
} as const;
