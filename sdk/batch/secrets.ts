/** Secrets, from where the manifest says that they are: they are in no manifest, no message and no argument. */
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import type { SecretPlace } from "./job.ts";

/** Where environment variables and relative paths are looked up. */
export interface SecretScope {
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** The manifest's folder. */
  readonly folder: string;
}

/** Reads the secret from the environment or the file. Throws Error naming the place when there is none. */
export function readSecret(place: SecretPlace, { environment, folder }: SecretScope): string {
  const secret = "env" in place ? environment[place.env] : readFileSync(resolve(folder, place.file), "utf8").replace(/\r?\n$/, "");
  if (secret === undefined || secret === "")
    throw new Error(
      "env" in place
        ? `the environment variable ${place.env} is to hold a secret, and is not set`
        : `${place.file} is to hold a secret, and is empty`,
    );
  return secret;
}
