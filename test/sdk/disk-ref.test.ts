import * as pulumi from "@pulumi/pulumi";
import { expect, test } from "vitest";
import { hostOf, withDiskRefs } from "../../sdk/disk-ref.ts";
import { ImportedDisk } from "../../sdk/imported-disk.ts";
import { recordRegistrations, settled } from "./pulumi-mocks.ts";

const uri = "qemu+ssh://root@kvm1/system";
const IDENTITY = { diskId: "web-1a2b3c", path: "/pool/web-1a2b3c.qcow2", format: "qcow2", pool: "default", declaration: "1a2b3c" };

await recordRegistrations({ ...IDENTITY, virtualSizeBytes: 1 });

const disk = new ImportedDisk("web", {
  host: { uri, passphrase: "secret" },
  source: { ova: "./web.ova", disk: 1 },
  migrationRef: "wave-1",
});
/** Without an output that may be absent: preview does not know those of a disk that exists. */
const REF = { ...IDENTITY, source: "ova", host: uri, migrationRef: "wave-1" };

/** What Pulumi would send: all outputs resolved. */
const sent = (value: unknown) => settled(pulumi.output(value));

test("a disk becomes a reference of what preview knows, with its host's name and no secret", async () => {
  expect(await sent(withDiskRefs(disk))).toEqual({ value: REF, isSecret: false });
});

test("disks are found in lists, in objects and behind what is known later", async () => {
  const disks = [{ disk, bus: "sata" }, { size: "10GiB" }, { disk: pulumi.output(disk) }, Promise.resolve({ disk })];
  expect((await sent(withDiskRefs(disks))).value).toEqual([{ disk: REF, bus: "sata" }, { size: "10GiB" }, { disk: REF }, { disk: REF }]);
});

test("a reference written by hand stays as it is, and so does what is no disk", async () => {
  const written = { diskId: "web", path: "/pool/web.qcow2" };
  expect((await sent(withDiskRefs(written))).value).toEqual(written);
  expect([undefined, null, "template.qcow2", 7].map(withDiskRefs)).toEqual([undefined, null, "template.qcow2", 7]);
});

test("what was secret stays secret", async () => {
  expect((await sent(withDiskRefs(pulumi.secret(disk)))).isSecret).toBe(true);
  expect((await sent(withDiskRefs({ diskId: "web", host: { uri, password: "secret" } }))).isSecret).toBe(true);
});

test("the host of a disk is its whole declaration, secrets included", async () => {
  expect(await sent(hostOf(disk))).toEqual({ value: { uri, passphrase: "secret" }, isSecret: true });
  expect((await sent(hostOf(pulumi.output(disk)))).value).toEqual({ uri, passphrase: "secret" });
  expect((await sent(hostOf({ diskId: "web", host: uri }))).value).toBe(uri);
  expect([undefined, "template.qcow2", { diskId: "web" }].map(hostOf)).toEqual([undefined, undefined, undefined]);
});
