/** Where the rules meet the resources: whose settings hold, what is said, and what fails. */
import type { CheckFailure, Context } from "../resource.ts";
import { deploymentOf } from "./deployment.ts";
import { judge, type Judgement, PreflightSchema, type PreflightSettings } from "./rule.ts";
import { RULES } from "./rules.ts";
import { TROUBLE_RULES } from "./trouble-rules.ts";

/** The resource that is judged. */
export interface Subject {
  readonly origin: string;
  /** What log lines call it. */
  readonly name: string;
}

/** The settings that hold for a resource, its own before the stack's (`virtlift:preflight`), and what is wrong with them. */
export function settingsOf(
  context: Context,
  own: PreflightSettings | undefined,
): { readonly settings: PreflightSettings; readonly failures: readonly CheckFailure[] } {
  const stack = stackSettings(context);
  const ownFailures = Object.keys(own ?? {}).flatMap((id) => settingFailure("preflight", id));
  const stackFailures = Object.keys(stack.settings).flatMap((id) =>
    settingFailure("preflight", id, "the configuration virtlift:preflight names "),
  );
  return { settings: { ...stack.settings, ...own }, failures: [...stack.failures, ...stackFailures, ...ownFailures] };
}

function stackSettings(context: Context): { readonly settings: PreflightSettings; readonly failures: readonly CheckFailure[] } {
  const configured = context.config("virtlift:preflight");
  if (configured === undefined) return { settings: {}, failures: [] };
  const fail = (words: string) => ({
    settings: {},
    failures: [{ property: "preflight", reason: `preflight: the configuration virtlift:preflight ${words}` }],
  });
  let parsed: unknown;
  try {
    parsed = JSON.parse(configured);
  } catch {
    return fail('is no JSON: it is {"virtlift/<rule>": {"level": "warn", "reason": "..."}}');
  }
  const result = PreflightSchema.safeParse(parsed);
  return result.success ? { settings: result.data, failures: [] } : fail(`is not right: ${result.error.issues[0]?.message}`);
}

function settingFailure(property: string, id: string, start = ""): readonly CheckFailure[] {
  const rule = RULES.find((each) => each.id === id);
  if (rule === undefined) return [{ property, reason: `${property}: ${start}${id}, and there is no such rule: docs/rules.md lists them` }];
  if (!rule.isFixed) return [];
  return [{ property, reason: `${property}: ${start}${id}, which cannot be changed: ${rule.remedy}` }];
}

/** What keeps a check from going on, as judgements. Throws the error on when no rule knows it: it is nobody's to mend. */
export function judgeTrouble(error: unknown): readonly Judgement[] {
  const judgements = judge(TROUBLE_RULES, { error }, {});
  if (judgements.length === 0) throw error;
  return judgements;
}

/** Says what warns and informs, in lines that name the resource, each once; remembers all; returns what fails. */
export function conclude(context: Context, { origin, name }: Subject, judgements: readonly Judgement[]): readonly CheckFailure[] {
  const deployment = deploymentOf(context.hosts);
  deployment.remember(origin, judgements);
  for (const { level, reason, waiver, isWaived } of judgements) {
    if (level === "block") continue;
    const change = waiver === undefined ? "" : isWaived ? `; waived: ${waiver}` : `; no block: ${waiver}`;
    tell(context, level, `${name}: ${reason}${change}`);
  }
  return judgements.filter(({ level }) => level === "block").map(({ property, reason }) => ({ property, reason }));
}

/** Logs a line that a second check of the same resource does not repeat. */
export function tell(context: Context, level: "info" | "warn", line: string): void {
  if (deploymentOf(context.hosts).isNew(line)) context.log(level, line);
}
