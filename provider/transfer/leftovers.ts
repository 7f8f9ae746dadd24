/** What interrupted imports left on a host: parts that a next run goes on with, or that somebody clears away. */
import { posix } from "node:path";
import type { Host } from "../host/hosts.ts";
import { WORK_FOLDER } from "./part-file.ts";

const LIST = `
for part in "$1"/*.part; do
  [ -f "$part" ] || continue
  state=stale
  flock -n "\${part%.part}.lock" true || state=writing
  stat -c "%b %Y $state %n" -- "$part"
done
`;

/** Under the lock, so that a writer who came in between keeps his part. The stamp of a part that has its final name already is the volume's. */
const REMOVE = `
stamp=$1/$2.stamp
[ "$(stat -c %h -- "$1/$2.part")" = 1 ] || stamp=
flock -n "$1/$2.lock" rm -f -- "$1/$2.part" "$1/$2.journal" "$1/$2.guest" "$1/$2.log" "$1/$2.source" "$1/$2.source.etag" \${stamp:+"$stamp"} || exit 75
rm -f -- "$1/$2.lock"
rmdir -- "$1" 2>/dev/null
exit 0
`;

/** A part file in the work folder of a pool. */
export interface Leftover {
  /** The import's id. */
  readonly id: string;
  readonly path: string;
  readonly allocatedBytes: number;
  /** Last written, in seconds since 1970. */
  readonly modifiedSeconds: number;
  /** Whether an import is writing it right now. */
  readonly isWriting: boolean;
}

/** The parts under a pool's folder. Changes nothing but makes sure of each part's lock file. */
export async function listLeftovers(host: Host, folder: string): Promise<readonly Leftover[]> {
  const { stdout } = await host.run(["sh", "-c", LIST, "virtlift", posix.join(folder, WORK_FOLDER)]);
  return stdout
    .toString("utf8")
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [blocks, modified, state, ...name] = line.split(" ");
      const path = name.join(" ");
      return {
        id: posix.basename(path, ".part"),
        path,
        allocatedBytes: Number(blocks) * 512,
        modifiedSeconds: Number(modified),
        isWriting: state === "writing",
      };
    });
}

/** Removes a part that nobody writes. Throws CommandError when somebody does by now. */
export async function removeLeftover(host: Host, leftover: Pick<Leftover, "id" | "path">): Promise<void> {
  await host.run(["sh", "-c", REMOVE, "virtlift", posix.dirname(leftover.path), leftover.id]);
}
