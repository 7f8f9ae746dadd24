/** Real hosts with a real libvirt, reached by SSH as root and as users with less. */
import { expect, test } from "vitest";
import type { HostSpec } from "../../provider/host/hosts.ts";
import { openKvmHost } from "../bed/libvirtd.ts";
import { failure, openHosts } from "./setup.ts";

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
      expect((await open(`${kvm.sshUri()}?${query}`).libvirt()).isOpen, query).toBe(true);
    }
    expect((await open(kvm.sshUri().replace("qemu+ssh", "test+ssh").replace("/system", "/default")).libvirt()).isOpen).toBe(true);

    const mover = open(kvm.sshUri("mover"), { sudo: true });
    expect((await mover.run(["id", "-un"])).stdout.toString()).toBe("root\n");
    expect((await mover.libvirt()).isOpen).toBe(true);
    const sleeping = await mover.stream(["sleep", "4731"]);
    await expect.poll(async () => kvm.run("sh", "-c", "pgrep -x -f 'sleep 4731' || true")).not.toBe("");
    sleeping.kill();
    await expect(sleeping.done).rejects.toMatchObject({ name: "CommandError" });
    await expect.poll(async () => kvm.run("sh", "-c", "pgrep -x -f 'sleep 4731' || true")).toBe("");

    const guest = await failure(open(kvm.sshUri("guest")).libvirt());
    expect(guest).toMatchObject({ phase: "daemon" });
    expect(guest.message).toContain("guest may not open libvirt's socket on guest@");
    expect(guest.message).toContain("add guest to the group libvirt");
    const guestSudo = await failure(open(kvm.sshUri("guest"), { sudo: true }).libvirt());
    expect(guestSudo.message).toContain("sudo does not allow virt-ssh-helper without a password on guest@");
    expect((await failure(open(kvm.sshUri("guest"), { sudo: true }).run(["id"]))).message).toContain(
      "sudo does not allow id without a password",
    );

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
    const { clientKey, knownHostsFile } = kvm.sshd;
    const host = user.hosts.open({ uri: kvm.sshUri(), identityFile: clientKey.path, knownHostsFile });
    const first = await host.libvirt();
    await kvm.killDaemon();
    await expect.poll(() => first.isOpen).toBe(false);
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
