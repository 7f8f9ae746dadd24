import { createHash } from "node:crypto";
import { once } from "node:events";
import { readFile, stat, writeFile } from "node:fs/promises";
import { createServer, type AddressInfo } from "node:net";
import { join } from "node:path";
import { Readable, Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { expect, test, vi } from "vitest";
import type { CommandError } from "../../provider/errors.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { descendants, openDaemon } from "../bed/daemon.ts";
import { makeSshKey, openSshd, renderKnownHost } from "../bed/sshd.ts";
import { failure, openHosts, PATIENT, sshUri } from "./setup.ts";

// A busy machine may need seconds for a login.
vi.setConfig({ testTimeout: 30_000 });

const MiB = 1024 * 1024;

/** As many bytes as told, in chunks, all of one value. */
function* zeros(count: number): Generator<Buffer> {
  const chunk = Buffer.alloc(MiB);
  for (let left = count; left > 0; left -= chunk.length) yield left < chunk.length ? chunk.subarray(0, left) : chunk;
}

/** Pids of processes below the server whose command line has this word. */
async function processesWith(server: { readonly daemon: { readonly pid: number } }, word: string): Promise<readonly number[]> {
  const found: number[] = [];
  for (const pid of descendants(server.daemon.pid)) {
    const line = await readFile(`/proc/${pid}/cmdline`, "latin1").catch(() => "");
    if (line.split("\0").includes(word)) found.push(pid);
  }
  return found;
}

test("runs commands as given, in English, with their input, and tells how they end", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  expect(host.label).toBe(`${server.user}@127.0.0.1:${server.port}`);
  const words = ["a b", "it's", "$HOME", "*", "", "\n", "ä"];
  const { stdout } = await host.run(["printf", String.raw`%s\0`, ...words]);
  expect(stdout.toString().split("\0").slice(0, -1)).toEqual(words);
  expect(await host.run(["sh", "-c", "echo $LC_ALL; echo warning >&2"])).toEqual({ stdout: Buffer.from("C\n"), stderr: "warning\n" });
  expect((await host.run(["cat"], { input: "x".repeat(3 * MiB) })).stdout.length).toBe(3 * MiB);
  expect((await host.run(["true"], { input: Buffer.alloc(8 * MiB) })).stdout.length).toBe(0);

  const failed = (await failure(host.run(["cat", "/nonexistent"]))) as CommandError;
  expect(failed).toMatchObject({ name: "CommandError", exitCode: 1, argv: ["cat", "/nonexistent"] });
  expect(failed.message).toBe(`cat exited 1: /nonexistent: No such file or directory (on ${host.label})`);
  expect((await failure(host.run(["no-such-program"]))).message).toBe(
    `no-such-program is not installed on ${host.label}, or not on the login's path`,
  );
  expect(await failure(host.run(["sh", "-c", "kill -TERM $$"]))).toMatchObject({ signal: "SIGTERM" });
});

test("bounds a command's time and output, and leaves no process of it", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  expect(await failure(host.run(["sh", "-c", "sleep 4711; true"], { timeoutMs: 300 }))).toMatchObject({
    phase: "timeout",
    message: `sh did not end within 0.3 s (on ${host.label})`,
  });
  expect((await failure(host.run(["head", "-c", "20M", "/dev/zero"]))).message).toContain("head wrote more than 16777216 bytes");
  const stop = new AbortController();
  const stopped = failure(host.run(["sleep", "4711"], { signal: stop.signal }));
  await expect.poll(() => processesWith(server, "4711"), PATIENT).not.toEqual([]);
  stop.abort();
  expect(await stopped).toMatchObject({ phase: "aborted" });
  await expect.poll(() => processesWith(server, "4711"), PATIENT).toEqual([]);
});

test("streams 256 MiB in each direction, whole and with flat memory", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  const target = join(server.directory, "part");
  await using write = await host.stream(["dd", `of=${target}`, "bs=1M", "iflag=fullblock", "status=none"]);
  const before = process.memoryUsage().rss;
  let peak = 0;
  const sampler = setInterval(() => (peak = Math.max(peak, process.memoryUsage().rss)), 20);
  write.io.resume();
  await pipeline(Readable.from(zeros(256 * MiB)), write.io);
  await write.done;
  expect((await stat(target)).size).toBe(256 * MiB);

  await using read = await host.stream(["cat", target]);
  const hash = createHash("sha256");
  let size = 0;
  await pipeline(
    read.io,
    new Writable({
      write(chunk: Buffer, _encoding, callback) {
        hash.update(chunk);
        size += chunk.length;
        callback();
      },
    }),
  );
  await read.done;
  clearInterval(sampler);
  expect(size).toBe(256 * MiB);
  expect(hash.digest("hex")).toBe((await runCommand(["sha256sum", target])).stdout.split(" ")[0]);
  expect((peak - before) / MiB).toBeLessThan(150);
});

