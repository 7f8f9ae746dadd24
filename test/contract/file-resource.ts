/** A resource as small as one can be and still be real: a text file with a seal beside it. What the adapter promises is proved on it. */
import { rmSync } from "node:fs";
import { readFile, rm, stat, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { Calls } from "../../provider/engine.ts";
import { LibvirtError } from "../../provider/errors.ts";
import type { Hosts } from "../../provider/host/hosts.ts";
import { type Context, Incomplete, type PropertyChange, type Resource } from "../../provider/resources/resource.ts";
import { UNKNOWN } from "../../provider/resources/unknown.ts";
import { type Handler, serve } from "../../provider/wire.ts";

export interface FileInputs {
  /** The file to write; another one is another resource. */
  readonly path: string;
  readonly content: string;
  /** A file without which the first one is not finished. */
  readonly seal?: string;
  /** Known before the file is there. */
  readonly sizeBytes: number | string;
}

export interface FileState extends FileInputs {
  readonly modified: Date;
  readonly blocks: bigint;
  readonly owner: string | undefined;
}

async function finish(inputs: FileInputs): Promise<FileState> {
  await writeFile(inputs.path, inputs.content);
  const { mtime, blocks } = await stat(inputs.path, { bigint: true });
  const state = { ...inputs, modified: mtime, blocks, owner: undefined };
  if (inputs.seal === undefined || (await exists(inputs.seal))) return state;
  throw new Incomplete(`${inputs.path} is written,\n but its seal ${inputs.seal} is missing: make it and run pulumi up again`, {
    id: inputs.path,
    state,
  });
}

const exists = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false,
  );

export const file: Resource<FileInputs, FileState> = {
  async check(context, olds, news) {
    const { path, content = context.config("project:content"), seal } = news as { path?: string; content?: string; seal?: string };
    if (content === "unreachable")
      throw new LibvirtError("the host does not answer", { code: 12, domain: 7, procedure: "DomainDefineXML" });
    const inputs = { path, content, seal, sizeBytes: content === UNKNOWN ? UNKNOWN : (content?.length ?? 0) };
    context.log("info", `checked ${path}${olds === undefined ? "" : " again"}\nin one line`);
    return {
      inputs: inputs as FileInputs,
      failures: path === undefined ? [{ property: "path", reason: "path is missing: give the path of the file" }] : [],
    };
  },
  async diff(_context, _id, olds, news) {
    if (news.content === "incomparable") throw new TypeError("no comparison");
    const changes: PropertyChange[] = [];
    if (olds.path !== news.path) changes.push({ property: "path", effect: "replace" }, { property: "path.folder", effect: "replace" });
    if (olds.content !== news.content) changes.push({ property: "content", effect: "live" });
    return { changes, deleteBeforeReplace: olds.path !== news.path };
  },
  async create(context, inputs) {
    if (inputs.content === "slow")
      await sleep(60_000, undefined, { signal: context.signal }).finally(() => rmSync(inputs.path, { force: true }));
    if (inputs.content === "refused") throw Object.assign(new Error(`${inputs.path} is refused`), { id: "stray", code: 12 });
    if (inputs.content === "nothing said")
      throw new AggregateError([new Error("connect ECONNREFUSED ::1:22"), new Error("connect ECONNREFUSED 127.0.0.1:22")]);
    const state = await finish(inputs);
    return { id: inputs.path, state: inputs.content === "unstorable" ? { ...state, owner: (() => "root") as unknown as string } : state };
  },
  async read(_context, id, state) {
    if (!(await exists(id))) return undefined;
    const { modified: _modified, blocks: _blocks, owner: _owner, ...inputs } = { ...state, content: await readFile(id, "utf8") };
    return { id, state: { ...state, ...inputs }, inputs };
  },
  update: (_context, _id, _olds, news) => finish(news),
  delete: (_context, id) => rm(id, { force: true }),
};

const calls = new Calls();
const hosts: Hosts = {
  open: () => {
    throw new Error("a file has no host");
  },
  close: async () => {},
};

/** What the provider's text in the tests asks for. */
export const handler: Handler = serve(
  async () => file,
  (config: Context["config"], work) =>
    calls.run(() =>
      work({ config, log: (_level, text) => process.stdout.write(`${text.replaceAll("\n", " ")}\n`), signal: calls.signal, hosts }),
    ),
  [({ text, ...state }) => ({ ...state, content: text })],
);
