/** The quickstart's stacks: the root program, run by the Pulumi CLI with its state, settings and passphrase in a folder of the user's, outside the clone. */
import { spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { copyFile, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { env, execPath } from "node:process";
import { runCommand } from "../setup/command.ts";
import { exists } from "../setup/files.ts";
import { SetupError } from "../setup/packages.ts";

const ROOT = join(import.meta.dirname, "../..");
const CLI_TIMEOUT_MS = 120_000;

/** What the root program reads from its configuration; each key is in the namespace `virtlift`. */
export type Settings = Readonly<Record<string, string>>;

export interface Outputs {
  readonly name: string;
  readonly path: string;
  readonly sourceDigest: string;
  readonly macAddresses: readonly string[];
  readonly serialLog: string;
}

/** One stack for each host and image, so that a quickstart with another one never takes the first one's machine away. */
export class Stacks {
  readonly #directory: string;
  readonly #env: NodeJS.ProcessEnv;

  private constructor(directory: string, pulumiBin: string) {
    this.#directory = directory;
    this.#env = {
      ...env,
      PATH: [dirname(execPath), pulumiBin, env["PATH"] ?? ""].join(delimiter),
      PULUMI_HOME: join(directory, "home"),
      PULUMI_BACKEND_URL: `file://${join(directory, "state")}`,
      PULUMI_CONFIG_PASSPHRASE: undefined,
      PULUMI_CONFIG_PASSPHRASE_FILE: join(directory, "passphrase"),
      PULUMI_STACK: undefined,
      PULUMI_SKIP_UPDATE_CHECK: "true",
      PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION: "true",
    };
  }

  /** `${XDG_STATE_HOME:-~/.local/state}/virtlift/quickstart`. Source: XDG Base Directory Specification. */
  static directory(): string {
    return join(env["XDG_STATE_HOME"] || join(homedir(), ".local/state"), "virtlift/quickstart");
  }

  /** Makes the folder with a fresh passphrase where it is not there. `pulumiBin` is the directory of the CLI. */
  static async open(pulumiBin: string): Promise<Stacks> {
    const directory = Stacks.directory();
    await mkdir(join(directory, "state"), { recursive: true, mode: 0o700 });
    await mkdir(join(directory, "home"), { recursive: true });
    const passphrase = join(directory, "passphrase");
    if (!(await exists(passphrase))) await writeFile(passphrase, randomBytes(24).toString("base64url"), { mode: 0o600, flag: "wx" });
    return new Stacks(directory, pulumiBin);
  }

  /** The name of the stack for a host and an image: `quickstart-` and a short hash of the two. */
  static nameFor(uri: string, image: string): string {
    return `quickstart-${createHash("sha256").update(`${uri}\0${image}`).digest("hex").slice(0, 8)}`;
  }

  /** Makes the stack where it is not there, frees it from a run that died, and gives it these settings and no others. */
  async prepare(name: string, settings: Settings): Promise<void> {
    const file = this.#settingsFile(name);
    if (!(await this.list()).includes(name)) {
      await this.#ask("stack", "init", name, "--no-select");
      // `stack init` writes the stack's salt beside the program; there it would be lost with the clone.
      const written = join(ROOT, `Pulumi.${name}.yaml`);
      await copyFile(written, file);
      await rm(written);
    }
    await this.#recover(name);
    for (const key of Object.keys(await this.#settings(name))) {
      if (!(key.replace("virtlift:", "") in settings)) await this.#ask("config", "rm", key, ...this.#select(name));
    }
    const pairs = Object.entries(settings).flatMap(([key, value]) => ["--plaintext", `virtlift:${key}=${value}`]);
    await this.#ask("config", "set-all", ...pairs, ...this.#select(name));
  }

  /** Shows what `up` would do. Throws SetupError when the preview fails; what is wrong stands above it then. */
  preview(name: string): Promise<void> {
    return this.#show("preview", "--refresh", ...this.#select(name));
  }

  /** Does it; what the host has lost since the last time is made again. Throws SetupError when it fails. */
  async up(name: string): Promise<Outputs> {
    await this.#show("up", "--refresh", "--yes", "--skip-preview", ...this.#select(name));
    return JSON.parse(await this.#ask("stack", "output", "--json", "--stack", name)) as Outputs;
  }

  /** Destroys what the stack made and forgets the stack. Throws SetupError when something could not be destroyed. */
  async remove(name: string): Promise<void> {
    await this.#recover(name);
    await this.#show("destroy", "--yes", "--skip-preview", "--remove", ...this.#select(name));
    await rm(this.#settingsFile(name), { force: true });
  }

  /** Names of all stacks. */
  async list(): Promise<readonly string[]> {
    const stacks = JSON.parse(await this.#ask("stack", "ls", "--json")) as readonly { readonly name: string }[];
    return stacks.map((stack) => stack.name);
  }

  /** The libvirt URI that the stack was made for. */
  async hostOf(name: string): Promise<string | undefined> {
    return (await this.#settings(name))["virtlift:host"]?.value;
  }

  async #settings(name: string): Promise<Readonly<Record<string, { readonly value: string }>>> {
    return JSON.parse(await this.#ask("config", "--json", ...this.#select(name))) as Record<string, { readonly value: string }>;
  }

  /** A run that was killed leaves the stack locked, and perhaps an operation pending; Pulumi does not undo that by itself. */
  async #recover(name: string): Promise<void> {
    const locks = join(this.#directory, "state/.pulumi/locks");
    const entries = await readdir(locks, { recursive: true, withFileTypes: true }).catch(() => []);
    const files = entries.filter((entry) => entry.isFile() && entry.parentPath.split("/").includes(name));
    for (const file of files) {
      const { pid } = JSON.parse(await readFile(join(file.parentPath, file.name), "utf8")) as { readonly pid: number };
      if (await exists(`/proc/${pid}`)) throw new SetupError(`another quickstart is at work on ${name} (process ${pid}): wait for its end`);
    }
    if (files.length === 0) return;
    await this.#ask("cancel", name, "--yes");
    await this.#ask("refresh", "--yes", "--skip-preview", "--clear-pending-creates", ...this.#select(name));
  }

  #settingsFile(name: string): string {
    return join(this.#directory, `Pulumi.${name}.yaml`);
  }

  #select(name: string): readonly string[] {
    return ["--stack", name, "--config-file", this.#settingsFile(name)];
  }

  async #ask(...argv: readonly string[]): Promise<string> {
    const options = { cwd: ROOT, env: this.#env, timeoutMs: CLI_TIMEOUT_MS };
    return (await runCommand(["pulumi", ...argv, "--non-interactive", "--color", "never"], options)).stdout;
  }

  /** The user sees the CLI's own display, and an interrupt reaches the CLI itself. */
  async #show(...argv: readonly string[]): Promise<void> {
    const child = spawn("pulumi", argv, { cwd: ROOT, env: this.#env, stdio: ["ignore", "inherit", "inherit"] });
    const [code] = (await once(child, "exit")) as [number | null];
    if (code !== 0) throw new SetupError(`pulumi ${argv[0]} ended with ${code ?? "a signal"}: what is wrong stands above`);
  }
}
