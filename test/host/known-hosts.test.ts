import { readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import {
  addKnownHost,
  fingerprintOf,
  judgeHostKey,
  keyTypeOf,
  knownHostName,
  offeredAlgorithms,
  parseKnownHosts,
  readKnownHosts,
} from "../../provider/host/known-hosts.ts";
import { runCommand } from "../../scripts/setup/command.ts";
import { openDirectory } from "../bed/directory.ts";
import { makeSshKey, type SshKey } from "../bed/sshd.ts";

function blobOf(key: SshKey): Buffer {
  return Buffer.from(key.publicKey.split(" ")[1] ?? "", "base64");
}

/** Two keys, of which the first is what a known_hosts text may call KEY and the second OTHER. */
async function openKeys() {
  const directory = await openDirectory("keys");
  const key = await makeSshKey(join(directory.path, "a"));
  const other = await makeSshKey(join(directory.path, "b"), { type: "ecdsa" });
  return {
    path: directory.path,
    key,
    other,
    judge: (text: string, host: string, port = 22, alias?: string) =>
      judgeHostKey(
        parseKnownHosts(text.replaceAll("KEY", key.publicKey).replaceAll("OTHER", other.publicKey), "/kh"),
        knownHostName(host, port, alias),
        blobOf(key),
      ).kind,
    [Symbol.asyncDispose]: () => directory[Symbol.asyncDispose](),
  };
}

test("names, ports, aliases, patterns and negations mean what they mean to ssh", async () => {
  await using keys = await openKeys();
  const { judge } = keys;
  expect(judge("kvm1 KEY", "kvm1")).toBe("known");
  expect(judge("kvm1 KEY", "KVM1")).toBe("known");
  expect(judge("# kvm1 KEY\n\n  kvm2 KEY", "kvm1")).toBe("unknown");
  expect(judge("other,kvm1,192.0.2.1 KEY comment here", "192.0.2.1")).toBe("known");
  expect(judge("*.example.org KEY", "a.example.org")).toBe("known");
  expect(judge("kvm? KEY", "kvm12")).toBe("unknown");
  expect(judge("*.example.org,!bad.example.org KEY", "bad.example.org")).toBe("unknown");
  expect(judge("!bad,* KEY", "good")).toBe("known");
  expect(judge("[kvm1]:2222 KEY", "kvm1", 2222)).toBe("known");
  expect(judge("[kvm1]:2222 KEY", "kvm1")).toBe("unknown");
  expect(judge("name-of-it KEY", "kvm1", 2222, "name-of-it")).toBe("known");
  expect(judge(`${"*a".repeat(40)} KEY`, "a".repeat(200) + "b")).toBe("unknown");
});

test("a key that is known without the port is accepted, a different one there accuses nobody", async () => {
  await using keys = await openKeys();
  expect(keys.judge("kvm1 KEY", "kvm1", 2222)).toBe("known");
  expect(keys.judge("kvm1 OTHER", "kvm1", 2222)).toBe("unknown");
});

test("another key, and a key of another type alone, are a change", async () => {
  await using keys = await openKeys();
  expect(keys.judge("kvm1 OTHER", "kvm1")).toBe("changed");
  expect(keys.judge("kvm1 OTHER\nkvm1 KEY", "kvm1")).toBe("known");
});

test("a revoked key is refused even when it is known as well, and an authority alone is no plain key", async () => {
  await using keys = await openKeys();
  expect(keys.judge("kvm1 KEY\n@revoked * KEY", "kvm1")).toBe("revoked");
  expect(keys.judge("@revoked * OTHER\nkvm1 KEY", "kvm1")).toBe("known");
  expect(keys.judge("@cert-authority *.example.org KEY", "a.example.org")).toBe("certificate-only");
  expect(keys.judge("@unheard-of kvm1 KEY", "kvm1")).toBe("unknown");
});

test("understands what ssh-keygen -H has hashed, with and without a port", async () => {
  await using keys = await openKeys();
  const file = join(keys.path, "known_hosts");
  await writeFile(file, `kvm1 ${keys.key.publicKey}\n[kvm2]:2222 ${keys.key.publicKey}\n`);
  await runCommand(["ssh-keygen", "-q", "-H", "-f", file]);
  const text = await readFile(file, "utf8");
  expect(text).not.toContain("kvm1");
  expect(keys.judge(text, "kvm1")).toBe("known");
  expect(keys.judge(text, "kvm2", 2222)).toBe("known");
  expect(keys.judge(text, "kvm3")).toBe("unknown");
});

test("offers the types that are known for the host first", async () => {
  await using keys = await openKeys();
  const lines = parseKnownHosts(`kvm1 ${keys.other.publicKey}\nkvm2 ${keys.key.publicKey}`, "/kh");
  expect(offeredAlgorithms(lines, knownHostName("kvm1", 22))[0]).toBe("ecdsa-sha2-nistp256");
  expect(offeredAlgorithms(lines, knownHostName("kvm3", 22))[0]).toBe("ssh-ed25519");
});

test.each([false, true])("what it writes down (hashed: %s) ssh-keygen -F finds, and nothing is lost", async (hashed) => {
  await using keys = await openKeys();
  const file = join(keys.path, "home/.ssh/known_hosts");
  await addKnownHost(file, knownHostName("kvm1", 22), blobOf(keys.key), hashed);
  expect((await stat(file)).mode & 0o777).toBe(0o600);
  await writeFile(file, `${(await readFile(file, "utf8")).trim()}`);
  await addKnownHost(file, knownHostName("kvm2", 2222), blobOf(keys.other), hashed);
  expect((await runCommand(["ssh-keygen", "-F", "kvm1", "-f", file])).stdout).toContain(keys.key.publicKey);
  expect((await runCommand(["ssh-keygen", "-F", "[kvm2]:2222", "-f", file])).stdout).toContain(keys.other.publicKey);
  expect((await readFile(file, "utf8")).includes("kvm1")).toBe(!hashed);
});

test("prints fingerprints and types as ssh-keygen does", async () => {
  await using keys = await openKeys();
  expect(fingerprintOf(blobOf(keys.key))).toBe(keys.key.fingerprint);
  expect(keyTypeOf(blobOf(keys.other))).toBe("ecdsa-sha2-nistp256");
  expect(keyTypeOf(Buffer.from([0, 0]))).toBe("unreadable");
  expect(keyTypeOf(Buffer.from([255, 255, 255, 255, 1]))).toBe("unreadable");
});

test("a file that is missing holds nothing, one that is a folder is an error", async () => {
  await using keys = await openKeys();
  expect(await readKnownHosts([join(keys.path, "none")])).toEqual([]);
  await expect(readKnownHosts([keys.path])).rejects.toThrow("EISDIR");
});
