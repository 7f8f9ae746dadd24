/** The page of rules as Markdown. */
import { CHAPTERS, type RuleText } from "../../provider/resources/preflight/rules.ts";

const INTRODUCTION = `# What preview knows

Made from the rules themselves by \`node scripts/rules.ts\`.

\`pulumi preview\` and \`pulumi up\` ask these questions before anything is copied, and \`virtlift check <file> --host <URI>\` asks them without a program.
What is found ends in the rule's id. A **block** fails the preview, with all findings of the resource at once; **warn** and **info** are lines in it.

Where you know better, change a rule for one resource, with a reason that is kept in the state:

\`\`\`ts
new VirtualMachine("web", {
  importedDisk: disk,
  bus: "virtio",
  preflight: { "virtlift/guest-driver": { level: "warn", reason: "virtio drivers are installed since March" } },
});
\`\`\`

Without a \`level\` the rule is waived altogether. For a whole stack: \`pulumi config set virtlift:preflight '{"virtlift/no-checksum": {"reason": "..."}}'\`;
a resource's own word counts before the stack's. A rule marked *fixed* cannot be changed: without what it asks for nothing could be planned, or another
argument gives the consent.
`;

export function renderRulesPage(): string {
  const chapters = CHAPTERS.map(
    ({ title, rules }) => `## ${title}\n\n| rule | level | what it finds | what to do |\n|---|---|---|---|\n${rules.map(row).join("")}`,
  );
  return `${INTRODUCTION}\n${chapters.join("\n")}`;
}

function row({ id, level, isFixed, summary, remedy }: RuleText): string {
  return `| \`${id}\` | ${level}${isFixed ? ", *fixed*" : ""} | ${cell(summary)} | ${cell(remedy)} |\n`;
}

function cell(text: string): string {
  return text.replaceAll("|", "\\|");
}
