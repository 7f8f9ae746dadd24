/** `npm run quickstart`: an image becomes a machine on libvirt by `pulumi preview` and `pulumi up`, and the guest says in its own words what it runs from. */
import { rm, rmdir } from "node:fs/promises";
import { homedir, userInfo } from "node:os";
import { dirname, resolve } from "node:path";
import { argv, env, exit } from "node:process";
import { parseArgs } from "node:util";
import type { Host, Hosts } from "../provider/host/hosts.ts";
import { createHosts } from "../provider/host/open.ts";
import { CommandError, ConnectionError, LibvirtError } from "../provider/errors.ts";
import { type GuestImage, prepareGuestKernel } from "./guest/guest.ts";
import { prepareGuestOva } from "./guest/ova.ts";
import { type GuestReport, parseGuestReport } from "./guest/report.ts";
import { followConsole } from "./quickstart/console.ts";
import { POOL_NAME, preparePool, removePool } from "./quickstart/pool.ts";
import { type Outputs, Stacks } from "./quickstart/stacks.ts";
import { probeAcceleration } from "./setup/acceleration.ts";
import { exists, findExecutable } from "./setup/files.ts";
import { GUEST, LIBVIRT, preparePackages, SetupError } from "./setup/packages.ts";
import { preparePulumi } from "./setup/pulumi.ts";
import { LOCAL_URIS, prepareLibvirt } from "./setup/services.ts";
import { bold, say, step } from "./setup/steps.ts";

const USAGE = `npm run quickstart -- [image] [--host <libvirt URI>]   imports an image and boots it
npm run quickstart -- --destroy                         removes all that it made

image: an OVA, OVF, VMDK, qcow2, VHD, VHDX, VDI or raw disk, also in gz, xz, zst or zip; default: a small guest, made here, that proves what it booted from
--host: such as qemu+ssh://root@kvm1/system; default: this machine's libvirt`;

/** Declared, so that the proof guest can be asked for it. */
const MAC = "52:54:00:76:6c:01";
/** Of an emulated CPU on a busy machine; with KVM it takes two seconds. */
const PROOF_TIMEOUT_MS = 240_000;
/** How long the console of a user's own image is shown, unless it asks for a login before. */
const CONSOLE_TIMEOUT_MS = 60_000;

const hosts = createHosts({
  environment: env,
  homeDirectory: homedir(),
  userName: userInfo().username,
  userId: userInfo().uid,
});
try {
  exit(await main(argv.slice(2), hosts));
} catch (error) {
  const isForUser = [SetupError, CommandError, ConnectionError, LibvirtError].some((each) => error instanceof each);
  if (!isForUser) throw error;
  say(`✗ ${error instanceof Error ? error.message : String(error)}`);
  exit(1);
}

async function main(rest: readonly string[], open: Hosts): Promise<number> {
  const { values, positionals } = parseOptions(rest);
  if (values.help === true) {
    say(USAGE);
    return 0;
  }
  if (values.destroy === true) return destroy(open);

  const image = positionals[0] === undefined ? undefined : resolve(env["INIT_CWD"] ?? ".", positionals[0]);
  if (image !== undefined && !(await exists(image))) throw new SetupError(`there is no image ${image}`);
  await preparePackages([...(values.host === undefined ? LIBVIRT : []), ...(image === undefined ? GUEST : [])]);
  const stacks = await Stacks.open(await preparePulumi());
  const proof = image === undefined ? await prepareProof() : undefined;
  // Only of this machine's KVM can it be told whether it works; another host's libvirt is taken at its word.
  const domainType = values.host === undefined ? await findAcceleration() : undefined;
  const uri = values.host ?? (await prepareLibvirt(open, domainType));
  const host = open.open({ uri });
  await step(`storage pool ${POOL_NAME}`, async (note) => {
    const path = await preparePool(host);
    note(path === undefined ? "is there" : `made in ${path} on ${host.label}`);
  });

  const stack = Stacks.nameFor(uri, image ?? "proof");
  await stacks.prepare(stack, {
    host: uri,
    source: image ?? proof?.path ?? "",
    pool: POOL_NAME,
    name: `virtlift-${stack}`,
    networks: JSON.stringify([{ type: "user", ...(proof && { mac: MAC }) }]),
    memoryMiB: proof === undefined ? "2048" : "256",
    ...(domainType === undefined ? {} : { domainType }),
  });
  say(`\n${bold("pulumi preview")}`);
  await stacks.preview(stack);
  say(`\n${bold("pulumi up")}`);
  const outputs = await stacks.up(stack);
  return proof === undefined ? showConsole(host, outputs) : prove(host, outputs, proof);
}

function parseOptions(rest: readonly string[]) {
  const options = { host: { type: "string" }, destroy: { type: "boolean" }, help: { type: "boolean", short: "h" } } as const;
  try {
    return parseArgs({ args: [...rest], options, allowPositionals: true });
  } catch (error) {
    throw new SetupError(`${error instanceof Error ? error.message : String(error)}\n${USAGE}`);
  }
}

function prepareProof(): Promise<GuestImage> {
  return step("proof guest", async (note) => {
    const image = await prepareGuestOva();
    note(image.path);
    return image;
  });
}

