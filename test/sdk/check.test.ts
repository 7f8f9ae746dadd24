/** `virtlift check`, in a process of its own. */
import { execFile } from "node:child_process";
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { execPath } from "node:process";
import { expect, test } from "vitest";
import { prepareGuestOva } from "../../scripts/guest/ova.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { qemuImg } from "../image/qemu.ts";
import { vmxSeed } from "../image/seeds.ts";
import { sparseVmdkSeed } from "../image/sparse-seeds.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";

const CLI = join(import.meta.dirname, "../../sdk/cli.ts");

const virtlift = (...argv: readonly string[]) =>
  new Promise<{ readonly code: number; readonly stdout: string; readonly stderr: string }>((resolve) => {
    const child = execFile(execPath, [CLI, ...argv], (_error, stdout, stderr) => resolve({ code: child.exitCode ?? -1, stdout, stderr }));
  });

test("its exit code tells the worst level, and its findings come as a table or as JSON", async () => {
  await using libvirtd = await openLibvirtd();
  const file = join(libvirtd.directory, "plain.raw");
  await writeFile(file, Buffer.alloc(65_536, 1));
  const fine = await virtlift("check", file, "--host", libvirtd.uri);
  expect(fine).toMatchObject({ code: 0, stderr: "" });
  expect(fine.stdout).toMatch(/plain\.raw \(raw, .*-> this machine:.*\n[\s\S]*info +disk 0 +checksum: .*\(virtlift\/no-checksum\)/);

  const zeros = join(libvirtd.directory, "zeros.qcow2");
  await qemuImg("create", "-q", "-f", "qcow2", zeros, "1M");
  expect(await virtlift("check", zeros, "--host", libvirtd.uri)).toMatchObject({
    code: 1,
    stdout: expect.stringContaining("(virtlift/empty-image)"),
  });

  const refused = await virtlift("check", join(libvirtd.directory, "none.vmdk"), "--host", libvirtd.uri, "--json");
  expect(refused.code).toBe(2);
  expect(JSON.parse(refused.stdout)).toMatchObject({
    verdict: "block",
    plan: [],
    findings: [{ resource: "disk 0", rule: "virtlift/source-missing", level: "block", property: "source" }],
  });
  const vmx = join(libvirtd.directory, "web.vmx");
  await writeFile(vmx, vmxSeed(['pciPassthru0.present = "TRUE"', 'sound.present = "TRUE"', 'uuid.bios = "56 4d 01 02"']));
  const lone = await virtlift("check", vmx, "--host", libvirtd.uri);
  expect(lone).toMatchObject({ code: 2, stdout: expect.stringContaining('there is no "a.vmdk" beside the VMX') });
  await writeFile(join(libvirtd.directory, "a.vmdk"), sparseVmdkSeed());
  const whole = await virtlift("check", vmx, "--host", libvirtd.uri);
  expect(whole.code).toBe(2);
  for (const [level, rule] of [
    ["block", "passthrough-lost"],
    ["warn", "nvram-lost"],
    ["warn", "hardware-lost"],
  ])
    expect(whole.stdout).toMatch(new RegExp(`^${level} +disk 0 +source: .* of the package's machine .* \\(virtlift/${rule}\\)$`, "m"));
  expect(whole.stdout).toMatch(/^info +machine +source: its BIOS UUID .* \(virtlift\/package-note\)$/m);
  const zip = join(libvirtd.directory, "packed.zip");
  const ova = (await prepareGuestOva()).path;
  const { stdout: members } = await runCommand(["tar", "--list", `--file=${ova}`]);
  await runCommand(["tar", "--extract", `--file=${ova}`, `--directory=${libvirtd.directory}`]);
  const unpacked = members
    .trim()
    .split("\n")
    .map((name) => join(libvirtd.directory, name));
  const packages = [
    { packed: [file], plan: /packed\.zip \(raw, 64\.0 KiB virtual\) -> this machine:/, machine: 0 },
    { packed: unpacked, plan: /packed\.zip \(vmdk streamOptimized, 64\.0 MiB virtual\) -> this machine:/, machine: 1 },
    {
      packed: [ova],
      plan: /packed\.zip \(.* of a size that shows on import\) -> .*, and how much there is to send shows then, too$/m,
      machine: 1,
    },
  ];
  for (const { packed, plan, machine } of packages) {
    await runCommand(["zip", "-q", "-1", "-j", zip, ...packed]);
    const { stdout } = await virtlift("check", zip, "--host", libvirtd.uri);
    expect(stdout).toMatch(plan);
    expect(stdout.match(/^block +machine +networks\[0\]\.network: the network default on this machine is not active/gm) ?? []).toHaveLength(
      machine,
    );
    await rm(zip);
  }
  expect(await virtlift("check", file)).toMatchObject({ code: 2, stderr: expect.stringContaining("give the host") });
}, 60_000);
