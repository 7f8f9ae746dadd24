/** What tests of the preflight share: a deployment of its own over real hosts, whose log lines can be read. */
import { type DiskInputs, type DiskState, importedDisk } from "../../../provider/resources/imported-disk.ts";
import type { CheckFailure, Context } from "../../../provider/resources/resource.ts";
import type { MachineInputs } from "../../../provider/resources/virtual-machine-spec.ts";
import { type MachineState, virtualMachine } from "../../../provider/resources/virtual-machine.ts";
import { createOwnHosts } from "../../host/setup.ts";

export interface Desk extends AsyncDisposable {
  readonly context: Context;
  /** `level: text`, as they came. */
  readonly lines: readonly string[];
  /** `olds` are the inputs of the disk that exists. */
  checkDisk(
    name: string,
    args: object,
    olds?: DiskInputs,
  ): Promise<{ readonly inputs: DiskInputs; readonly failures: readonly CheckFailure[] }>;
  /** `olds` are the inputs of the machine that exists. */
  checkMachine(
    name: string,
    args: object,
    olds?: MachineInputs,
  ): Promise<{ readonly inputs: MachineInputs; readonly failures: readonly CheckFailure[] }>;
  createDisk(inputs: DiskInputs): Promise<DiskState>;
  deleteDisk(state: DiskState): Promise<void>;
  createMachine(inputs: MachineInputs): Promise<MachineState>;
  updateMachine(state: MachineState, news: MachineInputs): Promise<MachineState>;
}

/** Opens a deployment. `config` is the stack's configuration by full key; `host` is declared of every resource. */
export function openDesk(host: unknown, config: Readonly<Record<string, string>> = {}): Desk {
  const hosts = createOwnHosts();
  const lines: string[] = [];
  const context: Context = {
    config: (key) => config[key],
    log: (level, text) => void lines.push(`${level}: ${text}`),
    signal: new AbortController().signal,
    hosts,
  };
  const declare = (name: string, args: object) => ({ host, origin: `acme/shop/prod/${name}`, ...args });
  return {
    context,
    lines,
    checkDisk: (name, args, olds) => importedDisk.check(context, olds, declare(name, args)),
    checkMachine: (name, args, olds) => virtualMachine.check(context, olds, declare(name, args)),
    createDisk: async (inputs) => (await importedDisk.create(context, inputs)).state,
    deleteDisk: (state) => importedDisk.delete(context, state.diskId, state),
    createMachine: async (inputs) => (await virtualMachine.create(context, inputs)).state,
    updateMachine: (state, news) => virtualMachine.update(context, state.uuid, state, news),
    [Symbol.asyncDispose]: () => hosts.close(),
  };
}

/** The ids of the rules that the failures are of, in order. */
export function rulesOf(failures: readonly CheckFailure[]): readonly string[] {
  return failures.map(({ reason }) => /\((virtlift\/[a-z0-9-]+)\)$/.exec(reason)?.[1] ?? reason);
}

/** Settings that waive the rules. */
export function waive(...rules: readonly string[]): { readonly preflight: object } {
  return { preflight: Object.fromEntries(rules.map((rule) => [rule, { level: "warn", reason: "a test looks at what happens then" }])) };
}