test("a reader that waits makes the command wait, and a command that waits makes the writer wait", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  await using read = await host.stream(["head", "-c", "64M", "/dev/zero"]);
  await once(read.io, "readable");
  await new Promise((resolve) => setTimeout(resolve, 300));
  expect(read.io.readableLength).toBeLessThan(MiB);
  expect(await processesWith(server, "64M")).not.toEqual([]);

  await using write = await host.stream(["sleep", "4712"]);
  let taken = 0;
  while (taken < 64 && write.io.write(Buffer.alloc(MiB))) taken += 1;
  expect(taken).toBeLessThan(4);
});

test("a stream whose command fails or dies is never taken for a whole one", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  await using read = await host.stream(["sh", "-c", "head -c 100000 /dev/zero; echo broken disk >&2; exit 3"]);
  await expect(pipeline(read.io, new Writable({ write: (_chunk, _encoding, callback) => callback() }))).rejects.toThrow(
    "sh exited 3: broken disk",
  );
  await expect(read.done).rejects.toMatchObject({ exitCode: 3, stderrTail: "broken disk\n" });

  await using early = await host.stream(["sh", "-c", "head -c 10 >/dev/null; exit 4"]);
  early.io.resume();
  await expect(pipeline(Readable.from(zeros(64 * MiB)), early.io)).rejects.toThrow("sh exited 4");

  await using content = await host.stream(["head", "-c", "10"]);
  content.io.resume();
  await expect(pipeline(Readable.from(zeros(64 * MiB)), content.io)).rejects.toMatchObject({ code: "EPIPE" });
  await content.done;
});

test("kill ends the command and its children on the host, in the middle of a stream", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  const stream = await host.stream(["sh", "-c", "sleep 4713 & cat >/dev/null; wait"]);
  stream.io.write(Buffer.alloc(MiB));
  await expect.poll(() => processesWith(server, "4713"), PATIENT).not.toEqual([]);
  stream.kill();
  stream.kill();
  await expect(stream.done).rejects.toMatchObject({ name: "CommandError", signal: "SIGKILL" });
  await expect.poll(() => processesWith(server, "4713"), PATIENT).toEqual([]);
  expect(stream.io.destroyed).toBe(true);
});

test("more commands at once than one connection carries all run, also where the server allows few sessions", async () => {
  await using server = await openSshd({ config: ["MaxSessions 2"] });
  await using user = await openHosts();
  const host = user.open(server);
  const streams = await Promise.all(Array.from({ length: 5 }, () => host.stream(["cat"])));
  const outputs = await Promise.all(Array.from({ length: 6 }, (_each, index) => host.run(["echo", String(index)])));
  expect(outputs.map(({ stdout }) => stdout.toString())).toEqual(["0\n", "1\n", "2\n", "3\n", "4\n", "5\n"]);
  await Promise.all(streams.map((stream) => stream[Symbol.asyncDispose]()));
});

test("ten commands share one login", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  expect(user.open(server)).toBe(host);
  await Promise.all(Array.from({ length: 8 }, () => host.run(["true"])));
  await Promise.all(Array.from({ length: 2 }, () => host.run(["true"])));
  expect(server.daemon.log().match(/Accepted publickey/g)).toHaveLength(1);
});

/** Cuts all connections to a server, as a crash of its session processes would. */
async function cutSessions(server: { readonly daemon: { readonly pid: number } }): Promise<void> {
  for (const pid of descendants(server.daemon.pid)) {
    if ((await readFile(`/proc/${pid}/comm`, "utf8").catch(() => "")).startsWith("sshd")) process.kill(pid, "SIGKILL");
  }
}

