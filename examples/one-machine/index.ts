/** One virtual machine from one OVA: its disk is copied to the host, the machine is defined over it and started. */
import { Config } from "@pulumi/pulumi";
import { ImportedDisk, VirtualMachine } from "virtlift";

const config = new Config();

const disk = new ImportedDisk("web-root", {
  source: { ova: config.require("ova") },
  migrationRef: "wave-1/web",
});

const machine = new VirtualMachine("web", {
  importedDisk: disk,
  vcpus: 1,
  memoryMiB: 512,
  networks: [{ type: "user", mac: "52:54:00:0a:0b:0c" }],
  domainType: config.get<"kvm" | "qemu">("domainType"),
  waitFor: [{ type: "serial", text: config.require("ready") }],
});

export const { path, sourceDigest } = disk;
export const { uuid, macAddresses, serialLog } = machine;
