/** Secrets, from where the manifest says that they are: they are in no manifest, no message and no argument. */
import { readFileSync } from "node:fs";
import type { SecretPlace } from "./job.ts";

/** Reads the secret, from this process's environment or the file. Throws Error naming the place when there is none. */
export function readSecret(place: SecretPlace): string {
  const secret = "env" in place ? process.env[place.env] : readFileSync(place.file, "utf8").replace(/\r?\n$/, "");
  if (secret === undefined || secret === "")
    throw new Error(
      "env" in place
        ? `the environment variable ${place.env} is to hold a secret, and is not set`
        : `${place.file} is to hold a secret, and is empty`,
    );
  return secret;
}
