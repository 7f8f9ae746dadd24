/** What tests of machines share: a private libvirtd, and a context over real hosts whose log lines can be read. */
import type { Context } from "../../provider/resources/resource.ts";
import type { MachineInputs } from "../../provider/resources/virtual-machine-spec.ts";
import { virtualMachine } from "../../provider/resources/virtual-machine.ts";
import { type Libvirtd, type LibvirtdOptions, openLibvirtd } from "../bed/libvirtd.ts";
import { createOwnHosts } from "../host/setup.ts";

export interface MachineBench extends AsyncDisposable {
  readonly context: Context;
  /** What was logged so far, `level: text`. */
  readonly logged: readonly string[];
  /** The checked inputs. Throws with the reasons when check has failures. */
  checked(news: object, olds?: MachineInputs): Promise<MachineInputs>;
  /** The failures of check, `property` and `reason`, in order. */
  failures(news: object, olds?: MachineInputs): Promise<readonly { readonly property: string; readonly reason: string }[]>;
}

/** `config` is the stack's configuration by its full keys. */
export function openMachineBench(config: Readonly<Record<string, string>> = {}): MachineBench {
  const hosts = createOwnHosts();
  const logged: string[] = [];
  const context: Context = {
    config: (key) => config[key],
    log: (level, text) => void logged.push(`${level}: ${text}`),
    signal: new AbortController().signal,
    hosts,
  };
  return {
    context,
    logged,
    async checked(news, olds) {
      const { inputs, failures } = await virtualMachine.check(context, olds, news);
      if (failures.length > 0) throw new Error(failures.map(({ reason }) => reason).join("; "));
      return inputs;
    },
    failures: async (news, olds) => (await virtualMachine.check(context, olds, news)).failures,
    [Symbol.asyncDispose]: () => hosts.close(),
  };
}

export interface MachineFixtures {
  /** One for all tests of the file. */
  readonly libvirtd: Libvirtd;
  readonly desk: MachineBench;
}

type Fixture<Value> = (context: object, use: (value: Value) => Promise<void>) => Promise<void>;

/** A libvirtd and a bench, for `test.extend`. */
export function machineFixtures(options: LibvirtdOptions = { network: true }): {
  libvirtd: [Fixture<Libvirtd>, { scope: "file" }];
  desk: Fixture<MachineBench>;
} {
  return {
    libvirtd: [
      // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
      async ({}, use) => {
        await using libvirtd = await openLibvirtd(options);
        await use(libvirtd);
      },
      { scope: "file" },
    ],
    // oxlint-disable-next-line no-empty-pattern -- vitest reads the names of the fixtures from the pattern
    desk: async ({}, use) => {
      await using desk = openMachineBench();
      await use(desk);
    },
  };
}
