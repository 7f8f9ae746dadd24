/**
 * The procedures of libvirt's RPC that Virtlift calls: one row each, with its number, its arguments and its result.
 *
 * Pure, knows no connection. Names and order of arguments are libvirt's own (remote_protocol.x, qemu_protocol.x). A result of one value is that
 * value; more are an object with libvirt's field names. An int that can only be yes or no is a boolean; a 64-bit number is
 * a `number`, refused beyond 2^53, where it is a size or a time of day.
 */
import {
  boolean,
  double,
  int32,
  int64,
  list,
  nothing,
  optional,
  string,
  struct,
  tuple,
  uint32,
  uint64,
  XdrError,
  type Codec,
} from "./xdr.ts";

/** RPC programs and their only version: REMOTE_PROGRAM, QEMU_PROGRAM. */
const REMOTE_PROGRAM = 0x20008086;
const QEMU_PROGRAM = 0x20008087;
export const PROGRAM_VERSION = 1;

/** The most items of one list in a reply: REMOTE_DOMAIN_LIST_MAX, REMOTE_STORAGE_VOL_LIST_MAX and their like. */
const MAX_LIST_ITEMS = 16_384;

/** The most addresses of a domain's interface, and typed parameters: REMOTE_DOMAIN_IP_ADDR_MAX, REMOTE_DOMAIN_GUEST_INFO_PARAMS_MAX. */
const MAX_ADDRESSES = 2048;
const MAX_PARAMETERS = 2048;

/** REMOTE_CPUMAP_MAX. */
const MAX_CPU_MAP_BYTES = 2048;

/** REMOTE_AUTH_TYPE_LIST_MAX. */
const MAX_AUTH_TYPES = 20;

/** VIR_SECURITY_MODEL_BUFLEN and VIR_SECURITY_DOI_BUFLEN of libvirt-host.h. */
const MAX_SECURITY_CHARACTERS = 257;

/** A reference to a domain. libvirt finds it by `uuid`; `id` is -1 while it does not run. */
export interface Domain {
  readonly name: string;
  /** Lower case, with dashes. */
  readonly uuid: string;
  readonly id: number;
}

export interface StoragePool {
  readonly name: string;
  readonly uuid: string;
}

/** A reference to a volume. libvirt finds it by `pool` and `name`; `key` is its path in a pool of files. */
export interface StorageVol {
  readonly pool: string;
  readonly name: string;
  readonly key: string;
}

export interface Network {
  readonly name: string;
  readonly uuid: string;
}

export interface DomainSnapshot {
  readonly name: string;
  readonly dom: Domain;
}

/** Sizes in bytes. `state`: `STORAGE_POOL_STATE`. */
export interface StoragePoolInfo {
  readonly state: number;
  readonly capacity: number;
  readonly allocation: number;
  readonly available: number;
}

/** Sizes in bytes. `type`: `STORAGE_VOL_TYPE`. */
export interface StorageVolInfo {
  readonly type: number;
  readonly capacity: number;
  readonly allocation: number;
}

/** `maxMem` and `memory` in KiB. `cpuTime` in nanoseconds is a bigint: 2^53 of them are 104 days of one CPU. `state`: `DOMAIN_STATE`. */
export interface DomainInfo {
  readonly state: number;
  readonly maxMem: number;
  readonly memory: number;
  readonly nrVirtCpu: number;
  readonly cpuTime: bigint;
}

/** `state`: `DOMAIN_STATE`; `reason`: virDomainRunningReason and its like, a set for each state. */
export interface DomainStateInfo {
  readonly state: number;
  readonly reason: number;
}

/** Sizes in bytes: `capacity` as the guest sees it, `allocation` what is in use on the host, `physical` the file's length. */
export interface DomainBlockInfo {
  readonly allocation: number;
  readonly capacity: number;
  readonly physical: number;
}

/** `found` is false when no job runs, and all else 0. `type`: virDomainBlockJobType. `cur` of `end` is done, in units of the job. */
export interface DomainBlockJobInfo {
  readonly found: boolean;
  readonly type: number;
  readonly bandwidth: number;
  readonly cur: number;
  readonly end: number;
}

