/** The shapes of what users declare of a virtual machine. The one source of types and documentation of its arguments. */
import { z } from "zod";
import { fitsXml } from "../libvirt/render.ts";
import { PreflightSchema } from "./preflight/rule.ts";
import { DiskRefSchema, HostSchema, SizeSchema, VolumeNameSchema } from "./schema.ts";

const TextSchema = z.string().refine(fitsXml, "the text holds a control character, which libvirt cannot store");
const LineSchema = TextSchema.refine((text) => !/[\r\n]/.test(text), "the text is to be one line");
const PathSchema = TextSchema.regex(/^\//, "the path on the host is to be absolute, beginning with /");
const BusSchema = z.enum(["virtio", "sata", "scsi", "ide"]);
const FormatSchema = z.enum(["qcow2", "raw"]);

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
    /** Grow the machine's disk to this size; never less than the template's. Default: the template's virtual size. */
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
    /** An imported disk. Exactly one of `disk`, `size`, `path` and `volume` is given. */
    disk: DiskRefSchema.optional(),
    /** A blank disk of this size, made for the machine and deleted with it: a number of bytes, or a string such as `40GiB`. Never changed afterwards. */
    size: SizeSchema.optional(),
    /** Of a blank disk, required: its name within the machine. It ties the disk to its data, whatever its place in the list. */
    name: VolumeNameSchema.optional(),
    /** A file that exists on the host: absolute path. It is never deleted. */
    path: PathSchema.optional(),
    /** A volume that exists in `pool`. It is never deleted. */
    volume: z.string().min(1).optional(),
    /** The pool of a blank disk or of `volume`. Default `default`. */
    pool: z.string().min(1).default("default"),
    /** Default: a blank disk is qcow2, a CD-ROM raw; of what exists, what libvirt says of it. */
    format: FormatSchema.optional(),
    /** Default `disk`. A `cdrom` is read-only. */
    device: z.enum(["disk", "cdrom"]).default("disk"),
    /** Default: the machine's `bus`; a CD-ROM is on sata (q35) or ide (pc). */
    bus: BusSchema.optional(),
    /** The serial number that the guest reads, at most 20 characters. Default: none. */
    serial: z
      .string()
      .regex(/^[A-Za-z0-9_.+-]{1,20}$/, "a disk's serial number is 1 to 20 letters, digits and _ . + -")
      .optional(),
    /** Whether the guest may only read it. Default false; a CD-ROM always is. */
    readOnly: z.boolean().default(false),
  })
  .refine(
    (disk) => [disk.disk, disk.size, disk.path, disk.volume].filter((kind) => kind !== undefined).length === 1,
    "give exactly one of `disk`, `size`, `path` and `volume`",
  )
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
    /** A libvirt network. Exactly one of `network`, `bridge` and `type: "user"` is given. */
    network: z.string().min(1).optional(),
    /** A bridge of the host. */
    bridge: z
      .string()
      .regex(/^[^\s/]{1,15}$/, "a bridge's name is 1 to 15 characters without spaces and slashes")
      .optional(),
    /** QEMU's own NAT, which needs no privilege: the guest reaches out, and nobody reaches it. */
    type: z.literal("user").optional(),
    /** Default: `52:54:00` and a hash of the machine's identity and the interface's place in the list, so that it never changes. */
    mac: MacSchema.optional(),
    /** What the guest sees. Default: `virtio` where `bus` is, else `e1000e` (`e1000` on a `pc`), which every guest system has a driver for. */
    model: z.enum(["virtio", "e1000e", "e1000", "rtl8139"]).optional(),
  })
  .refine(
    (network) => [network.network, network.bridge, network.type].filter((kind) => kind !== undefined).length === 1,
    'give exactly one of `network`, `bridge` and `type: "user"`',
  );

const timeoutSeconds = z.number().positive().max(86_400);
const WaitSchema = z.discriminatedUnion("type", [
  z.strictObject({
    /** Until the machine has an IPv4 address that others can reach it at, by its lease or its agent. */
    type: z.literal("ipv4"),
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
  /** Further disks, in the order in which the guest sees them. Default: none. */
  disks: z.array(FurtherDiskSchema).max(64).default([]),
  /** Default 1. */
  vcpus: z.number().int().min(1).max(1024).default(1),
  /** Default 2048. */
  memoryMiB: z.number().int().min(16).max(16_777_216).default(2048),
  /** The chipset. `q35` (default) is the current one, `pc` the old one, for guests that know no PCI Express. The version is the host's newest, and then kept. */
  machine: z.enum(["q35", "pc"]).default("q35"),
  /** As the guest was installed. Default `bios`. */
  firmware: z.enum(["bios", "uefi"]).default("bios"),
  /** UEFI with Secure Boot and Microsoft's keys; needs `q35`. Default false. */
  secureBoot: z.boolean().default(false),
  /** What CPU the guest sees. Default: `host-passthrough` with KVM, `maximum` without. A `model` goes with `custom` only. */
  cpu: z
    .strictObject({
      mode: z.enum(["host-passthrough", "host-model", "maximum", "custom"]),
      /** libvirt's name of a model, such as `Skylake-Server`. */
      model: LineSchema.min(1).optional(),
    })
    .refine(
      ({ mode, model }) => (mode === "custom") === (model !== undefined),
      "a `model` goes with the mode `custom`, and `custom` needs one",
    )
    .optional(),
  /** `kvm`, or `qemu` for emulation, which is much slower. Default: `kvm` where the host offers it. */
  domainType: z.enum(["kvm", "qemu", "test"]).optional(),
  /** What the disks hang on. Default `sata`, which every guest system has a driver for; `virtio` is faster where the guest has its drivers. */
  bus: BusSchema.default("sata"),
  /** The machine's network interfaces, in order. Default: none. */
  networks: z.array(NetworkSchema).max(28).default([]),
  /** Default `running`. A machine that stopped by itself is started again by the next `up` after a refresh. */
  powerState: z.enum(["running", "stopped"]).default("running"),
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
  /** Rules of the preview that are to have another level, or none, for this machine: by id, each with a reason that is kept. Default: as the rules say. */
  preflight: PreflightSchema.optional(),
  /** `<organization>/<project>/<stack>/<logical name>`: set by the class, the identity of the machine on the host. */
  origin: z
    .string()
    .regex(/^[^/]+\/[^/]+\/[^/]+\/.+$/)
    .refine(fitsXml),
});
export type VirtualMachineArgs = z.output<typeof VirtualMachineSchema>;
