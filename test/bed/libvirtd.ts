/**
 * Real libvirt daemons for tests, away from the machine's own: each runs in its own name spaces with its own /etc, /run and /var/lib/libvirt.
 * A `Libvirtd` is reached by its socket; a `KvmHost` is besides a whole second machine with an address and an sshd. Both need root.
 */
import { randomInt, randomUUID } from "node:crypto";
import { once } from "node:events";
import { chmod, mkdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { cachePath } from "../../scripts/setup/cache.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { type Daemon, descendants, openDaemon } from "./daemon.ts";
import { openDirectory } from "./directory.ts";
import { makeSshKey, openSshd, type Sshd, type SshKey } from "./sshd.ts";

const POOL_NAME = "default";
const NETWORK_NAME = "default";
const SSH_PORT = 22;
const RESTART_TIMEOUT_MS = 15_000;

export interface LibvirtdOptions {
  /** Puts the pool on a file system of this size, so that it can run full. Default: no limit but the disk's. */
  readonly poolMiB?: number;
  /** Whether the network `default` is started: NAT and DHCP on 192.168.122.0/24, in the daemon's own network name space. Default false: defined only. */
  readonly network?: boolean;
}

export interface Libvirtd extends AsyncDisposable {
  /** The QEMU driver through the daemon's socket: `qemu+unix:///system?socket=...`. */
  readonly uri: string;
  /** libvirt's test driver through the same daemon: `test+unix:///default?socket=...`. It forgets all when the last connection closes. */
  readonly testUri: string;
  /** The same path inside and outside. */
  readonly socketPath: string;
  /** The folder of the pool `default`; the same path inside and outside. */
  readonly poolPath: string;
  /** The daemon's folder, removed on dispose; QEMU's user may look into it, so a test may put its own disks there. */
  readonly directory: string;
  /** What the daemons have logged so far. */
  log(): string;
  /** Runs argv as root inside the host's name spaces and gives its stdout. Throws CommandError. */
  run(...argv: readonly [string, ...string[]]): Promise<string>;
  /** Runs virsh against the daemon from outside and gives its stdout. Throws CommandError. */
  virsh(...argv: readonly string[]): Promise<string>;
  /** Stops libvirtd with SIGSTOP, so that it answers nothing more until it is killed. */
  freezeDaemon(): Promise<void>;
  /** Kills libvirtd alone, with SIGKILL, and waits until its successor answers; machines run on. */
  killDaemon(): Promise<void>;
}

export interface KvmHostOptions extends LibvirtdOptions {
  /** Default `kvm1`. */
  readonly name?: string;
  /** Lines of sshd_config(5) that win over the bed's own. */
  readonly sshdConfig?: readonly string[];
}

export interface KvmHost extends Libvirtd {
  /** IPv4 address on a private link between this machine and the host; sshd listens there on port 22. */
  readonly address: string;
  /** Keys, known_hosts file and user for logging in. A new value after each boot, with the same keys. */
  readonly sshd: Sshd;
  /** `qemu+ssh://root@<address>/system`, and for another user as told. */
  sshUri(user?: string): string;
  /** Makes a user that may log in with the same client key. `sudo` lets it become root without a password. */
  addUser(name: string, options?: { readonly sudo?: boolean }): Promise<void>;
  /** Lets so many megabits (10^6) a second through to the host, all that is sent there together; undefined lifts the limit. Gone after `boot`. */
  limitLink(megabits: number | undefined): Promise<void>;
  /** Ends every process of the host at once; its files stay. */
  cutPower(): Promise<void>;
  /** Boots it again after `cutPower`, with the same files, address and keys. */
  boot(): Promise<void>;
}

/** Starts a private libvirtd with a running directory pool `default`; takes about a second. Throws Error with its log when it does not start. */
export async function openLibvirtd(options: LibvirtdOptions = {}): Promise<Libvirtd> {
  await using stack = new AsyncDisposableStack();
  const files = await prepareFiles(stack, options, "libvirtd");
  const machine = await openNamespaces(files);
  stack.use(machine);
  const held = stack.move();
  return { ...describe(files, () => machine), [Symbol.asyncDispose]: () => held.disposeAsync() };
}

/** Starts a whole host: its own network with an address, sshd, libvirtd. Takes about two seconds. Throws Error with the log of what does not start. */
export async function openKvmHost(options: KvmHostOptions = {}): Promise<KvmHost> {
  await using stack = new AsyncDisposableStack();
  const files = await prepareFiles(stack, options, options.name ?? "kvm1");
  const link = chooseLink();
  const hostKey = await makeSshKey(join(files.directory, "host-key"));
  const clientKey = await makeSshKey(join(files.directory, "client-key"));
  const running: { machine: Daemon; sshd: Sshd } = await bootHost(files, link, { hostKey, clientKey, config: options.sshdConfig ?? [] });
  stack.defer(async () => {
    await running.sshd[Symbol.asyncDispose]();
    await running.machine.kill();
  });
  const held = stack.move();
  const libvirtd = describe(files, () => running.machine);
  return {
    ...libvirtd,
    address: link.address,
    get sshd() {
      return running.sshd;
    },
    sshUri: (user = "root") => `qemu+ssh://${user}@${link.address}/system`,
    async addUser(name, { sudo = false } = {}) {
      // "*" is a password that nothing matches; without one the account counts as locked, and sshd lets nobody in.
      await libvirtd.run(
        "useradd",
        "--create-home",
        "--home-dir",
        join(files.directory, "home", name),
        "--shell",
        "/bin/bash",
        "--password",
        "*",
        name,
      );
      if (sudo) await writeFile(join(files.directory, "etc/sudoers.d", name), `${name} ALL=(ALL) NOPASSWD: ALL\n`, { mode: 0o440 });
    },
    async limitLink(megabits) {
      const shape = ["tbf", "rate", `${megabits}mbit`, "burst", "256kb", "latency", "20ms"];
      await runCommand([
        "tc",
        "qdisc",
        megabits === undefined ? "del" : "replace",
        "dev",
        link.device,
        "root",
        ...(megabits === undefined ? [] : shape),
      ]);
    },
    async cutPower() {
      await running.machine.kill();
      await running.sshd[Symbol.asyncDispose]();
    },
    async boot() {
      Object.assign(running, await bootHost(files, link, { hostKey, clientKey, config: options.sshdConfig ?? [] }));
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

interface HostFiles {
  readonly directory: string;
  readonly poolPath: string;
  readonly socketPath: string;
}

/** Lays out what the host takes for its own /etc, /run, /var/lib/libvirt and so on. */
async function prepareFiles(stack: AsyncDisposableStack, options: LibvirtdOptions, name: string): Promise<HostFiles> {
  if (process.getuid?.() !== 0) throw new Error("a private libvirtd needs root: it runs in its own name spaces");
  const directory = stack.use(await openDirectory("host")).path;
  // QEMU runs as its own user and must get through to the disks.
  await chmod(directory, 0o711);
  const poolPath = join(directory, "images");
  for (const folder of ["run", "lib", "lib/images", "log", "log/qemu", "home", "images"])
    await mkdir(join(directory, folder), { mode: 0o711 });
  // What libvirt found out about QEMU costs seconds and is the same for every daemon of this machine.
  await mkdir(cachePath("libvirt"), { recursive: true });
  await writeFile(join(directory, "hostname"), name);
  if (options.poolMiB !== undefined) {
    await runCommand(["mount", "-t", "tmpfs", "-o", `size=${options.poolMiB}M,mode=0711`, "virtlift-test", poolPath]);
    stack.defer(async () => void (await runCommand(["umount", "-l", poolPath])));
  }

  const etc = join(directory, "etc");
  await runCommand(["cp", "--archive", "/etc", etc]);
  const libvirt = join(etc, "libvirt");
  for (const definitions of ["qemu", "storage", "nwfilter"]) await rm(join(libvirt, definitions), { recursive: true, force: true });
  await defineAtStart(join(libvirt, "storage"), POOL_NAME, renderPool(poolPath), true);
  await defineAtStart(join(libvirt, "qemu/networks"), NETWORK_NAME, NETWORK_XML, options.network ?? false);
  const settings = [
    `host_uuid = "${randomUUID()}"`,
    'auth_unix_rw = "none"',
    'unix_sock_rw_perms = "0770"',
    'log_outputs = "3:stderr"',
    "",
  ].join("\n");
  await writeFile(join(libvirt, "libvirtd.conf"), settings);
  return { directory, poolPath, socketPath: join(directory, "run/libvirt/libvirt-sock") };
}

/** libvirt loads what lies in its configuration folder, and starts what is linked from `autostart`. */
async function defineAtStart(folder: string, name: string, xml: string, autostart: boolean): Promise<void> {
  await mkdir(join(folder, "autostart"), { recursive: true });
  await writeFile(join(folder, `${name}.xml`), xml, { mode: 0o600 });
  if (autostart) await symlink(`../${name}.xml`, join(folder, "autostart", `${name}.xml`));
}

function renderPool(path: string): string {
  return `<pool type="dir"><name>${POOL_NAME}</name><uuid>${randomUUID()}</uuid><target><path>${path}</path></target></pool>`;
}

const NETWORK_XML = `<network>
  <name>${NETWORK_NAME}</name>
  <uuid>${randomUUID()}</uuid>
  <bridge name="virbr0"/>
  <forward mode="nat"/>
  <ip address="192.168.122.1" netmask="255.255.255.0"><dhcp><range start="192.168.122.2" end="192.168.122.254"/></dhcp></ip>
</network>`;

/** Starts the host's first process, which starts the daemons, and waits until libvirtd answers. */
async function openNamespaces(files: HostFiles): Promise<Daemon> {
  await rm(files.socketPath, { force: true });
  const argv = ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"];
  return openDaemon([...argv, "sh", join(import.meta.dirname, "host-init.sh"), files.directory, cachePath("libvirt")], {
    ready: () => answers(files.socketPath),
  });
}

async function bootHost(
  files: HostFiles,
  link: HostLink,
  sshd: { readonly hostKey: SshKey; readonly clientKey: SshKey; readonly config: readonly string[] },
) {
  const machine = await openNamespaces(files);
  try {
    const init = firstProcess(machine);
    await connectLink(link, init);
    return {
      machine,
      sshd: await openSshd({
        hostKeys: [sshd.hostKey],
        clientKey: sshd.clientKey,
        config: sshd.config,
        listenAddress: link.address,
        port: SSH_PORT,
        prefix: enter(init),
      }),
    };
  } catch (error) {
    await machine.kill();
    throw error;
  }
}

/** One end of a pair of virtual Ethernet devices is the host's, the other ours; the pair ends with the host. */
interface HostLink {
  readonly device: string;
  readonly ownAddress: string;
  readonly address: string;
}

/** Random, so that hosts of tests that run side by side do not meet: one of the 2^14 networks /30 in 10.213.0.0/16. */
function chooseLink(): HostLink {
  const network = randomInt(2 ** 14) * 4;
  const address = (host: number): string => `10.213.${(network + host) >> 8}.${(network + host) & 0xff}`;
  return { device: `vl${network.toString(16).padStart(4, "0")}`, ownAddress: address(1), address: address(2) };
}

async function connectLink(link: HostLink, init: number): Promise<void> {
  const inside = `${link.device}i`;
  // The kernel takes the pair of a host that has ended away some time later, or has done so already.
  await runCommand(["ip", "link", "delete", link.device]).catch(() => undefined);
  await runCommand(["ip", "link", "add", link.device, "type", "veth", "peer", "name", inside, "netns", String(init)]);
  await runCommand(["ip", "address", "add", `${link.ownAddress}/30`, "dev", link.device]);
  await runCommand(["ip", "link", "set", link.device, "up"]);
  await runCommand([...enter(init), "ip", "address", "add", `${link.address}/30`, "dev", inside]);
  await runCommand([...enter(init), "ip", "link", "set", inside, "up"]);
}

/** The host's process 1 as this machine numbers it: the only child of `unshare`. */
function firstProcess(machine: Daemon): number {
  const [init] = descendants(machine.pid);
  if (init === undefined) throw new Error(`the host has no process: ${machine.log()}`);
  return init;
}

function enter(init: number): readonly [string, ...string[]] {
  return ["nsenter", "--target", String(init), "--mount", "--net", "--pid", "--uts", "--"];
}

function describe(files: HostFiles, machine: () => Daemon): Omit<Libvirtd, typeof Symbol.asyncDispose> {
  const uri = `qemu+unix:///system?socket=${files.socketPath}`;
  return {
    ...files,
    uri,
    testUri: `test+unix:///default?socket=${files.socketPath}`,
    log: () => machine().log(),
    run: async (...argv) => (await runCommand([...enter(firstProcess(machine())), ...argv])).stdout,
    virsh: async (...argv) => (await runCommand(["virsh", "--quiet", "--connect", uri, ...argv])).stdout,
    async freezeDaemon() {
      process.kill(await findLibvirtd(machine()), "SIGSTOP");
    },
    async killDaemon() {
      const before = await findLibvirtd(machine());
      process.kill(before, "SIGKILL");
      const deadline = performance.now() + RESTART_TIMEOUT_MS;
      while (performance.now() < deadline) {
        await sleep(20);
        const now = await findLibvirtd(machine()).catch(() => before);
        if (now !== before && (await answers(files.socketPath).catch(() => false))) return;
      }
      throw new Error(`libvirtd did not come back: ${machine().log()}`);
    },
  };
}

async function findLibvirtd(machine: Daemon): Promise<number> {
  for (const pid of descendants(machine.pid)) {
    const name = await readFile(`/proc/${pid}/comm`, "utf8").catch(() => "");
    if (name.trim() === "libvirtd") return pid;
  }
  throw new Error(`no libvirtd runs: ${machine.log()}`);
}

async function answers(socketPath: string): Promise<boolean> {
  const socket = createConnection(socketPath);
  try {
    await once(socket, "connect");
    return true;
  } finally {
    socket.destroy();
  }
}
