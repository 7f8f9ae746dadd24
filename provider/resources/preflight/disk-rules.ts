/** The rules about an imported disk: its source, its place, and the other disks of its deployment. Pure. */
import { DiskError } from "../../errors.ts";
import type { OvfPackage, PackagedDisk } from "../../image/ova.ts";
import { quoted } from "../../image/words.ts";
import { formatBytes, formatKind, formatSeconds } from "../../transfer/progress.ts";
import type { VolumeFile } from "../../transfer/probe.ts";
import type { DiskInputs } from "../imported-disk.ts";
import type { MachinePackage } from "../machine-description.ts";
import { capacityOf, type DiskFacts, neededBytes } from "./disk-facts.ts";
import type { Finding, Rule } from "./rule.ts";
import type { SourceFacts } from "./source-facts.ts";

/** Since libvirt 6.7.0 a sparse stream may end in a device. Source: libvirt's NEWS. */
const SPARSE_DEVICES_VERSION = 6_007_000;

/** File systems without hard links, which are what a volume is published by. Source: Linux, fs/fat and fs/exfat have no `link`. */
const WITHOUT_LINKS: ReadonlySet<string> = new Set(["vfat", "msdos", "exfat"]);

/** A rule about a source that could be read. */
const ofSource =
  (test: (source: SourceFacts, facts: DiskFacts) => readonly Finding[]): Rule<DiskFacts>["test"] =>
  (facts) =>
    facts.source instanceof DiskError ? [] : test(facts.source, facts);

/** A rule about the machine of a package, which its first disk speaks for. */
const ofMachine = (test: (packed: MachinePackage) => readonly string[]): Rule<DiskFacts>["test"] =>
  ofSource(({ packed }) => {
    if (packed === undefined || !isFirst(packed)) return [];
    return test(packed.package).map((sentence) => ({ property: "source", sentence }));
  });

function isFirst(packed: { readonly package: MachinePackage; readonly disk: PackagedDisk }): boolean {
  return packed.package.disks.find(({ place }) => place !== undefined)?.index === packed.disk.index;
}

/** A VMX never has one. */
function hasManifests(machine: MachinePackage): machine is OvfPackage {
  return "manifest" in machine;
}

/** Hardware that the package's machine had and that has no field of its own. */
const others = ({ system }: MachinePackage, isWanted: (words: string) => boolean): readonly string[] =>
  system.others.filter((words) => !/vmware\.vmci/i.test(words)).filter(isWanted);

const isPassthrough = (words: string): boolean => /passthrough|sriov/i.test(words);

