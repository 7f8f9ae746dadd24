/** The shapes of what users declare of a virtual machine. The one source of types and documentation of its arguments. */
import { z } from "zod";
import { fitsXml } from "../libvirt/render.ts";
import { PreflightSchema } from "./preflight/rule.ts";
import { DiskRefSchema, HostSchema, ORIGIN_FAULT, SizeSchema, VolumeNameSchema } from "./schema.ts";

const TextSchema = z.string().refine(fitsXml, "the text holds a control character, which libvirt cannot store");
const LineSchema = TextSchema.refine((text) => !/[\r\n]/.test(text), "the text is to be one line");
const PathSchema = TextSchema.regex(/^\//, "the path on the host is to be absolute, beginning with /");
const BusSchema = z.enum(["virtio", "sata", "scsi", "ide"], {
  error: 'a bus is "virtio", "sata", "scsi" or "ide": libvirt has no NVMe disks that are made from a file',
});
const FormatSchema = z.enum(["qcow2", "raw"]);

/** How a disk is served. Of a running guest none of it changes. */
const serving = {
  /** How QEMU caches it: `none` goes past the host's cache, `writeback` through it. Default: libvirt's, `writeback`; of a shareable disk `none`. */
  cache: z.enum(["none", "writeback", "writethrough", "directsync", "unsafe"]).optional(),
  /** How QEMU reads and writes it; `native` goes with the cache `none` or `directsync`. Default: libvirt's, `threads`. */
  io: z.enum(["native", "threads", "io_uring"]).optional(),
  /** Whether blocks that the guest gives up are freed on the host: `unmap` (default) or `ignore`. */
  discard: z.enum(["unmap", "ignore"]).optional(),
  /** The serial number that the guest reads, at most 20 characters. Default: none. */
  serial: z
    .string()
    .regex(/^[A-Za-z0-9_.+-]{1,20}$/, "a disk's serial number is 1 to 20 letters, digits and _ . + -")
    .optional(),
  /** Its place among what the firmware tries to boot from, from 1. Default: the boot disk is 1, and nothing else is tried. */
  bootOrder: z.number().int().min(1).max(100).optional(),
};

const ImageObjectSchema = z
  .strictObject({
    /** Absolute path of the template on the host. Exactly one of `path` and `volume` is given. */
    path: PathSchema.optional(),
    /** Name of the template's volume in `pool`. */
    volume: z.string().min(1).optional(),
    /** The directory pool that gets the machine's own volume, and that `volume` is in. Default `default`. */
    pool: z.string().min(1).default("default"),
    /** `copy` (default) stands alone; `overlay` is made at once and needs the template, unchanged, for as long as it lives. */
    mode: z.enum(["copy", "overlay"]).default("copy"),
    /** The template's format. Default: what libvirt says of it. */
    format: FormatSchema.optional(),
    /** The size of the machine's disk, never less than the template's: it may grow later, also while the guest runs, and never shrinks. Default: the template's. */
    capacity: SizeSchema.optional(),
  })
  .refine(({ path, volume }) => (path === undefined) !== (volume === undefined), "give exactly one of `path` and `volume`");

/** A template: a path (with a slash at its start), a volume's name in the pool `default`, an imported disk, or an object. Canonicalised to the object. */
export const ImageSchema = z
  .union([TextSchema.min(1), DiskRefSchema, ImageObjectSchema], {
    error: "a template is a path, a volume's name, an imported disk, or an object with exactly one of `path` and `volume`",
  })
  .transform((image): z.output<typeof ImageObjectSchema> => {
    const defaults = { pool: "default", mode: "copy" } as const;
    if (typeof image === "string") return { ...defaults, ...(image.startsWith("/") ? { path: image } : { volume: image }) };
    if (!("diskId" in image)) return image;
    const { diskId, path, format = "qcow2", pool = "default" } = image;
    return { ...defaults, ...(path === undefined ? { volume: `${diskId}.${format}` } : { path }), format, pool };
  });

const FurtherDiskSchema = z
  .strictObject({
    /** An imported disk. Exactly one of `disk`, `size`, `path` and `volume` is given; of a CD-ROM drive that is empty none. */
    disk: DiskRefSchema.optional(),
    /** A blank disk of this size, made for the machine and deleted with it: a number of bytes, or a string such as `40GiB`. It may grow later, also while the guest runs, and never shrinks. */
    size: SizeSchema.optional(),
    /** Of a blank disk, required: its name within the machine. It ties the disk to its data, whatever its place in the list. */
    name: VolumeNameSchema.optional(),
    /** A file or a block device that exists on the host: absolute path. It is never deleted. */
    path: PathSchema.optional(),
    /** A volume that exists in `pool`. It is never deleted. */
    volume: z.string().min(1).optional(),
    /** The pool of a blank disk or of `volume`. Default `default`. */
    pool: z.string().min(1).default("default"),
    /** Default: a blank disk is qcow2, a CD-ROM raw; of what exists, what libvirt says of it. */
    format: FormatSchema.optional(),
    /** Default `disk`. A `cdrom` is read-only; its medium can be changed, put in and taken out while the guest runs. */
    device: z.enum(["disk", "cdrom"]).default("disk"),
    /**
     * Default: the machine's `bus`; a CD-ROM is on sata (q35) or ide (pc). Disks on virtio, and on scsi where the machine has one there already, come
     * and go while the guest runs. `scsi` is virtio-scsi. NVMe disks are not offered: libvirt has none that is made from a file.
     */
    bus: BusSchema.optional(),
    ...serving,
    /** Whether the guest may only read it. Default false; a CD-ROM always is. */
    readOnly: z.boolean().default(false),
    /** Whether other machines have it too, each of which must say so; the guests must know how to share it. Only of raw disks. Default false. */
    shareable: z.boolean().optional(),
  })
  .refine((disk) => {
    const given = [disk.disk, disk.size, disk.path, disk.volume].filter((kind) => kind !== undefined).length;
    return given === 1 || (given === 0 && disk.device === "cdrom");
  }, "give exactly one of `disk`, `size`, `path` and `volume`")
  .refine(
    (disk) => (disk.size === undefined) === (disk.name === undefined),
    "a blank disk has a `size` and a `name`, and no other disk has either",
  );

/** Unicast addresses only: the lowest bit of the first byte is 0. */
const MacSchema = z
  .string()
  .regex(
    /^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$/,
    'a MAC address is six pairs of hex digits, such as "52:54:00:12:34:56", and no multicast address',
  )
  .transform((mac) => mac.toLowerCase());

const NetworkSchema = z
  .strictObject({
    /** A libvirt network. Exactly one of `network`, `bridge`, `direct` and `type: "user"` is given. */
    network: z.string().min(1).optional(),
    /** A bridge of the host. */
    bridge: z
      .string()
      .regex(/^[^\s/]{1,15}$/, "a bridge's name is 1 to 15 characters without spaces and slashes")
      .optional(),
    /** A network device of the host, which the machine shares by macvtap: the guest and its host do not see each other. */
    direct: z
      .string()
      .regex(/^[^\s/]{1,15}$/, "a network device's name is 1 to 15 characters without spaces and slashes")
      .optional(),
    /** Of `direct`: how it is shared. Default `bridge`: machines on one device see each other. */
    mode: z.enum(["bridge", "vepa", "private", "passthrough"]).optional(),
    /** QEMU's own NAT, which needs no privilege: the guest reaches out, and nobody reaches it. */
    type: z.literal("user").optional(),
    /** Default: `52:54:00` and a hash of the machine's identity and the interface's place in the list, so that it never changes. */
    mac: MacSchema.optional(),
    /** What the guest sees. Default: `virtio` where `bus` is, else `e1000e` (`e1000` on a `pc`), which every guest system has a driver for. */
    model: z.enum(["virtio", "e1000e", "e1000", "rtl8139"]).optional(),
    /** VLAN tags: one, or several for a trunk that the guest takes apart. Open vSwitch knows them, and `direct` by `passthrough` of a virtual function (SR-IOV); before libvirt 11 a Linux bridge refuses the start. */
    vlan: z.array(z.number().int().min(0).max(4095)).min(1).max(64).optional(),
    /** Whether the cable is in. Default `up`. */
    link: z.enum(["up", "down"]).optional(),
    /** Bytes of the largest packet. Default: the network's. */
    mtu: z.number().int().min(68).max(65_535).optional(),
    /** Queues of a `virtio` interface, for guests with several CPUs. Default 1. */
    queues: z.number().int().min(1).max(256).optional(),
  })
  .refine(
    (network) => [network.network, network.bridge, network.direct, network.type].filter((kind) => kind !== undefined).length === 1,
    'give exactly one of `network`, `bridge`, `direct` and `type: "user"`',
  )
  .refine(({ mode, direct }) => mode === undefined || direct !== undefined, "a `mode` goes with `direct` only")
  .refine(({ queues, model }) => queues === undefined || model === "virtio", 'several `queues` need the `model: "virtio"`');

/** The CPUs of a host: ascending ranges with commas between them, canonicalised as libvirt writes them. */
const CpuSetSchema = z.string().transform((cpus, context) => {
  const ranges = cpus.split(",").map((range) => /^\s*(\d{1,4})(?:-(\d{1,4}))?\s*$/.exec(range));
  const numbers = new Set<number>();
  for (const range of ranges) {
    const [first, last] = [Number(range?.[1]), Number(range?.[2] ?? range?.[1])];
    if (!range || last < first) {
      context.addIssue({ code: "custom", message: `"${cpus}" names no CPUs of the host: write numbers and ranges, such as "0-3,8"` });
      return z.NEVER;
    }
    for (let cpu = first; cpu <= last; cpu++) numbers.add(cpu);
  }
  const ascending = [...numbers].toSorted((one, other) => one - other);
  const starts = ascending.filter((cpu) => !numbers.has(cpu - 1));
  const ends = ascending.filter((cpu) => !numbers.has(cpu + 1));
  return starts.map((start, index) => (start === ends[index] ? `${start}` : `${start}-${ends[index]}`)).join(",");
});

/** Entries of one SMBIOS table, as the old hypervisor showed them. */
const smbiosEntry = LineSchema.trim().min(1).max(1000).optional();
const SmbiosSchema = z.strictObject({
  /** The system's own table; its UUID is the machine's. */
  system: z
    .strictObject({
      manufacturer: smbiosEntry,
      product: smbiosEntry,
      version: smbiosEntry,
      serial: smbiosEntry,
      sku: smbiosEntry,
      family: smbiosEntry,
    })
    .optional(),
  baseBoard: z
    .strictObject({
      manufacturer: smbiosEntry,
      product: smbiosEntry,
      version: smbiosEntry,
      serial: smbiosEntry,
      asset: smbiosEntry,
      location: smbiosEntry,
    })
    .optional(),
  chassis: z
    .strictObject({ manufacturer: smbiosEntry, version: smbiosEntry, serial: smbiosEntry, asset: smbiosEntry, sku: smbiosEntry })
    .optional(),
});

const seedText = z
  .string()
  .max(1024 * 1024)
  .optional();
const CloudInitSchema = z.strictObject({
  /** `user-data`: most often a text that begins with `#cloud-config`. Default: an empty one. */
  userData: seedText,
  /** `meta-data` in YAML. Default: the machine's UUID as `instance-id` and its name as `local-hostname`. */
  metaData: seedText,
  /** `network-config`. Default: none, so the guest's own default. */
  networkData: seedText,
  /** `vendor-data`. Default: none. */
  vendorData: seedText,
  /** The directory pool that gets the seed, a small ISO image named `<machine>-seed-<hash>.iso`. Default `default`. */
  pool: z.string().min(1).default("default"),
  /**
   * What a changed seed does. `update` (default) puts the new one into the drive, where cloud-init sees it at the guest's next start and runs again only
   * when the `instance-id` changed. `ignore` keeps the seed that the machine was made with. `replace` makes the machine anew.
   */
  onChange: z.enum(["update", "ignore", "replace"]).default("update"),
});

const LoaderSchema = z.strictObject({
  /** Absolute path of the firmware's code on the host. */
  path: PathSchema,
  /** Absolute path of what the machine's NVRAM is made from. Default: libvirt knows it for firmware that its descriptors name. */
  nvramTemplate: PathSchema.optional(),
  /** Absolute path of the machine's own NVRAM, for one that came along with it; it is deleted with the machine. Default: libvirt's folder. */
  nvram: PathSchema.optional(),
});

const XmlPatchSchema = z
  .strictObject({
    /**
     * Which element of the domain: names from its children down, such as `devices/video/model`. `[@type='vnc']` or `[target/@dev='sda']` after a name
     * chooses among several. Empty: the domain itself.
     */
    path: TextSchema.max(1000),
    /** Attributes to write. */
    set: z.record(z.string().regex(/^[A-Za-z_][\w:.-]*$/, "an attribute's name is letters, digits and _ : . -"), TextSchema).optional(),
    /** The element's text. */
    text: TextSchema.optional(),
    /** An element, as XML, that becomes the last child. Elements on the way to it are made where they are missing. */
    add: TextSchema.min(1).max(100_000).optional(),
    /** Removes the element. */
    remove: z.literal(true).optional(),
  })
  .refine(
    ({ set, text, add, remove }) => [set, text, add, remove].filter((kind) => kind !== undefined).length === 1,
    "give exactly one of `set`, `text`, `add` and `remove`",
  );

const AdoptSchema = z
  .strictObject({
    /** The machine's UUID in libvirt. Exactly one of `uuid` and `name` is given. */
    uuid: z
      .string()
      .regex(/^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$/, "a UUID is 32 hex digits in five groups")
      .transform((uuid) => uuid.toLowerCase())
      .optional(),
    /** The machine's name in libvirt. */
    name: LineSchema.min(1).optional(),
  })
  .refine(({ uuid, name }) => (uuid === undefined) !== (name === undefined), "give exactly one of `uuid` and `name`");

const timeoutSeconds = z.number().positive().max(86_400);
const WaitSchema = z.discriminatedUnion("type", [
  z.strictObject({
    /** Until the machine has an IPv4 address that others can reach it at, by its lease, its agent or its host's neighbour table. */
    type: z.literal("ipv4"),
    /** Default 300. */
    timeoutSeconds: timeoutSeconds.default(300),
  }),
  z.strictObject({
    /** Until the machine has an IPv6 address that others can reach it at; a link-local one is none. */
    type: z.literal("ipv6"),
    /** Default 300. */
    timeoutSeconds: timeoutSeconds.default(300),
  }),
  z.strictObject({
    /** Until QEMU's guest agent answers from inside the guest. */
    type: z.literal("agent"),
    /** Default 300. */
    timeoutSeconds: timeoutSeconds.default(300),
  }),
  z.strictObject({
    /** Until the guest wrote a text to its first serial port, since its last start. */
    type: z.literal("serial"),
    text: z.string().min(1).max(1000),
    /** Default 300. */
    timeoutSeconds: timeoutSeconds.default(300),
  }),
  z.strictObject({
    /** For some time. */
    type: z.literal("delay"),
    seconds: timeoutSeconds,
  }),
]);
export type Wait = z.output<typeof WaitSchema>;

/** The arguments of `VirtualMachine`. */
export const VirtualMachineSchema = z.strictObject({
  /** The host that runs the machine. Default: its disk's, else the stack's configuration `virtlift:host`. */
  host: HostSchema.optional(),
  /** The machine's name in libvirt. Default: the logical name. Another name is another machine. */
  name: z
    .string()
    .regex(
      /^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$/,
      "a machine's name is 1 to 100 letters, digits and . _ + -, beginning with a letter or digit",
    )
    .optional(),
  /** The machine's UUID, also in its SMBIOS: give the old one where a licence hangs on it. Default: made from the resource's identity. */
  uuid: z
    .string()
    .regex(
      /^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$/,
      'a UUID is 32 hex digits, such as "5f2c1c8e-3f7a-4d0b-9a43-1f1f0c6a8c01"',
    )
    .transform((uuid) => uuid.toLowerCase())
    .optional(),
  /** The disk that the machine boots from, made by `ImportedDisk` or there already; it is never deleted with the machine. Exactly one of `importedDisk` and `image` is given. */
  importedDisk: DiskRefSchema.optional(),
  /** A template that the machine's own boot disk is made from; that disk is deleted with the machine. */
  image: ImageSchema.optional(),
  /** How the boot disk is served. Default: as every disk is, and booted first. */
  bootDisk: z.strictObject(serving).optional(),
  /** Further disks, in the order in which the guest sees them. Default: none. */
  disks: z.array(FurtherDiskSchema).max(64).default([]),
  /** The guest's CPUs, more of them also while it runs, up to `maxVcpus`. Default 1. */
  vcpus: z.number().int().min(1).max(1024).default(1),
  /** How many CPUs it can be given while it runs. Default: `vcpus`. */
  maxVcpus: z.number().int().min(1).max(1024).optional(),
  /** How the CPUs look to the guest: their product is `maxVcpus`. Default: each is a socket. Licences and Windows desktops count sockets. */
  cpuTopology: z
    .strictObject({
      sockets: z.number().int().min(1).max(1024),
      cores: z.number().int().min(1).max(1024),
      threads: z.number().int().min(1).max(64).default(1),
    })
    .optional(),
  /** Which of the host's CPUs each of the guest's may run on, by the number of the guest's: `{ "0": "2-3" }`. Default: any. */
  cpuPinning: z.record(z.string().regex(/^\d{1,4}$/, "a CPU of the guest is a number from 0"), CpuSetSchema).optional(),
  /** What the guest gets, changed also while it runs, up to `maxMemoryMiB`. Default 2048. */
  memoryMiB: z.number().int().min(16).max(16_777_216).default(2048),
  /** How much memory it can be given while it runs; the guest needs the balloon's driver. Default: `memoryMiB`. */
  maxMemoryMiB: z.number().int().min(16).max(16_777_216).optional(),
  /** Whether memory can be taken from the guest and given back. Default true. */
  ballooning: z.boolean().optional(),
  /** The size of the huge pages that the guest's memory is made of: `2MiB`, `1GiB`, or `default` for the host's. They must be reserved on the host. Default: ordinary pages. */
  hugepages: z.enum(["default", "2MiB", "1GiB"]).optional(),
  /**
   * What runs inside: `linux`, `windows`, or an id of libosinfo such as `win11` or `http://microsoft.com/win/11`. A Windows guest gets its clock in local
   * time and, with KVM, Hyper-V's enlightenments. Default: no Windows.
   */
  guest: LineSchema.min(1).max(200).optional(),
  /** What the guest's clock shows at its start: `utc`, or the host's `localtime`. Default: `localtime` for Windows, `utc` for others. */
  clock: z.enum(["utc", "localtime"]).optional(),
  /** Whether the guest is told how to work with its hypervisor the way Windows knows it; needs KVM. Default: for Windows with KVM. */
  hyperv: z.boolean().optional(),
  /** The chipset. `q35` (default) is the current one, `pc` the old one, for guests that know no PCI Express. The version is the host's newest, and then kept. */
  machine: z.enum(["q35", "pc"]).default("q35"),
  /** As the guest was installed. Default `bios`. */
  firmware: z.enum(["bios", "uefi"]).default("bios"),
  /** UEFI with Secure Boot and Microsoft's keys; needs `q35`. Default false. */
  secureBoot: z.boolean().default(false),
  /** UEFI's files, where the host's choice is not the right one; needs `firmware: "uefi"`. Default: what the host's firmware descriptors say. */
  loader: LoaderSchema.optional(),
  /** Whether it has a TPM 2.0, which is emulated by the host's swtpm. Its state is deleted with the machine. Default false. */
  tpm: z.boolean().optional(),
  /** What the guest reads of its hardware's maker: values carried over from the old machine, where licences hang on them. Default: QEMU's. */
  smbios: SmbiosSchema.optional(),
  /** What CPU the guest sees. Default: `host-passthrough` with KVM, `maximum` without. A `model` goes with `custom` only. */
  cpu: z
    .strictObject({
      mode: z.enum(["host-passthrough", "host-model", "maximum", "custom"]),
      /** libvirt's name of a model, such as `Skylake-Server`. */
      model: LineSchema.min(1).optional(),
      /** Features by libvirt's names, over what the mode gives: `{ vmx: "require", "tsx-ctrl": "disable" }`. */
      features: z
        .record(
          z.string().regex(/^[a-z0-9][a-z0-9._-]*$/i, "a CPU feature is one word, such as `vmx`"),
          z.enum(["force", "require", "optional", "disable", "forbid"]),
        )
        .optional(),
      /** Of `host-passthrough` and `maximum`: false lets features through that keep the guest from moving to another host. Default true. */
      migratable: z.boolean().optional(),
    })
    .refine(
      ({ mode, migratable }) => migratable === undefined || mode === "host-passthrough" || mode === "maximum",
      "`migratable` goes with the modes `host-passthrough` and `maximum` only",
    )
    .refine(
      ({ mode, model }) => (mode === "custom") === (model !== undefined),
      "a `model` goes with the mode `custom`, and `custom` needs one",
    )
    .optional(),
  /** `kvm`, or `qemu` for emulation, which is much slower. Default: `kvm` where the host offers it. */
  domainType: z.enum(["kvm", "qemu", "test"], { error: "it is `kvm` or `qemu`" }).optional(),
  /** What the disks hang on. Default `sata`, which every guest system has a driver for; `virtio` is faster where the guest has its drivers. */
  bus: BusSchema.default("sata"),
  /** The screen, served on the host: `vnc` (default), `spice` or `none`, and the host's address that it listens on, `127.0.0.1` by default. */
  graphics: z
    .strictObject({
      type: z.enum(["vnc", "spice", "none"]),
      /** Default `127.0.0.1`: reached through SSH. It asks for no password. */
      listen: z
        .string()
        .regex(/^[0-9A-Fa-f.:]+$/, "an address to listen on is an IP address")
        .optional(),
    })
    .optional(),
  /** The graphics card. Default `vga`, which every guest system has a driver for; `none` without `graphics`. */
  video: z.enum(["vga", "virtio", "qxl", "bochs", "cirrus", "none"]).optional(),
  /** Whether the guest gets random numbers from its host. Default true. */
  rng: z.boolean().optional(),
  /** What happens when the guest stops feeding its watchdog, an i6300esb. Default: it has none. */
  watchdog: z.enum(["reset", "shutdown", "poweroff", "pause", "none", "dump", "inject-nmi"]).optional(),
  /** A seed for cloud-init's NoCloud source, on a CD-ROM of its own with the label `cidata`. Mark it as a secret where it holds one. Default: none. */
  cloudInit: CloudInitSchema.optional(),
  /** The machine's network interfaces, in order. Default: none. */
  networks: z.array(NetworkSchema).max(28).default([]),
  /** Default `running`. A machine that stopped or was paused by somebody else is brought back by the next `up` after a refresh. */
  powerState: z.enum(["running", "stopped", "paused"]).default("running"),
  /** Whether it starts with its host. Default false. */
  autostart: z.boolean().default(false),
  /** One line for people. */
  title: LineSchema.trim().min(1).optional(),
  /** Text for people. */
  description: TextSchema.trim().min(1).optional(),
  /** Names and values that are kept in the machine's metadata. */
  tags: z.record(LineSchema.min(1), LineSchema).default({}),
  /** What `up` waits for, one after the other, whenever it has started the machine. Default: nothing. */
  waitFor: z.array(WaitSchema).default([]),
  /** What a change does that a running guest cannot take: `fail` (default) refuses it in preview, `restart` restarts the guest, `defer` leaves it for the guest's next start. */
  onRestartRequired: z.enum(["fail", "restart", "defer"]).default("fail"),
  /** How long a guest may take to shut down when it is asked to. Default 120. */
  shutdownTimeoutSeconds: timeoutSeconds.default(120),
  /** What happens to a guest that does not shut down in time: `fail` (default) leaves it running and says so, `cut` cuts its power. A deleted machine is always cut. */
  onShutdownTimeout: z.enum(["fail", "cut"]).default("fail"),
  /**
   * Absolute path, on the host, of the file that keeps what the guest writes to its first serial port since its last start. Its folder exists.
   * Default: `<name>-serial0.log` where libvirt keeps the logs of machines, `/var/log/libvirt/qemu`.
   */
  serialLog: PathSchema.optional(),
  /** Changes to the domain's XML, in their order, for what no property says. Default: none. */
  xmlPatches: z.array(XmlPatchSchema).max(100).optional(),
  /**
   * A machine that is on the host already and is nobody's: it becomes this one, with its UUID, its name and its addresses, and is not restarted. The preview
   * says what will change, what no property knows and stays, and what goes. It counts at creation only.
   */
  adopt: AdoptSchema.optional(),
  /** Rules of the preview that are to have another level, or none, for this machine: by id, each with a reason that is kept. Default: as the rules say. */
  preflight: PreflightSchema.optional(),
  /** `<organization>/<project>/<stack>/<logical name>`: set by the class, the identity of the machine on the host. */
  origin: z
    .string()
    .regex(/^[^/]+\/[^/]+\/[^/]+\/.+$/, ORIGIN_FAULT)
    .refine(fitsXml, ORIGIN_FAULT),
});
export type VirtualMachineArgs = z.output<typeof VirtualMachineSchema>;
