/** What is wrong with arguments by themselves: for those who declare them in a file and want to say where in it. */
import type { z } from "zod";
import { ImportedDiskSchema } from "./schema.ts";
import { VirtualMachineSchema } from "./virtual-machine-schema.ts";

/** Plain JSON. */
export interface ArgumentProblem {
  /** Keys and places in lists, from the arguments down. Of a key that does not exist it is the last. */
  readonly path: readonly (string | number)[];
  /** One sentence; it does not name the path. */
  readonly message: string;
}

const SCHEMAS = {
  ImportedDisk: ImportedDiskSchema.omit({ host: true, source: true, origin: true }).partial(),
  VirtualMachine: VirtualMachineSchema.omit({ host: true, importedDisk: true, image: true, origin: true }).partial(),
} as const;

/** Of some of a resource's arguments; what is not given is not missed. Knows no host: whether it has what they name shows in preview. */
export function argumentProblems(resource: keyof typeof SCHEMAS, given: unknown): readonly ArgumentProblem[] {
  const schema: z.ZodType = SCHEMAS[resource];
  return (schema.safeParse(given).error?.issues ?? []).map((issue) => {
    const path = issue.path.map((key) => (typeof key === "number" ? key : String(key)));
    return issue.code === "unrecognized_keys"
      ? { path: [...path, issue.keys[0] ?? ""], message: `it is nothing that ${resource} has here: remove it or mend its name` }
      : { path, message: issue.message };
  });
}
