/** The rules about a machine, on its own, on its host, and beside the others of its deployment. Pure. */
import { posix } from "node:path";
import type { HostSecurity, MachineOffer } from "../../libvirt/capabilities.ts";
import type { PartitionTable } from "../../image/partitions.ts";
import type { OvfGuest } from "../../image/ovf.ts";
import { ownVolumes } from "../virtual-machine-spec.ts";
import type { FolderStep, HostMachine } from "./host-facts.ts";
import { isWritable, type MachineFacts } from "./machine-facts.ts";
import type { Finding, Rule } from "./rule.ts";
import type { GuestTraits } from "./source-facts.ts";

/** From here on a guest's timers and certificates suffer. */
const MAX_CLOCK_SECONDS = 30;

const bootProperty = ({ inputs }: MachineFacts): string => (inputs.importedDisk ? "importedDisk" : "image");

const diskProperty = (facts: MachineFacts, index: number): string => (index > 0 ? `disks[${index - 1}]` : bootProperty(facts));

/** Who declared a machine of ours. */
const ownerOf = ({ metadata }: { readonly metadata?: { readonly origin: string } | undefined }): string =>
  metadata ? ` (of ${metadata.origin})` : "";

const offered = ({ offer }: MachineFacts): MachineOffer | undefined => (offer === "unsupported" ? undefined : offer);

/** The first libvirt whose Linux bridges take VLAN tags. Source: formatnetwork.html, "Setting VLAN tag". */
const BRIDGES_TAKE_VLAN = 11_000_000;

