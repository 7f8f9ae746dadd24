import { copyFile, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { RunError } from "@pulumi/pulumi";
import { expect, test, vi } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { MigratedMachine, type MigratedMachineArgs } from "../../sdk/migrated-machine.ts";
import { openDirectory } from "../bed/directory.ts";
import { vmxSeed } from "../image/seeds.ts";
import { sparseVmdkSeed } from "../image/sparse-seeds.ts";
import { recordRegistrations, settled } from "./pulumi-mocks.ts";

const registered = await recordRegistrations({ diskId: "an-id", path: "/pool/a.qcow2" });
const NETWORKS = { "VM Network": "default", "DPG-Storage & Backup": { bridge: "br1" } } as const;

/** A copy of a recorded export, its disk files of the declared sizes but empty. */
async function openExport(name: string, files: Readonly<Record<string, number>>) {
  await using stack = new AsyncDisposableStack();
  const { path: directory } = stack.use(await openDirectory("export"));
  const ova = join(directory, `${name}.ovf`);
  await copyFile(join(import.meta.dirname, `../fixtures/ovf/${name}.ovf`), ova);
  for (const [file, sizeBytes] of Object.entries(files)) {
    await writeFile(join(directory, file), "");
    await truncate(join(directory, file), sizeBytes);
  }
  const held = stack.move();
  return { ova, [Symbol.asyncDispose]: () => held.disposeAsync() };
}

const openVmware = () => openExport("vmware", { "app01-1.vmdk": 1_048_576, "app01-2.vmdk": 524_288 });

function inputsOf(name: string): Readonly<Record<string, unknown>> {
  const found = registered.find((each) => each.name === name);
  if (found === undefined) throw new Error(`${name} was not registered`);
  return found.inputs;
}

test("declares the disks in the hardware's order and the machine over them, with all that the package says", async () => {
  await using exported = await openVmware();
  const machine = new MigratedMachine("app", { source: { ova: exported.ova }, host: "test:///default", networks: NETWORKS });
  await settled(machine.machine.urn);
  expect(inputsOf("app-disk0")).toMatchObject({ source: { ova: exported.ova, disk: 0 }, host: "test:///default", pool: "default" });
  expect(machine.disks).toHaveLength(2);
  expect(registered.find(({ name, type }) => name === "app" && type.endsWith("VirtualMachine"))?.inputs).toMatchObject({
    vcpus: 4,
    memoryMiB: 8192,
    machine: "q35",
    firmware: "uefi",
    secureBoot: true,
    bus: "sata",
    tpm: true,
    cpuTopology: { sockets: 2, cores: 2 },
    importedDisk: { diskId: "an-id" },
    disks: [{ disk: { diskId: "an-id" } }, { size: expect.any(Number) as number, name: "disk2", pool: "default" }, { device: "cdrom" }],
    networks: [
      { network: "default", model: "e1000e" },
      { bridge: "br1", model: "e1000e" },
    ],
  });
});

test("declares a machine from a zip archive as from the package in it, and says what is wrong with one", async () => {
  await using exported = await openVmware();
  const zip = `${exported.ova}.zip`;
  const pack = async (...files: readonly string[]): Promise<string> => {
    await rm(zip, { force: true });
    await runCommand(["zip", "-q", "-j", zip, ...files.map((file) => join(dirname(exported.ova), file))]);
    return zip;
  };
  const describe = (name: string, ova: string) =>
    new MigratedMachine(name, { source: { ova }, host: "test:///default", networks: NETWORKS }).description;
  const plain = describe("plain", exported.ova);
  expect(describe("zipped", await pack("vmware.ovf", "app01-1.vmdk", "app01-2.vmdk"))).toEqual(plain);
  await vi.waitFor(() => expect(inputsOf("zipped-disk1")).toMatchObject({ source: { ova: zip, disk: 1 } }));

  const lone = await pack("app01-1.vmdk");
  expect(() => describe("lone", lone)).toThrow(
    /^lone: .*vmware\.ovf\.zip: the zip archive holds no machine, but "app01-1\.vmdk": take it as a disk/,
  );
  const part = await pack("vmware.ovf", "app01-1.vmdk");
  expect(() => describe("part", part)).toThrow(/app01-2\.vmdk/);
  const bytes = await readFile(await pack("vmware.ovf", "app01-1.vmdk", "app01-2.vmdk"));
  // A byte in the middle of the deflated descriptor, which comes first.
  bytes[2000] = bytes[2000]! ^ 0xff;
  await writeFile(zip, bytes);
  expect(() => describe("damaged", zip)).toThrow(/"vmware\.ovf" in the zip archive is damaged/);
});

/** A VMX and its VMDK as they lie in a datastore's folder. */
async function openFolder(...more: readonly string[]) {
  await using stack = new AsyncDisposableStack();
  const { path: directory } = stack.use(await openDirectory("vmx"));
  await writeFile(join(directory, "web.vmx"), vmxSeed(more));
  await writeFile(join(directory, "a.vmdk"), sparseVmdkSeed());
  const held = stack.move();
  return { directory, vmx: join(directory, "web.vmx"), [Symbol.asyncDispose]: () => held.disposeAsync() };
}

test("declares a machine from its VMX and the VMDKs beside it as from an OVF", async () => {
  await using folder = await openFolder('ethernet0.startConnected = "FALSE"');
  const machine = new MigratedMachine("vm", { source: { vmx: folder.vmx }, host: "test:///default" });
  await settled(machine.machine.urn);
  expect(inputsOf("vm-disk0")).toMatchObject({
    source: { file: join(folder.directory, "a.vmdk"), vmx: folder.vmx },
    host: "test:///default",
  });
  expect(registered.find(({ name, type }) => name === "vm" && type.endsWith("VirtualMachine"))?.inputs).toMatchObject({
    vcpus: 4,
    cpuTopology: { sockets: 2, cores: 2 },
    memoryMiB: 2048,
    firmware: "uefi",
    secureBoot: true,
    description: "first line\nsecond line",
    networks: [{ network: "default", model: "e1000e", mac: "00:0c:29:aa:bb:cc", link: "down" }],
    disks: [{ device: "cdrom" }],
  });
});

test("leaves the package's topology and drives to a program that declares its own", async () => {
  await using folder = await openFolder();
  const declare = async (name: string, args: Pick<MigratedMachineArgs, "machine" | "disks">) => {
    const { machine } = new MigratedMachine(name, { source: { vmx: folder.vmx }, host: "test:///default", ...args });
    await settled(machine.urn);
    return registered.find((each) => each.name === name && each.type.endsWith("VirtualMachine"))?.inputs ?? {};
  };
  const own = await declare("own", { machine: { vcpus: 3, disks: [{ device: "cdrom", path: "/a.iso" }] } });
  expect(own).toMatchObject({ vcpus: 3, disks: [{ device: "cdrom", path: "/a.iso" }] });
  expect(own).not.toHaveProperty("cpuTopology");
  expect(await declare("none", { disks: { "ide1:0": false } })).toMatchObject({ disks: [] });
});

test("says what cannot come along, but for what the check of the boot disk says", async () => {
  await using folder = await openFolder('vtpm.present = "TRUE"', 'sound.present = "TRUE"', 'uuid.bios = "56 4d 01 02"');
  const { description: bare } = new MigratedMachine("bare", { source: { vmx: folder.vmx }, host: "test:///default" });
  await using exported = await openVmware();
  const { description } = new MigratedMachine("said", { source: { ova: exported.ova }, host: "test:///default", networks: NETWORKS });
  for (const { hardware, notes } of [bare, description]) {
    expect(hardware).toMatchObject({ firmware: "uefi", tpm: true });
    expect(notes.join()).toMatch(/its BIOS UUID "(56 4d 01 02|42 1a 6b 10 5c 3e 7d 21-9a 0f 11 22 33 44 55 66)" does not come along/);
    expect(notes.join()).not.toMatch(/TPM|UEFI|sound|per socket/);
  }
});

test("lets the program override any part, leave disks and interfaces out, and choose pools by the disk", async () => {
  await using exported = await openVmware();
  const machine = new MigratedMachine("other", {
    source: { ova: exported.ova },
    host: "test:///default",
    name: "other-name",
    networks: { "VM Network": { network: "default", mac: "52:54:00:00:00:01" }, "*": false },
    pools: { "app01-2.vmdk": "fast", "*": "slow" },
    disks: { "2": false, "*": { layout: "compressed" } },
    machine: { memoryMiB: 512, bus: "virtio", disks: [{ size: "1GiB", name: "scratch" }] },
    migrationRef: "wave-1",
  });
  await settled(machine.machine.urn);
  expect(new Set(["other-disk0", "other-disk1"].map((name) => inputsOf(name)["pool"]))).toEqual(new Set(["fast", "slow"]));
  expect(inputsOf("other-disk0")).toMatchObject({ layout: "compressed", migrationRef: "wave-1" });
  expect(registered.find(({ name, type }) => name === "other" && type.endsWith("VirtualMachine"))?.inputs).toMatchObject({
    name: "other-name",
    memoryMiB: 512,
    bus: "virtio",
    vcpus: 4,
    disks: [{ disk: { diskId: "an-id" } }, { size: "1GiB", name: "scratch" }, { device: "cdrom" }],
    networks: [{ network: "default", mac: "52:54:00:00:00:01" }],
  });
});

test("refuses a network without a target, and an entry for what the machine does not have", async () => {
  await using exported = await openVmware();
  const declare = (name: string, rest: object) => () =>
    new MigratedMachine(name, { source: { ova: exported.ova }, host: "test:///default", ...rest });
  expect(declare("unmapped", { networks: { "VM Network": "default" } })).toThrow(
    'unmapped: networks says nothing of "DPG-Storage & Backup": give it a libvirt network, or all of them by "*" (the machine has "VM Network", "DPG-Storage & Backup")',
  );
  expect(declare("typo", { pools: { "app1.vmdk": "fast" }, networks: { "*": "default", lan: false } })).toThrow(
    /^typo: networks names lan, which the machine does not have: .*; typo: pools names app1\.vmdk, which the machine does not have: /,
  );
  expect(() => new MigratedMachine("none", { source: { ova: exported.ova }, networks: {}, disks: { "*": false } })).toThrow(RunError);
});

test("takes a stored description for a package that is gone", async () => {
  await using exported = await openVmware();
  const { description } = new MigratedMachine("first", { source: { ova: exported.ova }, host: "test:///default", networks: NETWORKS });
  const stored = JSON.parse(JSON.stringify(description)) as typeof description;
  const again = new MigratedMachine("again", {
    source: { ova: "/gone.ova" },
    host: "test:///default",
    networks: NETWORKS,
    description: stored,
  });
  await settled(again.machine.urn);
  expect(inputsOf("again-disk1")).toMatchObject({ source: { ova: "/gone.ova", disk: 1 } });
});

test("says in one sentence what is wrong with a package", () => {
  const declare = () => new MigratedMachine("gone", { source: { ova: "/there/is/none.ova" } });
  expect(declare).toThrow("gone: there is no file /there/is/none.ova");
  expect(declare).toThrow(RunError);
});
