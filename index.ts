/** The smallest migration: one image becomes one machine. What it needs is in the stack's configuration; see `Pulumi.yaml`. */
import * as pulumi from "@pulumi/pulumi";
import { ImportedDisk, VirtualMachine, type VirtualMachineArgs } from "virtlift";

const config = new pulumi.Config("virtlift");
const source = config.require("source");

const disk = new ImportedDisk("disk", {
  source: /\.ov[af]$/i.test(source) ? { ova: source } : { file: source },
  pool: config.get("pool") ?? "default",
});

const machine = new VirtualMachine("machine", {
  importedDisk: disk,
  memoryMiB: config.getNumber("memoryMiB") ?? 1024,
  // JSON, as the argument of the same name; none is no network.
  networks: config.getObject<VirtualMachineArgs["networks"]>("networks") ?? [{ network: "default" }],
  ...optional("name", config.get("name")),
  ...optional("domainType", config.get<"kvm" | "qemu">("domainType")),
});

/** An argument that is left out is not the same as one that is undefined. */
function optional<Key extends string, Value>(key: Key, value: Value | undefined): { readonly [Each in Key]?: Value } {
  return value === undefined ? {} : ({ [key]: value } as { readonly [Each in Key]: Value });
}

export const name = machine.name;
export const path = disk.path;
export const sourceDigest = disk.sourceDigest;
export const contentDigest = disk.contentDigest;
export const macAddresses = machine.macAddresses;
export const serialLog = machine.serialLog;