export const MACHINE_RULES: readonly Rule<MachineFacts>[] = [
  {
    id: "virtlift/name-taken",
    level: "block",
    summary: "A machine of this name is on the host and is not this one.",
    remedy: "Choose another `name`. No machine of somebody else is ever redefined.",
    test: ({ inputs, host, neighbours }) =>
      neighbours
        .filter(({ name }) => name === inputs.name)
        .map((other) => ({
          property: "name",
          sentence: `there is a machine ${other.name}${ownerOf(other)} on ${host.label} already, which is not touched: choose another \`name\``,
        })),
  },
  {
    id: "virtlift/name-twice",
    level: "block",
    summary: "Two machines of this deployment have the same name on the same host.",
    remedy: "Choose another `name` for one of them.",
    test: ({ inputs, host, neighbours, siblings }) =>
      siblings
        .filter(({ name }) => name === inputs.name && !neighbours.some((other) => other.name === name))
        .map(({ origin, name }) => ({
          property: "name",
          sentence: `${origin} is to be named ${name} on ${host.label} too: choose another \`name\` for one of them`,
        })),
  },
  {
    id: "virtlift/machine-made",
    level: "block",
    isFixed: true,
    summary:
      "The machine is on the host already, and this stack's state does not know it: another checkout made it, or the state was lost.",
    remedy: "Set `adopt` to take it over as it runs, or give one of the two stacks another name.",
    test: ({ ofOtherState, host }) => (ofOtherState ? [{ property: "adopt", sentence: otherStateRefusal(ofOtherState, host.label) }] : []),
  },
  {
    id: "virtlift/machine-replaced",
    level: "block",
    isFixed: true,
    summary: "In place of the machine stands another of its UUID: one that somebody else made, or that was made for another resource.",
    remedy:
      "Remove that one by hand to have this one made again, take it over with `adopt` if it bears no mark, or run `pulumi state delete`.",
    test: ({ stranger, host }) => (stranger ? [{ property: "uuid", sentence: strangerRefusal(stranger, host.label, "changed") }] : []),
  },
  {
    id: "virtlift/uuid-taken",
    level: "block",
    summary: "A machine with this UUID is on the host and is not this one.",
    remedy: "Choose another `uuid`, or none: a machine of its own gets one of its own.",
    test: ({ inputs, host, neighbours }) =>
      neighbours
        .filter(({ name, uuid }) => uuid === inputs.uuid && name !== inputs.name)
        .map((other) => ({
          property: "uuid",
          sentence: `the machine ${other.name}${ownerOf(other)} on ${host.label} has the UUID ${other.uuid} already: choose another \`uuid\``,
        })),
  },
  {
    id: "virtlift/uuid-twice",
    level: "block",
    summary: "Two machines of this deployment have the same UUID on the same host.",
    remedy: "Choose another `uuid` for one of them.",
    test: ({ inputs, siblings }) =>
      siblings
        .filter(({ uuid }) => uuid === inputs.uuid)
        .map(({ origin, uuid }) => ({
          property: "uuid",
          sentence: `${origin} is to have the UUID ${uuid} too: choose another \`uuid\` for one of them`,
        })),
  },
  {
    id: "virtlift/mac-taken",
    level: "block",
    summary: "Another machine of the host has the MAC address: two of them break the network for both.",
    remedy: "Choose another `mac`, or leave it out; or remove it from the other machine, once that one is retired.",
    test: ({ inputs, host, neighbours }) =>
      inputs.networks.flatMap(({ mac }, index): readonly Finding[] => {
        const user = neighbours.find(({ interfaces }) => interfaces.some((other) => other.mac === mac));
        if (!user) return [];
        return [
          {
            property: `networks[${index}].mac`,
            sentence: `the machine ${user.name} on ${host.label} has the address ${mac} already: choose another, or remove it there`,
          },
        ];
      }),
  },
  {
    id: "virtlift/mac-twice",
    level: "block",
    summary: "A MAC address is declared for two interfaces of one machine, or of two machines of this deployment.",
    remedy: "Choose another `mac` for one of them, or leave it out.",
    test: ({ inputs, siblings }) =>
      inputs.networks.flatMap(({ mac }, index): readonly Finding[] => {
        const property = `networks[${index}].mac`;
        if (inputs.networks.findIndex((other) => other.mac === mac) < index) {
          return [{ property, sentence: `${mac} is given to two interfaces of this machine: choose another` }];
        }
        const sibling = siblings.find(({ macs }) => macs.includes(mac));
        return sibling ? [{ property, sentence: `${mac} is given to ${sibling.origin} too: choose another for one of them` }] : [];
      }),
  },
  {
    id: "virtlift/disk-taken",
    level: "block",
    summary: "Another machine of the host uses a file that this one is to write to.",
    remedy: "Give the machine a disk of its own. Two guests on one disk destroy its file systems.",
    test: (facts) =>
      facts.inputs.diskPaths.flatMap((path, index): readonly Finding[] => {
        const user = isWritable(facts.inputs, index) && facts.neighbours.find(({ disks }) => disks.some((disk) => disk.path === path));
        if (!user) return [];
        const sentence = `the machine ${user.name} on ${facts.host.label} uses ${path} already: two machines would destroy it`;
        return [{ property: diskProperty(facts, index), sentence }];
      }),
  },
  {
    id: "virtlift/disk-twice",
    level: "block",
    summary: "A disk is declared twice for one machine, or for two machines of this deployment that would both write to it.",
    remedy: "Give each disk to one machine, once.",
    test: (facts) =>
      facts.inputs.diskPaths.flatMap((path, index): readonly Finding[] => {
        if (!isWritable(facts.inputs, index)) return [];
        const property = diskProperty(facts, index);
        if (facts.inputs.diskPaths.indexOf(path) !== index) {
          return [{ property, sentence: `${path} is given to this machine twice: give each disk once` }];
        }
        const sibling = facts.siblings.find(({ writablePaths }) => writablePaths.includes(path));
        if (!sibling || facts.neighbours.some(({ disks }) => disks.some((disk) => disk.path === path))) return [];
        return [{ property, sentence: `${path} is given to ${sibling.origin} too, and two machines would destroy it: give it to one` }];
      }),
  },
  {
    id: "virtlift/own-volume-taken",
    level: "block",
    summary: "A volume that is to be made for the machine exists already and is somebody's.",
    remedy:
      "To keep what is in it, declare it as what exists: a disk by its `path` in place of `size` and `name`, a boot disk as `importedDisk` in place of `image`. Else choose another name, or remove the volume. Nothing is ever overwritten.",
    test: ({ inputs, host, takenVolumes }) =>
      ownVolumes(inputs)
        .filter(({ path }) => takenVolumes.has(path))
        .map(({ path, content }) => {
          const index = inputs.disks.findIndex((disk) => disk.path === path);
          const taken = `${path} exists on ${host.label} and is not overwritten`;
          if (content !== undefined) return { property: "cloudInit", sentence: `${taken}: remove it, or choose another name` };
          const keep =
            index < 0 ? "declare it as `importedDisk` in place of `image`" : "declare it by its `path` in place of `size` and `name`";
          return {
            property: index < 0 ? "image" : `disks[${index}].name`,
            sentence: `${taken}: to keep what is in it ${keep}, else choose another name or remove it`,
          };
        }),
  },
  {
    id: "virtlift/network-missing",
    level: "block",
    summary: "The host has no network of this name.",
    remedy: "Name one of the networks that it has, or define it with `virsh net-define`.",
    test: ({ inputs, host, networks }) =>
      inputs.networks.flatMap(({ network }, index): readonly Finding[] => {
        if (network === undefined || networks.some(({ name }) => name === network)) return [];
        const names = networks.map(({ name }) => name);
        const remedy = names.length > 0 ? `it has ${names.join(", ")}` : "define one with virsh net-define";
        return [{ property: `networks[${index}].network`, sentence: `there is no network ${network} on ${host.label}: ${remedy}` }];
      }),
  },
  {
    id: "virtlift/network-inactive",
    level: "block",
    summary: "The network is defined on the host, but not started, and the machine is to run.",
    remedy: "Start it: `virsh net-start`, and `virsh net-autostart` to keep it so.",
    test: ({ inputs, host, networks }) =>
      inputs.networks.flatMap(({ network }, index): readonly Finding[] => {
        if (inputs.powerState === "stopped" || !networks.some(({ name, isActive }) => name === network && !isActive)) return [];
        const sentence = `the network ${network} on ${host.label} is not active: virsh net-start ${network}`;
        return [{ property: `networks[${index}].network`, sentence }];
      }),
  },
  {
    id: "virtlift/bridge-missing",
    level: "block",
    summary: "The host has no bridge of this name, and the machine is to run.",
    remedy: "Name one of the bridges that it has, or make it first.",
    test: ({ inputs, host, system }) =>
      inputs.networks.flatMap(({ bridge }, index): readonly Finding[] => {
        if (bridge === undefined || system === undefined || inputs.powerState === "stopped" || system.bridges.has(bridge)) return [];
        const remedy = system.bridges.size > 0 ? `it has ${[...system.bridges].join(", ")}` : "make it, or take a `network`";
        return [{ property: `networks[${index}].bridge`, sentence: `there is no bridge ${bridge} on ${host.label}: ${remedy}` }];
      }),
  },
  {
    id: "virtlift/device-missing",
    level: "block",
    summary: "The host has no network device of this name to share by macvtap, and the machine is to run.",
    remedy: "Name one of the devices that it has.",
    test: ({ inputs, host, system }) =>
      inputs.networks.flatMap(({ direct }, index): readonly Finding[] => {
        if (direct === undefined || system === undefined || inputs.powerState === "stopped" || system.networkDevices.has(direct)) return [];
        const names = [...system.networkDevices].filter((name) => name !== "lo");
        return [
          {
            property: `networks[${index}].direct`,
            sentence: `there is no network device ${direct} on ${host.label}: ${names.length > 0 ? `it has ${names.join(", ")}` : "take a `network`"}`,
          },
        ];
      }),
  },
  {
    id: "virtlift/vlan-refused",
    level: "block",
    summary: "The interface has VLAN tags, and what it hangs on takes none, so that the machine would not start.",
    remedy:
      "Use a libvirt network over Open vSwitch, libvirt 11 or later, or a network or bridge of the VLAN's own; or leave the tags to the guest.",
    test: ({ inputs, host, vlanNetworks }) => {
      if (inputs.powerState === "stopped" || (inputs.xmlPatches ?? []).some((patch) => JSON.stringify(patch).includes("virtualport")))
        return [];
      return inputs.networks.flatMap(({ vlan, network, bridge, direct, mode }, index): readonly Finding[] => {
        const isBridged = network !== undefined || bridge !== undefined;
        const takesTags =
          (isBridged && host.libvirtVersion >= BRIDGES_TAKE_VLAN) ||
          (network !== undefined && vlanNetworks.has(network)) ||
          (direct !== undefined && mode === "passthrough");
        if (vlan === undefined || takesTags) return [];
        const place = network ?? bridge ?? direct ?? "QEMU's own NAT";
        const sentence = `${place} on ${host.label} takes no VLAN tags${isBridged ? " before libvirt 11" : ""}: use a network or a bridge of the VLAN's own, or Open vSwitch`;
        return [{ property: `networks[${index}].vlan`, sentence }];
      });
    },
  },
  {
    id: "virtlift/template-missing",
    level: "block",
    summary: "The machine's boot disk is an overlay, and the template under it is gone: neither can be made, nor read, without it.",
    remedy: "Bring the template back to its path, unchanged, or make the machine anew from another one.",
    test: ({ inputs: { image }, host, isTemplateMissing }) =>
      isTemplateMissing && image
        ? [
            {
              property: "image",
              sentence: `the overlay ${image.volumePath} stands on ${image.template.path}, and that is not on ${host.label}: bring it back as it was`,
            },
          ]
        : [],
  },
  {
    id: "virtlift/no-hugepages",
    level: "block",
    summary: "The machine's memory is to be of huge pages, and the host has too few of them reserved, or none of that size mounted.",
    remedy: "Reserve them (`sysctl vm.nr_hugepages`, or `hugepages=` on the kernel's command line), mount them, and restart libvirtd.",
    test: ({ inputs, host, system }) => {
      if (inputs.hugepages === undefined || inputs.powerState === "stopped" || system === undefined) return [];
      const [defaultKiB = 0] = system.hugepages.keys();
      const sizeKiB = { default: defaultKiB, "2MiB": 2048, "1GiB": 1024 * 1024 }[inputs.hugepages];
      const reserved = system.hugepages.get(sizeKiB) ?? 0;
      const wanted = Math.ceil(((inputs.maxMemoryMiB ?? inputs.memoryMiB) * 1024) / sizeKiB);
      const fail = (sentence: string): readonly Finding[] => [{ property: "hugepages", sentence }];
      if (reserved < wanted)
        return fail(`${host.label} has ${reserved} huge pages of ${sizeKiB} KiB, and the machine wants ${wanted}: reserve them`);
      if (!system.mountedHugepagesKiB.has(sizeKiB)) {
        return fail(
          `no huge pages of ${sizeKiB} KiB are mounted on ${host.label}: mount -t hugetlbfs -o pagesize=${sizeKiB}K, and restart libvirtd`,
        );
      }
      return [];
    },
  },
  {
    id: "virtlift/machine-type",
    level: "block",
    summary: "The host's QEMU runs no machines of this chipset and kind.",
    remedy: 'Take the other chipset, or another `domainType`. "pc" is gone from RHEL 10 and its kin.',
    test: ({ inputs, host, offer }) => {
      if (offer !== "unsupported") return [];
      if (host.domainTypes.has(inputs.domainType)) {
        const sentence = `${host.label} runs no ${inputs.machine} machines of the kind ${inputs.domainType}: take another \`machine\``;
        return [{ property: "machine", sentence }];
      }
      const remedy = "leave `domainType` out, or switch virtualization on in its firmware";
      return [{ property: "domainType", sentence: `${host.label} runs no machines of the kind ${inputs.domainType}: ${remedy}` }];
    },
  },
  {
    id: "virtlift/no-uefi-firmware",
    level: "block",
    summary: "The machine boots by UEFI, and the host has no such firmware.",
    remedy: "Install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL) on the host.",
    test: (facts) =>
      facts.inputs.firmware === "uefi" && facts.inputs.loader === undefined && offered(facts)?.uefi === false
        ? [
            {
              property: "firmware",
              sentence: `${facts.host.label} has no UEFI firmware for ${facts.inputs.machine} machines: install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)`,
            },
          ]
        : [],
  },
  {
    id: "virtlift/no-secure-boot",
    level: "block",
    summary: "The machine wants Secure Boot, and the host's firmware has none.",
    remedy: "Install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL) on the host.",
    test: (facts) => {
      const offer = offered(facts);
      if (!facts.inputs.secureBoot || facts.inputs.loader !== undefined || !offer?.uefi || offer.secureBoot) return [];
      const sentence = `${facts.host.label} has no UEFI firmware with Secure Boot: install ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)`;
      return [{ property: "secureBoot", sentence }];
    },
  },
  {
    id: "virtlift/no-tpm",
    level: "block",
    summary: "The machine wants a TPM, and the host cannot emulate one.",
    remedy: "Install swtpm and swtpm-tools on the host.",
    test: (facts) =>
      facts.inputs.tpm === true && offered(facts)?.tpm === false
        ? [{ property: "tpm", sentence: `${facts.host.label} cannot emulate a TPM: install swtpm and swtpm-tools` }]
        : [],
  },
  {
    id: "virtlift/cpu-mode",
    level: "block",
    summary: "The host does not offer the CPU mode, or does not know the CPU model.",
    remedy: "Take another mode, or a model that `virsh domcapabilities` lists.",
    test: (facts) => {
      const { cpu, domainType } = facts.inputs;
      const offer = offered(facts);
      if (!cpu || !offer) return [];
      if (!offer.cpuModes.includes(cpu.mode)) {
        const sentence = `${facts.host.label} offers no CPU mode ${cpu.mode} to ${domainType} machines: take ${offer.cpuModes.join(", ")}`;
        return [{ property: "cpu.mode", sentence }];
      }
      if (cpu.model === undefined || offer.cpuModels.has(cpu.model)) return [];
      return [{ property: "cpu.model", sentence: `${facts.host.label} knows no CPU ${cpu.model}: virsh domcapabilities lists the models` }];
    },
  },
  {
    id: "virtlift/cpu-unusable",
    level: "block",
    summary:
      "The host's processor lacks features of the CPU model, and KVM cannot make up for them. An emulated machine just goes without.",
    remedy: 'Take an older model, the mode "host-model", or switch the features off in `cpu.features`.',
    test: ({ inputs: { cpu }, host, cpuGaps }) => {
      if (cpu?.model === undefined || cpuGaps.length === 0) return [];
      const sentence = `the processor of ${host.label} has not all of ${cpu.model} (it lacks ${cpuGaps.join(", ")}): take an older model, the mode "host-model", or switch them off in \`cpu.features\``;
      return [{ property: "cpu.model", sentence }];
    },
  },
  {
    id: "virtlift/disk-bus",
    level: "block",
    summary: "The host's QEMU has no disks on this bus for machines of this type.",
    remedy: "Take another `bus`.",
    test: (facts) => {
      const offer = offered(facts);
      if (!offer || offer.diskBuses.length === 0) return [];
      const sentence = (bus: string) =>
        `${facts.host.label} offers no ${bus} disks to ${facts.inputs.machine} machines: take ${offer.diskBuses.join(", ")}`;
      const buses = [
        { property: "bus", bus: facts.inputs.bus },
        ...facts.inputs.disks.map(({ bus }, index) => ({ property: `disks[${index}].bus`, bus })),
      ];
      return buses.filter(({ bus }) => !offer.diskBuses.includes(bus)).map(({ property, bus }) => ({ property, sentence: sentence(bus) }));
    },
  },
  {
    id: "virtlift/memory-beyond-host",
    level: "block",
    summary: "The machine wants more memory than the host has.",
    remedy: "Give it less, or choose a larger host.",
    test: ({ inputs, host }) =>
      inputs.memoryMiB > host.memoryMiB
        ? [
            {
              property: "memoryMiB",
              sentence: `${host.label} has ${host.memoryMiB} MiB of memory, and the machine wants ${inputs.memoryMiB}: give it less`,
            },
          ]
        : [],
  },
  {
    id: "virtlift/memory-for-all",
    level: "warn",
    summary: "The machines that run on the host and those of this deployment together want more memory than it has.",
    remedy: "Give them less, or another host; else the host swaps, or ends one of them.",
    test: ({ inputs, host, neighbours, siblings }) => {
      if (inputs.powerState === "stopped" || inputs.memoryMiB > host.memoryMiB) return [];
      const running = neighbours.filter(({ isRunning }) => isRunning);
      const coming = siblings.filter(({ isRunning, uuid }) => isRunning && !running.some((other) => other.uuid === uuid));
      const allMiB = [
        ...running.map(({ memoryKiB }) => memoryKiB / 1024),
        ...coming.map(({ memoryMiB }) => memoryMiB),
        inputs.memoryMiB,
      ].reduce((sum, each) => sum + each, 0);
      if (allMiB <= host.memoryMiB) return [];
      const sentence = `the running machines of ${host.label} and those of this deployment want ${Math.ceil(allMiB)} MiB of its ${host.memoryMiB} MiB: give them less, or another host`;
      return [{ property: "memoryMiB", sentence }];
    },
  },
  {
    id: "virtlift/vcpus-beyond-type",
    level: "block",
    summary: "The machine wants more vCPUs than its chipset can have on this host.",
    remedy: 'Give it fewer, or take `machine: "q35"`.',
    test: (facts) => {
      const most = offered(facts)?.maxVcpus;
      if (most === undefined || facts.inputs.vcpus <= most) return [];
      const sentence = `a ${facts.inputs.machine} machine on ${facts.host.label} has at most ${most} vCPUs, and ${facts.inputs.vcpus} are wanted: give it fewer`;
      return [{ property: "vcpus", sentence }];
    },
  },
  {
    id: "virtlift/vcpus-beyond-host",
    level: "warn",
    summary: "The machine wants more vCPUs than the host has processors.",
    remedy: "Give it fewer: it will not be faster, and often slower.",
    test: (facts) => {
      const { inputs, host } = facts;
      if (inputs.vcpus <= host.cpus || inputs.vcpus > (offered(facts)?.maxVcpus ?? Number.POSITIVE_INFINITY)) return [];
      const sentence = `${host.label} has ${host.cpus} processors, and the machine wants ${inputs.vcpus}: it runs, but slower than with ${host.cpus}`;
      return [{ property: "vcpus", sentence }];
    },
  },
  {
    id: "virtlift/no-acceleration",
    level: "warn",
    summary: "The host offers no KVM, and the machine was not declared as emulated: every instruction of its guest is translated.",
    remedy: 'Switch virtualization on in the host\'s firmware, or load its kvm module; or say `domainType: "qemu"`.',
    test: ({ inputs, host }) =>
      inputs.domainType === "qemu" && !inputs.declared.includes("domainType") && !host.domainTypes.has("kvm")
        ? [
            {
              property: "domainType",
              sentence: `${host.label} offers no KVM, so the machine is emulated and 10 to 50 times slower: switch virtualization on in its firmware, or say \`domainType: "qemu"\``,
            },
          ]
        : [],
  },
  {
    id: "virtlift/libvirt-too-old",
    level: "block",
    summary: "The host's libvirt does not know a feature that the machine's definition needs.",
    remedy: "Update libvirt on the host, or do without the feature.",
    test: ({ inputs, host }) =>
      NEWER_FEATURES.filter(({ since, isUsed }) => host.libvirtVersion < since && isUsed(inputs)).map(({ property, words, since }) => ({
        property,
        sentence: `${words} needs libvirt ${inWords(since)}, and ${host.label} has ${inWords(host.libvirtVersion)}: update it, or do without`,
      })),
  },
  {
    id: "virtlift/uefi-disk-on-bios",
    level: "block",
    summary:
      "The boot disk starts by UEFI only (it has an EFI system partition and nothing that BIOS would run), and the machine has BIOS.",
    remedy: 'Set `firmware: "uefi"`.',
    test: (facts) => {
      const { boot, inputs } = facts;
      if (
        inputs.firmware !== "bios" ||
        !boot?.partitions?.hasEfiSystemPartition ||
        startsByBios(boot.partitions, boot.packed?.package.system.firmware)
      )
        return [];
      return [
        {
          property: "firmware",
          sentence:
            'the boot disk has an EFI system partition and nothing that BIOS could start, so the guest would not boot: set `firmware: "uefi"`',
        },
      ];
    },
  },
  {
    id: "virtlift/bios-disk-on-uefi",
    level: "block",
    summary: "The boot disk has neither an EFI system partition nor another with FAT, and the machine boots by UEFI.",
    remedy: 'Set `firmware: "bios"`.',
    test: ({ boot, inputs }) =>
      inputs.firmware === "uefi" && boot?.partitions && boot.partitions.table !== "none" && !startsByUefi(boot)
        ? [
            {
              property: "firmware",
              sentence: 'the boot disk has no EFI system partition, so UEFI finds nothing to start: set `firmware: "bios"`',
            },
          ]
        : [],
  },
  {
    id: "virtlift/firmware-changed",
    level: "warn",
    summary: "The package says that its machine had another firmware, and the boot disk would start by either.",
    remedy: "Give the machine the firmware that it was installed with.",
    test: (facts) => {
      const { boot, inputs } = facts;
      const packed = boot?.packed?.package.system.firmware;
      if (packed === undefined || !boot?.partitions) return [];
      const had = packed === "efi" ? "uefi" : "bios";
      const canStart = had === "uefi" ? startsByBios(boot.partitions, packed) : startsByUefi(boot);
      if (had === inputs.firmware || !canStart) return [];
      return [
        {
          property: "firmware",
          sentence: `the package's machine had ${had}, and this one has ${inputs.firmware}: set \`firmware: "${had}"\``,
        },
      ];
    },
  },
  {
    id: "virtlift/nothing-to-boot",
    level: "warn",
    summary: "The boot disk has neither boot code nor an EFI system partition.",
    remedy: "Look whether it is the right disk: of a machine with several, the first one boots.",
    test: (facts) => {
      const { boot, inputs } = facts;
      if (inputs.firmware !== "bios" || !boot?.partitions || boot.partitions.hasBootCode || boot.partitions.hasEfiSystemPartition)
        return [];
      return [
        {
          property: bootProperty(facts),
          sentence: "the boot disk holds nothing that BIOS could start: look whether it is the right disk",
        },
      ];
    },
  },
  {
    id: "virtlift/guest-driver",
    level: "block",
    summary:
      "The package holds a Windows that has no driver for the bus of its boot disk, as far as the package tells: it would stop with INACCESSIBLE_BOOT_DEVICE.",
    remedy:
      'Take `bus: "sata"` (Windows before Vista: `machine: "pc"` and `bus: "ide"`), or install the virtio drivers first and waive the rule.',
    test: ({ inputs, boot }) => {
      const packed = boot?.packed;
      const family = packed && windowsOf(packed.package.system.guest);
      if (!packed || !family || inputs.bus === packed.disk.controller?.bus) return [];
      const needs = family === "old" ? "ide" : "sata";
      if (inputs.bus === needs || inputs.bus === "ide") return [];
      const remedy =
        family === "old" ? 'take `machine: "pc"` and `bus: "ide"`' : 'take `bus: "sata"`, or install the virtio drivers before';
      return [
        { property: "bus", sentence: `the guest is a Windows, which has no driver of its own for a boot disk on ${inputs.bus}: ${remedy}` },
      ];
    },
  },
  {
    id: "virtlift/guest-nic-driver",
    level: "warn",
    summary: "The package holds a Windows, which has no driver of its own for virtio interfaces.",
    remedy: 'Take `model: "e1000e"`, or install the virtio drivers.',
    test: ({ inputs, boot }) => {
      const system = boot?.packed?.package.system;
      if (!system || !windowsOf(system.guest) || system.nics.some(({ model }) => /virtio/i.test(model ?? ""))) return [];
      return inputs.networks.flatMap(({ model }, index): readonly Finding[] =>
        model === "virtio"
          ? [
              {
                property: `networks[${index}].model`,
                sentence: 'the guest is a Windows, which has no driver of its own for virtio: take "e1000e", or install the drivers',
              },
            ]
          : [],
      );
    },
  },
  {
    id: "virtlift/path-unreachable",
    level: "block",
    summary: "QEMU runs as a user of its own, who may not pass through a folder above the machine's disks.",
    remedy: "Let others pass: `chmod o+x` on the folder that is named, or use a pool below /var/lib/libvirt/images.",
    test: (facts) => {
      const user = facts.host.security.qemuUser;
      if (user === undefined || user.uid === 0 || facts.inputs.powerState === "stopped") return [];
      return facts.inputs.diskPaths.flatMap((path, index): readonly Finding[] => {
        const folder = facts.folders.find((each) => each.path === posix.dirname(path));
        const closed = folder?.steps.find((step) => !canPass(step, user));
        if (!closed) return [];
        const sentence = `QEMU on ${facts.host.label} runs as user ${user.uid}, who may not pass ${closed.path} (${closed.mode}) on the way to ${path}: chmod o+x ${closed.path}`;
        return [{ property: diskProperty(facts, index), sentence }];
      });
    },
  },
  {
    id: "virtlift/path-confined",
    level: "warn",
    summary: "The host's SELinux or AppArmor forbids QEMU to read disks at such a place.",
    remedy:
      "Use a pool below /var/lib/libvirt/images. On a network file system SELinux wants `setsebool -P virt_use_nfs on` (or virt_use_samba, virt_use_fusefs).",
    test: (facts) =>
      facts.inputs.diskPaths.flatMap((path, index): readonly Finding[] => {
        const fileSystem = facts.folders.find((each) => each.path === posix.dirname(path))?.fileSystem ?? "";
        const reason = confinement(facts.host.security, path, fileSystem);
        return reason === undefined ? [] : [{ property: diskProperty(facts, index), sentence: `${path} on ${facts.host.label} ${reason}` }];
      }),
  },
  {
    id: "virtlift/clock-skew",
    level: "warn",
    summary: `The host's clock and the clock of the machine that runs Pulumi differ by more than ${MAX_CLOCK_SECONDS} seconds. Guests start with the host's.`,
    remedy: "Let both keep time by NTP.",
    test: ({ host, system }) => {
      const seconds = Math.round(system?.clockAheadSeconds ?? 0);
      if (Math.abs(seconds) <= MAX_CLOCK_SECONDS) return [];
      const sentence = `the clock of ${host.label} is ${Math.abs(seconds)} seconds ${seconds > 0 ? "ahead of" : "behind"} ours, and guests start with it: let both keep time by NTP`;
      return [{ property: "host", sentence }];
    },
  },
];

