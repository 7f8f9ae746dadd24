/** Finds the libvirt of this machine, and starts it where it does not run and we may. */
import { once } from "node:events";
import { chmod, mkdir } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { getuid } from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { Hosts } from "../../provider/host/hosts.ts";
import { runCommand } from "./command.ts";
import { exists } from "./files.ts";
import { SetupError } from "./packages.ts";
import { type Note, step } from "./steps.ts";

const SYSTEM_URI = "qemu:///system";
const SESSION_URI = "qemu:///session";
/** What `prepareLibvirt` may answer with. */
export const LOCAL_URIS = [SYSTEM_URI, SESSION_URI] as const;
const START_TIMEOUT_MS = 30_000;
/** Is there where systemd is in charge. Source: sd_booted(3). */
const SYSTEMD = "/run/systemd/system";

/**
 * The URI of a libvirt that answers: the system's where this user may use it, else the user's own session.
 * A daemon that runs is not touched; root starts the system's when none does, and one that is started beside a KVM that does not work
 * (`acceleration` is "qemu") does not see it. Shows its step. Throws SetupError when neither answers.
 */
export async function prepareLibvirt(hosts: Hosts, acceleration: "kvm" | "qemu" | undefined): Promise<string> {
  return step("libvirt", async (note) => {
    const refusal = await refusalOf(hosts, SYSTEM_URI);
    if (refusal === undefined) {
      // Without it no machine starts, and where no systemd is in charge nobody brings it back.
      const isOurs = getuid?.() === 0 && !(await exists(SYSTEMD));
      const started = isOurs && (await startLogger(note));
      note(`${SYSTEM_URI}, runs already${started ? "; virtlogd did not, and was started" : ""}`);
      return SYSTEM_URI;
    }
    if (getuid?.() === 0) {
      await startDaemons(note, acceleration === "qemu");
      await waitFor(hosts, SYSTEM_URI);
      note(`${SYSTEM_URI}, started`);
      return SYSTEM_URI;
    }
    const sessionRefusal = await refusalOf(hosts, SESSION_URI);
    if (sessionRefusal !== undefined) throw new SetupError(`no libvirt answers: ${refusal}; ${sessionRefusal}`);
    note(`${SESSION_URI}, as this user may not use ${SYSTEM_URI}`);
    return SESSION_URI;
  });
}

/** Why the libvirt cannot be used; undefined when it can. */
async function refusalOf(hosts: Hosts, uri: string): Promise<string | undefined> {
  try {
    await hosts.open({ uri }).libvirt();
    return undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

async function waitFor(hosts: Hosts, uri: string): Promise<void> {
  const deadline = performance.now() + START_TIMEOUT_MS;
  let refusal = await refusalOf(hosts, uri);
  while (refusal !== undefined) {
    if (performance.now() > deadline) throw new SetupError(`libvirt was started but does not answer: ${refusal}`);
    await sleep(100);
    refusal = await refusalOf(hosts, uri);
  }
}

/** Starts virtlogd, which keeps what machines write to their consoles, where it does not answer. Gives whether it had to. */
async function startLogger(note: Note): Promise<boolean> {
  if (await answers("/run/libvirt/virtlogd-sock")) return false;
  note("virtlogd");
  await runCommand(["virtlogd", "--daemon"]);
  return true;
}

/** Whether somebody listens: a daemon that was killed leaves its socket behind. */
async function answers(path: string): Promise<boolean> {
  const socket = createConnection(path);
  try {
    await once(socket, "connect");
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

/** By systemd where that is in charge, else as daemons of their own: libvirtd wants the system's bus and, for consoles, virtlogd. */
async function startDaemons(note: Note, hideKvm: boolean): Promise<void> {
  if (await exists(SYSTEMD)) {
    note("systemctl start libvirtd");
    await runCommand(["systemctl", "start", "libvirtd"]);
    return;
  }
  if (!(await answers("/run/dbus/system_bus_socket"))) {
    note("dbus-daemon");
    await mkdir("/run/dbus", { recursive: true });
    await chmod("/run/dbus", 0o755);
    // One that was killed leaves its pid file, by which a new one would not start.
    await runCommand(["dbus-daemon", "--system", "--fork", "--nopidfile"]);
  }
  await startLogger(note);
  note("libvirtd");
  if (!hideKvm || !(await exists("/dev/kvm"))) {
    await runCommand(["libvirtd", "--daemon"]);
    return;
  }
  // libvirt would run machines under a KVM that hangs, or probe QEMU for seconds at each call when QEMU's user may not open it.
  const script = join(import.meta.dirname, "hide-kvm.sh");
  await runCommand(["unshare", "--mount", "--propagation", "slave", "sh", "-c", 'sh "$0" && exec libvirtd --daemon', script]);
}