export const DISK_RULES: readonly Rule<DiskFacts>[] = [
  {
    id: "virtlift/source-missing",
    level: "block",
    summary: "The source, or a file that it needs, is not there or cannot be read.",
    remedy: "Mend the path, or the permission.",
    test: ({ source }) =>
      source instanceof DiskError && source.step === "source" ? [{ property: "source", sentence: source.message }] : [],
  },
  {
    id: "virtlift/source-refused",
    level: "block",
    summary:
      "The image is damaged, truncated, encrypted, of a kind that is not read, or refers to other files (a backing file, an extent by its path, a snapshot's parent); or the package does not match its manifest.",
    remedy: "Export the machine again, without snapshots. What an image says of itself is never believed over its bytes.",
    test: ({ source }) =>
      source instanceof DiskError && source.step !== "source" ? [{ property: "source", sentence: source.message }] : [],
  },
  {
    id: "virtlift/volume-taken",
    level: "block",
    summary: "A volume of this name is in the pool, and it is not this disk.",
    remedy:
      'Choose another `name`, or remove the volume. One that was imported for this disk by another checkout, or by a state that was lost, can be taken over by `source: { hostPath: "...", mode: "adopt" }`. Nothing is ever overwritten.',
    test: ({ inputs, host, place }) => (place.file ? [{ property: "name", sentence: takenRefusal(inputs, host.label, place.file) }] : []),
  },
  {
    id: "virtlift/volume-twice",
    level: "block",
    summary: "Two disks of this deployment are to lie at the same path.",
    remedy: "Choose another `name` for one of them.",
    test: ({ inputs, host, place, siblings }) =>
      siblings
        .filter(({ path }) => path === inputs.path && place.file === undefined)
        .map(({ origin }) => ({
          property: "name",
          sentence: `${origin} is to lie at ${inputs.path} on ${host.label} too: choose another \`name\` for one of them`,
        })),
  },
  {
    id: "virtlift/volume-in-use",
    level: "block",
    summary: "A machine of the host names the disk's path as its own, though nothing of ours lies there.",
    remedy: "Choose another `name`.",
    test: ({ inputs, host, users }) =>
      users.map((user) => ({
        property: "name",
        sentence: `the machine ${user} on ${host.label} uses ${inputs.path}: choose another \`name\``,
      })),
  },
  {
    id: "virtlift/device-format",
    level: "block",
    summary: "The pool's volumes are devices, and the format is not raw.",
    remedy: 'Set `format: "raw"`, or choose another pool.',
    test: ({ inputs, host, place }) =>
      place.pool.isBlock && inputs.format !== "raw"
        ? [
            {
              property: "format",
              sentence: `the volumes of pool ${place.pool.name} on ${host.label} are devices, which hold a raw disk: set \`format: "raw"\`, or choose another pool`,
            },
          ]
        : [],
  },
  {
    id: "virtlift/device-libvirt",
    level: "block",
    summary: "The pool's volumes are devices, and the host's libvirt is too old to write a sparse stream to one.",
    remedy: "Update libvirt on the host to 6.7 or newer, or choose another pool.",
    test: ({ host, place }) =>
      place.pool.isBlock && host.libvirtVersion < SPARSE_DEVICES_VERSION
        ? [
            {
              property: "pool",
              sentence: `the volumes of pool ${place.pool.name} on ${host.label} are devices, and libvirt there is older than 6.7: update it, or choose another pool`,
            },
          ]
        : [],
  },
  {
    id: "virtlift/partition-name",
    level: "block",
    summary: "The pool is a disk whose volumes are partitions, and partitions are named by their number.",
    remedy: "Set the `name` that the sentence says.",
    test: ({ inputs, host, place, givenName }) =>
      givenName !== undefined && givenName !== inputs.volumeName
        ? [
            {
              property: "name",
              sentence: `a volume of the disk pool ${place.pool.name} on ${host.label} has its partition's name, and the next one is ${givenName}: set \`name: "${givenName}"\``,
            },
          ]
        : [],
  },
  {
    id: "virtlift/upload-stream",
    level: "info",
    summary:
      "No program can write the disk on the host, so its bytes go through libvirt's own upload stream, and are read back to be compared.",
    remedy: "For the faster way, log in as somebody who may write to the pool's folder, or set `sudo: true` on the host.",
    test: ({ inputs, place }) => {
      if (place.uploadReason === undefined) return [];
      const stampless =
        inputs.format === "raw" ? "; a raw volume then carries no stamp, and is known as ours by the stack's state alone" : "";
      const sentence = `the bytes go through libvirt's upload stream, since ${place.uploadReason}; all is read back to be compared${stampless}`;
      return [{ property: "pool", sentence }];
    },
  },
  {
    id: "virtlift/pool-file-system",
    level: "block",
    summary: "The pool's folder lies on a file system that takes no volume: it is mounted read-only, or has no hard links (vfat, exFAT).",
    remedy: "Mount it for writing, or choose a pool on another file system.",
    test: ({ inputs, host, place: { fileSystem, uploadReason } }) => {
      const folder = `${inputs.path.slice(0, inputs.path.lastIndexOf("/"))} on ${host.label}`;
      if (fileSystem?.isReadOnly === true)
        return [{ property: "pool", sentence: `${folder} is mounted read-only: mount it for writing, or choose another pool` }];
      // libvirt's upload stream writes the volume under its own name.
      if (fileSystem === undefined || uploadReason !== undefined || !WITHOUT_LINKS.has(fileSystem.type)) return [];
      const words = "which has no hard links, and a disk is published by one, so that it can overwrite nothing";
      return [{ property: "pool", sentence: `${folder} is a ${fileSystem.type}, ${words}: choose a pool on another file system` }];
    },
  },
  {
    id: "virtlift/verify-without-shell",
    level: "block",
    summary: "The content is to be verified by the host's own qemu-img, which it lacks, or no program may run there.",
    remedy: "Install qemu-utils on the host, or leave out `verify`: what goes through libvirt is read back in any case.",
    test: ({ inputs, host, place }) => {
      if (inputs.verify !== "content") return [];
      if (place.uploadReason !== undefined) {
        const sentence = `the content is read by a program on ${host.label}, and none may run, since ${place.uploadReason}: leave out \`verify\`; all is read back through libvirt anyway`;
        return [{ property: "verify", sentence }];
      }
      if (place.hasQemuImg !== false) return [];
      return [
        {
          property: "verify",
          sentence: `the content is read by qemu-img, which ${host.label} lacks: install qemu-utils there, or leave out \`verify\``,
        },
      ];
    },
  },
  {
    id: "virtlift/raw-compressed",
    level: "block",
    summary: "A raw volume is to be compressed, which raw has no form for.",
    remedy: "Choose the format qcow2, or another layout.",
    test: ({ inputs }) =>
      inputs.layout === "compressed" && inputs.format === "raw"
        ? [{ property: "layout", sentence: "a raw volume cannot be compressed: choose the format qcow2, or another layout" }]
        : [],
  },
  {
    id: "virtlift/capacity-too-small",
    level: "block",
    summary: "The declared capacity is less than the source's virtual size.",
    remedy: "Give at least the source's size: a disk is never cut.",
    test: ofSource(({ virtualSizeBytes }, { inputs: { capacity } }) =>
      capacity !== undefined && capacity < virtualSizeBytes
        ? [
            {
              property: "capacity",
              sentence: `${formatBytes(capacity)} is less than the source's ${formatBytes(virtualSizeBytes)}, and a disk is never cut: give at least ${virtualSizeBytes} bytes`,
            },
          ]
        : [],
    ),
  },
  {
    id: "virtlift/no-room",
    level: "block",
    summary: "The pool has not the room that this disk and the others of this deployment take together, as their layouts need it.",
    remedy: "Make room, choose another pool, or a layout that takes less.",
    test: (facts) => {
      const { inputs, host, place, pending } = facts;
      if (place.freeBytes === undefined) return [];
      const needed = neededBytes(facts);
      const othersBytes = pending.reduce((sum, { pendingBytes }) => sum + pendingBytes, 0);
      if (needed === 0 || needed + othersBytes <= place.freeBytes + place.partBytes) return [];
      const folder = inputs.path.slice(0, inputs.path.lastIndexOf("/"));
      const together =
        othersBytes === 0
          ? `the disk takes up to ${formatBytes(needed)}`
          : `the disk takes up to ${formatBytes(needed)} beside ${formatBytes(othersBytes)} of ${pending.length} other disk${pending.length === 1 ? "" : "s"} of this deployment`;
      const sentence = `${folder} on ${host.label} has ${formatBytes(place.freeBytes)} free and ${together}: make room, or choose another pool`;
      return [{ property: "pool", sentence }];
    },
  },
  {
    id: "virtlift/sector-size",
    level: "block",
    summary: "The disk is partitioned for sectors of 4096 bytes, and machines present 512: the guest finds no partition on it.",
    remedy: "Convert the disk at its source to sectors of 512 bytes.",
    test: ofSource(({ partitions }) =>
      partitions?.sectorBytes === 4096
        ? [
            {
              property: "source",
              sentence:
                "the disk is partitioned for sectors of 4096 bytes, and machines present 512, so its guest would find no partition: convert it at its source",
            },
          ]
        : [],
    ),
  },
  {
    id: "virtlift/passthrough-lost",
    level: "block",
    summary: "The package's machine has devices of its host passed through (PCI, SR-IOV), which do not come along.",
    remedy: "Look whether the guest can do without them, and waive the rule.",
    test: ofMachine((packed) =>
      others(packed, isPassthrough).map(
        (words) =>
          `${words} of the package's machine is a device of its host and does not come along: waive this rule if the guest can do without`,
      ),
    ),
  },
  {
    id: "virtlift/empty-image",
    level: "warn",
    summary: "The image holds no data at all.",
    remedy: "Look whether it is the right one. A blank disk is made with `disks: [{ size, name }]`.",
    test: ofSource(({ dataBytes, path }) =>
      dataBytes === 0 ? [{ property: "source", sentence: `${path} holds no data at all: look whether it is the right image` }] : [],
    ),
  },
  {
    id: "virtlift/size-differs",
    level: "warn",
    summary: "The package says another size of the disk than the image itself. The image's counts.",
    remedy: "Look whether the package is whole, and of one piece.",
    test: ofSource(({ packed, virtualSizeBytes }) => {
      const declared = packed?.disk.capacityBytes;
      if (declared === undefined || declared === virtualSizeBytes) return [];
      const sentence = `the package says that the disk has ${declared} bytes, and the image has ${virtualSizeBytes}, which is what counts: look whether the package is whole`;
      return [{ property: "source", sentence }];
    }),
  },
  {
    id: "virtlift/no-manifest",
    level: "warn",
    summary: "The package has no manifest, or its manifest says nothing about the disk: nothing vouches for its bytes.",
    remedy: "Export it with a manifest, or give `checksum`.",
    test: ofSource(({ packed, digests }) => {
      if (packed === undefined || !hasManifests(packed.package) || digests.every((digest) => digest !== undefined)) return [];
      const reason =
        packed.package.manifest === undefined ? "the package has no manifest" : "the package's manifest does not list the disk";
      return [{ property: "source", sentence: `${reason}, so nothing vouches for its bytes: give \`checksum\`` }];
    }),
  },
  {
    id: "virtlift/no-checksum",
    level: "info",
    summary: "Nothing vouches for the source's bytes: they are taken as they are.",
    remedy: "Give `checksum`.",
    test: ofSource(({ packed, digests }) =>
      !(packed && hasManifests(packed.package)) && digests.some((digest) => digest === undefined)
        ? [{ property: "checksum", sentence: "nothing vouches for the source's bytes: give `checksum`" }]
        : [],
    ),
  },
  {
    id: "virtlift/weak-checksum",
    level: "warn",
    summary: "Only a SHA-1 digest vouches for the source: it shows damage, but no forgery.",
    remedy: "Give `checksum` with SHA-256, or export with a SHA-256 manifest.",
    test: ofSource(({ digests }) =>
      digests.some((digest) => digest?.algorithm === "sha1")
        ? [
            {
              property: "checksum",
              sentence: "only a SHA-1 digest vouches for the source, which shows damage but no forgery: give a sha256",
            },
          ]
        : [],
    ),
  },
  {
    id: "virtlift/vtpm-lost",
    level: "warn",
    summary: "The package's machine has a TPM, whose contents never leave their hypervisor.",
    remedy: "Have the recovery keys of BitLocker or LUKS at hand, or suspend the encryption before the export.",
    test: ofMachine(({ system }) =>
      system.hasVtpm
        ? ["what the TPM of the package's machine holds does not come along: have the recovery keys of its guest's disks at hand"]
        : [],
    ),
  },
  {
    id: "virtlift/nvram-lost",
    level: "warn",
    summary: "The package's machine boots by UEFI, and a package does not carry its boot entries.",
    remedy:
      "Nothing, where the guest has the fallback loader EFI/BOOT/BOOTX64.EFI, as nearly all do; else add the entry in the firmware's menu.",
    test: ofMachine(({ system }) =>
      system.firmware === "efi"
        ? [
            "the boot entries of the package's machine do not come along: its guest boots by the fallback loader EFI/BOOT/BOOTX64.EFI, or not at all",
          ]
        : [],
    ),
  },
  {
    id: "virtlift/usb-lost",
    level: "warn",
    summary: "The package's machine has USB controllers; what is plugged into them does not come along.",
    remedy: "Look whether the guest needs a dongle.",
    test: ofMachine(({ system }) =>
      system.usbControllers.length > 0
        ? [
            `the USB devices of the package's machine (${system.usbControllers.map(quoted).join(", ")}) do not come along: look whether its guest needs any`,
          ]
        : [],
    ),
  },
  {
    id: "virtlift/hardware-lost",
    level: "warn",
    summary: "The package's machine has hardware that is not made anew: serial and parallel ports, sound, floppies, and so on.",
    remedy: "Look whether the guest needs it.",
    test: ofMachine((packed) => {
      const floppies = packed.system.floppies.length > 0 ? ["floppy drive"] : [];
      const lost = [...others(packed, (words) => !isPassthrough(words)), ...floppies];
      return lost.length > 0 ? [`${lost.join(", ")} of the package's machine does not come along: look whether its guest needs it`] : [];
    }),
  },
  {
    id: "virtlift/hot-add-lost",
    level: "warn",
    summary: "The package's machine could get more memory or processors while it ran.",
    remedy: "Give the machine what it will need.",
    test: ofMachine(({ system }) =>
      system.cpuHotAdd || system.memoryHotAdd
        ? ["the package's machine could get more memory or processors while it ran, which does not come along: give it what it will need"]
        : [],
    ),
  },
];

