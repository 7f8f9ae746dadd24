/** Whether the documentation on the schemas' keys reaches who writes a program: asked of TypeScript's own language service, as editors do. */
import { join } from "node:path";
import ts from "typescript";
import { expect, test } from "vitest";

const root = join(import.meta.dirname, "../..");
const fileName = join(root, "test/sdk/program-in-memory.ts");

/** What an editor shows on the last occurrence of each word in a program, by word. */
function hover(program: string, words: readonly string[]): Readonly<Record<string, string>> {
  const { options } = ts.parseJsonConfigFileContent(
    ts.readConfigFile(join(root, "tsconfig.json"), (path) => ts.sys.readFile(path)).config,
    ts.sys,
    root,
  );
  const service = ts.createLanguageService({
    useCaseSensitiveFileNames: () => true,
    readFile: (path) => ts.sys.readFile(path),
    directoryExists: (path) => ts.sys.directoryExists(path),
    getDirectories: (path) => ts.sys.getDirectories(path),
    realpath: (path) => ts.sys.realpath?.(path) ?? path,
    getCompilationSettings: () => options,
    getScriptFileNames: () => [fileName],
    getScriptVersion: () => "1",
    getScriptSnapshot(path) {
      const text = path === fileName ? program : ts.sys.readFile(path);
      return text === undefined ? undefined : ts.ScriptSnapshot.fromString(text);
    },
    getCurrentDirectory: () => root,
    getDefaultLibFileName: (settings) => ts.getDefaultLibFilePath(settings),
    fileExists: (path) => path === fileName || ts.sys.fileExists(path),
  });
  const diagnostics = service.getSemanticDiagnostics(fileName).map(({ messageText }) => ts.flattenDiagnosticMessageText(messageText, "\n"));
  expect(diagnostics).toEqual([]);
  return Object.fromEntries(
    words.map((word) => {
      const info = service.getQuickInfoAtPosition(fileName, program.lastIndexOf(word));
      return [word, ts.displayPartsToString(info?.documentation)];
    }),
  );
}

test("arguments and outputs of a disk are documented, nested ones too, and may be outputs", () => {
  const shown = hover(
    `import * as pulumi from "@pulumi/pulumi";
     import { ImportedDisk } from "../../sdk/index.ts";
     const later: pulumi.Output<string> = pulumi.output("qemu:///system");
     const flag: pulumi.Output<boolean> = pulumi.output(true);
     const format: pulumi.Input<"qcow2" | "raw"> = "raw";
     const disk = new ImportedDisk("disk", { host: { uri: later, fingerprint: later, sudo: flag }, source: { file: later }, capacity: later, format, checksum: undefined });
     export const size: pulumi.Output<number> = disk.virtualSizeBytes;
     export const layout: pulumi.Output<"sparse" | "compressed" | "full"> = disk.layout;`,
    ["fingerprint", "file: later", "capacity", "checksum", "virtualSizeBytes", "layout;"],
  );
  expect(shown).toEqual({
    fingerprint: expect.stringContaining("The only host key to accept"),
    "file: later": expect.stringContaining("Path of a disk image"),
    capacity: expect.stringContaining("Grow the disk to this size"),
    checksum: expect.stringContaining("Digest of the file that `source` names"),
    virtualSizeBytes: expect.stringContaining("as the guest sees it"),
    "layout;": expect.stringContaining("stores what is not zero"),
  });
});

test("a machine takes an imported disk wherever it takes a disk, and its arguments are documented", () => {
  const shown = hover(
    `import * as pulumi from "@pulumi/pulumi";
     import { ImportedDisk, VirtualMachine } from "../../sdk/index.ts";
     const disk = new ImportedDisk("disk", { source: { file: "disk.vmdk" } });
     const machine = new VirtualMachine("machine", {
       importedDisk: disk,
       disks: [{ disk, serial: "data" }, { size: "10GiB", name: "scratch" }],
       networks: [{ network: "default", mac: pulumi.output("52:54:00:12:34:56") }],
       vcpus: pulumi.output(2),
       tags: { owner: pulumi.output("me") },
     });
     new VirtualMachine("clone", { image: disk });
     new VirtualMachine("later", { importedDisk: pulumi.output(disk), disks: [Promise.resolve({ disk })] });
     new VirtualMachine("by hand", { importedDisk: { diskId: "web", host: "qemu:///system" } });
     export const addresses: pulumi.Output<readonly string[]> = machine.ipAddresses;`,
    ["serial", "mac:", "vcpus", "ipAddresses"],
  );
  expect(shown).toEqual({
    serial: expect.stringContaining("serial number that the guest reads"),
    "mac:": expect.stringContaining("52:54:00"),
    vcpus: expect.stringContaining("Default 1."),
    ipAddresses: expect.stringContaining("others can reach it"),
  });
});
