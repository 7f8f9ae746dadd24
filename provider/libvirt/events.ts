/** The events that libvirt sends: one row each, with the number to register, the procedure of the message and its shape. Pure, as `procedures.ts` is. */
import { domain, network, storagePool, type Domain, type Network, type ProcedureName, type StoragePool } from "./procedures.ts";
import { int32, optional, string, struct, type Codec } from "./xdr.ts";

/** `eventId` is what a registration asks for, `procedure` the number in the header of the message; the body follows the callback's i32 in its payload. */
export interface EventRow<Body> {
  readonly eventId: number;
  readonly procedure: number;
  readonly body: Codec<Body>;
}

/** `event`: `DOMAIN_LIFECYCLE`; `detail`: virDomainEventStoppedDetailType and its like, a set for each event. */
export interface LifecycleEvent {
  readonly dom: Domain;
  readonly event: number;
  readonly detail: number;
}

/** `action` is what the guest does now: 0 none, 1 paused, 2 reports the error itself. */
export interface IoErrorEvent {
  readonly dom: Domain;
  readonly srcPath: string;
  readonly devAlias: string;
  readonly action: number;
}

/** `status`: 0 completed, 1 failed, 2 cancelled, 3 ready for a pivot. `type`: virDomainBlockJobType. */
export interface BlockJobEvent {
  readonly dom: Domain;
  readonly path: string;
  readonly type: number;
  readonly status: number;
}

export interface DeviceEvent {
  readonly dom: Domain;
  readonly devAlias: string;
}

/** `state`: 1 connected, 2 disconnected. `reason`: 0 unknown, 1 the domain started, 2 the channel changed. */
export interface AgentLifecycleEvent {
  readonly dom: Domain;
  readonly state: number;
  readonly reason: number;
}

/** `type` as in `DOMAIN_METADATA`; `nsuri` for an element only. */
export interface MetadataChangeEvent {
  readonly dom: Domain;
  readonly type: number;
  readonly nsuri: string | undefined;
}

/** What happens to each kind of domain event. */
export interface DomainEvents {
  readonly lifecycle: LifecycleEvent;
  readonly reboot: { readonly dom: Domain };
  readonly ioError: IoErrorEvent;
  readonly ioErrorReason: IoErrorEvent & { readonly reason: string };
  readonly blockJob: BlockJobEvent;
  readonly deviceRemoved: DeviceEvent;
  readonly agentLifecycle: AgentLifecycleEvent;
  readonly deviceAdded: DeviceEvent;
  readonly deviceRemovalFailed: DeviceEvent;
  readonly metadataChange: MetadataChangeEvent;
}

/** `event`: 0 defined, 1 undefined, 2 started, 3 stopped, 4 created, 5 deleted. */
export interface StoragePoolEvents {
  readonly lifecycle: { readonly pool: StoragePool; readonly event: number; readonly detail: number };
  readonly refresh: { readonly pool: StoragePool };
}

/** `event`: 0 defined, 1 undefined, 2 started, 3 stopped. */
export interface NetworkEvents {
  readonly lifecycle: { readonly net: Network; readonly event: number; readonly detail: number };
}

/** The procedures that ask for the events of one kind of object, and call them off. */
export interface EventRegistrar {
  readonly register: ProcedureName & `${string}RegisterAny`;
  readonly deregister: ProcedureName & `${string}DeregisterAny`;
}

/** The events of one kind of object. */
export interface EventFamily<Events> extends EventRegistrar {
  readonly rows: { readonly [Kind in keyof Events]: EventRow<Events[Kind]> };
}

const device = struct<DeviceEvent>({ dom: domain, devAlias: string });
const ioError = { dom: domain, srcPath: string, devAlias: string, action: int32 };

/** virDomainEventID of libvirt-domain.h and REMOTE_PROC_DOMAIN_EVENT_CALLBACK_* of remote_protocol.x. */
export const DOMAIN_EVENTS = {
  register: "ConnectDomainEventCallbackRegisterAny",
  deregister: "ConnectDomainEventCallbackDeregisterAny",
  rows: {
    lifecycle: { eventId: 0, procedure: 318, body: struct<LifecycleEvent>({ dom: domain, event: int32, detail: int32 }) },
    reboot: { eventId: 1, procedure: 319, body: struct<{ dom: Domain }>({ dom: domain }) },
    ioError: { eventId: 4, procedure: 322, body: struct<IoErrorEvent>(ioError) },
    ioErrorReason: { eventId: 6, procedure: 324, body: struct<DomainEvents["ioErrorReason"]>({ ...ioError, reason: string }) },
    blockJob: { eventId: 8, procedure: 326, body: struct<BlockJobEvent>({ dom: domain, path: string, type: int32, status: int32 }) },
    deviceRemoved: { eventId: 15, procedure: 333, body: device },
    agentLifecycle: { eventId: 18, procedure: 348, body: struct<AgentLifecycleEvent>({ dom: domain, state: int32, reason: int32 }) },
    deviceAdded: { eventId: 19, procedure: 354, body: device },
    deviceRemovalFailed: { eventId: 22, procedure: 367, body: device },
    metadataChange: {
      eventId: 23,
      procedure: 379,
      body: struct<MetadataChangeEvent>({ dom: domain, type: int32, nsuri: optional(string) }),
    },
  },
} as const satisfies EventFamily<DomainEvents>;

/** virStoragePoolEventID of libvirt-storage.h. */
export const STORAGE_POOL_EVENTS = {
  register: "ConnectStoragePoolEventRegisterAny",
  deregister: "ConnectStoragePoolEventDeregisterAny",
  rows: {
    lifecycle: {
      eventId: 0,
      procedure: 370,
      body: struct<StoragePoolEvents["lifecycle"]>({ pool: storagePool, event: int32, detail: int32 }),
    },
    refresh: { eventId: 1, procedure: 373, body: struct<StoragePoolEvents["refresh"]>({ pool: storagePool }) },
  },
} as const satisfies EventFamily<StoragePoolEvents>;

/** virNetworkEventID of libvirt-network.h. */
export const NETWORK_EVENTS = {
  register: "ConnectNetworkEventRegisterAny",
  deregister: "ConnectNetworkEventDeregisterAny",
  rows: {
    lifecycle: {
      eventId: 0,
      procedure: 315,
      body: struct<NetworkEvents["lifecycle"]>({ net: network, event: int32, detail: int32 }),
    },
  },
} as const satisfies EventFamily<NetworkEvents>;
