/** How a machine refers to its disks: never by the resource itself, which would arrive as a bare id that preview does not know. */
import * as pulumi from "@pulumi/pulumi";
import { ImportedDisk } from "./imported-disk.ts";
import { type Host, type Later, withSecrets } from "./values.ts";

/**
 * The value with every `ImportedDisk` in it, at any depth, as a reference of outputs that preview knows.
 * What may still become a disk (a promise, an output) is looked through; it stays secret if it is.
 */
export function withDiskRefs(value: unknown): unknown {
  if (ImportedDisk.isInstance(value)) return ImportedDisk.refOf(value);
  if (value instanceof Promise || pulumi.Output.isInstance(value))
    return pulumi.output(value).apply((known) => pulumi.output(withDiskRefs(known)));
  if (Array.isArray(value)) return value.map(withDiskRefs);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, each]) => [key, key === "host" ? withSecrets(each as Later<Host>) : withDiskRefs(each)]),
  );
}

/** The host of a disk, however it is given; undefined when it names none. */
export function hostOf(disk: unknown): pulumi.Input<unknown> {
  if (disk instanceof Promise || pulumi.Output.isInstance(disk)) return pulumi.output(disk).apply((known) => pulumi.output(hostOf(known)));
  if (ImportedDisk.isInstance(disk)) return disk.host;
  return typeof disk === "object" && disk !== null && "host" in disk ? withSecrets(disk.host as Later<Host>) : undefined;
}
