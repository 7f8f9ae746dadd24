/** Hosts as a user with an empty home has them. */
import { mkdir, writeFile } from "node:fs/promises";
import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import type { Host, Hosts, HostSpec } from "../../provider/host/hosts.ts";
import { createHosts } from "../../provider/host/open.ts";
import { openDirectory } from "../bed/directory.ts";
import type { Sshd } from "../bed/sshd.ts";

/** Hosts as whoever runs the tests has them; the caller closes them. */
export function createOwnHosts(environment: NodeJS.ProcessEnv = process.env): Hosts {
  return createHosts({ environment, homeDirectory: homedir(), userName: userInfo().username, userId: process.getuid!() });
}

/** For expect.poll: how long a busy machine may take to get there. */
export const PATIENT = { timeout: 10_000 };

export interface TestHosts extends AsyncDisposable {
  readonly hosts: Hosts;
  /** The home folder, removed on dispose. Its `.ssh` exists. */
  readonly home: string;
  /** Opens an sshd's host; the spec's other properties default to the client key and the known_hosts file. */
  open(server: Sshd, spec?: Partial<HostSpec>): Host;
}

/** Nothing of the machine's own ssh_config, agent or keys is seen. `sshConfig` becomes `~/.ssh/config`. */
export async function openHosts(
  options: { readonly sshConfig?: string; readonly environment?: Readonly<Record<string, string>>; readonly userId?: number } = {},
): Promise<TestHosts> {
  const directory = await openDirectory("home");
  const home = directory.path;
  await mkdir(join(home, ".ssh"), { mode: 0o700 });
  const config = join(home, ".ssh/config");
  if (options.sshConfig !== undefined) await writeFile(config, options.sshConfig);
  const hosts = createHosts({
    environment: { PATH: process.env["PATH"], ...options.environment },
    homeDirectory: home,
    userName: userInfo().username,
    userId: options.userId ?? userInfo().uid,
    sshConfigFiles: [config],
  });
  return {
    hosts,
    home,
    open: (server, spec = {}) =>
      hosts.open({ uri: sshUri(server), identityFile: server.clientKey.path, knownHostsFile: server.knownHostsFile, ...spec }),
    async [Symbol.asyncDispose]() {
      await hosts.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

export function sshUri(server: Sshd, path = "/system"): string {
  return `qemu+ssh://${server.user}@${server.address}:${server.port}${path}`;
}

/** What a promise rejects with; throws when it does not. */
export async function failure(promise: Promise<unknown>): Promise<Error> {
  const outcome = await promise.then(
    () => undefined,
    (error: unknown) => error,
  );
  if (!(outcome instanceof Error)) throw new Error("it did not fail");
  return outcome;
}