/** Undefined where the trial's kernel is not to be had, which needs apt: then libvirt decides. */
function findAcceleration(): Promise<"kvm" | "qemu" | undefined> {
  return step("acceleration", async (note) => {
    if ((await findExecutable("apt-get")) === undefined || (await findExecutable("dpkg-deb")) === undefined) {
      note("as libvirt says");
      return undefined;
    }
    const domainType = await probeAcceleration(await prepareGuestKernel());
    note(domainType === "kvm" ? "KVM works" : "no KVM that works: the CPU is emulated, which is slow");
    return domainType;
  });
}

/** Waits for the guest's report and compares it with what was declared. Gives the exit code. */
async function prove(host: Host, outputs: Outputs, source: GuestImage): Promise<number> {
  say(`\n${bold("the guest's console")}  ${outputs.serialLog} on ${host.label}`);
  const text = await followConsole(host, outputs.serialLog, {
    timeoutMs: PROOF_TIMEOUT_MS,
    isEnough: (console) => parseGuestReport(console) !== undefined,
    onLine: (line) => say(`│ ${line}`),
  });
  const report = parseGuestReport(text);
  if (report === undefined) throw new SetupError(`the guest did not report within ${PROOF_TIMEOUT_MS / 1000} s; its console stands above`);
  return compare(report, source) ? 0 : 1;
}

function compare(report: GuestReport, source: GuestImage): boolean {
  const [disk] = report.disks;
  const [network] = report.interfaces;
  const isSameMac = network?.mac === MAC;
  const isSameDisk = disk?.sha256 === source.contentSha256;
  say(`\n${bold("in the guest's own words")}`);
  say(`  kernel   ${report.kernel}`);
  say(`  MAC      ${network?.mac ?? "none"}  ${isSameMac ? "✓ as declared" : `✗ declared was ${MAC}`}`);
  say(`  disk     ${disk?.device ?? "none"}, ${disk?.sizeBytes ?? 0} bytes`);
  say(`  SHA-256  ${disk?.sha256 ?? "none"}  ${isSameDisk ? "✓ equal to the source's" : `✗ the source's is ${source.contentSha256}`}`);
  say(`\nIt all goes away again with: npm run quickstart -- --destroy`);
  return isSameMac && isSameDisk;
}

async function showConsole(host: Host, outputs: Outputs): Promise<number> {
  say(`\n${bold("the guest's console")}  ${outputs.serialLog} on ${host.label}, for ${CONSOLE_TIMEOUT_MS / 1000} s at most`);
  const text = await followConsole(host, outputs.serialLog, {
    timeoutMs: CONSOLE_TIMEOUT_MS,
    isEnough: (console) => console.includes("login:"),
    isOver: async () => !(await isRunning(host, outputs.name)),
    onLine: (line) => say(`│ ${line}`),
  });
  if (text.trim() === "") say("the guest wrote nothing to its serial port: look at it with virt-viewer, or virsh screenshot");
  const runs = (await isRunning(host, outputs.name)) ? "runs" : "has powered itself off";
  say(`\nThe machine ${outputs.name} ${runs}; its disk is ${outputs.path} on ${host.label}.`);
  say(`Its console: virsh --connect ${host.spec.uri} console ${outputs.name}`);
  say(`It all goes away again with: npm run quickstart -- --destroy`);
  return 0;
}

async function isRunning(host: Host, name: string): Promise<boolean> {
  const libvirt = await host.libvirt();
  return libvirt.domainIsActive(await libvirt.domainLookupByName(name));
}

/** Every stack with its machine and disk, every pool, and the folder of the state. */
async function destroy(open: Hosts): Promise<number> {
  if (!(await exists(Stacks.directory()))) {
    say("there is nothing to remove");
    return 0;
  }
  const stacks = await Stacks.open(await preparePulumi());
  const names = await stacks.list();
  const uris = new Set((await Promise.all(names.map((name) => stacks.hostOf(name)))).filter((uri) => uri !== undefined));
  if (LOCAL_URIS.some((uri) => uris.has(uri))) await prepareLibvirt(open, await findAcceleration());
  let failures = 0;
  /** One host that is away does not keep the others from being cleaned. */
  const attempt = async (work: Promise<void>): Promise<void> => {
    try {
      await work;
    } catch (error) {
      failures += 1;
      say(`✗ ${error instanceof Error ? error.message : String(error)}`);
    }
  };
  for (const name of names) await attempt(stacks.remove(name));
  for (const uri of uris) {
    const host = open.open({ uri });
    await attempt(step(`remove storage pool ${POOL_NAME} on ${host.label}`, () => removePool(host)));
  }
  if (failures > 0) {
    throw new SetupError(
      `not all could be removed; mend what stands above and run this again, or, where a host is gone for good, delete ${Stacks.directory()}`,
    );
  }
  await rm(Stacks.directory(), { recursive: true });
  // ENOTEMPTY: somebody else keeps something beside it.
  await rmdir(dirname(Stacks.directory())).catch(() => undefined);
  say("✓ all that the quickstart made is gone; its cache, packages that it installed, daemons that it started and their logs stay");
  return 0;
}
