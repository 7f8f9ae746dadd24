/** Looks for files and programs. */
import { access } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { env } from "node:process";

/** Whether the path names something that we may look at. */
export async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

/** Absolute path of a program on PATH; undefined when there is none. */
export async function findExecutable(name: string, directories = (env["PATH"] ?? "").split(delimiter)): Promise<string | undefined> {
  for (const directory of directories) {
    const path = join(directory, name);
    if (directory !== "" && (await exists(path))) return path;
  }
  return undefined;
}
