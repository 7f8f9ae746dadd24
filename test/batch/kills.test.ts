/** What kill -9 does to a batch in the middle of a copy: the next `up` goes on, and nothing is left over. */
import { existsSync, readFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../../scripts/setup/command.ts";
import { descendants } from "../bed/daemon.ts";
import { openLibvirtd } from "../bed/libvirtd.ts";
import { readReport } from "../../sdk/batch/report.ts";
import { openBatchBed, type RunningCli } from "./bed.ts";

const MIB = 2 ** 20;

/** At this rate a copy of 32 MiB takes more than three seconds, however quick the machine is. */
const LIMIT = 10 * MIB;

/** A batch whose `up` copies 32 MiB of random bytes, caught in the middle. */
async function openCopy() {
  await using stack = new AsyncDisposableStack();
  const libvirtd = stack.use(await openLibvirtd());
  const source = join(libvirtd.directory, "random.raw");
  await runCommand(["dd", "if=/dev/urandom", `of=${source}`, "bs=1M", "count=32", "status=none"]);
  const bed = stack.use(
    await openBatchBed({
      project: "kills",
      retry: { attempts: 3, delaySeconds: 1 },
      limits: { bandwidth: LIMIT },
      machines: {
        big: { source: { file: source }, host: libvirtd.uri, machine: { powerState: "stopped", domainType: "qemu" } },
      },
    }),
  );
  const running = bed.start("up");
  const parts = join(libvirtd.poolPath, ".virtlift");
  await expect
    .poll(async () => (existsSync(parts) ? (await readdir(parts)).some((name) => name.endsWith(".part")) : false), {
      interval: 2,
      timeout: 40_000,
      message: running.stderr(),
    })
    .toBe(true);
  const held = stack.move();
  return {
    bed,
    running,
    /** Asserts that the machine is there, its disk is whole, and nothing else is in the pool. */
    async expectConverged() {
      expect((await libvirtd.virsh("list", "--all", "--name")).trim()).toBe("big");
      const [disk = "", ...others] = (await readdir(libvirtd.poolPath)).filter((name) => name !== ".virtlift");
      expect(others).toEqual([]);
      await runCommand(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, join(libvirtd.poolPath, disk)]);
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  };
}

/** The driver's descendant whose command line holds all the words. */
function processOf(driver: RunningCli, ...words: readonly string[]): number {
  const pid = descendants(driver.pid).find((each) => {
    const line = existsSync(`/proc/${each}/cmdline`) ? readFileSync(`/proc/${each}/cmdline`, "utf8") : "";
    return words.every((word) => line.includes(word));
  });
  if (pid === undefined) throw new Error(`the driver has no process ${words.join(" ")}`);
  return pid;
}

const isAlive = (pid: number): boolean => existsSync(`/proc/${pid}`) && !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));

test("a killed engine is noticed, its lock taken over, and the same up goes on and finishes", async () => {
  await using copy = await openCopy();
  process.kill(processOf(copy.running, "pulumi\0up"), "SIGKILL");
  const ended = await copy.running.ended;
  expect(ended).toMatchObject({ code: 0, stdout: expect.stringMatching(/^1 done$/m) as string });
  expect(ended.stderr).toContain("big: trying again (attempt 2): Pulumi's engine was killed");
  expect(ended.stderr).toContain("took over the stack from process");
  await copy.expectConverged();
}, 120_000);

test("a killed worker is replaced, after its engine has ended, and the same up goes on and finishes", async () => {
  await using copy = await openCopy();
  const engine = processOf(copy.running, "pulumi\0up");
  process.kill(processOf(copy.running, "batch/worker"), "SIGKILL");
  const ended = await copy.running.ended;
  expect(isAlive(engine)).toBe(false);
  expect(ended).toMatchObject({ code: 0, stdout: expect.stringMatching(/^1 done$/m) as string });
  expect(ended.stderr).toContain("the worker process was killed by SIGKILL");
  await copy.expectConverged();
}, 120_000);

test("after a killed driver its workers and engines end by themselves, status says so, and the next up goes on", async () => {
  await using copy = await openCopy();
  const left = descendants(copy.running.pid);
  process.kill(copy.running.pid, "SIGKILL");
  await copy.running.ended;
  expect((await copy.bed.cli("status")).stdout).toMatch(/big .* interrupted/);
  await expect.poll(() => left.filter(isAlive), { timeout: 25_000 }).toEqual([]);
  const again = await copy.bed.cli("up");
  expect(again).toMatchObject({ code: 0, stdout: expect.stringMatching(/^1 done$/m) as string });
  await copy.expectConverged();
  expect((await copy.bed.cli("plan")).stdout).toContain("nothing is to be copied");
}, 120_000);

test("the first Ctrl-C lets the copy end, and starts nothing more", async () => {
  await using copy = await openCopy();
  process.kill(copy.running.pid, "SIGINT");
  const ended = await copy.running.ended;
  expect(ended.code).toBe(130);
  expect(ended.stderr).toContain("stopping: what is being copied goes on to its end");
  await copy.expectConverged();
  const copied = readReport(copy.bed.manifestPath).machines[0]?.spans.find(({ kind }) => kind === "copy");
  const seconds = ((copied?.endedMs ?? 0) - (copied?.beganMs ?? 0)) / 1000;
  // A tenth of a second of the rate may go at once.
  expect((32 * MIB - LIMIT / 10) / seconds).toBeLessThan(LIMIT);
}, 120_000);

test("the second Ctrl-C cancels the copy, and the next up goes on with it", async () => {
  await using copy = await openCopy();
  process.kill(copy.running.pid, "SIGINT");
  await expect.poll(() => copy.running.stderr()).toContain("stopping");
  process.kill(copy.running.pid, "SIGINT");
  const ended = await copy.running.ended;
  expect(ended.code).toBe(130);
  expect(ended.stdout).toMatch(/^1 (cancelled|done)$/m);
  expect(ended.stderr).not.toContain("error: ");
  expect(await copy.bed.cli("up")).toMatchObject({ code: 0, stdout: expect.stringMatching(/^1 done$/m) as string });
  await copy.expectConverged();
}, 120_000);
