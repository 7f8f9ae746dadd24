import { spawn } from "node:child_process";
import { once } from "node:events";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { openDirectory } from "../bed/directory.ts";
import { openKvmHost } from "../bed/libvirtd.ts";

const SCRIPT = join(import.meta.dirname, "../../scripts/quickstart.ts");

/** As a user runs it, with the state in a folder of the test's. */
async function quickstart(state: string, ...argv: readonly string[]): Promise<{ readonly code: number; readonly output: string }> {
  const child = spawn(process.execPath, [SCRIPT, ...argv], {
    env: { ...process.env, XDG_STATE_HOME: state },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) stream.setEncoding("utf8").on("data", (chunk: string) => void (output += chunk));
  const [code] = (await once(child, "close")) as [number];
  return { code, output };
}

test("brings an OVA over SSH, hears the guest's proof, does so twice, and removes all that it made", { timeout: 120_000 }, async () => {
  await using host = await openKvmHost();
  await using state = await openDirectory("state");
  const uri = `${host.sshUri()}?keyfile=${host.sshd.clientKey.path}&known_hosts=${host.sshd.knownHostsFile}`;
  for (const changes of ["3 created", "1 updated"]) {
    const { code, output } = await quickstart(state.path, "--host", uri);
    expect(output).toContain(changes);
    expect(output).toContain("✓ as declared");
    expect(output).toContain("✓ equal to the source's");
    expect(code).toBe(0);
  }
  const { code, output } = await quickstart(state.path, "--destroy");
  expect({ code, output }).toMatchObject({ code: 0, output: expect.stringContaining("all that the quickstart made is gone") });
  expect(await host.virsh("list", "--all", "--name")).toBe("");
  expect((await host.virsh("pool-list", "--all", "--name")).trim()).toBe("default");
  expect(await host.run("ls", "/var/lib/libvirt/images")).toBe("");
  expect(await readdir(state.path)).toEqual([]);
});

test("says in one line what an image is missing, before it touches anything", async () => {
  await using state = await openDirectory("state");
  const { code, output } = await quickstart(state.path, "/nowhere/web.ova");
  expect(output).toBe("✗ there is no image /nowhere/web.ova\n");
  expect(code).toBe(1);
  expect(await readdir(state.path)).toEqual([]);
});