/** An interface as the lease file, the agent or the ARP table shows it. An address of `type` 0 is IPv4, 1 is IPv6. */
export interface DomainInterface {
  readonly name: string;
  readonly hwaddr: string | undefined;
  readonly addrs: readonly { readonly type: number; readonly addr: string; readonly prefix: number }[];
}

/** `expirytime` in seconds since 1970, 0 for never. `type` 0 is IPv4, 1 is IPv6. */
export interface NetworkDhcpLease {
  readonly iface: string;
  readonly expirytime: number;
  readonly type: number;
  readonly mac: string | undefined;
  readonly iaid: string | undefined;
  readonly ipaddr: string;
  readonly prefix: number;
  readonly hostname: string | undefined;
  readonly clientid: string | undefined;
}

/** `memory` in KiB, `mhz` 0 when unknown. */
export interface NodeInfo {
  readonly model: string;
  readonly memory: number;
  readonly cpus: number;
  readonly mhz: number;
  readonly nodes: number;
  readonly sockets: number;
  readonly cores: number;
  readonly threads: number;
}

/** `model` is `selinux`, `apparmor`, `none` or empty. */
export interface SecurityModel {
  readonly model: string;
  readonly doi: string;
}

/** virTypedParameter: a named value with its type on the wire. */
export type TypedParameter = { readonly field: string } & TypedValue;
export type TypedValue =
  | { readonly type: "int" | "uint" | "llong" | "ullong" | "double"; readonly value: number }
  | { readonly type: "boolean"; readonly value: boolean }
  | { readonly type: "string"; readonly value: string };

/** What libvirt says of a failure. Codes and domains: virterror.h. */
export interface ErrorReply {
  readonly code: number;
  readonly domain: number;
  readonly message: string | undefined;
  readonly level: number;
  readonly dom: Domain | undefined;
  readonly str1: string | undefined;
  readonly str2: string | undefined;
  readonly str3: string | undefined;
  readonly int1: number;
  readonly int2: number;
  readonly net: Network | undefined;
}

/** opaque[16] on the wire, text with dashes here. */
const uuid: Codec<string> = {
  decode: (reader) => {
    const hex = reader.opaque(16).toString("hex");
    return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
  },
  encode: (writer, value) => {
    const hex = value.replaceAll("-", "");
    if (!/^[0-9a-f]{32}$/i.test(hex)) throw new XdrError(`"${value}" is no UUID`);
    writer.opaque(Buffer.from(hex, "hex"));
  },
};

/** `opaque x<n>`: a count of bytes, then the bytes. */
function countedBytes(maxBytes: number): Codec<Uint8Array> {
  return {
    decode: (reader) => {
      const lengthBytes = reader.uint32();
      if (lengthBytes > maxBytes) throw new XdrError(`${lengthBytes} bytes are declared, more than ${maxBytes}`);
      return Buffer.from(reader.opaque(lengthBytes));
    },
    encode: (writer, bytes) => {
      if (bytes.length > maxBytes) throw new XdrError(`${bytes.length} bytes are more than ${maxBytes}`);
      writer.uint32(bytes.length);
      writer.opaque(bytes);
    },
  };
}

/** unsigned hyper, as a number that is exact. */
const unsignedHyper: Codec<number> = {
  decode: (reader) => exactNumber(reader.uint64()),
  encode: (writer, value) => uint64.encode(writer, BigInt(value)),
};

/** hyper, as a number that is exact. */
const hyper: Codec<number> = {
  decode: (reader) => exactNumber(reader.int64()),
  encode: (writer, value) => int64.encode(writer, BigInt(value)),
};

/** `char x[n]`: every character is an int of its own, and the text ends at the first NUL. */
function characters(length: number): Codec<string> {
  return {
    decode: (reader) => textOfCharacters(Array.from({ length }, () => reader.int32())),
    encode: (writer, value) => {
      const bytes = Buffer.alloc(length);
      bytes.write(value, 0, length - 1);
      for (const byte of bytes) writer.int32(byte);
    },
  };
}

/** `char x<n>`: a count, then every character as an int of its own. */
function countedCharacters(maxLength: number): Codec<string> {
  const ints = list(int32, maxLength);
  return {
    decode: (reader) => textOfCharacters(ints.decode(reader)),
    encode: (writer, value) => ints.encode(writer, [...Buffer.from(value)]),
  };
}

