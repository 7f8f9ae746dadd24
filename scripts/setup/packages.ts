/** What a script needs of the operating system: found by what it brings, installed where that is allowed, else named. */
import { delimiter, isAbsolute } from "node:path";
import { env, getuid } from "node:process";
import { exists, findExecutable } from "./files.ts";
import { runCommand } from "./command.ts";
import { step } from "./steps.ts";

const INSTALL_TIMEOUT_MS = 20 * 60_000;
/** Another apt may be at work: a fresh machine updates itself. */
const APT_LOCK = ["-o", "DPkg::Lock::Timeout=300"];

/** One thing that must be there: any of `brings`, each the name of a program or an absolute path. `debian` is the package that brings it. */
export interface Need {
  readonly debian: string;
  readonly brings: readonly [string, ...string[]];
}

/** To run machines on this machine. */
export const LIBVIRT: readonly Need[] = [
  { debian: "libvirt-daemon-system", brings: ["libvirtd", "virtqemud"] },
  { debian: "qemu-system-x86", brings: ["qemu-system-x86_64", "/usr/libexec/qemu-kvm"] },
  { debian: "qemu-utils", brings: ["qemu-img"] },
  { debian: "dbus", brings: ["dbus-daemon"] },
];

/** To make the proof guest. */
export const GUEST: readonly Need[] = [
  { debian: "apt", brings: ["apt-get"] },
  { debian: "dpkg", brings: ["dpkg-deb"] },
  { debian: "qemu-utils", brings: ["qemu-img"] },
  { debian: "dosfstools", brings: ["mkfs.vfat"] },
  { debian: "mtools", brings: ["mcopy"] },
  { debian: "syslinux", brings: ["syslinux"] },
  { debian: "syslinux-common", brings: ["/usr/lib/syslinux/mbr/mbr.bin"] },
];

/** To test against real daemons, beside `LIBVIRT` and `GUEST`. */
export const TESTS: readonly Need[] = [
  { debian: "libvirt-clients", brings: ["virsh"] },
  { debian: "ovmf", brings: ["/usr/share/OVMF/OVMF_CODE_4M.fd"] },
  { debian: "swtpm", brings: ["swtpm"] },
  { debian: "xorriso", brings: ["xorriso"] },
  { debian: "openssh-server", brings: ["sshd"] },
  { debian: "openssh-client", brings: ["ssh"] },
  { debian: "netcat-openbsd", brings: ["nc"] },
  { debian: "sudo", brings: ["sudo"] },
  { debian: "passwd", brings: ["useradd"] },
  { debian: "iproute2", brings: ["ip"] },
  { debian: "iptables", brings: ["iptables"] },
  { debian: "dnsmasq-base", brings: ["dnsmasq"] },
  { debian: "util-linux", brings: ["setpriv"] },
  { debian: "fdisk", brings: ["sfdisk"] },
  { debian: "parted", brings: ["parted"] },
  { debian: "e2fsprogs", brings: ["mkfs.ext4"] },
  { debian: "dosfstools", brings: ["mkfs.vfat"] },
  { debian: "openssl", brings: ["openssl"] },
  { debian: "curl", brings: ["curl"] },
  { debian: "xz-utils", brings: ["xz"] },
  { debian: "zstd", brings: ["zstd"] },
  { debian: "zip", brings: ["zip"] },
];

/** What a person has to do before the script can go on; its message is all that should be shown. */
export class SetupError extends Error {
  override readonly name = "SetupError";
}

/**
 * Sees to it that all needs are met. On Debian and Ubuntu, as root or with a sudo that asks nothing, installs what is missing;
 * otherwise throws SetupError, which names what is missing and the command that brings it. Touches nothing when nothing is missing.
 */
export async function preparePackages(needs: readonly Need[]): Promise<void> {
  const missing = [...new Set((await findMissing(needs)).map((need) => need.debian))];
  if (missing.length === 0) return;
  const apt = ["apt-get", ...APT_LOCK, "--yes", "--quiet"] as const;
  const install = [...apt, "install", "--no-install-recommends", ...missing] as const;
  const privilege = await findPrivilege();
  if (privilege === undefined) {
    throw new SetupError(
      `missing on this machine: ${missing.join(", ")}; install what brings them (Debian, Ubuntu: sudo apt-get install --no-install-recommends ${missing.join(" ")}), then run this again`,
    );
  }
  await step(`install ${missing.join(" ")}`, async (note) => {
    const options = { env: { ...env, DEBIAN_FRONTEND: "noninteractive" }, timeoutMs: INSTALL_TIMEOUT_MS };
    note("apt-get update");
    await runCommand([...privilege, ...apt, "update"], options);
    note("apt-get install");
    await runCommand([...privilege, ...install], options);
    note("");
  });
  const still = await findMissing(needs);
  if (still.length > 0)
    throw new SetupError(
      `apt-get installed ${missing.join(", ")}, but these are not there: ${still.map((need) => need.brings[0]).join(", ")}`,
    );
}

async function findMissing(needs: readonly Need[]): Promise<readonly Need[]> {
  const found = await Promise.all(needs.map(isMet));
  return needs.filter((_, index) => found[index] !== true);
}

/** Programs of administrators are looked for too where a user's PATH leaves them out. */
async function isMet(need: Need): Promise<boolean> {
  const directories = [...(env["PATH"] ?? "").split(delimiter), "/usr/sbin", "/sbin"];
  for (const each of need.brings) {
    if (isAbsolute(each) ? await exists(each) : (await findExecutable(each, directories)) !== undefined) return true;
  }
  return false;
}

/** What to put before apt-get: nothing for root, env through sudo for others; undefined without apt-get or the right to use it. */
async function findPrivilege(): Promise<readonly [] | readonly ["sudo", "-n", string] | undefined> {
  if ((await findExecutable("apt-get")) === undefined) return undefined;
  if (getuid?.() === 0) return [];
  return runCommand(["sudo", "-n", "true"]).then(
    () => ["sudo", "-n", "DEBIAN_FRONTEND=noninteractive"] as const,
    () => undefined,
  );
}
