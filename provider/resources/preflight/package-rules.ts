/** The rules about a package by itself, which no resource is: only `virtlift check` judges them; programs tell the same in log lines. Pure. */
import type { MachineDescription } from "../machine-description.ts";
import type { Rule } from "./rule.ts";

export const PACKAGE_RULES: readonly Rule<Pick<MachineDescription, "notes">>[] = [
  {
    id: "virtlift/package-note",
    level: "info",
    summary:
      "What is to be known of the machine in a package, above all what does not come along. Said by `virtlift check`; programs log it.",
    remedy: "Look whether the guest can do without it.",
    test: ({ notes }) => notes.map((sentence) => ({ property: "source", sentence })),
  },
];