export const domain: Codec<Domain> = struct<Domain>({ name: string, uuid, id: int32 });
export const storagePool: Codec<StoragePool> = struct<StoragePool>({ name: string, uuid });
export const network: Codec<Network> = struct<Network>({ name: string, uuid });
const storageVol = struct<StorageVol>({ pool: string, name: string, key: string });
const domainSnapshot = struct<DomainSnapshot>({ name: string, dom: domain });
const optionalString = optional(string);

/** virNetMessageError of virnetprotocol.x, all of it. */
export const errorReply: Codec<ErrorReply> = struct<ErrorReply>({
  code: int32,
  domain: int32,
  message: optionalString,
  level: int32,
  dom: optional(domain),
  str1: optionalString,
  str2: optionalString,
  str3: optionalString,
  int1: int32,
  int2: int32,
  net: optional(network),
});

const storagePoolInfo = struct<StoragePoolInfo>({
  state: uint32,
  capacity: unsignedHyper,
  allocation: unsignedHyper,
  available: unsignedHyper,
});

const storageVolInfo = struct<StorageVolInfo>({ type: int32, capacity: unsignedHyper, allocation: unsignedHyper });

const domainInfo = struct<DomainInfo>({
  state: uint32,
  maxMem: unsignedHyper,
  memory: unsignedHyper,
  nrVirtCpu: uint32,
  cpuTime: uint64,
});

const domainBlockInfo = struct<DomainBlockInfo>({ allocation: unsignedHyper, capacity: unsignedHyper, physical: unsignedHyper });

const domainBlockJobInfo = struct<DomainBlockJobInfo>({
  found: boolean,
  type: int32,
  bandwidth: unsignedHyper,
  cur: unsignedHyper,
  end: unsignedHyper,
});

const domainInterface = struct<DomainInterface>({
  name: string,
  hwaddr: optionalString,
  addrs: list(struct<DomainInterface["addrs"][number]>({ type: int32, addr: string, prefix: uint32 }), MAX_ADDRESSES),
});

const networkDhcpLease = struct<NetworkDhcpLease>({
  iface: string,
  expirytime: hyper,
  type: int32,
  mac: optionalString,
  iaid: optionalString,
  ipaddr: string,
  prefix: uint32,
  hostname: optionalString,
  clientid: optionalString,
});

const nodeInfo = struct<NodeInfo>({
  model: characters(32),
  memory: unsignedHyper,
  cpus: int32,
  mhz: int32,
  nodes: int32,
  sockets: int32,
  cores: int32,
  threads: int32,
});

const securityModel = struct<SecurityModel>({
  model: countedCharacters(MAX_SECURITY_CHARACTERS),
  doi: countedCharacters(MAX_SECURITY_CHARACTERS),
});

/** virTypedParameterType of libvirt-common.h; the position is the number. */
const typedParameter: Codec<TypedParameter> = {
  decode: (reader) => {
    const field = reader.string();
    const type = reader.int32();
    switch (type) {
      case 1:
        return { field, type: "int", value: reader.int32() };
      case 2:
        return { field, type: "uint", value: reader.uint32() };
      case 3:
        return { field, type: "llong", value: hyper.decode(reader) };
      case 4:
        return { field, type: "ullong", value: unsignedHyper.decode(reader) };
      case 5:
        return { field, type: "double", value: reader.double() };
      case 6:
        return { field, type: "boolean", value: boolean.decode(reader) };
      case 7:
        return { field, type: "string", value: reader.string() };
      default:
        throw new XdrError(`the parameter ${field} has the unknown type ${type}`);
    }
  },
  encode: (writer, parameter) => {
    writer.string(parameter.field);
    writer.int32(1 + ["int", "uint", "llong", "ullong", "double", "boolean", "string"].indexOf(parameter.type));
    switch (parameter.type) {
      case "int":
        return writer.int32(parameter.value);
      case "uint":
        return writer.uint32(parameter.value);
      case "llong":
        return hyper.encode(writer, parameter.value);
      case "ullong":
        return unsignedHyper.encode(writer, parameter.value);
      case "double":
        return double.encode(writer, parameter.value);
      case "boolean":
        return boolean.encode(writer, parameter.value);
      case "string":
        return writer.string(parameter.value);
    }
  },
};

