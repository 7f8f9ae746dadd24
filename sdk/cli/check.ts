/** `virtlift check`: what stands in the way of an image or a package, without any program. */
import { stdout } from "node:process";
import { formatTable, printable } from "../batch/words.ts";
import { loadProvider } from "../provider.ts";
import { type Command, parseCommand, UsageError } from "./command.ts";

const EXIT_CODES = { ok: 0, warn: 1, block: 2 } as const;

export const check: Command = {
  name: "check",
  usage: "check <file.ova|.ovf|.vmx|.zip|.vmdk|...> --host <libvirt URI> [--pool <pool>] [--network <network>] [--json]",
  summary:
    "Says what would be done with an image or a package on the host, and what stands in the way; changes nothing. Exit code: 0 fine, 1 warnings, 2 it would fail.",
  async run(argv) {
    const options = { host: { type: "string" }, pool: { type: "string" }, network: { type: "string" }, json: { type: "boolean" } } as const;
    const { values, positionals } = parseCommand(argv, options, ["<file>"]);
    const { host, pool, network, json } = values;
    if (host === undefined) throw new UsageError("give the host: --host qemu:///system");
    await using tools = await loadProvider().openToolbox();
    const report = await tools.checkSource({ path: positionals[0]!, host, pool, network });
    if (json === true) stdout.write(`${JSON.stringify(report, undefined, 2)}\n`);
    else {
      for (const line of report.plan) stdout.write(`${printable(line)}\n`);
      const rows = report.findings.map(({ level, resource, reason }) => [level, resource, printable(reason)]);
      stdout.write(rows.length === 0 ? "nothing stands in the way\n" : `${formatTable(["level", "what", "finding"], rows).join("\n")}\n`);
    }
    return EXIT_CODES[report.verdict];
  },
};
