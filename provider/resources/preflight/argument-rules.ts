/** The rules about what a program declares, before any host is asked. Pure. */
import type { CheckFailure } from "../resource.ts";
import type { VirtualMachineArgs } from "../virtual-machine-schema.ts";
import type { Finding, Rule } from "./rule.ts";

/** Asked of every resource: what its schema finds. */
export const ARGUMENT_RULES: readonly Rule<{ readonly failures: readonly CheckFailure[] }>[] = [
  {
    id: "virtlift/argument",
    level: "block",
    isFixed: true,
    summary: "An argument is not of the shape that it must have, or is none that exists.",
    remedy: "Mend it as the sentence says.",
    test: ({ failures }) => failures.map(({ property, reason }) => ({ property, sentence: reason.slice(`${property}: `.length) })),
  },
];

/** What a machine is declared with, as it came; what preview does not know is its sentinel. */
export interface DeclaredBoot {
  readonly importedDisk: unknown;
  readonly image: unknown;
}

/** Asked also when other arguments are wrong. */
export const BOOT_RULES: readonly Rule<DeclaredBoot>[] = [
  {
    id: "virtlift/no-boot-disk",
    level: "block",
    isFixed: true,
    summary: "A machine boots from an `importedDisk` or from an `image`, and not exactly one of them is given.",
    remedy: "Give one of them.",
    test: ({ importedDisk, image }) => {
      if ((importedDisk === undefined) !== (image === undefined)) return [];
      const start = "a machine boots from an `importedDisk` or from an `image`, and";
      return importedDisk === undefined
        ? [{ property: "importedDisk", sentence: `${start} neither is given: give one` }]
        : [{ property: "image", sentence: `${start} both are given: remove one` }];
    },
  },
];

/** Asked of every resource first. */
export const HOST_RULES: readonly Rule<{ readonly host: unknown }>[] = [
  {
    id: "virtlift/no-host",
    level: "block",
    isFixed: true,
    summary: "No host is given, neither here nor in the stack's configuration.",
    remedy: "Give `host`, or `pulumi config set virtlift:host`.",
    test: ({ host }) =>
      host === undefined
        ? [
            {
              property: "host",
              sentence: "give a libvirt URI, here or as the stack's configuration virtlift:host",
            },
          ]
        : [],
  },
];

/** Arguments that are each right, but not together. */
export const COMBINATION_RULES: readonly Rule<VirtualMachineArgs>[] = [
  {
    id: "virtlift/combination",
    level: "block",
    isFixed: true,
    summary: "Arguments of the machine are each right, but no machine has them together: Secure Boot with BIOS, IDE on a q35, and so on.",
    remedy: "The sentence says which of them to change.",
    test: (args) => [...combinations(args)],
  },
];

function* combinations(args: VirtualMachineArgs): Iterable<Finding> {
  if (args.secureBoot && args.firmware === "bios")
    yield { property: "secureBoot", sentence: 'Secure Boot is of UEFI: set `firmware: "uefi"` too' };
  if (args.secureBoot && args.machine === "pc")
    yield { property: "secureBoot", sentence: 'Secure Boot needs the chipset q35: set `machine: "q35"`' };
  const noIde = 'a q35 machine has no IDE: take "sata", or set `machine: "pc"`';
  if (args.machine === "q35" && args.bus === "ide") yield { property: "bus", sentence: noIde };
  const names = new Set<string>();
  for (const [index, { name, bus, device }] of args.disks.entries()) {
    const property = `disks[${index}]`;
    if (args.machine === "q35" && bus === "ide") yield { property: `${property}.bus`, sentence: noIde };
    if (device === "cdrom" && bus === "virtio")
      yield { property: `${property}.bus`, sentence: 'there is no CD-ROM on virtio: take "sata" or "scsi"' };
    if (name !== undefined && names.has(name))
      yield { property: `${property}.name`, sentence: `two blank disks of this machine are named ${name}: choose another` };
    if (name !== undefined) names.add(name);
  }
  yield* sizeCombinations(args);
  yield* servingCombinations(args);
  if (args.loader && args.firmware === "bios") yield { property: "loader", sentence: 'a loader is of UEFI: set `firmware: "uefi"` too' };
  if (args.hyperv && args.domainType === "qemu")
    yield { property: "hyperv", sentence: "Hyper-V's enlightenments need KVM: leave `hyperv` out, or take another `domainType`" };
  if (args.domainType === "qemu" && args.cpu?.mode === "host-passthrough")
    yield { property: "cpu.mode", sentence: 'host-passthrough needs KVM: take "maximum", or another `domainType`' };
}

function* sizeCombinations(args: VirtualMachineArgs): Iterable<Finding> {
  const { vcpus, maxVcpus = vcpus, memoryMiB, maxMemoryMiB = memoryMiB, cpuTopology: topology } = args;
  if (vcpus > maxVcpus)
    yield { property: "maxVcpus", sentence: `the machine is to have ${vcpus} CPUs, more than its ${maxVcpus} at most: give it more` };
  if (memoryMiB > maxMemoryMiB)
    yield {
      property: "maxMemoryMiB",
      sentence: `the machine is to have ${memoryMiB} MiB, more than its ${maxMemoryMiB} at most: give it more`,
    };
  if (maxMemoryMiB > memoryMiB && args.ballooning === false)
    yield {
      property: "ballooning",
      sentence: "memory below `maxMemoryMiB` is given by the balloon: leave `ballooning` on, or `maxMemoryMiB` out",
    };
  if (topology && topology.sockets * topology.cores * topology.threads !== maxVcpus) {
    const { sockets, cores, threads } = topology;
    const sentence = `${sockets} sockets with ${cores} cores of ${threads} threads are ${sockets * cores * threads} CPUs, and the machine has ${maxVcpus} at most: make them the same`;
    yield { property: "cpuTopology", sentence };
  }
  for (const vcpu of Object.keys(args.cpuPinning ?? {})) {
    if (Number(vcpu) >= maxVcpus)
      yield { property: `cpuPinning.${vcpu}`, sentence: `the machine has no CPU ${vcpu}: they are numbered from 0 to ${maxVcpus - 1}` };
  }
}

function* servingCombinations(args: VirtualMachineArgs): Iterable<Finding> {
  const orders = new Map([[args.bootDisk?.bootOrder ?? 1, "bootDisk"]]);
  const served = [
    { property: "bootDisk", disk: args.bootDisk ?? {} },
    ...args.disks.map((disk, index) => ({ property: `disks[${index}]`, disk })),
  ];
  for (const [index, { property, disk }] of served.entries()) {
    if (disk.io === "native" && disk.cache !== "none" && disk.cache !== "directsync")
      yield { property: `${property}.io`, sentence: '"native" goes past the host\'s cache: set `cache: "none"` too' };
    const other = disk.bootOrder === undefined || index === 0 ? undefined : orders.get(disk.bootOrder);
    if (other !== undefined)
      yield { property: `${property}.bootOrder`, sentence: `${other} has the place ${disk.bootOrder} already: choose another` };
    if (disk.bootOrder !== undefined) orders.set(disk.bootOrder, property);
  }
  for (const [index, { shareable, format, size }] of args.disks.entries()) {
    if (shareable && format !== "raw" && (format !== undefined || size !== undefined))
      yield { property: `disks[${index}].shareable`, sentence: 'only a raw disk can be shared: set `format: "raw"`' };
  }
}
