/** Real hosts with a real libvirt, reached by SSH as root and as users with less. */
import { copyFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import type { HostSpec } from "../../provider/host/hosts.ts";
import { openKvmHost } from "../bed/libvirtd.ts";
import { failure, openHosts, PATIENT } from "./setup.ts";

const isRoot = process.getuid?.() === 0;

test.runIf(isRoot)(
  "reaches libvirt by every way that a host offers, and says what is missing",
  async () => {
    await using kvm = await openKvmHost({ name: "kvm8" });
    await kvm.addUser("mover", { sudo: true });
    await kvm.addUser("guest");
    await using user = await openHosts();
    const open = (uri: string, spec: Partial<HostSpec> = {}) =>
      user.hosts.open({ uri, identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile, ...spec });

    const root = open(kvm.sshUri());
    const [first, second] = await Promise.all([root.libvirt(), root.libvirt()]);
    expect(first).toBe(second);
    expect(first.isOpen).toBe(true);
    const own = await root.openLibvirt();
    await own.close();
    for (const query of ["proxy=native", "proxy=netcat", "proxy=netcat&netcat=no-such-netcat", "mode=legacy", `socket=${kvm.socketPath}`]) {
      expect((await open(`${kvm.sshUri()}?${query}`).libvirt()).isOpen).toBe(true);
    }
    expect((await open(kvm.sshUri().replace("qemu+ssh", "test+ssh").replace("/system", "/default")).libvirt()).isOpen).toBe(true);

    const mover = open(kvm.sshUri("mover"), { sudo: true });
    expect((await mover.run(["id", "-un"])).stdout.toString()).toBe("root\n");
    expect((await mover.libvirt()).isOpen).toBe(true);
    const sleeping = await mover.stream(["sleep", "4731"]);
    await expect.poll(async () => kvm.run("sh", "-c", "pgrep -x -f 'sleep 4731' || true"), PATIENT).not.toBe("");
    sleeping.kill();
    await expect(sleeping.done).rejects.toMatchObject({ name: "CommandError" });
    await expect.poll(async () => kvm.run("sh", "-c", "pgrep -x -f 'sleep 4731' || true"), PATIENT).toBe("");

    const guest = await failure(open(kvm.sshUri("guest")).libvirt());
    expect(guest).toMatchObject({ phase: "daemon" });
    expect(guest.message).toContain("guest may not open libvirt's socket on guest@");
    expect(guest.message).toContain("add guest to the group libvirt");
    const guestSudo = await failure(open(kvm.sshUri("guest"), { sudo: true }).libvirt());
    expect(guestSudo.message).toContain("sudo does not allow virt-ssh-helper without a password on guest@");
    expect((await failure(open(kvm.sshUri("guest"), { sudo: true }).run(["id"]))).message).toContain(
      "sudo does not allow id without a password",
    );

    // virt-ssh-helper starts the daemon of a user who has none.
    expect((await open(kvm.sshUri("guest").replace("/system", "/session")).libvirt()).isOpen).toBe(true);
    const missing = await failure(open(`${kvm.sshUri()}?socket=/run/none`).libvirt());
    expect(missing).toMatchObject({ phase: "daemon", message: expect.stringContaining("at /run/none: start it there") });
  },
  60_000,
);

test.runIf(isRoot)(
  "survives a daemon that dies and a host that loses its power",
  async () => {
    await using kvm = await openKvmHost({ name: "kvm9" });
    await using user = await openHosts({ sshConfig: "ConnectTimeout 2\n" });
    // The bed's own files go with the power.
    const [identityFile, knownHostsFile] = [join(user.home, "key"), join(user.home, "hosts")];
    await copyFile(kvm.sshd.clientKey.path, identityFile);
    await copyFile(kvm.sshd.knownHostsFile, knownHostsFile);
    const host = user.hosts.open({ uri: kvm.sshUri(), identityFile, knownHostsFile });
    const first = await host.libvirt();
    await kvm.killDaemon();
    await expect.poll(() => first.isOpen, PATIENT).toBe(false);
    expect((await host.libvirt()).isOpen).toBe(true);
    const sleeping = failure(host.run(["sleep", "4732"], { timeoutMs: 3000 }));
    await kvm.cutPower();
    expect(await sleeping).toMatchObject({ name: "ConnectionError" });
    expect(["connect", "timeout", "closed"]).toContain(
      ((await failure(host.run(["true"], { timeoutMs: 3000 }))) as { readonly phase?: string }).phase,
    );
    await kvm.boot();
    await expect
      .poll(async () => (await host.run(["echo", "back"]).catch(() => undefined))?.stdout.toString(), { timeout: 20_000 })
      .toBe("back\n");
    expect((await host.libvirt()).isOpen).toBe(true);
  },
  60_000,
);

test.runIf(isRoot)(
  "logs in by password, asked for by keyboard-interactive or as itself, and never tells it",
  async () => {
    await using user = await openHosts();
    for (const [method, sshdConfig] of [
      ["password", ["PasswordAuthentication yes", "KbdInteractiveAuthentication no"]],
      ["keyboard-interactive", ["UsePAM yes", "PasswordAuthentication no", "KbdInteractiveAuthentication yes"]],
    ] as const) {
      await using kvm = await openKvmHost({ name: "kvm6", sshdConfig: ["PubkeyAuthentication no", ...sshdConfig] });
      await kvm.addUser("mover");
      await kvm.run("sh", "-c", "echo mover:Sesam-7 | chpasswd");
      const spec = { uri: kvm.sshUri("mover"), knownHostsFile: kvm.sshd.knownHostsFile };
      expect((await user.hosts.open({ ...spec, password: "Sesam-7" }).run(["id", "-un"])).stdout.toString()).toBe("mover\n");
      const { message } = await failure(user.hosts.open({ ...spec, password: "Geheim-8" }).run(["true"]));
      expect(message).toContain(
        `refused the login: tried password${method === "password" ? "" : " (keyboard-interactive)"}; it takes ${method}`,
      );
      expect(message).not.toContain("Geheim-8");
      await user.hosts.close();
    }
  },
  60_000,
);

test.runIf(isRoot)(
  "a host that offers no helper and forwards no sockets is told what it may offer",
  async () => {
    await using kvm = await openKvmHost({ name: "kvm5", sshdConfig: ["AllowStreamLocalForwarding no"] });
    await using user = await openHosts();
    const uri = `${kvm.sshUri()}?proxy=netcat&netcat=no-such-netcat`;
    const host = user.hosts.open({ uri, identityFile: kvm.sshd.clientKey.path, knownHostsFile: kvm.sshd.knownHostsFile });
    const error = await failure(host.libvirt());
    expect(error).toMatchObject({ phase: "daemon" });
    expect(error.message).toContain("install virt-ssh-helper, nc or socat there, or set AllowStreamLocalForwarding");
  },
  60_000,
);
