/** `virtlift schema`: the JSON Schema of manifests, for editors. */
import { stdout } from "node:process";
import { manifestJsonSchema } from "../batch/manifest.ts";
import { type Command, parseCommand } from "./command.ts";

export const schema: Command = {
  name: "schema",
  usage: "schema",
  summary: "Prints the JSON Schema of manifests, for editors.",
  async run(argv) {
    parseCommand(argv, {}, []);
    stdout.write(`${JSON.stringify(manifestJsonSchema(), null, 2)}\n`);
    return 0;
  },
};
