/** The program of each stack of a batch: one machine from its declaration. */
import { ImportedDisk, type ImportedDiskArgs } from "../imported-disk.ts";
import { MigratedMachine, type MigratedMachineArgs } from "../migrated-machine.ts";
import type { Host } from "../values.ts";
import { VirtualMachine, type VirtualMachineArgs } from "../virtual-machine.ts";
import type { DeclaredHost, Job } from "./job.ts";
import { readSecret, type SecretScope } from "./secrets.ts";

/** Declares the job's machine. What the manifest's maps hold is checked by the classes and by the provider, like that of any program. */
export function declareMachine({ stack, declaration, description, programFolder }: Job): void {
  const { source, disks, machine, networks, pools, name, migrationRef } = declaration;
  const host = hostOf(declaration.host, { environment: process.env, folder: programFolder });
  const given = { ...(name !== undefined && { name }) };
  const migration = { ...(migrationRef !== undefined && { migrationRef }) };
  if (description !== undefined) {
    const args = { source, host, description, ...given, ...migration, ...present({ networks, pools, disks, machine }) };
    // oxlint-disable-next-line no-new -- a resource is declared by being made
    new MigratedMachine(stack, args as unknown as MigratedMachineArgs);
    return;
  }
  const pool = pools?.["0"] ?? pools?.["*"];
  const disk = new ImportedDisk(`${stack}-disk0`, {
    ...present((disks?.["0"] ?? disks?.["*"] ?? {}) as object),
    ...(pool !== undefined && { pool }),
    ...migration,
    source: source as unknown as NonNullable<ImportedDiskArgs["source"]>,
    host,
  });
  const interfaces = networks?.["*"];
  const network = typeof interfaces === "string" ? { network: interfaces } : interfaces;
  // oxlint-disable-next-line no-new -- as above
  new VirtualMachine(stack, {
    ...(network !== undefined && network !== false && { networks: [network] as VirtualMachineArgs["networks"] }),
    ...machine,
    ...given,
    host,
    importedDisk: disk,
  } as VirtualMachineArgs);
}

/** The host with its secrets read. Throws Error naming the place that has none. */
function hostOf({ passphrase, password, ...open }: DeclaredHost, scope: SecretScope): Host {
  return {
    ...open,
    ...(passphrase !== undefined && { passphrase: readSecret(passphrase, scope) }),
    ...(password !== undefined && { password: readSecret(password, scope) }),
  };
}

function present<Value extends object>(value: Value): Partial<Value> {
  return Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined)) as Partial<Value>;
}