test("when the connection breaks all that runs is rejected, and the next command connects anew", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  const run = failure(host.run(["sleep", "4714"]));
  await using stream = await host.stream(["cat"]);
  await expect.poll(() => processesWith(server, "4714"), PATIENT).not.toEqual([]);
  const reading = failure(pipeline(stream.io, new Writable({ write: (_chunk, _encoding, callback) => callback() })));
  const orphans = await processesWith(server, "4714");
  await cutSessions(server);
  expect(await run).toMatchObject({
    name: "ConnectionError",
    phase: "closed",
    message: expect.stringContaining(`the connection to ${host.label} was lost`),
  });
  expect(await reading).toMatchObject({ phase: "closed" });
  await expect(stream.done).rejects.toMatchObject({ phase: "closed" });
  expect((await host.run(["echo", "again"])).stdout.toString()).toBe("again\n");
  // A command that neither reads nor writes outlives its connection, as it does under ssh.
  for (const pid of orphans) process.kill(pid, "SIGKILL");
});

test("close ends what runs", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const host = user.open(server);
  await using stream = await host.stream(["cat"]);
  await user.hosts.close();
  await expect(stream.done).rejects.toMatchObject({ phase: "closed" });
});

test("refuses an unknown key with the remedy, and learns it only when told to", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const knownHostsFile = join(user.home, "known/hosts");
  const key = server.hostKeys[0]!;
  const refused = await failure(user.open(server, { knownHostsFile }).run(["true"]));
  expect(refused).toMatchObject({ phase: "host key", host: `${server.user}@127.0.0.1:${server.port}` });
  expect(refused.message).toContain(`is unknown: ssh-ed25519 ${key.fingerprint};`);
  expect(refused.message).toContain(`run ssh-keyscan -p ${server.port} 127.0.0.1 >> ${knownHostsFile}`);
  await expect(stat(knownHostsFile)).rejects.toThrow("ENOENT");

  await user.open(server, { knownHostsFile, hostKeyPolicy: "accept-new" }).run(["true"]);
  expect(await readFile(knownHostsFile, "utf8")).toBe(`[127.0.0.1]:${server.port} ${key.publicKey}\n`);
  await user.open(server, { knownHostsFile }).run(["true"]);
});

test.each(["strict", "accept-new"] as const)("refuses a changed key (%s) and names the line that knows better", async (hostKeyPolicy) => {
  await using server = await openSshd({ hostKeyTypes: ["ed25519"] });
  await using user = await openHosts();
  const other = await makeSshKey(join(user.home, "other"), { type: "ecdsa" });
  const knownHostsFile = join(user.home, "hosts");
  await writeFile(knownHostsFile, `\n[127.0.0.1]:${server.port} ${other.publicKey}\n`);
  const { message } = await failure(user.open(server, { knownHostsFile, hostKeyPolicy }).run(["true"]));
  expect(message).toContain(
    `has changed: it shows ssh-ed25519 ${server.hostKeys[0]!.fingerprint}, but ${knownHostsFile}:2 has ecdsa-sha2-nistp256 ${other.fingerprint}`,
  );
  expect(message).toContain(`ssh-keygen -R '[127.0.0.1]:${server.port}'`);
});

test.each(["rsa", "ecdsa", "ed25519"] as const)("knows a server of three keys by its %s key alone, also hashed", async (type) => {
  await using server = await openSshd({ hostKeyTypes: ["ed25519", "ecdsa", "rsa"] });
  await using user = await openHosts();
  const key = server.hostKeys.find((each) => each.type === type)!;
  const knownHostsFile = join(user.home, "hosts");
  await writeFile(knownHostsFile, `${renderKnownHost(server.address, server.port)} ${key.publicKey}\n`);
  await runCommand(["ssh-keygen", "-q", "-H", "-f", knownHostsFile]);
  const byFile = await user.open(server, { knownHostsFile }).run(["echo", "in"]);
  expect(byFile.stdout.toString()).toBe("in\n");
  const byFingerprint = await user
    .open(server, { knownHostsFile: join(user.home, "none"), fingerprint: key.fingerprint })
    .run(["echo", "in"]);
  expect(byFingerprint.stdout.toString()).toBe("in\n");
});

test("a pinned fingerprint wins over known_hosts, and a wrong one is refused with all that the server has", async () => {
  await using server = await openSshd({ hostKeyTypes: ["ed25519", "rsa"] });
  await using user = await openHosts();
  const { message } = await failure(user.open(server, { fingerprint: "SHA256:wrong" }).run(["true"]));
  expect(message).toContain(
    `is not the pinned SHA256:wrong: it has ssh-ed25519 ${server.hostKeys[0]!.fingerprint}, ssh-rsa ${server.hostKeys[1]!.fingerprint}`,
  );
});

