import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { resolveSshConfig } from "../../provider/host/ssh-config.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openDirectory } from "../bed/directory.ts";

async function openConfig(text: string) {
  const directory = await openDirectory("config");
  const home = directory.path;
  const file = join(home, ".ssh/config");
  await mkdir(join(home, ".ssh/conf.d"), { recursive: true });
  await writeFile(file, text);
  const context = {
    environment: { SSH_AUTH_SOCK: "/agent", KEYS: "/keys" },
    homeDirectory: home,
    userName: "me",
    userId: 1000,
    sshConfigFiles: [file],
  };
  return {
    home,
    file,
    resolve: (alias: string, given: { readonly user?: string; readonly port?: number } = {}) => resolveSshConfig(alias, given, context),
    [Symbol.asyncDispose]: () => directory[Symbol.asyncDispose](),
  };
}

test("an empty configuration gives ssh's defaults", async () => {
  await using config = await openConfig("");
  expect(config.resolve("KVM1")).toEqual({
    hostName: "kvm1",
    port: 22,
    user: "me",
    identityFiles: ["id_rsa", "id_ecdsa", "id_ed25519"].map((name) => join(config.home, ".ssh", name)),
    identitiesOnly: false,
    agentSocket: "/agent",
    proxyJump: [],
    userKnownHostsFiles: [join(config.home, ".ssh/known_hosts"), join(config.home, ".ssh/known_hosts2")],
    globalKnownHostsFiles: ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"],
    hostKeyPolicy: "strict",
    hashKnownHosts: false,
    connectTimeoutMs: 30_000,
  });
});

test("Host, Match, tokens and several identities are obeyed, the first value wins and the caller's above all", async () => {
  await using config = await openConfig(`
    Host kvm1 kvm?-lab !kvm9-lab
      hostname %h.Example.org
      PORT=2222
      User mover
      IdentityFile ~/.ssh/%r_%n_%p
      IdentityFile "\${KEYS}/one key"
      IdentitiesOnly yes
      IdentityAgent none
      ProxyJump jump@gate:2200, second
      StrictHostKeyChecking accept-new
      HostKeyAlias lab
      ConnectTimeout 7
      UserKnownHostsFile /a ~/b
      GlobalKnownHostsFile none
    Match user somebody
      Port 4444
    Match originalhost old.example
      User ancient
    Host *
      User nobody
      HashKnownHosts yes
  `);
  expect(config.resolve("kvm1")).toEqual({
    hostName: "kvm1.example.org",
    port: 2222,
    user: "mover",
    identityFiles: [join(config.home, ".ssh/mover_kvm1_2222"), "/keys/one key"],
    identitiesOnly: true,
    proxyJump: ["jump@gate:2200", "second"],
    userKnownHostsFiles: ["/a", join(config.home, "b")],
    globalKnownHostsFiles: [],
    hostKeyPolicy: "accept-new",
    hostKeyAlias: "lab",
    hashKnownHosts: true,
    connectTimeoutMs: 7000,
  });
  expect(config.resolve("kvm1", { user: "admin", port: 23 })).toMatchObject({ user: "admin", port: 23 });
  expect(config.resolve("kvm9-lab")).toMatchObject({ user: "nobody", port: 22 });
  expect(config.resolve("other", { user: "somebody" })).toMatchObject({ port: 4444 });
  expect(config.resolve("old.example")).toMatchObject({ user: "ancient" });
});

test("agrees with ssh -G on names, ports, users and jumps", async () => {
  await using config = await openConfig(`
    Host a
      HostName 192.0.2.7
      Port 2201
    Match host 192.0.2.7
      User seven
    Host a b
      ProxyJump x@gate:99
    Host *
      Port 2202
      User anybody
  `);
  for (const alias of ["a", "b", "c"]) {
    const { stdout } = await runCommand(["ssh", "-G", "-F", config.file, alias]);
    const words = new Map(stdout.split("\n").map((line) => [line.split(" ")[0], line.split(" ").slice(1).join(" ")]));
    const resolved = config.resolve(alias);
    expect(resolved.hostName).toBe(words.get("hostname"));
    expect(resolved.user).toBe(words.get("user"));
    expect(String(resolved.port)).toBe(words.get("port"));
    expect(resolved.proxyJump.join(",")).toBe(words.get("proxyjump") ?? "");
  }
});

test("Include works at the top and inside a matching Host, by pattern, relative and from home; inside another Host it is not read", async () => {
  await using config = await openConfig(`
    Include conf.d/*.conf ~/extra
    Host never
      Include /nonexistent/never
    Host kvm?
      Include inside
      Port 5
  `);
  await writeFile(join(config.home, ".ssh/conf.d/1.conf"), "Host kvm1\n  User first\n");
  await writeFile(join(config.home, ".ssh/conf.d/2.conf"), "Host kvm1\n  User second\n");
  await writeFile(join(config.home, "extra"), "ConnectTimeout 9\n");
  await writeFile(join(config.home, ".ssh/inside"), "Port 4\nHost kvm2\n  User inner\n");
  expect(config.resolve("kvm1")).toMatchObject({ user: "first", port: 4, connectTimeoutMs: 9000 });
  expect(config.resolve("kvm2")).toMatchObject({ user: "inner", port: 4 });
  expect(config.resolve("else")).toMatchObject({ user: "me", port: 22 });
});

test.each([
  ["ProxyCommand ssh -W %h:%p gate", "ProxyCommand for kvm1, which is not supported: use ProxyJump"],
  ["IdentityFile ~/%Q", "token %Q is not supported"],
  ["IdentityFile ${NOT_SET}/x", "NOT_SET is not set"],
  ["Port 99999", "not in 1 to 65535"],
  ["ConnectTimeout soon", "not in 1 to 3600"],
  ['User "open', "cannot be parsed as ssh_config"],
  ["Include config", "includes too many files, or itself"],
])("%s is refused with one sentence", async (text, reason) => {
  await using config = await openConfig(text);
  expect(() => config.resolve("kvm1")).toThrow(expect.objectContaining({ phase: "resolve", message: expect.stringContaining(reason) }));
});

test("ProxyCommand none, and one that a ProxyJump stands above, are no obstacle", async () => {
  await using config = await openConfig("Host a\n ProxyCommand none\nHost b\n ProxyJump gate\n ProxyCommand x\n");
  expect(config.resolve("a").proxyJump).toEqual([]);
  expect(config.resolve("b").proxyJump).toEqual(["gate"]);
});
