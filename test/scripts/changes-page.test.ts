import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { VirtualMachineSchema } from "../../provider/resources/virtual-machine-schema.ts";
import { CHANGES_PAGE, renderChangesPage } from "../../scripts/changes-page.ts";

test("the page of changes is what the table says, and names every property that a machine has", async () => {
  const page = await readFile(CHANGES_PAGE, "utf8");
  expect(page).toBe(renderChangesPage());
  const missing = Object.keys(VirtualMachineSchema.shape).filter((property) => !page.includes(`\n| \`${property}\` | `));
  expect(missing).toEqual(["origin"]);
});
