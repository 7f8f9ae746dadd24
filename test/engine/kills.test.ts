/** What happens when the provider or the engine is killed in the middle of a copy. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { commandLine, descendants } from "../bed/daemon.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { openPulumi, type RunningPulumi } from "../bed/pulumi.ts";

const PROGRAM = `
import { Config } from "@pulumi/pulumi";
import { ImportedDisk } from "virtlift";
const disk = new ImportedDisk("root", { source: { file: new Config().require("file") } });
export const { path } = disk;
`;

/** A project whose `up` copies 256 MiB of random bytes, and an `up` of it that is caught in the middle. */
async function openBed() {
  await using stack = new AsyncDisposableStack();
  const pulumi = stack.use(await openPulumi());
  const libvirtd = stack.use(await openLibvirtd());
  const source = join(libvirtd.directory, "random.raw");
  await runCommand(["dd", "if=/dev/urandom", `of=${source}`, "bs=1M", "count=256", "status=none"]);
  const project = await pulumi.openProject(PROGRAM, { config: { "virtlift:host": libvirtd.uri, file: source } });
  const running = project.start("up", "--yes", "--skip-preview");
  const partBytes = await waitForPart(join(libvirtd.poolPath, ".virtlift"), running);
  const provider = providerOf(pulumi.env["PULUMI_HOME"] ?? "");
  const importer = descendants(provider).find((pid) => commandLine(pid).includes("import-program"));
  if (importer === undefined) throw new Error("nobody imports");
  // The writers sleep, so that nothing is finished before anybody is killed.
  const writers = descendants(importer);
  for (const pid of writers) process.kill(pid, "SIGSTOP");
  const held = stack.move();
  return {
    pulumi,
    project,
    running,
    provider,
    importer,
    writers,
    partBytes,
    wakeWriters: () => writers.filter(isAlive).forEach((pid) => process.kill(pid, "SIGCONT")),
    /** Asserts that the pool holds the whole disk and nothing else. */
    async expectConverged() {
      const { path } = JSON.parse((await project.mustRun("stack", "output", "--json")).stdout) as { path: string };
      expect(await readdir(libvirtd.poolPath)).toEqual([path.slice(libvirtd.poolPath.length + 1)]);
      await runCommand(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, path]);
      await project.mustRun("up", "--yes", "--skip-preview", "--expect-no-changes");
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** Whether it runs; an orphan that init has not reaped yet does not. Source: proc_pid_stat(5), the third field. */
function isAlive(pid: number): boolean {
  try {
    return !readFileSync(`/proc/${pid}/stat`, "utf8")
      .replace(/^.*\) /s, "")
      .startsWith("Z");
  } catch {
    // ENOENT, ESRCH: it has ended.
    return false;
  }
}

async function waitForPart(folder: string, running: RunningPulumi): Promise<number> {
  let sizeBytes = 0;
  await expect
    .poll(
      async () => {
        const [part] = (existsSync(folder) ? await readdir(folder) : []).filter((name) => name.endsWith(".part"));
        sizeBytes = part === undefined ? 0 : (await stat(join(folder, part))).size;
        return sizeBytes;
      },
      { interval: 2, timeout: 20_000, message: running.output() },
    )
    .toBeGreaterThan(0);
  return sizeBytes;
}

/** The pid of the one dynamic provider that was started with this home of Pulumi. */
function providerOf(home: string): number {
  const pid = readdirSync("/proc")
    .map(Number)
    .filter(Boolean)
    .find((each) => {
      try {
        const [program, script] = commandLine(each).split("\0");
        const isProvider = program?.endsWith("node") === true && script?.includes("cmd/dynamic-provider") === true;
        return isProvider && readFileSync(`/proc/${each}/environ`, "utf8").split("\0").includes(`PULUMI_HOME=${home}`);
      } catch {
        // ENOENT, ESRCH: it ended by itself.
        return false;
      }
    });
  return pid ?? expect.unreachable("the engine has started no provider");
}

test("after kill -9 of the provider nothing is in state, and the next up goes on and finishes", async () => {
  await using bed = await openBed();
  process.kill(bed.provider, "SIGKILL");
  bed.wakeWriters();
  const killed = await bed.running.ended;
  expect(killed.exitCode).not.toBe(0);
  expect(await bed.pulumi.readState("program")).not.toContain("virtlift:ImportedDisk");
  await expect.poll(() => [bed.importer, ...bed.writers].filter(isAlive)).toEqual([]);

  const { stdout } = await bed.project.mustRun("up", "--yes", "--skip-preview");
  expect(stdout).toContain("both ends agree on every byte");
  await bed.expectConverged();
}, 90_000);

test("after kill -9 of the process that imports the provider says so, and the next up goes on and finishes", async () => {
  await using bed = await openBed();
  process.kill(bed.importer, "SIGKILL");
  bed.wakeWriters();
  const killed = await bed.running.ended;
  expect(killed.exitCode).not.toBe(0);
  expect(killed.stdout + killed.stderr).toContain("the process that imports was killed by SIGKILL; what it brought over is kept");
  await expect.poll(() => bed.writers.filter(isAlive)).toEqual([]);
  await bed.project.mustRun("up", "--yes", "--skip-preview");
  await bed.expectConverged();
}, 90_000);

test("after kill -9 of the engine the provider stops by itself, and cancel, refresh and up converge with one writer", async () => {
  await using bed = await openBed();
  process.kill(bed.running.pid, "SIGKILL");
  await bed.running.ended;
  expect(isAlive(bed.provider)).toBe(true);

  const locked = await bed.project.run("up", "--yes", "--skip-preview");
  expect(locked.stdout + locked.stderr).toContain("pulumi cancel");
  await bed.project.mustRun("cancel", "--yes");
  // At once: the old provider may still be there, and its writers hold the lock.
  await bed.project.mustRun("refresh", "--yes", "--skip-preview", "--clear-pending-creates");
  const { stdout } = await bed.project.mustRun("up", "--yes", "--skip-preview");
  expect(stdout).toContain("both ends agree on every byte");
  expect([bed.importer, ...bed.writers].filter(isAlive)).toEqual([]);
  await expect.poll(() => isAlive(bed.provider), { timeout: 10_000 }).toBe(false);
  await bed.expectConverged();
}, 90_000);
