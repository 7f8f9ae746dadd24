/** `virtlift clean`: what interrupted imports left on a host. */
import { stdout } from "node:process";
import { formatBytes, formatTable, printable } from "../batch/words.ts";
import { loadProvider } from "../provider.ts";
import { type Command, parseCommand, UsageError } from "./command.ts";

export const clean: Command = {
  name: "clean",
  usage: "clean --host <libvirt URI> [--remove]",
  summary: "Lists what interrupted imports left in the host's pools; --remove removes it, but for what is being written, and devices.",
  async run(argv) {
    const { values } = parseCommand(argv, { host: { type: "string" }, remove: { type: "boolean" } }, []);
    if (values.host === undefined) throw new UsageError("give the host: --host qemu:///system");
    await using tools = await loadProvider().openToolbox();
    const found = values.remove === true ? await tools.clearLeftovers(values.host) : await tools.findLeftovers(values.host);
    if (found.length === 0) {
      stdout.write(`nothing ${values.remove === true ? "to remove" : "is left over"} on ${values.host}\n`);
      return 0;
    }
    const rows = found.map(({ pool, path, allocatedBytes, modifiedSeconds, isWriting }) => [
      printable(pool),
      formatBytes(allocatedBytes),
      modifiedSeconds === undefined ? "?" : new Date(modifiedSeconds * 1000).toISOString(),
      values.remove === true ? "removed" : isWriting ? "being written" : modifiedSeconds === undefined ? "remove by hand" : "stale",
      printable(path),
    ]);
    stdout.write(`${formatTable(["pool", "size", "last written", "state", "path"], rows).join("\n")}\n`);
    if (found.some(({ isWriting, modifiedSeconds }) => values.remove !== true && !isWriting && modifiedSeconds !== undefined))
      stdout.write("what is stale is removed by --remove\n");
    return 0;
  },
};
