/** Finds a Pulumi CLI or obtains one: from PATH, from the user's cache, by the official installer, or built from pinned Go modules. */
import { createHash } from "node:crypto";
import { copyFile, mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { env } from "node:process";
import { cachePath, fillOnce } from "./cache.ts";
import { runCommand } from "./command.ts";
import { exists, findExecutable } from "./files.ts";
import { SetupError } from "./packages.ts";
import { type Note, step } from "./steps.ts";

/** The oldest CLI that the package's peer range of @pulumi/pulumi goes with. */
const OLDEST_CLI = [3, 205, 0] as const;
const BUILD_TIMEOUT_MS = 45 * 60_000;

/** `modules` is the folder beside this file with go.mod and go.sum. The version must be linked in, or the Automation API cannot read it. */
const GO_BUILDS = [
  { name: "pulumi", modules: "pulumi-cli", package: "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", version: "v3.250.0" },
  {
    name: "pulumi-language-nodejs",
    modules: "pulumi-language-nodejs",
    package: "github.com/pulumi/pulumi/sdk/v3/nodejs/cmd/pulumi-language-nodejs",
    version: "v3.68.0",
  },
] as const;

/** The dynamic provider's launcher, which the engine looks for on PATH. */
const DYNAMIC_PROVIDER_LAUNCHER = "pulumi-resource-pulumi-nodejs";

/**
 * The directory to put first on PATH: `pulumi`, the Node language host and the dynamic provider's launcher are in it, or already on PATH.
 * Shows its step. Throws SetupError with what was tried and what would help when there is no CLI to be had.
 */
export async function preparePulumi(): Promise<string> {
  return step("Pulumi CLI", async (note) => {
    const bin = (await findPulumi()) ?? (await obtainOnce(note));
    const { stdout } = await runCommand([join(bin, "pulumi"), "version"], { env: { ...env, PULUMI_SKIP_UPDATE_CHECK: "true" } });
    note(`${stdout.trim()} in ${bin}`);
    return bin;
  });
}

/** As `preparePulumi`, with what is there already and without a word; undefined when nothing is. */
export async function findPulumi(): Promise<string | undefined> {
  const installed = await findOnPath();
  if (installed !== undefined) return installed;
  const cached = await cachedRoot();
  return (await exists(cached)) ? join(cached, "bin") : undefined;
}

async function obtainOnce(note: Note): Promise<string> {
  const root = await cachedRoot();
  await fillOnce(root, (temporary) => obtain(temporary, note));
  return join(root, "bin");
}

/** The directory of a CLI that is new enough, where its language host is on PATH too. */
async function findOnPath(): Promise<string | undefined> {
  const path = await findExecutable("pulumi");
  if (path === undefined || (await findExecutable("pulumi-language-nodejs")) === undefined) return undefined;
  const { stdout } = await runCommand([path, "version"], { env: { ...env, PULUMI_SKIP_UPDATE_CHECK: "true" } });
  const numbers = stdout.trim().replace(/^v/, "").split(/[.+-]/).map(Number);
  const difference = OLDEST_CLI.map((oldest, index) => (numbers[index] ?? 0) - oldest).find((each) => each !== 0) ?? 0;
  return difference >= 0 ? dirname(path) : undefined;
}

/** The folder of the CLI in the cache, named by the hash of all that pins it. */
async function cachedRoot(): Promise<string> {
  const hash = createHash("sha256");
  for (const build of GO_BUILDS) {
    for (const file of ["go.mod", "go.sum"]) hash.update(await readFile(join(import.meta.dirname, build.modules, file)));
  }
  return cachePath("pulumi", hash.digest("hex").slice(0, 16));
}

/** Fills `directory/bin`: by the official installer where it can be reached, else by the Go toolchain. */
async function obtain(directory: string, note: Note): Promise<void> {
  note("official installer");
  const refusal = await installOfficially(directory);
  if (refusal === undefined) return;
  const go = await findExecutable("go", [
    ...(env["PATH"] ?? "").split(delimiter),
    "/usr/local/go/bin",
    "/usr/lib/go/bin",
    join(homedir(), "go/bin"),
  ]);
  if (go === undefined) {
    throw new SetupError(
      `no Pulumi CLI: none of version ${OLDEST_CLI.join(".")} or newer is on PATH, the official installer failed (${refusal}), and no Go toolchain is there to build it with; ` +
        "install Pulumi (https://www.pulumi.com/docs/install) or Go (https://go.dev/dl), then run this again",
    );
  }
  const bin = join(directory, "bin");
  await mkdir(bin, { recursive: true });
  for (const build of GO_BUILDS) {
    note(`building ${build.name} ${build.version} from pinned Go modules, which takes some minutes`);
    const flags = `-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=${build.version}`;
    await runCommand(
      [go, "build", "-mod=readonly", "-tags", "osusergo,grpcnotrace", "-ldflags", flags, "-o", join(bin, build.name), build.package],
      {
        cwd: join(import.meta.dirname, build.modules),
        env: { ...env, CGO_ENABLED: "0" },
        timeoutMs: BUILD_TIMEOUT_MS,
      },
    );
  }
  const sdk = dirname(createRequire(import.meta.url).resolve("@pulumi/pulumi/package.json"));
  await copyFile(join(sdk, DYNAMIC_PROVIDER_LAUNCHER), join(bin, DYNAMIC_PROVIDER_LAUNCHER));
}

/** Installs the CLI of the SDK's own version into `root/bin`; gives the reason when it cannot. */
async function installOfficially(root: string): Promise<string | undefined> {
  const { PulumiCommand } = await import("@pulumi/pulumi/automation/index.js");
  try {
    await PulumiCommand.install({ root });
    return undefined;
  } catch (error) {
    return error instanceof Error ? (error.message.trim().split("\n").at(-1) ?? error.name) : String(error);
  }
}
