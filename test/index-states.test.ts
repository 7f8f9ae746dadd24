/** States as released versions stored them: each must be understood for ever, and none may ask for a replacement by itself. */
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { importedDisk, virtualMachine } from "../provider/index.ts";
import type { Handler, Properties } from "../provider/wire.ts";

const fixtures = join(import.meta.dirname, "fixtures");
const HANDLERS: Readonly<Record<string, Handler>> = {
  "pulumi-nodejs:dynamic/virtlift:ImportedDisk": importedDisk,
  "pulumi-nodejs:dynamic/virtlift:VirtualMachine": virtualMachine,
};

/** As `pulumi stack export` shows a resource. */
interface Stored {
  readonly type: string;
  readonly id: string;
  readonly inputs: Properties;
  readonly outputs: Properties;
}

const files = globSync("state-v*.json", { cwd: fixtures }).toSorted();

test.for(files)("%s differs in nothing from its own inputs", async (file) => {
  const { type, id, inputs, outputs } = JSON.parse(readFileSync(join(fixtures, file), "utf8")) as Stored;
  expect(await HANDLERS[type]?.diff(id, outputs, inputs)).toEqual({ changes: false });
});