/** libvirt's versions, and from which on what we write is known. Source: the "since" notes of formatdomain.html. */
const NEWER_FEATURES: readonly {
  readonly since: number;
  readonly property: string;
  readonly words: string;
  readonly isUsed: (inputs: MachineFacts["inputs"]) => boolean;
}[] = [
  {
    since: 7_002_000,
    property: "firmware",
    words: "the choice of UEFI firmware by its features",
    isUsed: ({ firmware, loader }) => firmware === "uefi" && loader === undefined,
  },
  { since: 7_001_000, property: "cpu.mode", words: "the CPU mode maximum", isUsed: ({ cpu }) => cpu?.mode === "maximum" },
];

function inWords(version: number): string {
  return `${Math.floor(version / 1e6)}.${Math.floor(version / 1e3) % 1000}.${version % 1000}`;
}

/** GRUB's partition, or boot code on a disk whose machine was not known to be UEFI: Windows leaves code in the MBR of disks that only UEFI starts. */
function startsByBios(partitions: PartitionTable, packedFirmware: "bios" | "efi" | undefined): boolean {
  return partitions.hasBootCode && (partitions.hasBiosBootPartition || packedFirmware !== "efi");
}

/** An MBR's extended partitions, whose logical ones are not followed. */
const EXTENDED_TYPES: ReadonlySet<string> = new Set(["05", "0f", "85"]);

