/** Packs a disk as VMware exports a machine: an OVF, a manifest of SHA-256 digests and a streamOptimized VMDK in one OVA. */
import { link, stat, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { cachePath, fillOnce } from "../setup/cache.ts";
import { runCommand } from "../setup/command.ts";
import { type GuestImage, type GuestOptions, hashFile, prepareGuest } from "./guest.ts";

const NAME = "virtlift-guest";

export interface GuestOva extends GuestImage {
  readonly format: "vmdk-stream";
}

/** The proof guest as an OVA; `path` is the OVA's, `contentSha256` the disk's in it. Made on the first call, taken from the cache later. */
export async function prepareGuestOva(options: GuestOptions = {}): Promise<GuestOva> {
  const image = await prepareGuest("vmdk-stream", options);
  const directory = cachePath("guest", `ova-${image.contentSha256.slice(0, 16)}`);
  await fillOnce(directory, (temporary) => writeOva(temporary, image));
  return { ...image, format: "vmdk-stream", path: join(directory, `${NAME}.ova`) };
}

/** Members in the order of DSP0243 2.1, section 5.4: the descriptor first, then the manifest, then the files in the order of the references. */
async function writeOva(directory: string, image: GuestImage): Promise<void> {
  const disk = `${NAME}-disk1.vmdk`;
  const ovf = `${NAME}.ovf`;
  const manifest = `${NAME}.mf`;
  await link(image.path, join(directory, disk));
  await writeFile(join(directory, ovf), renderOvf(disk, (await stat(image.path)).size, image.virtualSizeBytes));
  const digests = await Promise.all(
    [ovf, disk].map(async (name) => `SHA256(${basename(name)})= ${await hashFile(join(directory, name))}\n`),
  );
  await writeFile(join(directory, manifest), digests.join(""));
  await runCommand([
    "tar",
    "--format=ustar",
    "--owner=0",
    "--group=0",
    "-C",
    directory,
    "-cf",
    join(directory, `${NAME}.ova`),
    ovf,
    manifest,
    disk,
  ]);
}

/** Resource types of CIM_ResourceAllocationSettingData (DMTF DSP8004): 3 CPU, 4 memory, 20 other storage controller (SATA), 17 disk, 10 Ethernet. */
function renderOvf(disk: string, fileBytes: number, capacityBytes: number): string {
  const item = (id: number, type: number, name: string, rest: string): string =>
    `<Item><rasd:ElementName>${name}</rasd:ElementName><rasd:InstanceID>${id}</rasd:InstanceID>${rest}<rasd:ResourceType>${type}</rasd:ResourceType></Item>`;
  return `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References><File ovf:href="${disk}" ovf:id="file1" ovf:size="${fileBytes}"/></References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="${capacityBytes}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="VM Network"><Description>The network of the machine</Description></Network></NetworkSection>
  <VirtualSystem ovf:id="${NAME}">
    <Info>A machine that proves what it booted from</Info>
    <Name>${NAME}</Name>
    <OperatingSystemSection ovf:id="101" vmw:osType="other5xLinux64Guest"><Info>Guest operating system</Info></OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemType>vmx-19</vssd:VirtualSystemType></System>
      ${item(1, 3, "1 virtual CPU", "<rasd:VirtualQuantity>1</rasd:VirtualQuantity>")}
      ${item(2, 4, "256 MB of memory", "<rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:VirtualQuantity>256</rasd:VirtualQuantity>")}
      ${item(3, 20, "SATA controller 0", "<rasd:Address>0</rasd:Address><rasd:ResourceSubType>vmware.sata.ahci</rasd:ResourceSubType>")}
      ${item(4, 17, "Hard disk 1", "<rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:Parent>3</rasd:Parent>")}
      ${item(5, 10, "Network adapter 1", "<rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:Connection>VM Network</rasd:Connection><rasd:ResourceSubType>E1000e</rasd:ResourceSubType>")}
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
`;
}
