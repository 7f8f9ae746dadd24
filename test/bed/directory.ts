/** Folders that live as long as a test. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface TemporaryDirectory extends AsyncDisposable {
  /** Absolute. */
  readonly path: string;
}

/** Makes a folder under the system's temporary folder, readable for its owner only; it is removed with all that is in it on dispose. */
export async function openDirectory(purpose = "test"): Promise<TemporaryDirectory> {
  const path = await mkdtemp(join(tmpdir(), `virtlift-${purpose}-`));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}
