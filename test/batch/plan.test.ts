import { expect, test } from "vitest";
import type { Step } from "../../sdk/batch/job.ts";
import { parseManifest } from "../../sdk/batch/manifest.ts";
import { planBatch, type Previewed } from "../../sdk/batch/plan.ts";

const GIB = 2 ** 30;
const RATES = { assumed: GIB };
const { machines } = parseManifest(
  "machines:\n  a: { source: { ova: a }, host: 'qemu:///system' }\n  b: { source: { ova: b }, host: 'qemu:///system' }\n  c: { source: { ova: c }, host: 'qemu+ssh://kvm2/system' }\n",
  "/m.yaml",
);

/** A machine that is going to be made, with one disk of 10 GiB that holds 4. */
function previewed(name: string, own: { readonly machine?: object; readonly disk?: object; readonly op?: string } = {}): Previewed {
  const op = own.op ?? "create";
  const step = (kind: Step["kind"], resource: string, properties: object): Step => ({
    kind,
    name: resource,
    op,
    changed: [],
    properties: properties as Step["properties"],
  });
  return {
    machine: machines.find((machine) => machine.name === name)!,
    steps: [
      step("ImportedDisk", `${name}-disk0`, { path: `/pool/${name}.qcow2`, pool: "default", layout: "sparse", ...own.disk }),
      step("VirtualMachine", name, {
        name,
        uuid: `uuid-${name}`,
        macAddresses: [`52:54:00:00:00:0${name}`],
        memoryMiB: 2048,
        powerState: "running",
        ...own.machine,
      }),
    ],
    findings: [],
    measures: new Map([
      [`${name}-disk0`, { path: `${name}.ova`, format: "vmdk streamOptimized", virtualSizeBytes: 10 * GIB, dataBytes: 4 * GIB, notes: [] }],
    ]),
  };
}

const survey = (freeBytes: number, memoryMiB = 65_536) => ({
  label: "this machine",
  memoryMiB,
  usedMemoryMiB: 1024,
  cpus: 8,
  pools: [{ name: "default", folder: "/pool", freeBytes }],
});

test("names what changes of a machine and of its disks, and nothing of what is new or stays", () => {
  const changing = (op: string): Previewed => {
    const each = previewed("a", { op });
    return { ...each, steps: each.steps.map((step) => ({ ...step, changed: ["capacity", "memoryMiB"] })) };
  };
  const [updated, made] = ["update", "create"].map((op) => planBatch([changing(op)], new Map(), RATES).machines[0]?.changes);
  expect(updated).toEqual(["a-disk0.capacity", "a-disk0.memoryMiB", "capacity", "memoryMiB"]);
  expect(made).toEqual([]);
});

test("adds up what is going to be copied, and estimates its time", () => {
  const plan = planBatch([previewed("a"), previewed("b", { op: "same" }), previewed("c", { disk: { layout: "full" } })], new Map(), {
    assumed: 4 * GIB,
    seen: 2 * GIB,
    limit: GIB,
  });
  expect(plan.machines.map(({ action, wireBytes, estimateSeconds }) => [action, wireBytes / GIB, estimateSeconds])).toEqual([
    ["create", 4, 4],
    ["same", 0, 0],
    ["create", 10, 10],
  ]);
  expect(plan.isClear).toBe(true);
});

test.for([
  ["assumed", { assumed: 3 }, 3],
  ["seen", { assumed: 3, seen: 5, limit: 6 }, 5],
  ["limit", { assumed: 3, limit: 2 }, 2],
] as const)("estimates by the rate that is %s, and says so", ([basis, rates, bytesPerSecond]) => {
  expect(planBatch([previewed("a")], new Map(), rates)).toMatchObject({ basis, bytesPerSecond });
});

test.for([
  ["name", { machine: { name: "same" } }, "the name same on qemu:///system is claimed by b of this batch too: give one of them another"],
  ["MAC address", { machine: { macAddresses: ["52:54:00:00:00:01"] } }, "the MAC address 52:54:00:00:00:01 on qemu:///system is claimed"],
  ["path", { disk: { path: "/pool/x.qcow2" } }, "the path /pool/x.qcow2 on qemu:///system is claimed"],
  ["UUID", { machine: { uuid: "u" } }, "the UUID u on qemu:///system is claimed"],
] as const)("blocks machines of one host that claim the same %s, and not those of two hosts", ([, own, sentence]) => {
  const plan = planBatch([previewed("a", own), previewed("b", own), previewed("c", own)], new Map(), RATES);
  expect(plan.machines.map(({ action }) => action)).toEqual(["blocked", "blocked", "create"]);
  const blocking = plan.machines[0]!.findings.filter(({ level }) => level === "block");
  expect(blocking).toEqual([{ level: "block", text: expect.stringContaining(sentence) as string }]);
  expect(plan.isClear).toBe(false);
});

test("warns of a MAC address that machines of two hosts have", () => {
  const own = { machine: { macAddresses: ["52:54:00:00:00:01"] } };
  const plan = planBatch([previewed("a", own), previewed("b"), previewed("c", own)], new Map(), RATES);
  expect(plan.isClear).toBe(true);
  expect(plan.machines.map(({ findings }) => findings)).toEqual([
    [
      {
        level: "warn",
        text: "the MAC address 52:54:00:00:00:01 is that of c on qemu+ssh://kvm2/system too: where both are on one network neither is reached; give one of them another",
      },
    ],
    [],
    [{ level: "warn", text: expect.stringContaining("is that of a on qemu:///system too") as string }],
  ]);
});

test("blocks machines that have room in a pool one by one, but not together", () => {
  const together = [previewed("a"), previewed("b")];
  expect(planBatch(together, new Map([["qemu:///system", survey(8 * GIB)]]), RATES).isClear).toBe(true);
  const plan = planBatch(together, new Map([["qemu:///system", survey(7 * GIB)]]), RATES);
  expect(plan.machines.map(({ action }) => action)).toEqual(["blocked", "blocked"]);
  expect(plan.machines[0]!.findings[0]!.text).toBe(
    "the pool default of qemu:///system has 7.0 GiB free, and the 2 machines of this batch take up to 8.0 GiB: make room, or choose another pool",
  );
});

test("warns when the machines of a host take more memory than it has left", () => {
  const plan = planBatch([previewed("a"), previewed("b")], new Map([["qemu:///system", survey(100 * GIB, 4096)]]), RATES);
  expect(plan.isClear).toBe(true);
  expect(plan.machines[1]!.findings).toEqual([{ level: "warn", text: expect.stringContaining("has 4096 MiB of memory") as string }]);
});

test("a finding that blocks keeps its machine from starting", () => {
  const plan = planBatch([{ ...previewed("a"), findings: [{ level: "block", text: "no" }] }, previewed("b")], new Map(), RATES);
  expect(plan.machines.map(({ action }) => action)).toEqual(["blocked", "create"]);
});
