/** The folder in which a batch keeps its state: `.virtlift` beside the manifest. */
import { lstat, mkdir, readlink, rm, symlink } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

/** The places in the folder. All absolute. */
export interface StateFolder {
  readonly path: string;
  /** Pulumi's own state, where the manifest names no other backend. */
  readonly backend: string;
  readonly journal: string;
  /** Held by the driver that works on the batch. */
  readonly lock: string;
  /** Where the packages are found that stacks need: to be on NODE_PATH. */
  readonly modules: string;
  /** What Node keeps of the packages that it compiled. */
  readonly compiled: string;
  /** Saved plans, one file a machine. */
  readonly plans: string;
  /** The folder of one stack. */
  stack(name: string): string;
}

/** Makes the folder beside the manifest, readable for its owner only, and links the packages into it. May be called for a folder that exists. */
export async function openStateFolder(manifestFolder: string): Promise<StateFolder> {
  const path = join(manifestFolder, ".virtlift");
  const folder: StateFolder = {
    path,
    backend: join(path, "state"),
    journal: join(path, "journal.ndjson"),
    lock: join(path, "lock"),
    modules: join(path, "node_modules"),
    compiled: join(path, "compiled"),
    plans: join(path, "plans"),
    stack: (name) => join(path, "stacks", name),
  };
  await mkdir(path, { recursive: true, mode: 0o700 });
  for (const each of [folder.backend, folder.plans]) await mkdir(each, { recursive: true });
  const load = createRequire(import.meta.url);
  for (const name of ["virtlift", "@pulumi/pulumi"]) await link(dirname(load.resolve(`${name}/package.json`)), join(folder.modules, name));
  return folder;
}

async function link(target: string, path: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const found = await lstat(path).catch(() => undefined);
  if (found?.isSymbolicLink() && (await readlink(path)) === target) return;
  await rm(path, { recursive: true, force: true });
  await symlink(target, path);
}
