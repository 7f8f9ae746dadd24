/** `node scripts/rules.ts` writes the page of rules, docs/rules.md, from the rules themselves. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { renderRulesPage } from "./rules/page.ts";

await writeFile(join(import.meta.dirname, "../docs/rules.md"), renderRulesPage());
