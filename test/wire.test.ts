import { expect, test } from "vitest";
import { ConnectionError, LibvirtError } from "../provider/errors.ts";
import { Incomplete, type Resource } from "../provider/resources/resource.ts";
import { type Properties, serve } from "../provider/wire.ts";

type Bag = Readonly<Record<string, unknown>>;

/** A resource that holds whatever it is given, but for the functions given here. */
function serving(overrides: Partial<Resource<Bag, Bag>> = {}, logged: string[] = []) {
  const resource: Resource<Bag, Bag> = {
    check: async (_context, _olds, news) => ({ inputs: news as Bag, failures: [] }),
    diff: async () => ({ changes: [] }),
    create: async (_context, inputs) => ({ id: "one", state: inputs }),
    read: async (_context, id, state) => ({ id, state, inputs: state }),
    update: async (_context, _id, _olds, news) => news,
    delete: async () => {},
    ...overrides,
  };
  const { signal } = new AbortController();
  const hosts = { open: () => expect.unreachable("no host is needed"), close: async () => {} };
  return serve(
    async () => resource,
    (config, work) => work({ config, log: (_level, text) => logged.push(text), signal, hosts }),
  );
}

const PROVIDER = { __provider: "text" };
const MARKS = { complete: true, schemaVersion: 1 };

test.for<readonly [string, unknown, unknown]>([
  ["undefined is left out, at every depth", { a: undefined, b: { c: undefined, d: 1 } }, { b: { d: 1 } }],
  ["undefined in a list keeps its place", { list: [1, undefined, 3] }, { list: [1, null, 3] }],
  ["bigint becomes decimal text", { size: 2n ** 63n }, { size: "9223372036854775808" }],
  ["Date becomes ISO text", { at: new Date(0) }, { at: "1970-01-01T00:00:00.000Z" }],
  ["false, 0 and empty text stay", { no: false, zero: 0, none: "" }, { no: false, zero: 0, none: "" }],
])("in outputs %s", async ([, state, outs]) => {
  const handler = serving({ create: async () => ({ id: "one", state: state as Bag }) });
  expect(await handler.create({ ...PROVIDER })).toEqual({ id: "one", outs: { ...(outs as Bag), ...MARKS } });
});

test.for<readonly [string, unknown, string]>([
  ["function", () => {}, "outputs.bad.deep[0] cannot be stored: it is a function"],
  ["symbol", Symbol("s"), "outputs.bad.deep[0] cannot be stored: it is a symbol"],
  ["NaN", Number.NaN, "outputs.bad.deep[0] cannot be stored: it is NaN"],
  ["Map", new Map(), "outputs.bad.deep[0] cannot be stored: it is Map"],
  ["Buffer", Buffer.from("x"), "outputs.bad.deep[0] cannot be stored: it is Buffer"],
  ["invalid Date", new Date(Number.NaN), "outputs.bad.deep[0] cannot be stored: it is Date"],
])("a %s among the outputs is refused with its place, and what exists is kept", async ([, value, reason]) => {
  const handler = serving({ create: async () => ({ id: "one", state: { bad: { deep: [value] } } }) });
  await expect(handler.create({ ...PROVIDER, given: 1 })).rejects.toMatchObject({
    id: "one",
    properties: { ...PROVIDER, given: 1, complete: false, schemaVersion: 1 },
    reasons: [reason],
  });
});

test("neither the provider's text nor null nor the version reaches the resource", async () => {
  const seen: unknown[] = [];
  const handler = serving({
    check: async (_context, olds, news) => ({ inputs: (seen.push(olds, news), news as Bag), failures: [] }),
    delete: async (_context, _id, state) => void seen.push(state),
  });
  await handler.check({}, { ...PROVIDER, a: 1, b: null, c: { d: null, e: [null] } });
  await handler.delete("one", { ...PROVIDER, ...MARKS, a: 1 });
  expect(seen).toEqual([undefined, { a: 1, c: { e: [null] } }, { complete: true, a: 1 }]);
});

