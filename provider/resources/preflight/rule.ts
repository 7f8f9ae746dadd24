/** What a rule of the preflight is, how rules are judged, and how users change their levels. Pure: facts come in, judgements go out. */
import { z } from "zod";

/** `block` fails the preview, `warn` and `info` are said in it. */
export type Level = "block" | "warn" | "info";

/** What a rule found. `property` is the user's own name with its path (`networks[0].mac`), `sentence` says what is wrong, where, and what to do. */
export interface Finding {
  readonly property: string;
  readonly sentence: string;
}

/** A question to the facts. */
export interface Rule<Facts> {
  /** `virtlift/` and words with dashes; it never changes its meaning. */
  readonly id: string;
  readonly level: Level;
  /** Whether it must stay a block: without what it asks for nothing can be planned, or another property gives the consent. Default false. */
  readonly isFixed?: true;
  /** What it finds, for the page of rules. */
  readonly summary: string;
  /** What to do about it, for the page of rules. */
  readonly remedy: string;
  /** Pure: neither the world nor a clock. Empty when all is well. */
  readonly test: (facts: Facts) => readonly Finding[];
}

/** A finding with the level that holds for it. */
export interface Judgement {
  readonly rule: string;
  readonly level: Level;
  readonly property: string;
  /** One sentence that begins with the property and ends with the rule's id in parentheses. */
  readonly reason: string;
  /** Why the user made it less, or more, than the rule itself says; undefined where nobody did. */
  readonly waiver?: string | undefined;
  /** Whether the user waived it altogether; its level is then `info`. */
  readonly isWaived: boolean;
}

/** What users say about rules, by their ids. */
export const PreflightSchema = z.record(
  z.string().regex(/^virtlift\/[a-z0-9-]+$/, 'a rule\'s id is such as "virtlift/mac-taken": docs/rules.md lists them'),
  z.strictObject({
    /** The level that the rule is to have. Default: none, it is waived altogether. */
    level: z.enum(["block", "warn", "info"]).optional(),
    /** Why: it is kept, and said whenever the rule would have spoken. */
    reason: z.string().trim().min(1, "say why the rule is changed").max(500),
  }),
);
export type PreflightSettings = z.output<typeof PreflightSchema>;

/** Asks every rule, in their order. Settings of fixed rules do not count. */
export function judge<Facts>(rules: readonly Rule<Facts>[], facts: Facts, settings: PreflightSettings): readonly Judgement[] {
  return rules.flatMap((rule) => rule.test(facts).map((finding) => judgementOf(rule, finding, settings)));
}

/** The judgement of a finding that was not made by a test. */
export function judgementOf(
  { id, level, isFixed }: Pick<Rule<never>, "id" | "level" | "isFixed">,
  { property, sentence }: Finding,
  settings: PreflightSettings,
): Judgement {
  const setting = isFixed ? undefined : settings[id];
  return {
    rule: id,
    level: setting === undefined ? level : (setting.level ?? "info"),
    property,
    reason: `${property}: ${sentence} (${id})`,
    ...(setting !== undefined && { waiver: setting.reason }),
    isWaived: setting !== undefined && setting.level === undefined,
  };
}
