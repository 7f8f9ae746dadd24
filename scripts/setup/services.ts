/** Finds the libvirt of this machine, and starts it where it does not run and we may. */
import { chmod, mkdir } from "node:fs/promises";
import { getuid } from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { Hosts } from "../../provider/host/hosts.ts";
import { runCommand } from "./command.ts";
import { exists } from "./files.ts";
import { SetupError } from "./packages.ts";
import { type Note, step } from "./steps.ts";

const SYSTEM_URI = "qemu:///system";
const SESSION_URI = "qemu:///session";
const START_TIMEOUT_MS = 30_000;

/**
 * The URI of a libvirt that answers: the system's where this user may use it, else the user's own session.
 * A daemon that runs is not touched; root starts the system's when none does. Shows its step. Throws SetupError when neither answers.
 */
export async function prepareLibvirt(hosts: Hosts): Promise<string> {
  return step("libvirt", async (note) => {
    const refusal = await refusalOf(hosts, SYSTEM_URI);
    if (refusal === undefined) {
      note(`${SYSTEM_URI}, runs already`);
      return SYSTEM_URI;
    }
    if (getuid?.() === 0) {
      await startDaemons(note);
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

/** By systemd where that is in charge (sd_booted(3)), else as daemons of their own: libvirtd wants the system's bus and, for consoles, virtlogd. */
async function startDaemons(note: Note): Promise<void> {
  if (await exists("/run/systemd/system")) {
    note("systemctl start libvirtd");
    await runCommand(["systemctl", "start", "libvirtd"]);
    return;
  }
  if (!(await exists("/run/dbus/system_bus_socket"))) {
    note("dbus-daemon");
    await mkdir("/run/dbus", { recursive: true });
    await chmod("/run/dbus", 0o755);
    await runCommand(["dbus-daemon", "--system", "--fork"]);
  }
  if (!(await exists("/run/libvirt/virtlogd-sock"))) {
    note("virtlogd");
    await runCommand(["virtlogd", "--daemon"]);
  }
  note("libvirtd");
  await runCommand(["libvirtd", "--daemon"]);
}
