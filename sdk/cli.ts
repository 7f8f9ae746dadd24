#!/usr/bin/env node
/** The command `virtlift`. Each command is a file in `cli/`; this one finds it. */
import { argv, exit, stderr, stdout, versions } from "node:process";
import { batchCommands } from "./cli/batch.ts";
import { check } from "./cli/check.ts";
import { clean } from "./cli/clean.ts";
import { type Command, UsageError } from "./cli/command.ts";
import { schema } from "./cli/schema.ts";

const COMMANDS: readonly Command[] = [...batchCommands, check, clean, schema];

const HELP = `virtlift brings virtual machines home to libvirt/KVM.

${COMMANDS.map(({ usage, summary }) => `  virtlift ${usage}\n      ${summary}`).join("\n")}

Exit codes: 0 all is well; 1 something failed or may not start; 2 the command or the manifest is wrong; 130 interrupted.
`;

/** As `engines` in package.json says: older ones lack what the commands load. */
const OLDEST_NODE = [22, 18] as const;

async function main([name, ...rest]: readonly string[]): Promise<number> {
  const [major = 0, minor = 0] = versions.node.split(".").map(Number);
  if (major < OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor < OLDEST_NODE[1])) {
    stderr.write(`virtlift: Node ${OLDEST_NODE.join(".")} or newer is needed, and this is ${versions.node}\n`);
    return 2;
  }
  if (name === undefined || name === "help" || name === "--help" || name === "-h") {
    stdout.write(HELP);
    return name === undefined ? 2 : 0;
  }
  const command = COMMANDS.find((each) => each.name === name);
  if (command === undefined) {
    stderr.write(`virtlift: there is no command ${name}: it is one of ${COMMANDS.map((each) => each.name).join(", ")}\n`);
    return 2;
  }
  try {
    return await command.run(rest);
  } catch (error) {
    if (error instanceof UsageError) {
      stderr.write(`virtlift: ${error.message}\nusage: virtlift ${command.usage}\n`);
      return 2;
    }
    stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
    return error instanceof Error && error.name === "ManifestError" ? 2 : 1;
  }
}

exit(await main(argv.slice(2)));
