/** Finds out whether this machine's KVM runs guests. That /dev/kvm exists proves nothing: nested in another machine, guests may hang under it. */
import { spawn } from "node:child_process";
import { access, constants, stat } from "node:fs/promises";
import { getuid } from "node:process";

const KVM = "/dev/kvm";
const FIRST_WORDS = "Linux version";
const TRIAL_MS = 5000;
/** Permission to read and write for group or others: QEMU runs as a user of its own under the system's libvirt. */
const SHARED_MODES = [0o060, 0o006] as const;

/** `kvm` when a kernel, started for five seconds at most, speaks under it; else `qemu`: emulation, which works everywhere and is slow. */
export async function probeAcceleration(kernelPath: string): Promise<"kvm" | "qemu"> {
  return (await isShared()) && (await speaks(kernelPath)) ? "kvm" : "qemu";
}

async function isShared(): Promise<boolean> {
  try {
    await access(KVM, constants.R_OK | constants.W_OK);
    const { mode } = await stat(KVM);
    return getuid?.() !== 0 || SHARED_MODES.some((wanted) => (mode & wanted) === wanted);
  } catch {
    // ENOENT, EACCES: there is none for us.
    return false;
  }
}

function speaks(kernelPath: string): Promise<boolean> {
  const argv = ["-accel", "kvm", "-m", "256", "-display", "none", "-nic", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernelPath];
  const child = spawn("qemu-system-x86_64", [...argv, "-append", "console=ttyS0 panic=-1"], { stdio: ["ignore", "pipe", "ignore"] });
  return new Promise((resolve) => {
    let console = "";
    const end = (works: boolean): void => {
      clearTimeout(timer);
      child.kill("SIGKILL");
      resolve(works);
    };
    const timer = setTimeout(end, TRIAL_MS, false);
    child.once("error", () => end(false));
    child.once("close", () => end(console.includes(FIRST_WORDS)));
    child.stdout.setEncoding("utf8").on("data", (chunk: string) => {
      console = (console + chunk).slice(-65_536);
      if (console.includes(FIRST_WORDS)) end(true);
    });
  });
}
