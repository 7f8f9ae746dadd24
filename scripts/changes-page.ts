/** Writes `docs/changes.md`, what a change of each property of a machine takes, from the table that diff and update go by: `node scripts/changes-page.ts`. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { DERIVED, MACHINE_CHANGES } from "../provider/resources/virtual-machine-changes.ts";
import type { MachineInputs } from "../provider/resources/virtual-machine-spec.ts";

/** Where the page lies. */
export const CHANGES_PAGE = join(import.meta.dirname, "../docs/changes.md");

const TITLES = { live: "live", restart: "restart", replace: "**replace**", refused: "**refused**" } as const;

/** The page, with every property of a machine that a user can declare. */
export function renderChangesPage(): string {
  const rows = Object.entries(MACHINE_CHANGES)
    .filter(([property]) => property !== "origin" && !DERIVED.has(property as keyof MachineInputs))
    .flatMap(([property, { cases }]) =>
      cases.map(
        ({ what, effect, why = "" }, index) =>
          `| ${index === 0 ? `\`${property}\`` : ""} | ${what || "any"} | ${TITLES[effect]} | ${why} |`,
      ),
    );
  return `<!-- Written by scripts/changes-page.ts: change provider/resources/virtual-machine-changes.ts and run it again. -->
# What a change of a machine takes

- **live**: at once, whether the guest runs or not.
- **restart**: at the guest's next start. A running guest is never restarted without consent: \`onRestartRequired: "restart"\` restarts it, \`"defer"\` leaves
  the change for its next start (the output \`restartPending\` says so), and \`"fail"\`, the default, refuses the change in preview.
- **replace**: by another machine in its place. Its own disks go with the old one; imported disks stay.
- **refused**: in preview, with the reason. Nothing is changed.

When a live change fails, what was done before it is taken back, and the old definition stands again. A device that the guest does not let go within 20
seconds stays until its next start, with a warning.

Deleting a machine asks its guest to shut down, and cuts its power when it has not after \`shutdownTimeoutSeconds\`, with a warning:
\`onShutdownTimeout\` is for changes and restarts.

| property | change | takes | why |
| --- | --- | --- | --- |
${rows.join("\n")}
`;
}

if (import.meta.main) await writeFile(CHANGES_PAGE, renderChangesPage());