/** OVMF starts EFI/BOOT/BOOTX64.EFI from any partition with FAT, whatever its type. True also where nobody looked. Source: UEFI 2.10, section 13.3. */
function startsByUefi({ partitions, holdsFat }: GuestTraits): boolean {
  if (partitions === undefined || holdsFat !== false || partitions.hasEfiSystemPartition) return true;
  return partitions.partitions.some(({ type }) => EXTENDED_TYPES.has(type));
}

/** Windows by the words of the package: VMware's `windows2019srv_64Guest`, `winXPProGuest`; VirtualBox's `Windows2019_64`. `old` is before Vista: no AHCI. */
function windowsOf({ vendorId, description }: OvfGuest): "old" | "current" | undefined {
  const words = `${vendorId ?? ""} ${description ?? ""}`;
  if (!/\bwin(?!e\b)/i.test(words)) return undefined;
  return /\bwin(dows)?[ _]?(xp|net|nt|2000|2003|95|98|me(?![a-z])|server 2003)/i.test(words) ? "old" : "current";
}

/** Whether the user may pass through the folder, as far as its mode says; an access control list may say otherwise. */
function canPass({ mode, uid, gid }: FolderStep, user: NonNullable<HostSecurity["qemuUser"]>): boolean {
  if (mode.endsWith("+")) return true;
  if (uid === user.uid) return /[xs]/.test(mode[3] ?? "");
  // Groups besides its own may let it in: only a folder that no group passes is certain.
  const byGroup = /[xs]/.test(mode[6] ?? "");
  const byAll = /[xt]/.test(mode[9] ?? "");
  return gid === user.gid ? byGroup : byAll || (byGroup && gid !== 0);
}