/** A list reply: the items, then their number once more. Calls that give it take needResults, which is always 1 here. */
function results<T>(item: Codec<T>): Codec<readonly T[]> {
  const items = list(item, MAX_LIST_ITEMS);
  return {
    decode: (reader) => {
      const found = items.decode(reader);
      reader.uint32();
      return found;
    },
    encode: (writer, values) => {
      items.encode(writer, values);
      writer.uint32(values.length);
    },
  };
}

/** One procedure: where it is found, and how its arguments and its result lie on the wire. */
export interface Procedure<Arguments extends readonly unknown[], Result> {
  readonly program: number;
  readonly number: number;
  readonly args: Codec<Arguments>;
  readonly result: Codec<Result>;
}

function remote<Arguments extends readonly unknown[], Result>(
  number: number,
  args: { readonly [K in keyof Arguments]: Codec<Arguments[K]> },
  result: Codec<Result>,
): Procedure<Arguments, Result> {
  return { program: REMOTE_PROGRAM, number, args: tuple<Arguments>(...args), result };
}

const ROWS = {
  AuthList: remote(66, [], list(int32, MAX_AUTH_TYPES)),
  AuthPolkit: remote(70, [], boolean),
  ConnectSupportsFeature: remote(60, [int32], boolean),
  ConnectOpen: remote(1, [optionalString, uint32], nothing),
  ConnectClose: remote(2, [], nothing),
  ConnectGetType: remote(3, [], string),
  ConnectGetVersion: remote(4, [], unsignedHyper),
  ConnectGetLibVersion: remote(157, [], unsignedHyper),
  ConnectGetHostname: remote(59, [], string),
  ConnectGetUri: remote(110, [], string),
  ConnectGetCapabilities: remote(7, [], string),
  ConnectDomainXMLToNative: remote(136, [string, string, uint32], string),
  ConnectGetDomainCapabilities: remote(342, [optionalString, optionalString, optionalString, optionalString, uint32], string),
  ConnectCompareCPU: remote(158, [string, uint32], int32),
  ConnectCompareHypervisorCPU: remote(393, [optionalString, optionalString, optionalString, optionalString, string, uint32], int32),
  ConnectGetStoragePoolCapabilities: remote(403, [uint32], string),
  NodeGetInfo: remote(6, [], nodeInfo),
  NodeGetFreeMemory: remote(102, [], unsignedHyper),
  NodeGetSecurityModel: remote(122, [], securityModel),

  ConnectListAllStoragePools: remote(281, [boolean, uint32], results(storagePool)),
  StoragePoolLookupByName: remote(84, [string], storagePool),
  StoragePoolLookupByUUID: remote(85, [uuid], storagePool),
  StoragePoolLookupByVolume: remote(86, [storageVol], storagePool),
  StoragePoolLookupByTargetPath: remote(391, [string], storagePool),
  StoragePoolDefineXML: remote(77, [string, uint32], storagePool),
  StoragePoolCreateXML: remote(76, [string, uint32], storagePool),
  StoragePoolBuild: remote(79, [storagePool, uint32], nothing),
  StoragePoolCreate: remote(78, [storagePool, uint32], nothing),
  StoragePoolDestroy: remote(80, [storagePool], nothing),
  StoragePoolDelete: remote(81, [storagePool, uint32], nothing),
  StoragePoolUndefine: remote(82, [storagePool], nothing),
  StoragePoolRefresh: remote(83, [storagePool, uint32], nothing),
  StoragePoolGetInfo: remote(87, [storagePool], storagePoolInfo),
  StoragePoolGetXMLDesc: remote(88, [storagePool, uint32], string),
  StoragePoolGetAutostart: remote(89, [storagePool], boolean),
  StoragePoolSetAutostart: remote(90, [storagePool, boolean], nothing),
  StoragePoolIsActive: remote(154, [storagePool], boolean),
  StoragePoolListAllVolumes: remote(282, [storagePool, boolean, uint32], results(storageVol)),

  StorageVolLookupByName: remote(95, [storagePool, string], storageVol),
  StorageVolLookupByKey: remote(96, [string], storageVol),
  StorageVolLookupByPath: remote(97, [string], storageVol),
  StorageVolCreateXML: remote(93, [storagePool, string, uint32], storageVol),
  StorageVolCreateXMLFrom: remote(125, [storagePool, string, storageVol, uint32], storageVol),
  StorageVolUpload: remote(208, [storageVol, unsignedHyper, unsignedHyper, uint32], nothing),
  StorageVolDownload: remote(209, [storageVol, unsignedHyper, unsignedHyper, uint32], nothing),
  StorageVolDelete: remote(94, [storageVol, uint32], nothing),
  StorageVolGetInfo: remote(98, [storageVol], storageVolInfo),
  StorageVolGetInfoFlags: remote(378, [storageVol, uint32], storageVolInfo),
  StorageVolGetXMLDesc: remote(99, [storageVol, uint32], string),
  StorageVolGetPath: remote(100, [storageVol], string),
  StorageVolResize: remote(260, [storageVol, unsignedHyper, uint32], nothing),
  StorageVolWipe: remote(165, [storageVol, uint32], nothing),

  ConnectListAllDomains: remote(273, [boolean, uint32], results(domain)),
  DomainLookupByName: remote(23, [string], domain),
  DomainLookupByUUID: remote(24, [uuid], domain),
  DomainDefineXML: remote(11, [string], domain),
  DomainDefineXMLFlags: remote(350, [string, uint32], domain),
  DomainCreateXML: remote(10, [string, uint32], domain),
  DomainCreate: remote(9, [domain], nothing),
  DomainCreateWithFlags: remote(196, [domain, uint32], domain),
  DomainGetXMLDesc: remote(14, [domain, uint32], string),
  DomainGetState: remote(212, [domain, uint32], struct<DomainStateInfo>({ state: int32, reason: int32 })),
  DomainGetInfo: remote(16, [domain], domainInfo),
  DomainIsActive: remote(150, [domain], boolean),
  DomainIsPersistent: remote(151, [domain], boolean),
  DomainIsUpdated: remote(202, [domain], boolean),
  DomainSuspend: remote(34, [domain], nothing),
  DomainResume: remote(28, [domain], nothing),
  DomainShutdown: remote(33, [domain], nothing),
  DomainShutdownFlags: remote(258, [domain, uint32], nothing),
  DomainReboot: remote(27, [domain, uint32], nothing),
  DomainReset: remote(245, [domain, uint32], nothing),
  DomainDestroy: remote(12, [domain], nothing),
  DomainDestroyFlags: remote(234, [domain, uint32], nothing),
  DomainUndefine: remote(35, [domain], nothing),
  DomainUndefineFlags: remote(231, [domain, uint32], nothing),
  DomainRename: remote(358, [domain, optionalString, uint32], int32),
  DomainGetAutostart: remote(15, [domain], boolean),
  DomainSetAutostart: remote(29, [domain, boolean], nothing),
  DomainSetMetadata: remote(264, [domain, int32, optionalString, optionalString, optionalString, uint32], nothing),
  DomainGetMetadata: remote(265, [domain, int32, optionalString, uint32], string),
  DomainSetVcpus: remote(32, [domain, uint32], nothing),
  DomainSetVcpusFlags: remote(199, [domain, uint32, uint32], nothing),
  DomainGetVcpusFlags: remote(200, [domain, uint32], int32),
  DomainPinVcpuFlags: remote(225, [domain, uint32, countedBytes(MAX_CPU_MAP_BYTES), uint32], nothing),
  DomainSetMemory: remote(31, [domain, unsignedHyper], nothing),
  DomainSetMemoryFlags: remote(204, [domain, unsignedHyper, uint32], nothing),
  DomainSetMaxMemory: remote(30, [domain, unsignedHyper], nothing),
  DomainAttachDevice: remote(8, [domain, string], nothing),
  DomainAttachDeviceFlags: remote(160, [domain, string, uint32], nothing),
  DomainDetachDevice: remote(13, [domain, string], nothing),
  DomainDetachDeviceFlags: remote(161, [domain, string, uint32], nothing),
  DomainDetachDeviceAlias: remote(392, [domain, string, uint32], nothing),
  DomainUpdateDeviceFlags: remote(174, [domain, string, uint32], nothing),
  DomainBlockResize: remote(251, [domain, string, unsignedHyper, uint32], nothing),
  DomainGetBlockInfo: remote(194, [domain, string, uint32], domainBlockInfo),
  DomainBlockCopy: remote(345, [domain, string, string, list(typedParameter, MAX_PARAMETERS), uint32], nothing),
  DomainGetBlockJobInfo: remote(238, [domain, string, uint32], domainBlockJobInfo),
  DomainInterfaceAddresses: remote(353, [domain, uint32, uint32], list(domainInterface, MAX_LIST_ITEMS)),
  DomainGetHostname: remote(277, [domain, uint32], string),
  DomainGetGuestInfo: remote(418, [domain, uint32, uint32], list(typedParameter, MAX_PARAMETERS)),
  DomainFsfreeze: remote(335, [domain, list(string, MAX_LIST_ITEMS), uint32], int32),
  DomainFsthaw: remote(336, [domain, list(string, MAX_LIST_ITEMS), uint32], int32),
  DomainHasManagedSaveImage: remote(183, [domain, uint32], boolean),
  DomainManagedSaveRemove: remote(184, [domain, uint32], nothing),
  DomainScreenshot: remote(211, [domain, uint32, uint32], optionalString),
  DomainOpenConsole: remote(201, [domain, optionalString, uint32], nothing),
  DomainGetMessages: remote(426, [domain, uint32], list(string, MAX_LIST_ITEMS)),
  DomainAgentCommand: { ...remote(3, [domain, string, int32, uint32], optionalString), program: QEMU_PROGRAM },

  ConnectListAllNetworks: remote(283, [boolean, uint32], results(network)),
  NetworkLookupByName: remote(46, [string], network),
  NetworkLookupByUUID: remote(47, [uuid], network),
  NetworkIsActive: remote(152, [network], boolean),
  NetworkCreate: remote(39, [network], nothing),
  NetworkGetXMLDesc: remote(43, [network, uint32], string),
  NetworkGetBridgeName: remote(45, [network], string),
  NetworkGetAutostart: remote(44, [network], boolean),
  NetworkGetDhcpLeases: remote(341, [network, optionalString, boolean, uint32], results(networkDhcpLease)),
  NetworkUpdate: remote(291, [network, uint32, uint32, int32, string, uint32], nothing),

  DomainSnapshotCreateXML: remote(185, [domain, string, uint32], domainSnapshot),
  DomainListAllSnapshots: remote(274, [domain, boolean, uint32], results(domainSnapshot)),
  DomainSnapshotLookupByName: remote(189, [domain, string, uint32], domainSnapshot),
  DomainSnapshotGetXMLDesc: remote(186, [domainSnapshot, uint32], string),
  DomainRevertToSnapshot: remote(192, [domainSnapshot, uint32], nothing),
  DomainSnapshotDelete: remote(193, [domainSnapshot, uint32], nothing),

  ConnectDomainEventCallbackRegisterAny: remote(316, [int32, optional(domain)], int32),
  ConnectDomainEventCallbackDeregisterAny: remote(317, [int32], nothing),
  ConnectStoragePoolEventRegisterAny: remote(368, [int32, optional(storagePool)], int32),
  ConnectStoragePoolEventDeregisterAny: remote(369, [int32], nothing),
  ConnectNetworkEventRegisterAny: remote(313, [int32, optional(network)], int32),
  ConnectNetworkEventDeregisterAny: remote(314, [int32], nothing),
};

type Rows = typeof ROWS;
export type ProcedureName = keyof Rows;
type ArgumentsOf<Row> = Row extends Procedure<infer Args, infer _Value> ? Args : never;
type ResultOf<Row> = Row extends Procedure<infer _Args, infer Value> ? Value : never;
export type Arguments<Name extends ProcedureName> = ArgumentsOf<Rows[Name]>;
export type Result<Name extends ProcedureName> = ResultOf<Rows[Name]>;

/** Every procedure by its name. */
export const PROCEDURES: { readonly [Name in ProcedureName]: Procedure<Arguments<Name>, Result<Name>> } = ROWS;

function exactNumber(value: bigint): number {
  const number = Number(value);
  if (!Number.isSafeInteger(number)) throw new XdrError(`the number ${value} is beyond 2^53`);
  return number;
}

function textOfCharacters(characterCodes: readonly number[]): string {
  const end = characterCodes.indexOf(0);
  return Buffer.from(end < 0 ? characterCodes : characterCodes.slice(0, end)).toString("utf8");
}
