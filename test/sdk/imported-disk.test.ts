import { secret } from "@pulumi/pulumi";
import { expect, test } from "vitest";
import { ImportedDisk } from "../../sdk/imported-disk.ts";
import { recordRegistrations, settled } from "./pulumi-mocks.ts";

const registered = await recordRegistrations({ diskId: "web-root-1a2b3c", path: "/pool/web-root-1a2b3c.qcow2" });

test("registers under the frozen type and text, with its origin and the program's arguments", async () => {
  const disk = new ImportedDisk("web-root", { host: "test:///default", source: { ova: "./web.ova", disk: 0 }, capacity: "40GiB" });
  await settled(disk.urn);
  expect(registered.find(({ name }) => name === "web-root")).toEqual({
    type: "pulumi-nodejs:dynamic/virtlift:ImportedDisk",
    name: "web-root",
    inputs: {
      host: "test:///default",
      source: { ova: "./web.ova", disk: 0 },
      capacity: "40GiB",
      origin: "organization/project/dev/web-root",
      __provider: 'exports.handler = () => require("virtlift/provider").importedDisk;',
    },
  });
});

test("has an output for what the provider returns, also where the program gave no argument", async () => {
  const disk = new ImportedDisk("outputs", { source: { file: "./disk.vmdk" } });
  expect((await settled(disk.path)).value).toBe("/pool/web-root-1a2b3c.qcow2");
  expect((await settled(disk.virtualSizeBytes)).value).toBeUndefined();
});

test("marks passphrase and password of its host as secrets, plain or not, and nothing else", async () => {
  const uri = "qemu+ssh://root@kvm1/system";
  const hosts = [{ uri, passphrase: "plain" }, Promise.resolve({ uri, password: secret("given") }), { uri, sudo: true }];
  const disks = hosts.map((host, index) => new ImportedDisk(`secret-${index}`, { host, source: { file: "disk.raw" } }));
  expect(await Promise.all(disks.map(async ({ host }) => (await settled(host)).isSecret))).toEqual([true, true, false]);
});

test("is recognised by its brand, also when another copy of the package made it", () => {
  const disk = new ImportedDisk("branded", { source: { file: "disk.raw" } });
  expect(ImportedDisk.isInstance(disk)).toBe(true);
  expect(ImportedDisk.isInstance({ [Symbol.for("virtlift.ImportedDisk")]: true })).toBe(true);
  expect([undefined, null, "id", {}].some((value) => ImportedDisk.isInstance(value))).toBe(false);
});
