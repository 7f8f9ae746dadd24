/**
 * The folder in which batches keep their state: `.virtlift` beside the manifests. What is one batch's own is in `projects/<project>` of it, as two manifests
 * may be in one folder. A journal in `.virtlift` itself names no project: the one that it is of takes it over.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { lstat, mkdir, readlink, rename, rm, symlink } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { parse } from "yaml";
import { lockBatch } from "./driver-lock.ts";

/** The places in the folder. All absolute. */
export interface StateFolder {
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

/**
 * Makes the folder beside the manifest, readable for its owner only, and links the packages into it. May be called for a folder that exists.
 * Throws Error when another driver works on what is to be taken over.
 */
export async function openStateFolder(manifestFolder: string, project: string): Promise<StateFolder> {
  const path = join(manifestFolder, ".virtlift");
  const own = join(path, "projects", project);
  const folder: StateFolder = {
    backend: join(path, "state"),
    ...journalPlaces(own),
    modules: join(path, "node_modules"),
    compiled: join(path, "compiled"),
    plans: join(own, "plans"),
    stack: (name) => join(own, "stacks", name),
  };
  await mkdir(own, { recursive: true, mode: 0o700 });
  if (holdsJournalOf(path, project)) await takeOver(path, own);
  for (const each of [folder.backend, folder.plans]) await mkdir(each, { recursive: true });
  const load = createRequire(import.meta.url);
  for (const name of ["virtlift", "@pulumi/pulumi"]) await link(dirname(load.resolve(`${name}/package.json`)), join(folder.modules, name));
  return folder;
}

/** Where the journal and the lock of a project are, for whoever only looks: also before a driver has taken them over. */
export function findJournal(manifestFolder: string, project: string): Pick<StateFolder, "journal" | "lock"> {
  const path = join(manifestFolder, ".virtlift");
  return journalPlaces(holdsJournalOf(path, project) ? path : join(path, "projects", project));
}

function journalPlaces(folder: string): Pick<StateFolder, "journal" | "lock"> {
  return { journal: join(folder, "journal.ndjson"), lock: join(folder, "lock") };
}

/** Whether the project has no journal yet and `.virtlift` itself holds one that is its: its stacks' folders name it, or name nobody. */
function holdsJournalOf(path: string, project: string): boolean {
  if (existsSync(journalPlaces(join(path, "projects", project)).journal) || !existsSync(journalPlaces(path).journal)) return false;
  const stacks = join(path, "stacks");
  const owners = existsSync(stacks) ? readdirSync(stacks).flatMap((name) => projectOf(join(stacks, name, "Pulumi.yaml"))) : [];
  return owners.length === 0 || owners.includes(project);
}

/** The name in the file that Pulumi's automation API writes beside a stack; none where there is no such file. */
function projectOf(path: string): readonly string[] {
  try {
    const settings: unknown = parse(readFileSync(path, "utf8"));
    return typeof settings === "object" && settings !== null && "name" in settings && typeof settings.name === "string"
      ? [settings.name]
      : [];
  } catch {
    // ENOENT or a YAML error: the stack was never opened, or whoever opened it was killed.
    return [];
  }
}

/** The journal goes last: until then, whoever is killed begins again. */
async function takeOver(path: string, own: string): Promise<void> {
  await using _ = await lockBatch(journalPlaces(path).lock);
  for (const name of ["plans", "stacks", "journal.ndjson"])
    if (existsSync(join(path, name))) await rename(join(path, name), join(own, name));
}

async function link(target: string, path: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const found = await lstat(path).catch(() => undefined);
  if (found?.isSymbolicLink() && (await readlink(path)) === target) return;
  await rm(path, { recursive: true, force: true });
  await symlink(target, path);
}
