/**
 * An inline Automation program in a process of its own: argv is a command of the stack, the host's URI, the source file, the file for the
 * serial console, and the machine's title.
 * Prints the stack's outputs and the operation's summary as one line of JSON.
 */
import { argv, env, stdout } from "node:process";
import { LocalWorkspace, PulumiCommand } from "@pulumi/pulumi/automation/index.js";
import { ImportedDisk, VirtualMachine } from "virtlift";

const [, , command = "", host = "", file = "", serialLog = "", title = ""] = argv;
const stack = await LocalWorkspace.createOrSelectStack(
  {
    stackName: "test",
    projectName: "inline",
    program: async () => {
      const disk = new ImportedDisk("root", { host, source: { file } });
      const machine = new VirtualMachine("web", {
        importedDisk: disk,
        memoryMiB: 256,
        domainType: "qemu",
        networks: [],
        // That the guest boots is seen once; later it is cut off before it could shut down.
        ...(title === "first" ? { waitFor: [{ type: "serial" as const, text: "virtlift-guest done" }] } : { shutdownTimeoutSeconds: 1 }),
        serialLog,
        title,
      });
      return { path: disk.path, uuid: machine.uuid };
    },
  },
  { pulumiCommand: await PulumiCommand.get({}), envVars: { PULUMI_BACKEND_URL: env["PULUMI_BACKEND_URL"] ?? "" } },
);

async function run(): Promise<unknown> {
  switch (command) {
    case "preview":
      return (await stack.preview()).changeSummary;
    case "up":
      return (await stack.up()).summary.resourceChanges;
    case "refresh":
      return (await stack.refresh()).summary.resourceChanges;
    case "destroy":
      return (await stack.destroy()).summary.resourceChanges;
    default:
      throw new Error(`${command} is no command`);
  }
}

const changes = await run();
const outputs = Object.entries(await stack.outputs()).map(([key, { value }]) => [key, value as unknown]);
stdout.write(`${JSON.stringify({ changes, outputs: Object.fromEntries(outputs) as unknown })}\n`);
