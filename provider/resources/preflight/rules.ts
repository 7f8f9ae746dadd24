/** Every rule, in the order of the page that is made of them. */
import { ARGUMENT_RULES, BOOT_RULES, COMBINATION_RULES, HOST_RULES } from "./argument-rules.ts";
import { DISK_CHANGE_RULES, MACHINE_CHANGE_RULES } from "./change-rules.ts";
import { DISK_RULES } from "./disk-rules.ts";
import { MACHINE_RULES } from "./machine-rules.ts";
import { PACKAGE_RULES } from "./package-rules.ts";
import type { Rule } from "./rule.ts";
import { TROUBLE_RULES } from "./trouble-rules.ts";

/** What a rule is, without what it looks at. */
export type RuleText = Omit<Rule<never>, "test">;

/** The rules by what they look at. */
export const CHAPTERS: readonly { readonly title: string; readonly rules: readonly RuleText[] }[] = [
  { title: "Before anything else", rules: [...ARGUMENT_RULES, ...HOST_RULES, ...BOOT_RULES, ...COMBINATION_RULES, ...TROUBLE_RULES] },
  { title: "Disks: the source and its place", rules: DISK_RULES },
  { title: "Machines: the host and the guest", rules: [...MACHINE_RULES, ...PACKAGE_RULES] },
  { title: "Changes of what exists", rules: [...DISK_CHANGE_RULES, ...MACHINE_CHANGE_RULES] },
];

export const RULES: readonly RuleText[] = CHAPTERS.flatMap(({ rules }) => rules);