test("a revoked key and a certificate authority are told apart from an unknown key", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const knownHostsFile = join(user.home, "hosts");
  const line = `* ${server.hostKeys[0]!.publicKey}\n`;
  await writeFile(knownHostsFile, `@revoked ${line}${line}`);
  expect((await failure(user.open(server, { knownHostsFile }).run(["true"]))).message).toContain(`is revoked by ${knownHostsFile}:1`);
  await writeFile(knownHostsFile, `@cert-authority ${line}`);
  expect((await failure(user.open(server, { knownHostsFile }).run(["true"]))).message).toContain("by a certificate authority only");
});

test("a refused login names what was tried and what the server takes", async () => {
  await using server = await openSshd();
  await using user = await openHosts();
  const stranger = await makeSshKey(join(user.home, "stranger"));
  const error = await failure(user.open(server, { identityFile: stranger.path, password: "geheim" }).run(["true"]));
  expect(error).toMatchObject({ phase: "login" });
  expect(error.message).toContain(`${server.user}@127.0.0.1:${server.port} refused the login: tried key ${stranger.path}`);
  expect(error.message).toContain("it takes publickey");
  expect(error.message).not.toContain("geheim");
  expect((await failure(user.open(server, { identityFile: join(user.home, "none") }).run(["true"]))).message).toContain(
    "none does not exist",
  );
});

test("an encrypted key wants its passphrase, and says so", async () => {
  await using user = await openHosts();
  const key = await makeSshKey(join(user.home, "locked"), { passphrase: "sesame" });
  await using server = await openSshd({ authorizedKeys: [key.publicKey] });
  const identityFile = key.path;
  await user.open(server, { identityFile, passphrase: "sesame" }).run(["true"]);
  expect((await failure(user.open(server, { identityFile }).run(["true"]))).message).toContain(
    `${identityFile} is encrypted: set its passphrase, or add it to an agent`,
  );
  const wrong = await failure(user.open(server, { identityFile, passphrase: "open" }).run(["true"]));
  expect(wrong.message).toContain(`${identityFile} does not open with the passphrase that is set`);
});

test("logs in by a real agent, whose key may be one of many, encrypted on disk, or named by its public half", async () => {
  await using user = await openHosts();
  const socket = join(user.home, "agent");
  await using _agent = await openDaemon(["ssh-agent", "-D", "-a", socket], { ready: async () => (await stat(socket)).isSocket() });
  const key = await makeSshKey(join(user.home, "locked"), { passphrase: "sesame", type: "rsa" });
  const askpass = join(user.home, "askpass");
  await writeFile(askpass, "#!/bin/sh\necho sesame\n", { mode: 0o700 });
  const environment = { ...process.env, SSH_AUTH_SOCK: socket, SSH_ASKPASS: askpass, SSH_ASKPASS_REQUIRE: "force" };
  for (let index = 0; index < 3; index += 1) {
    const stranger = await makeSshKey(join(user.home, `stranger${index}`));
    await runCommand(["ssh-add", "-q", stranger.path], { env: environment });
  }
  await runCommand(["ssh-add", "-q", key.path], { env: environment });
  await using server = await openSshd({ authorizedKeys: [key.publicKey] });
  const uri = sshUri(server);
  const { knownHostsFile } = server;

  await using withAgent = await openHosts({ environment: { SSH_AUTH_SOCK: socket } });
  await withAgent.hosts.open({ uri, knownHostsFile }).run(["true"]);
  await withAgent.hosts.open({ uri, knownHostsFile, identityFile: key.path }).run(["true"]);
  await using only = await openHosts({
    environment: { SSH_AUTH_SOCK: socket },
    sshConfig: `Host *\n IdentitiesOnly yes\n IdentityFile ${key.path}.pub\n`,
  });
  await only.hosts.open({ uri, knownHostsFile }).run(["true"]);
  await using other = await openHosts({
    environment: { SSH_AUTH_SOCK: socket },
    sshConfig: `Host *\n IdentitiesOnly yes\n IdentityFile ${user.home}/stranger0\n`,
  });
  const { message } = await failure(other.hosts.open({ uri, knownHostsFile }).run(["true"]));
  expect(message.match(/agent key/g)).toHaveLength(1);
});

test("a dead agent is a remark, not the end", async () => {
  await using server = await openSshd();
  await using user = await openHosts({ environment: { SSH_AUTH_SOCK: "/nonexistent/agent" } });
  await user.open(server).run(["true"]);
  const { message } = await failure(user.hosts.open({ uri: sshUri(server), knownHostsFile: server.knownHostsFile }).run(["true"]));
  expect(message).toContain("the agent at /nonexistent/agent does not answer");
});

