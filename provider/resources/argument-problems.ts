/** What is wrong with arguments by themselves: for those who declare them in a file and want to say where in it. */
import { z } from "zod";
import { ImportedDiskSchema, SourceSchema } from "./schema.ts";
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
  VirtualMachine: VirtualMachineSchema.omit({ host: true, name: true, importedDisk: true, image: true, origin: true }).partial(),
} as const;

/**
 * Of some of a resource's arguments, what is not given is not missed; of a `MachineSource`, where a machine with all its disks comes from, all of it.
 * Knows no host: whether it has what they name shows in preview.
 */
export function argumentProblems(resource: keyof typeof SCHEMAS | "MachineSource", given: unknown): readonly ArgumentProblem[] {
  if (resource === "MachineSource") return machineSourceProblems(given);
  return problemsOf(SCHEMAS[resource], given, () => `it is nothing that ${resource} has here: remove it or mend its name`);
}

/** The packages that make a machine whole, by the key of each, then the sources of one disk. */
const MACHINE_SOURCES: ReadonlyMap<string, z.ZodType> = new Map<string, z.ZodType>([
  ["ova", z.strictObject({ ova: z.string().min(1) })],
  ["vmx", z.strictObject({ vmx: z.string().min(1) })],
  ...SourceSchema.options.flatMap((option): [string, z.ZodType][] => {
    const [kind = ""] = Object.keys(option.shape);
    return kind === "ova" ? [] : [[kind, option]];
  }),
]);

function machineSourceProblems(given: unknown): readonly ArgumentProblem[] {
  const keys = Object.keys(Object(given) as object);
  const kinds = keys.filter((key) => MACHINE_SOURCES.has(key));
  const [kind = ""] = kinds;
  const schema = MACHINE_SOURCES.get(kind);
  if (schema === undefined || kinds.length > 1) {
    const known = [...MACHINE_SOURCES.keys()].map((each) => `{ ${each} }`).join(", ");
    return [{ path: keys.length === 1 ? keys : [], message: `a source is exactly one of ${known}, got { ${keys.join(", ")} }` }];
  }
  return problemsOf(schema, given, (key) =>
    kind === "ova" && key === "disk"
      ? "a machine has all disks of its package: leave one out by `disks` beside `source`"
      : `it does not go with { ${kind} }: remove it or mend its name`,
  );
}

function problemsOf(schema: z.ZodType, given: unknown, sayUnknown: (key: string) => string): readonly ArgumentProblem[] {
  return (schema.safeParse(given).error?.issues ?? []).flatMap((issue): readonly ArgumentProblem[] => {
    const path = issue.path.map((key) => (typeof key === "number" ? key : String(key)));
    return issue.code === "unrecognized_keys"
      ? issue.keys.map((key) => ({ path: [...path, key], message: sayUnknown(key) }))
      : [{ path, message: issue.message }];
  });
}
