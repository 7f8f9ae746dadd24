/** Takes files out of the distribution's packages without installing them: the kernel, its modules, busybox, a UEFI boot loader. */
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { zstdDecompressSync } from "node:zlib";
import { exists } from "../setup/files.ts";
import { runCommand } from "../setup/command.ts";

const DOWNLOAD_TIMEOUT_MS = 300_000;

/** Names of the kernel's own package by distribution: Debian, Ubuntu. Each is a metapackage that depends on the versioned one. */
const KERNEL_METAPACKAGES = ["linux-image-amd64", "linux-image-generic"];

export interface Kernel {
  /** As `uname -r` says. */
  readonly release: string;
  readonly image: Buffer;
  /** Module files in the order in which they must be loaded; drivers that are built in are left out. */
  readonly modules: readonly { readonly name: string; readonly content: Buffer }[];
}

export interface GuestParts {
  readonly kernel: Kernel;
  /** A statically linked busybox. */
  readonly busybox: Buffer;
  /** systemd-boot for x64. */
  readonly bootLoader: Buffer;
}

/**
 * Downloads the packages with `apt-get download`, which checks them against the distribution's signatures, and unpacks them below `directory`.
 * Needs no root: where the system has no package lists, they are fetched into `directory`. Throws CommandError when apt cannot, Error when a package lacks a file.
 */
export async function downloadGuestParts(directory: string, drivers: readonly string[]): Promise<GuestParts> {
  const apt = await openPackageLists(directory);
  const kernelPackages = await findKernelPackages(apt);
  const root = join(directory, "root");
  await mkdir(root, { recursive: true });
  const packages = [...kernelPackages, "busybox-static", "systemd-boot-efi"];
  await runCommand(["apt-get", ...apt, "--quiet", "download", ...packages], { cwd: directory, timeoutMs: DOWNLOAD_TIMEOUT_MS });
  for (const file of await readdir(directory)) {
    if (file.endsWith(".deb")) await runCommand(["dpkg-deb", "-x", join(directory, file), root], { timeoutMs: DOWNLOAD_TIMEOUT_MS });
  }
  const busybox = (await exists(join(root, "bin/busybox"))) ? "bin/busybox" : "usr/bin/busybox";
  return {
    kernel: await readKernel(root, drivers),
    busybox: await readFile(join(root, busybox)),
    bootLoader: await readFile(join(root, "usr/lib/systemd/boot/efi/systemd-bootx64.efi")),
  };
}

/** Options for apt-get and apt-cache that name package lists which know the kernel: the system's own, else fresh ones below `directory`. */
async function openPackageLists(directory: string): Promise<readonly string[]> {
  // Root's apt would change to the user _apt, who may not write into a user's cache.
  const common = ["-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=1"];
  if (await findMetapackage(common)) return common;
  const lists = join(directory, "lists");
  const cache = join(directory, "cache");
  await mkdir(join(lists, "partial"), { recursive: true });
  await mkdir(join(cache, "archives/partial"), { recursive: true });
  const own = [...common, "-o", `Dir::State::lists=${lists}`, "-o", `Dir::Cache=${cache}`];
  await runCommand(["apt-get", ...own, "--quiet", "update"], { timeoutMs: DOWNLOAD_TIMEOUT_MS });
  return own;
}

async function findMetapackage(apt: readonly string[]): Promise<string | undefined> {
  const { stdout } = await runCommand(["apt-cache", ...apt, "pkgnames", "linux-image-"]);
  const names = new Set(stdout.split("\n"));
  return KERNEL_METAPACKAGES.find((name) => names.has(name));
}

/** The versioned packages behind the metapackage: the image, and on Ubuntu the modules, which are a package of their own. */
async function findKernelPackages(apt: readonly string[]): Promise<readonly string[]> {
  const metapackage = await findMetapackage(apt);
  if (metapackage === undefined) throw new Error(`the package lists hold none of ${KERNEL_METAPACKAGES.join(", ")}`);
  const { stdout } = await runCommand(["apt-cache", ...apt, "depends", metapackage]);
  const image = /Depends: (linux-image-\d\S+)/.exec(stdout)?.[1];
  if (image === undefined) throw new Error(`${metapackage} depends on no versioned kernel image`);
  const modules = image.replace("linux-image-", "linux-modules-");
  const { stdout: known } = await runCommand(["apt-cache", ...apt, "pkgnames", modules]);
  return known.split("\n").includes(modules) ? [image, modules] : [image];
}

async function readKernel(root: string, drivers: readonly string[]): Promise<Kernel> {
  const imageName = (await readdir(join(root, "boot"))).find((name) => name.startsWith("vmlinuz-"));
  if (imageName === undefined) throw new Error(`the kernel package holds no boot/vmlinuz-* (unpacked in ${root})`);
  const release = imageName.slice("vmlinuz-".length);
  const modulesRoot = (await exists(join(root, "lib/modules", release)))
    ? join(root, "lib/modules", release)
    : join(root, "usr/lib/modules", release);
  const paths = new Map<string, string>();
  for (const path of await readdir(modulesRoot, { recursive: true })) {
    const name = /([^/]+)\.ko(\.zst)?$/.exec(path)?.[1];
    if (name !== undefined) paths.set(name.replaceAll("-", "_"), join(modulesRoot, path));
  }
  const modules = new Map<string, Buffer>();
  for (const driver of drivers) await addModule(driver, paths, modules);
  return {
    release,
    image: await readFile(join(root, "boot", imageName)),
    modules: [...modules].map(([name, content]) => ({ name: `${name}.ko`, content })),
  };
}

/** Adds a module after all that it depends on; a name without a file is built into the kernel. */
async function addModule(name: string, paths: ReadonlyMap<string, string>, modules: Map<string, Buffer>): Promise<void> {
  const path = paths.get(name);
  if (path === undefined || modules.has(name)) return;
  const stored = await readFile(path);
  const content = path.endsWith(".zst") ? zstdDecompressSync(stored) : stored;
  for (const dependency of parseModuleDependencies(content)) await addModule(dependency, paths, modules);
  modules.set(name, content);
}

/** The `depends=` entry of the module's .modinfo section: names with commas between, ended by a NUL. Source: Linux, scripts/mod/modpost.c add_depends. */
function parseModuleDependencies(content: Buffer): readonly string[] {
  const start = content.indexOf("\0depends=") + "\0depends=".length;
  if (start < "\0depends=".length) return [];
  const names = content.toString("latin1", start, content.indexOf(0, start));
  return names
    .split(",")
    .filter(Boolean)
    .map((name) => name.replaceAll("-", "_"));
}