test("reaches a host by its ssh_config alias, through a jump host with a configuration of its own", async () => {
  await using gate = await openSshd();
  await using server = await openSshd({ authorizedKeys: [gate.clientKey.publicKey] });
  const known = `${await readFile(gate.knownHostsFile, "utf8")}${await readFile(server.knownHostsFile, "utf8")}`;
  await using user = await openHosts({
    sshConfig: `
      Host inner
        HostName 127.0.0.1
        Port ${server.port}
        ProxyJump gate
      Host gate
        HostName 127.0.0.1
        Port ${gate.port}
      Host *
        IdentityFile ${gate.clientKey.path}
        UserKnownHostsFile ~/known
    `,
  });
  await writeFile(join(user.home, "known"), known);
  const host = user.hosts.open({ uri: "qemu+ssh://inner/system" });
  expect(host.label).toBe(`${server.user}@inner:${server.port}`);
  const { stdout } = await host.run(["sh", "-c", "echo $SSH_CONNECTION"]);
  expect(stdout.toString()).toContain(` ${server.port}\n`);
  expect(gate.daemon.log()).toContain("Accepted publickey");

  await using stream = await host.stream(["cat"]);
  await cutSessions(gate);
  await expect(stream.done).rejects.toMatchObject({ phase: "closed" });
  expect((await host.run(["echo", "again"])).stdout.toString()).toBe("again\n");

  const jumpHosts = [`${gate.user}@127.0.0.1:${gate.port}`];
  const spec = { uri: sshUri(server), identityFile: gate.clientKey.path, jumpHosts };
  await user.hosts.open(spec).run(["true"]);
  await writeFile(join(user.home, "known"), await readFile(server.knownHostsFile));
  const refused = await failure(user.hosts.open({ ...spec, password: "another spec" }).run(["true"]));
  expect(refused).toMatchObject({ phase: "host key", host: `${gate.user}@127.0.0.1:${gate.port}` });
});

test("a jump host that cannot go on, and jump hosts in a circle, are one sentence", async () => {
  await using gate = await openSshd();
  await using user = await openHosts({ sshConfig: "Host a\n ProxyJump b\nHost b\n ProxyJump a\n" });
  const spec = {
    identityFile: gate.clientKey.path,
    knownHostsFile: gate.knownHostsFile,
    jumpHosts: [`${gate.user}@127.0.0.1:${gate.port}`],
  };
  const refused = await failure(user.hosts.open({ uri: "qemu+ssh://root@127.0.0.1:1/system", ...spec }).run(["true"]));
  expect(refused).toMatchObject({ phase: "connect" });
  expect(refused.message).toContain(`the jump host ${gate.user}@127.0.0.1:${gate.port} cannot reach root@127.0.0.1:1: Connection refused`);
  expect(() => user.hosts.open({ uri: "qemu+ssh://a/system" })).toThrow("lead in a circle");
  expect(() => user.hosts.open({ uri: "qemu+ssh://c/system", jumpHosts: ["x y"] })).toThrow('the jump host "x y" is none');
});

test("a name that is none, a closed port, a silent port and a port without SSH are told apart", async () => {
  await using user = await openHosts({ sshConfig: "ConnectTimeout 1\n" });
  const ofUri = (uri: string) => failure(user.hosts.open({ uri }).run(["true"]));
  expect(await ofUri("qemu+ssh://root@no-such-host.invalid/system")).toMatchObject({ phase: "resolve" });
  expect(await ofUri("qemu+ssh://root@127.0.0.1:1/system")).toMatchObject({
    phase: "connect",
    message: "nothing listens on port 1 of root@127.0.0.1:1: is sshd running, is the port right?",
  });
  const silent = createServer().listen(0, "127.0.0.1");
  const web = createServer((socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n")).listen(0, "127.0.0.1");
  await Promise.all([once(silent, "listening"), once(web, "listening")]);
  const portOf = (each: typeof silent): number => (each.address() as AddressInfo).port;
  expect(await ofUri(`qemu+ssh://root@127.0.0.1:${portOf(silent)}/system`)).toMatchObject({ phase: "timeout" });
  expect((await ofUri(`qemu+ssh://root@127.0.0.1:${portOf(web)}/system`)).message).toContain("is it an SSH server");
  silent.close();
  web.close();
});