/**
 * What an import is taken to reach at most as long as nothing of its kind was measured, in previews and in the plans of batches: about what 1 Gbit/s
 * carries, and what two cores do that compress nothing and hash at both ends.
 */
export const ASSUMED_BYTES_PER_SECOND = 100 * 1024 * 1024;

interface Rate {
  readonly bytesPerSecond: number;
  readonly basis: string;
}

/** Of those that are known; the first is. */
function slowestOf(rates: readonly [Rate, ...(Omit<Rate, "bytesPerSecond"> & { readonly bytesPerSecond: number | undefined })[]]): Rate {
  let slowest = rates[0];
  for (const { bytesPerSecond, basis } of rates)
    if (bytesPerSecond !== undefined && bytesPerSecond < slowest.bytesPerSecond) slowest = { bytesPerSecond, basis };
  return slowest;
}

/**
 * The line that says what will be done: from where, in what form, where to, how much, and how long. Rates are in bytes per second: the link's is measured,
 * undefined where there is no link; the limit is the run's.
 */
export function describeCopy(
  facts: DiskFacts,
  source: SourceFacts,
  wireBytes: number,
  rates: { readonly link: number | undefined; readonly limit: number | undefined },
): string {
  const { inputs, host } = facts;
  const { bytesPerSecond, basis } = slowestOf([
    { bytesPerSecond: ASSUMED_BYTES_PER_SECOND, basis: "assumed, as nothing was measured that is slower" },
    { bytesPerSecond: rates.link, basis: "as measured on this connection just now" },
    { bytesPerSecond: rates.limit, basis: "to which this run is limited" },
  ]);
  const seconds = Math.max(1, Math.ceil(wireBytes / bytesPerSecond));
  const size = source.virtualSizeBytes === 0 ? "of a size that shows on import" : `${formatBytes(capacityOf(facts) ?? 0)} virtual`;
  const from = `${source.path} (${formatKind(source)}, ${size}) -> ${host.label}:${inputs.path}`;
  if ("hostPath" in inputs.source || "volume" in inputs.source) {
    const mode = "hostPath" in inputs.source ? inputs.source.mode : "copy";
    if (mode === "adopt") return `${from}, adopted as it is: its stamp is written, and nothing is copied`;
    return `${from}, ${mode === "move" ? "moved" : "copied"} on ${host.label} itself, nothing to send`;
  }
  if ("url" in inputs.source && inputs.source.fetch === "host") return `${from}, fetched by ${host.label} itself, nothing to send`;
  if (source.virtualSizeBytes === 0) return `${from}, and how much there is to send shows then, too`;
  return `${from}, about ${formatBytes(wireBytes)} to send, about ${formatSeconds(seconds)} (at ${formatBytes(bytesPerSecond)}/s, ${basis})`;
}

/** Why a disk is not imported to a path where a file is. */
export function takenRefusal({ path, importId }: Pick<DiskInputs, "path" | "importId">, host: string, { stamp }: VolumeFile): string {
  const taken = `${path} exists on ${host} and is not overwritten`;
  if (stamp?.importId !== importId) return `${taken}: choose another \`name\`, or remove it`;
  return `${taken}, since it was imported for a disk of this name that this stack's state does not know: take it over by \`source: { hostPath: "${path}", mode: "adopt" }\`, choose another \`name\`, or remove it`;
}