test("inputs that were made from a state carry no marks of outputs", async () => {
  const { inputs, props } = await serving().read("one", { ...PROVIDER, ...MARKS, a: 1 });
  expect(inputs).toEqual({ a: 1 });
  expect(props).toEqual({ ...MARKS, a: 1 });
});

test.for<readonly [Properties, Properties, boolean]>([
  [{ complete: true }, {}, true],
  [{ complete: true }, { complete: false }, false],
  [{ complete: false }, { complete: true }, false],
  [{}, {}, false],
])("a state that says %j is, when read as %j, complete: %s", async ([stored, found, complete]) => {
  const handler = serving({ read: async (_context, id) => ({ id, state: found, inputs: {} }) });
  expect((await handler.read("one", stored)).props["complete"]).toBe(complete);
});

test("an update that got half way keeps the old outputs beside the new ones, and the new text", async () => {
  const handler = serving({
    update: () => Promise.reject(new Incomplete("half\n way", { id: "ignored", state: { b: 3 } })),
  });
  await expect(handler.update("one", { ...MARKS, a: 1, b: 2, __provider: "old" }, { ...PROVIDER })).rejects.toMatchObject({
    message: "half way",
    id: "one",
    properties: { ...PROVIDER, a: 1, b: 3, complete: false, schemaVersion: 1 },
    reasons: ["half way"],
  });
});

test("an unfinished resource that must be replaced says both", async () => {
  const handler = serving({ diff: async () => ({ changes: [{ property: "disks[0].path", effect: "replace" }] }) });
  expect(await handler.diff("one", { complete: false }, {})).toEqual({ changes: true, replaces: ["disks"], deleteBeforeReplace: false });
});

test("a create without an id fails", async () => {
  const handler = serving({ create: async () => ({ id: "", state: {} }) });
  await expect(handler.create({})).rejects.toThrow("the resource was created, but without an id; it cannot be stored");
});

test.for<readonly [string, unknown, string]>([
  ["text", "just text", "just text"],
  ["undefined", undefined, "undefined"],
  ["an Error without a message", new RangeError(), "RangeError"],
  ["several lines", new Error("first\n  second\n"), "first second"],
  ["more than a trailer takes", new Error("x".repeat(5000)), `${"x".repeat(4000)}...`],
])("what is thrown is an Error with one line: %s", async ([, thrown, message]) => {
  const handler = serving({ delete: () => Promise.reject(thrown) });
  const error: unknown = await handler.delete("one", {}).catch((each: unknown) => each);
  expect(error).toBeInstanceOf(Error);
  expect(error).toMatchObject({ message });
});

test("a bug keeps its stack, a foreseen failure shows none", async () => {
  const bug = await serving({ delete: () => Promise.reject(new TypeError("bug")) })
    .delete("one", {})
    .catch((error: Error) => error.stack);
  const foreseen = await serving({ delete: () => Promise.reject(new Incomplete("half", { id: "one", state: {} })) })
    .delete("one", {})
    .catch((error: Error) => error.stack);
  expect(bug).toContain("wire.test.ts");
  expect(foreseen).toBe("");
});

test("says of what needs no mending that it may pass, whole or half made, and of nothing else", async () => {
  const closed = new ConnectionError("kvm1 closed the connection", { host: "kvm1", phase: "closed" });
  const denied = new LibvirtError("access denied", { code: 88, domain: 0, procedure: "DomainCreate" });
  const failing = (error: Error) => serving({ create: () => Promise.reject(error) }).create({ ...PROVIDER });
  await expect(failing(closed)).rejects.toThrow("kvm1 closed the connection (it may pass: run up again)");
  await expect(failing(denied)).rejects.toThrow(/^access denied$/);
  await expect(failing(new Incomplete("half", { id: "one", state: {}, cause: closed }))).rejects.toMatchObject({
    reasons: ["half (it may pass: run up again)"],
  });
});
