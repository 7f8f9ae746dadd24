import { copyFile, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, test } from "vitest";
import { prepareGuest, type GuestImage } from "../../scripts/guest/guest.ts";
import { parseGuestReport, type GuestReport } from "../../scripts/guest/report.ts";
import { type Libvirtd, openLibvirtd } from "../bed/libvirtd.ts";

const MAC = "52:54:00:aa:bb:cc";
const BOOT_TIMEOUT_MS = 60_000;

interface Hardware {
  readonly os: string;
  readonly target: string;
  readonly model: string;
}

const VIRTIO_BIOS: Hardware = { os: "<os>", target: 'dev="vda" bus="virtio"', model: "virtio" };
const SATA_UEFI: Hardware = {
  os: '<os firmware="efi"><firmware><feature enabled="no" name="enrolled-keys"/></firmware>',
  target: 'dev="sda" bus="sata"',
  model: "e1000e",
};

function renderDomain(disk: string, log: string, hardware: Hardware): string {
  return `<domain type="qemu"><name>guest</name><memory unit="MiB">256</memory><vcpu>1</vcpu>
    ${hardware.os}<type arch="x86_64" machine="q35">hvm</type></os><features><acpi/></features>
    <devices>
      <disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="${disk}"/><target ${hardware.target}/></disk>
      <interface type="network"><source network="default"/><mac address="${MAC}"/><model type="${hardware.model}"/></interface>
      <serial type="pty"><log file="${log}"/></serial>
    </devices></domain>`;
}

async function boot(libvirtd: Libvirtd, image: GuestImage, hardware: Hardware): Promise<string> {
  const disk = join(libvirtd.poolPath, "guest.qcow2");
  const log = join(libvirtd.directory, "guest.log");
  await copyFile(image.path, disk);
  const definition = join(libvirtd.directory, "guest.xml");
  await writeFile(definition, renderDomain(disk, log, hardware));
  await libvirtd.virsh("create", definition);
  return log;
}

/** Follows the console until `seen` finds what it looks for. */
async function follow<T>(log: string, seen: (console: string) => T | undefined): Promise<T> {
  const deadline = performance.now() + BOOT_TIMEOUT_MS;
  while (performance.now() < deadline) {
    const found = seen(await readFile(log, "utf8").catch(() => ""));
    if (found !== undefined) return found;
    await sleep(100);
  }
  throw new Error(`the guest did not say it: ${await readFile(log, "utf8")}`);
}

function withAddress(console: string): GuestReport | undefined {
  const report = parseGuestReport(console);
  return report !== undefined && report.ipv4Addresses.length > 0 ? report : undefined;
}

test.each([
  ["BIOS and virtio", VIRTIO_BIOS, { firmware: "bios", device: "/dev/vda", driver: "virtio_net" }],
  ["UEFI, SATA and e1000e", SATA_UEFI, { firmware: "uefi", device: "/dev/sda", driver: "e1000e" }],
])("boots by %s, tells its hardware and its disk's hash, and powers off", { timeout: 90_000 }, async (_, hardware, expected) => {
  await using libvirtd = await openLibvirtd({ network: true });
  const image = await prepareGuest("qcow2", { sizeMiB: 32 });
  const log = await boot(libvirtd, image, hardware);
  const report = await follow(log, parseGuestReport);
  expect(report).toMatchObject({
    kernel: expect.stringMatching(/^\d+\.\d+/),
    firmware: expected.firmware,
    vcpus: 1,
    uuid: expect.stringMatching(/^[0-9a-f-]{36}$/),
    interfaces: [{ mac: MAC, driver: expected.driver }],
    disks: [{ device: expected.device, sizeBytes: image.virtualSizeBytes, sha256: image.contentSha256 }],
  });
  await expect.poll(() => libvirtd.virsh("list", "--name"), { timeout: 20_000 }).toBe("");
});

test(
  "stays when told to, takes an address by DHCP, tells of a disk that comes later, and heeds the power button",
  { timeout: 90_000 },
  async () => {
    await using libvirtd = await openLibvirtd({ network: true });
    const image = await prepareGuest("qcow2", { sizeMiB: 32, stay: true, hash: false });
    const log = await boot(libvirtd, image, VIRTIO_BIOS);
    const report = await follow(log, withAddress);
    expect(report.disks).toEqual([{ device: "/dev/vda", sizeBytes: image.virtualSizeBytes, sha256: undefined }]);
    expect(await libvirtd.virsh("domifaddr", "guest")).toContain(report.ipv4Addresses[0]);
    await libvirtd.virsh("shutdown", "guest", "--mode", "acpi");
    await expect.poll(() => libvirtd.virsh("list", "--name"), { timeout: 20_000 }).toBe("");
    expect(await readFile(log, "utf8")).toContain("virtlift-guest power button");
  },
);
