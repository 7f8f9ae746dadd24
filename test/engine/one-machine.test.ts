/** The example `one-machine`, run as it is by the CLI: an OVA becomes a machine that boots on another host, reached by SSH. */
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { parseGuestReport } from "../../scripts/guest/report.ts";
import { openKvmHost } from "../bed/libvirtd.ts";
import { openPulumi } from "../bed/pulumi.ts";

const EXAMPLE = join(import.meta.dirname, "../../examples/one-machine/index.ts");

test("the machine boots from the OVA's bytes, with the declared MAC, and goes without a trace", async () => {
  await using pulumi = await openPulumi();
  await using kvm = await openKvmHost();
  // A distribution's package brings this folder; libvirt does not make it.
  await kvm.run("mkdir", "-p", "/var/log/libvirt/qemu");
  const host = `${kvm.sshUri()}?keyfile=${kvm.sshd.clientKey.path}&known_hosts=${kvm.sshd.knownHostsFile}`;
  const guest = await prepareGuestOva({ stay: true });
  const project = await pulumi.openProject(await readFile(EXAMPLE, "utf8"), {
    name: "one-machine",
    config: { "virtlift:host": host, ova: guest.path, domainType: "qemu", ready: "virtlift-guest done" },
  });

  await project.mustRun("preview");
  expect(await kvm.virsh("list", "--all", "--name")).toBe("");
  await project.mustRun("up", "--yes", "--skip-preview");
  const outputs = JSON.parse((await project.mustRun("stack", "output", "--json")).stdout) as { uuid: string; serialLog: string };
  const report = parseGuestReport(await kvm.run("cat", outputs.serialLog));
  expect(report).toMatchObject({
    firmware: "bios",
    vcpus: 1,
    uuid: outputs.uuid,
    interfaces: [{ mac: "52:54:00:0a:0b:0c" }],
    disks: [{ sizeBytes: guest.virtualSizeBytes, sha256: guest.contentSha256 }],
  });

  await project.mustRun("up", "--yes", "--skip-preview", "--expect-no-changes");
  await project.mustRun("destroy", "--yes", "--skip-preview");
  expect(await kvm.virsh("list", "--all", "--name")).toBe("");
  expect(await readdir(kvm.poolPath)).toEqual([]);
}, 180_000);
