import { createConnection } from "node:net";
import { once } from "node:events";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { openSshd, type Sshd } from "./sshd.ts";

function sshArgv(server: Sshd, ...command: readonly string[]): readonly [string, ...string[]] {
  return [
    "ssh",
    "-F",
    "none",
    "-o",
    "BatchMode=yes",
    "-o",
    "StrictHostKeyChecking=yes",
    "-o",
    `UserKnownHostsFile=${server.knownHostsFile}`,
    "-o",
    "GlobalKnownHostsFile=/dev/null",
    "-o",
    "IdentitiesOnly=yes",
    "-i",
    server.clientKey.path,
    "-p",
    String(server.port),
    `${server.user}@${server.address}`,
    ...command,
  ];
}

test("lets OpenSSH in by the client key, and proves itself by the known_hosts file", async () => {
  await using server = await openSshd({ hostKeyTypes: ["ed25519", "ecdsa"] });
  const { stdout } = await runCommand(sshArgv(server, 'echo "hello from $HOME"'));
  expect(stdout).toBe(`hello from ${server.directory}/home\n`);
  expect(server.hostKeys.map((key) => key.fingerprint)).toEqual([expect.stringMatching(/^SHA256:/), expect.stringMatching(/^SHA256:/)]);
  expect(server.daemon.log()).toContain(server.clientKey.fingerprint);
});

test("puts the caller's configuration before its own", async () => {
  await using server = await openSshd({ config: ["PubkeyAuthentication no"] });
  await expect(runCommand(sshArgv(server, "true"))).rejects.toThrow("Permission denied");
});

test("is gone with its sessions after dispose", async () => {
  const server = await openSshd();
  const session = runCommand(sshArgv(server, "sleep 60")).catch((error: Error) => error.message);
  await expect.poll(() => server.daemon.log()).toContain("Starting session: command");
  await server[Symbol.asyncDispose]();
  expect(await session).toContain("exited 255");
  const socket = createConnection({ host: server.address, port: server.port });
  await expect(once(socket, "connect")).rejects.toThrow("ECONNREFUSED");
});