/** Sources: libvirt's AppArmor profile of virt-aa-helper (`audit deny @{HOME}/.*`); virt_selinux(8), the booleans virt_use_*. */
function confinement({ models }: HostSecurity, path: string, fileSystem: string): string | undefined {
  if (models.includes("apparmor") && /^\/(home\/[^/]+|root)\/\./.test(path)) {
    return "is in a hidden folder, which AppArmor forbids to machines: use a pool below /var/lib/libvirt/images";
  }
  if (models.includes("selinux") && /^(nfs|cifs|smb|fuse)/.test(fileSystem)) {
    return `lies on ${fileSystem}, which SELinux forbids to machines unless told otherwise: setsebool -P virt_use_${fileSystem.startsWith("nfs") ? "nfs" : fileSystem.startsWith("fuse") ? "fusefs" : "samba"} on`;
  }
  return undefined;
}

/** Why a machine that has the UUID of ours and is not ours is let be. */
export function strangerRefusal(
  { name, metadata }: Pick<HostMachine, "name" | "metadata">,
  host: string,
  change: "changed" | "deleted",
): string {
  const owner = metadata ? `belongs to ${metadata.origin}` : "bears no mark of virtlift, as one that somebody else made,";
  const consent = !metadata && change === "changed" ? "set `adopt` to take it over, " : "";
  return `the machine ${name} on ${host} ${owner} and is not ${change}: ${consent}remove it by hand, or run pulumi state delete`;
}

/** Why a machine by the same origin that another state made is not redefined. */
export function otherStateRefusal({ name, uuid, metadata }: Pick<HostMachine, "name" | "uuid" | "metadata">, host: string): string {
  return `the machine ${name} on ${host} was made for ${metadata?.origin} on ${metadata?.finished?.slice(0, 10)}, and this stack's state does not know it: set \`adopt: { uuid: "${uuid}" }\` to take it over, or rename the stack if another checkout owns it`;
}
