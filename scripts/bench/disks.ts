/** The disks that the benchmark moves: a file system of real files, made once and kept in the cache in every format that is compared. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { copyFile, mkdir, rm, stat, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { cachePath, fillOnce } from "../setup/cache.ts";
import { runCommand } from "../setup/command.ts";

const MIB = 1024 * 1024;
const MAKE_TIMEOUT_MS = 20 * 60_000;

/** Raise it when the disks are made in another way: the old ones are in the cache. */
const VERSION = 1;

/** Where real files of every kind are found: programs, libraries, texts, pictures. */
const FILE_FOLDERS = [join(import.meta.dirname, "../../node_modules"), "/usr/share", "/usr/bin", "/usr/lib"];

/** A disk with one ext4 file system, in all formats. Paths on this machine; sizes in bytes. */
export interface BenchDisk {
  /** What the files in it take. */
  readonly dataMiB: number;
  readonly virtualGiB: number;
  readonly raw: string;
  readonly qcow2: string;
  /** streamOptimized. */
  readonly vmdk: string;
  /** The same VMDK with an OVF and a SHA-256 manifest. */
  readonly ova: string;
  readonly vmdkBytes: number;
}

/** Makes a disk, or finds it in the cache. The larger takes a minute. */
export async function prepareDisk(virtualGiB: number, dataMiB: number): Promise<BenchDisk> {
  const directory = cachePath("bench", `v${VERSION}-${virtualGiB}-gib-${dataMiB}-mib`);
  await fillOnce(directory, (temporary) => makeDisk(temporary, virtualGiB, dataMiB));
  const vmdk = join(directory, "disk.vmdk");
  return {
    dataMiB,
    virtualGiB,
    raw: join(directory, "disk.raw"),
    qcow2: join(directory, "disk.qcow2"),
    vmdk,
    ova: join(directory, "disk.ova"),
    vmdkBytes: (await stat(vmdk)).size,
  };
}

async function makeDisk(directory: string, virtualGiB: number, dataMiB: number): Promise<void> {
  const [files, raw, vmdk] = ["files", "disk.raw", "disk.vmdk"].map((name) => join(directory, name)) as [string, string, string];
  await mkdir(files);
  await collectFiles(files, dataMiB * MIB);
  await runCommand(["truncate", "--size", `${virtualGiB}G`, raw]);
  await runCommand(["mkfs.ext4", "-q", "-F", "-m", "0", "-d", files, raw], { timeoutMs: MAKE_TIMEOUT_MS });
  await rm(files, { recursive: true });
  const convert = (...argv: readonly string[]) => runCommand(["qemu-img", "convert", "-f", "raw", ...argv], { timeoutMs: MAKE_TIMEOUT_MS });
  await convert("-O", "qcow2", raw, join(directory, "disk.qcow2"));
  await convert("-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk);
  await packOva(directory, virtualGiB * 1024 * MIB);
}

/** An OVF, a manifest that vouches for both, and the VMDK. */
async function packOva(directory: string, capacityBytes: number): Promise<void> {
  const path = (name: string): string => join(directory, name);
  await writeFile(path("disk.ovf"), renderOvf((await stat(path("disk.vmdk"))).size, capacityBytes));
  const lines = await Promise.all(["disk.ovf", "disk.vmdk"].map(async (name) => `SHA256(${name})= ${await hashFile(path(name))}\n`));
  await writeFile(path("disk.mf"), lines.join(""));
  await runCommand(["tar", "--format=ustar", "-C", directory, "-cf", path("disk.ova"), "disk.ovf", "disk.mf", "disk.vmdk"]);
}

async function hashFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  await pipeline(createReadStream(path), hash);
  return hash.digest("hex");
}

/** Resource types of CIM_ResourceAllocationSettingData (DMTF DSP8004): 20 a storage controller, 17 a disk. */
function renderOvf(fileBytes: number, capacityBytes: number): string {
  return `<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References><File ovf:href="disk.vmdk" ovf:id="file1" ovf:size="${fileBytes}"/></References>
  <DiskSection><Info>Disks</Info><Disk ovf:capacity="${capacityBytes}" ovf:diskId="disk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
  <VirtualSystem ovf:id="bench"><Info>A machine</Info><Name>bench</Name><VirtualHardwareSection><Info>Hardware</Info>
    <Item><rasd:ElementName>SATA</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:Address>0</rasd:Address><rasd:ResourceType>20</rasd:ResourceType></Item>
    <Item><rasd:ElementName>Disk</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/disk1</rasd:HostResource><rasd:Parent>1</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>
`;
}

/** Copies files of this machine, an equal share from each folder as far as it has them, in the order of their paths; the last one is cut. */
async function collectFiles(into: string, wantedBytes: number): Promise<void> {
  let left = wantedBytes;
  let count = 0;
  for (const [index, folder] of FILE_FOLDERS.entries()) {
    const enough = left - left / (FILE_FOLDERS.length - index);
    const { stdout } = await runCommand(["find", folder, "-xdev", "-type", "f", "-size", "+0", "-printf", "%s %p\\n"]);
    for (const line of stdout.split("\n").filter(Boolean).toSorted(byPath)) {
      if (left <= enough) break;
      const sizeBytes = Number(line.slice(0, line.indexOf(" ")));
      // Many files in one folder slow a file system down.
      const shelf = join(into, String(Math.floor(count / 1000)));
      if (count % 1000 === 0) await mkdir(shelf);
      const to = join(shelf, String(count++));
      await copyFile(line.slice(line.indexOf(" ") + 1), to);
      if (sizeBytes > left) await truncate(to, left);
      left -= Math.min(left, sizeBytes);
    }
  }
  if (left > 0) throw new Error(`this machine has not ${Math.round(wantedBytes / MIB)} MiB of files in ${FILE_FOLDERS.join(", ")}`);
}

function byPath(a: string, b: string): number {
  const [pathA, pathB] = [a, b].map((line) => line.slice(line.indexOf(" "))) as [string, string];
  return pathA < pathB ? -1 : 1;
}
