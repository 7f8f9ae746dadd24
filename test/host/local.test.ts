import { chmod, chown, mkdir, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { once } from "node:events";
import { join } from "node:path";
import { Readable, Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { expect, test, vi } from "vitest";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { failure, openHosts, PATIENT } from "./setup.ts";

// A busy machine may need seconds for a daemon.
vi.setConfig({ testTimeout: 30_000 });

const isRoot = process.getuid?.() === 0;
const NOBODY = 65_534;

async function pidsOf(word: string): Promise<string> {
  return (await runCommand(["sh", "-c", `pgrep -x -f ${word} || true`])).stdout;
}

test("runs commands of this machine and tells how they end", async () => {
  await using user = await openHosts();
  const host = user.hosts.open({ uri: "qemu:///system" });
  expect(host).toMatchObject({ label: "this machine", isLocal: true });
  expect(await host.run(["sh", "-c", 'cat; echo "$LC_ALL" "$1" >&2', "sh", "it's"], { input: "in" })).toEqual({
    stdout: Buffer.from("in"),
    stderr: "C it's\n",
  });
  expect((await failure(host.run(["cat", "/nonexistent"]))).message).toBe(
    "cat exited 1: /nonexistent: No such file or directory (on this machine)",
  );
  expect((await failure(host.run(["no-such-program"]))).message).toBe(
    "no-such-program is not installed on this machine, or not on the path",
  );
  expect(await failure(host.run(["sh", "-c", "kill -TERM $$"]))).toMatchObject({ signal: "SIGTERM" });
});

test("ends a command with all that it started, by time, by abort and by kill", async () => {
  await using user = await openHosts();
  const host = user.hosts.open({ uri: "qemu:///system" });
  expect(await failure(host.run(["sh", "-c", "sleep 4721 & sleep 4721; true"], { timeoutMs: 200 }))).toMatchObject({ phase: "timeout" });
  expect(await failure(host.run(["sh", "-c", "sleep 4721 & wait"], { signal: AbortSignal.timeout(200) }))).toMatchObject({
    phase: "aborted",
  });
  expect(await failure(host.run(["true"], { signal: AbortSignal.abort() }))).toMatchObject({ phase: "aborted" });
  const stream = await host.stream(["sh", "-c", "sleep 4721 & cat"]);
  stream.kill();
  await expect(stream.done).rejects.toMatchObject({ signal: "SIGKILL" });
  await expect.poll(() => pidsOf("'sleep 4721'"), PATIENT).toBe("");
});

test("streams with back-pressure, and a cut stream does not end like a whole one", async () => {
  await using user = await openHosts();
  const host = user.hosts.open({ uri: "qemu:///system" });
  await using copy = await host.stream(["cat"]);
  let size = 0;
  const count = new Writable({
    write(chunk: Buffer, _encoding, callback) {
      size += chunk.length;
      setImmediate(callback);
    },
  });
  const chunk = Buffer.alloc(1024 * 1024);
  await Promise.all([pipeline(Readable.from(Array.from({ length: 32 }, () => chunk)), copy.io), pipeline(copy.io, count)]);
  await copy.done;
  expect(size).toBe(32 * chunk.length);

  await using cut = await host.stream(["sh", "-c", "head -c 100000 /dev/zero; exit 3"]);
  await expect(pipeline(cut.io, new Writable({ write: (_chunk, _encoding, callback) => callback() }))).rejects.toThrow("sh exited 3");
});

test("a sudo that wants a password is one sentence", async () => {
  await using user = await openHosts();
  const bin = join(user.home, "bin");
  await mkdir(bin);
  // What sudo -n of Debian 12 says; the real one is asked on a host of its own in ssh-libvirt.test.ts.
  await writeFile(join(bin, "sudo"), "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n");
  await chmod(join(bin, "sudo"), 0o755);
  await using other = await openHosts({ environment: { PATH: `${bin}:${process.env["PATH"]}` } });
  const { message } = await failure(other.hosts.open({ uri: "qemu:///system", sudo: true }).run(["cat", "/etc/shadow"]));
  expect(message).toBe(
    "sudo does not allow cat without a password on this machine: add a NOPASSWD rule for it to sudoers, or log in as root",
  );
});

test.runIf(isRoot)(
  "opens libvirt by a socket once for all, and again after the daemon died",
  async () => {
    await using libvirtd = await openLibvirtd();
    await using user = await openHosts();
    const host = user.hosts.open({ uri: libvirtd.uri });
    const [first, second] = await Promise.all([host.libvirt(), host.libvirt()]);
    expect(first).toBe(second);
    const own = await host.openLibvirt();
    expect(own).not.toBe(first);
    await own.close();
    expect(first.isOpen).toBe(true);
    expect((await user.hosts.open({ uri: libvirtd.testUri }).libvirt()).isOpen).toBe(true);
    await libvirtd.killDaemon();
    await expect.poll(() => first.isOpen, PATIENT).toBe(false);
    const [again, same] = await Promise.all([host.libvirt(), host.libvirt()]);
    expect(again).toBe(same);
    expect(again.isOpen).toBe(true);
  },
  30_000,
);

test("a socket that is not there, that nobody serves, or that is none of ours is told apart", async () => {
  await using user = await openHosts();
  const path = join(user.home, "sock");
  const open = () => failure(user.hosts.open({ uri: `qemu+unix:///system?socket=${path}` }).libvirt());
  expect(await open()).toMatchObject({
    phase: "daemon",
    message: expect.stringContaining(`no libvirt daemon answers on this machine at ${path}: start it`),
  });
  const server = createServer((socket) => socket.end()).listen(path);
  await once(server, "listening");
  expect(await open()).toMatchObject({ phase: "closed" });
  server.close();
  await writeFile(path, "");
  expect(await open()).toMatchObject({ phase: "daemon" });
});

test.runIf(isRoot)(
  "starts the session daemon of a user who has none, as libvirt does",
  async () => {
    await using user = await openHosts();
    const runtime = join(user.home, "run");
    await mkdir(runtime, { mode: 0o700 });
    await chmod(user.home, 0o755);
    await chown(runtime, NOBODY, NOBODY);
    // The test runs as root, so the daemon's place is taken by a wrapper that becomes nobody first.
    const daemon = join(user.home, "libvirtd");
    await writeFile(
      daemon,
      `#!/bin/sh\necho $$ > ${user.home}/pid\nexport HOME=${runtime} XDG_CONFIG_HOME=${runtime} XDG_CACHE_HOME=${runtime}\nexec setpriv --reuid=${NOBODY} --regid=${NOBODY} --clear-groups libvirtd "$@"\n`,
      { mode: 0o755 },
    );
    await writeFile(join(user.home, "pid"), "");
    const environment = { XDG_RUNTIME_DIR: runtime, VIRTD_PATH: daemon };
    await using nobody = await openHosts({ userId: NOBODY, environment });
    try {
      const libvirt = await nobody.hosts.open({ uri: "qemu:///session" }).libvirt();
      expect(libvirt.isOpen).toBe(true);
      const pid = (await readFile(join(user.home, "pid"), "utf8")).trim();
      expect(await readFile(`/proc/${pid}/cmdline`, "utf8")).toContain("libvirtd\0--timeout=120");
      await nobody.hosts.open({ uri: "qemu:///session?mode=legacy" }).libvirt();
      expect((await readFile(join(user.home, "pid"), "utf8")).trim()).toBe(pid);
    } finally {
      await nobody.hosts.close();
      const pid = Number(await readFile(join(user.home, "pid"), "utf8"));
      if (pid > 0) process.kill(pid, "SIGKILL");
    }

    await using off = await openHosts({ userId: NOBODY, environment: { XDG_RUNTIME_DIR: join(runtime, "x"), LIBVIRT_AUTOSTART: "0" } });
    expect((await failure(off.hosts.open({ uri: "qemu:///session" }).libvirt())).message).toContain(
      "no libvirt daemon answers on this machine",
    );
    await using broken = await openHosts({
      userId: NOBODY,
      environment: { XDG_RUNTIME_DIR: join(runtime, "x"), VIRTD_PATH: "/bin/false" },
    });
    expect((await failure(broken.hosts.open({ uri: "qemu:///session" }).libvirt())).message).toContain(
      "the session daemon /bin/false did not come up: it ended (exit 1)",
    );
  },
  30_000,
);
