import { expect, test } from "vitest";
import { ImportedDisk } from "../../sdk/imported-disk.ts";
import { VirtualMachine } from "../../sdk/virtual-machine.ts";
import { recordRegistrations, settled } from "./pulumi-mocks.ts";

const registered = await recordRegistrations({ diskId: "root-1a2b3c", path: "/pool/root-1a2b3c.qcow2", pool: "default", format: "qcow2" });
const host = { uri: "qemu+ssh://root@kvm1/system", passphrase: "secret" };
const disk = new ImportedDisk("root", { host, source: { ova: "./web.ova" } });
const REF = { diskId: "root-1a2b3c", path: "/pool/root-1a2b3c.qcow2", pool: "default", format: "qcow2", source: "ova", host: host.uri };

async function inputsOf(machine: VirtualMachine, name: string): Promise<unknown> {
  await settled(machine.urn);
  return registered.find((each) => each.name === name && each.type.endsWith("VirtualMachine"))?.inputs;
}

test("registers under the frozen type and text, with its origin, its disks as references and its disk's host", async () => {
  const machine = new VirtualMachine("web", {
    importedDisk: disk,
    disks: [{ disk, serial: "data" }],
    vcpus: 2,
    networks: [{ network: "default" }],
  });
  expect(await inputsOf(machine, "web")).toEqual({
    importedDisk: REF,
    disks: [{ disk: REF, serial: "data" }],
    vcpus: 2,
    networks: [{ network: "default" }],
    // Pulumi's mocks show a secret as what it is on the wire.
    host: expect.objectContaining({ value: host }),
    origin: "organization/project/dev/web",
    __provider: 'exports.handler = () => require("virtlift/provider").virtualMachine;',
  });
});

test("its own host wins over its disk's", async () => {
  const machine = new VirtualMachine("elsewhere", { importedDisk: disk, host: "qemu:///system" });
  expect(await inputsOf(machine, "elsewhere")).toMatchObject({ host: "qemu:///system" });
});

test("a template's host is its host too, and a template by name has none", async () => {
  expect(await inputsOf(new VirtualMachine("copy", { image: disk }), "copy")).toMatchObject({ host: { value: host }, image: REF });
  expect(await inputsOf(new VirtualMachine("named", { image: "template" }), "named")).not.toHaveProperty("host");
});
