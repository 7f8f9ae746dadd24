/** Disks and network interfaces of a machine, as XML and as plain data, both ways. Pure. Source: https://libvirt.org/formatdomain.html#devices. */
import type { XmlElement } from "../image/xml.ts";
import { element, type Element } from "./render.ts";
import { attribute, child, childrenOf, text } from "./tree.ts";

/** A disk as it is found: words are libvirt's own, also those that we never write. */
export interface ObservedDisk {
  /** `disk`, `cdrom`, `floppy`, `lun`. */
  readonly device: string;
  /** Absolute path of a file or a block device; undefined for an empty drive and for what is neither. */
  readonly path?: string | undefined;
  /** `qcow2`, `raw`; undefined where libvirt is left to guess, and of an empty drive. */
  readonly format?: string | undefined;
  readonly bus: string;
  /** The name that libvirt knows it by: `vda`. The guest may have another. */
  readonly target: string;
  /** From 1. */
  readonly bootOrder?: number | undefined;
  readonly serial?: string | undefined;
  readonly isReadOnly: boolean;
  /** Whether other machines may have it too. Undefined: no. */
  readonly isShareable?: true | undefined;
  /** `none`, `writeback`, `writethrough`, `directsync`, `unsafe`; undefined: the hypervisor's default. */
  readonly cache?: string | undefined;
  /** `native`, `threads`, `io_uring`; undefined: the hypervisor's default. */
  readonly io?: string | undefined;
  /** Whether what the guest discards is freed: `unmap`, `ignore`; undefined: the hypervisor's default. */
  readonly discard?: string | undefined;
}

/** A disk as we define it. */
export interface DiskSpec extends ObservedDisk {
  readonly device: "disk" | "cdrom";
  /** Undefined only for a CD-ROM drive without a medium. */
  readonly path?: string | undefined;
  /** Undefined only for such a drive. */
  readonly format?: "qcow2" | "raw" | undefined;
  readonly bus: "virtio" | "sata" | "scsi" | "ide";
}

/** A network interface as it is found. */
export interface ObservedInterface {
  /** `network`, `bridge`, `user`, `direct` and so on. */
  readonly type: string;
  /** The name of the network, the bridge or, for `direct`, the host's device; undefined for `user`. */
  readonly source?: string | undefined;
  /** Of `direct`: `bridge`, `vepa`, `private`, `passthrough`. */
  readonly mode?: string | undefined;
  /** Lower case, with colons. */
  readonly mac: string;
  /** `virtio`, `e1000e`. */
  readonly model?: string | undefined;
  /** VLAN tags, one unless the guest is to see a trunk. Undefined: none. */
  readonly vlan?: readonly number[] | undefined;
  /** Whether the cable is out. Undefined: it is in. */
  readonly isLinkDown?: true | undefined;
  /** Bytes. Undefined: the network's. */
  readonly mtu?: number | undefined;
  /** Undefined: one. */
  readonly queues?: number | undefined;
}

/** A network interface as we define it. */
export interface InterfaceSpec extends ObservedInterface {
  readonly type: "network" | "bridge" | "direct" | "user";
  readonly model: string;
}

/** PCI addresses that a redefinition keeps: of disks by path, of interfaces by MAC. */
export type Addresses = ReadonlyMap<string, Readonly<Record<string, string>>>;

/** `addresses` undefined: libvirt chooses. */
export function diskElement(disk: DiskSpec, addresses?: Addresses): Element {
  const isBlock = disk.path?.startsWith("/dev/") ?? false;
  const address = disk.bus === "virtio" && disk.path !== undefined ? addresses?.get(disk.path) : undefined;
  return element(
    "disk",
    { type: isBlock ? "block" : "file", device: disk.device },
    element("driver", { name: "qemu", type: disk.format, cache: disk.cache, io: disk.io, discard: disk.discard }),
    disk.path === undefined ? undefined : element("source", { [isBlock ? "dev" : "file"]: disk.path }),
    element("target", { dev: disk.target, bus: disk.bus }),
    disk.serial === undefined ? undefined : element("serial", {}, disk.serial),
    disk.isReadOnly ? element("readonly") : undefined,
    disk.isShareable && element("shareable"),
    disk.bootOrder === undefined ? undefined : element("boot", { order: disk.bootOrder }),
    address && element("address", address),
  );
}

/** `addresses` undefined: libvirt chooses. */
export function interfaceElement(each: InterfaceSpec, addresses?: Addresses): Element {
  const { type, source, mode, mac, model, vlan, isLinkDown, mtu, queues } = each;
  const address = addresses?.get(mac);
  return element(
    "interface",
    { type },
    element("mac", { address: mac }),
    source === undefined ? undefined : element("source", { [type === "direct" ? "dev" : type]: source, mode }),
    vlan && element("vlan", { trunk: vlan.length > 1 ? "yes" : undefined }, ...vlan.map((id) => element("tag", { id }))),
    element("model", { type: model }),
    queues === undefined ? undefined : element("driver", { queues }),
    isLinkDown && element("link", { state: "down" }),
    mtu === undefined ? undefined : element("mtu", { size: mtu }),
    address && element("address", address),
  );
}

export function parseDisk(disk: XmlElement): ObservedDisk {
  const target = child(disk, "target");
  const driver = child(disk, "driver");
  const bootOrder = attribute(child(disk, "boot"), "order");
  const type = attribute(disk, "type");
  const isFile = type === "file" || type === "block";
  const path = isFile ? attribute(child(disk, "source"), type === "file" ? "file" : "dev") : undefined;
  return {
    device: attribute(disk, "device") ?? "disk",
    path,
    // Of an empty drive libvirt shows what was in it before, or nothing.
    format: isFile && path === undefined ? undefined : attribute(driver, "type"),
    bus: attribute(target, "bus") ?? "",
    target: attribute(target, "dev") ?? "",
    bootOrder: bootOrder === undefined ? undefined : Number(bootOrder),
    serial: text(disk, "serial"),
    // libvirt marks every CD-ROM, whether it was told to or not.
    isReadOnly: child(disk, "readonly") !== undefined,
    isShareable: child(disk, "shareable") && true,
    cache: attribute(driver, "cache"),
    io: attribute(driver, "io"),
    discard: attribute(driver, "discard"),
  };
}

export function parseInterface(each: XmlElement): ObservedInterface {
  const type = attribute(each, "type") ?? "";
  const source = child(each, "source");
  const vlan = child(each, "vlan");
  const mtu = attribute(child(each, "mtu"), "size");
  const queues = attribute(child(each, "driver"), "queues");
  return {
    type,
    source: attribute(source, type === "direct" ? "dev" : type),
    mode: type === "direct" ? attribute(source, "mode") : undefined,
    mac: (attribute(child(each, "mac"), "address") ?? "").toLowerCase(),
    model: attribute(child(each, "model"), "type"),
    vlan: vlan && childrenOf(vlan, "tag").map((tag) => Number(attribute(tag, "id"))),
    isLinkDown: attribute(child(each, "link"), "state") === "down" ? true : undefined,
    mtu: mtu === undefined ? undefined : Number(mtu),
    queues: queues === undefined ? undefined : Number(queues),
  };
}
