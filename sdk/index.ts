/** What programs import: disks and machines to declare. Declaring needs no host; the provider does the work, found by its name. */
export { ImportedDisk, type ImportedDiskArgs, type ImportedDiskState } from "./imported-disk.ts";
export { type DiskOverride, MigratedMachine, type MigratedMachineArgs, type NetworkTarget } from "./migrated-machine.ts";
export { VirtualMachine, type VirtualMachineArgs, type VirtualMachineState } from "./virtual-machine.ts";
