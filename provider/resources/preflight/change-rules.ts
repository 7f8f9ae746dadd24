/** The rules about a change of what exists: it is refused where it would take something that the user did not say yes to. Pure. */
import type { Rule } from "./rule.ts";

/** What a changed declaration does to a disk that exists. */
export interface DiskChange {
  readonly diskId: string;
  /** Absolute path on the host. */
  readonly path: string;
  /** The properties that make it another disk. */
  readonly changed: readonly string[];
  /** Whether the changed disk would lie under the same name. */
  readonly isSameName: boolean;
  /** Whether a guest wrote to the old one, and the user did not say that it may go. */
  readonly losesWrites: boolean;
}

export const DISK_CHANGE_RULES: readonly Rule<DiskChange>[] = [
  {
    id: "virtlift/name-reused",
    level: "block",
    isFixed: true,
    summary: "A changed declaration would put another disk under the name of the one that exists, which is never overwritten.",
    remedy: "Give the changed disk another `name`, or none: it then gets one of its own.",
    test: ({ diskId, isSameName }) =>
      isSameName
        ? [
            {
              property: "name",
              sentence: `${diskId} was imported from another declaration, which is never overwritten: give the changed disk another \`name\``,
            },
          ]
        : [],
  },
  {
    id: "virtlift/written-since-import",
    level: "block",
    isFixed: true,
    summary: "A changed declaration would replace a disk by a fresh copy of its source, and a guest wrote to it since its import.",
    remedy: "Undo the change, or set `replaceWritten: true` to let what was written go.",
    test: ({ path, changed, isSameName, losesWrites }) =>
      losesWrites && !isSameName
        ? [
            {
              property: changed[0] ?? "source",
              sentence: `${path} was written since its import, and a changed ${changed.join(", ")} would replace it by a fresh copy of the source: undo the change, or set \`replaceWritten: true\` to let what was written go`,
            },
          ]
        : [],
  },
];

/** What a changed declaration does to a machine that exists. */
export interface ChangedMachine {
  readonly name: string;
  /** What no machine can take: the user's path to it, and why. */
  readonly refused: readonly { readonly path: string; readonly why?: string | undefined }[];
  /** Properties that a running guest cannot take, when it runs and no consent to a restart is given. */
  readonly restart: readonly string[];
}

export const MACHINE_CHANGE_RULES: readonly Rule<ChangedMachine>[] = [
  {
    id: "virtlift/change-refused",
    level: "block",
    isFixed: true,
    summary: "A change that no machine can take: a disk that is to shrink.",
    remedy: "Undo the change, declare the size that the disk has by now, or give another disk another `name`.",
    test: ({ name, refused }) =>
      refused.map(({ path, why }) => ({
        property: path,
        sentence: `${name} cannot take this change: ${why}: declare the size that it has by now, or another disk`,
      })),
  },
  {
    id: "virtlift/restart-needed",
    level: "block",
    isFixed: true,
    summary: "The guest runs, and the change takes effect at its next start only.",
    remedy: 'Set `onRestartRequired` to "restart" or "defer", or shut it down first.',
    test: ({ name, restart }) => restart.map((property) => ({ property, sentence: restartRefusal(name) })),
  },
];

/** Why a change waits for a restart that nobody consented to. */
export function restartRefusal(name: string): string {
  return `${name} is running, and this changes at its next start only: set \`onRestartRequired\` to "restart" or "defer", or shut it down first`;
}
