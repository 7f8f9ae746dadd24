import { readFile, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { UNKNOWN } from "../../provider/resources/unknown.ts";
import { openDirectory } from "../bed/directory.ts";
import { type CallError, openProviderProcess } from "./provider-process.ts";

const PROVIDER = `exports.handler = () => require(${JSON.stringify(fileURLToPath(import.meta.resolve("./file-resource.ts")))}).handler;`;

/** A folder of its own and a configured process that serves the file resource. */
async function openBed() {
  const directory = await openDirectory("contract");
  const provider = await openProviderProcess({ cwd: directory.path });
  await provider.configure({ "project:content": "from config" });
  const path = join(directory.path, "file.txt");
  return {
    provider,
    path,
    seal: join(directory.path, "seal"),
    inputs: { path, content: "hello", sizeBytes: 5, __provider: PROVIDER },
    async [Symbol.asyncDispose]() {
      await provider[Symbol.asyncDispose]();
      await directory[Symbol.asyncDispose]();
    },
  };
}

/** What a call throws over the wire. */
const failure = (call: Promise<unknown>): Promise<CallError> =>
  call.then(
    () => expect.unreachable("the call should have failed"),
    (error: CallError) => error,
  );

describe("check", () => {
  test("canonicalises, keeps the provider's text and tells the core of no old inputs the first time", async () => {
    await using bed = await openBed();
    const first = await bed.provider.check({}, { path: bed.path, content: "hello", seal: null, __provider: PROVIDER });
    expect(first).toEqual({ inputs: bed.inputs, failures: [] });
    const second = await bed.provider.check(first.inputs, { path: bed.path, content: "hello", __provider: PROVIDER });
    expect(second.inputs).toEqual(bed.inputs);
    await expect.poll(() => bed.provider.output().stdout).toBe(`checked ${bed.path} in one line\nchecked ${bed.path} again in one line\n`);
  });

  test("passes unknown values through", async () => {
    await using bed = await openBed();
    const { inputs, failures } = await bed.provider.check({}, { path: bed.path, content: UNKNOWN, __provider: PROVIDER });
    expect(failures).toEqual([]);
    expect(inputs).toMatchObject({ content: UNKNOWN, sizeBytes: UNKNOWN });
  });

  test("says a failure in the reason only, so that the engine prints no value", async () => {
    await using bed = await openBed();
    const { failures } = await bed.provider.check({}, { content: "x", __provider: PROVIDER });
    expect(failures).toEqual([{ property: "", reason: "path is missing: give the path of the file" }]);
  });

  test("gives every one of several concurrent first calls the stack's configuration", async () => {
    await using bed = await openBed();
    const checks = await Promise.all(Array.from({ length: 5 }, () => bed.provider.check({}, { path: bed.path, __provider: PROVIDER })));
    expect(checks.map(({ inputs }) => inputs["content"])).toEqual(Array.from({ length: 5 }, () => "from config"));
  });

  test("fails with the sentence of a foreseen error, without a stack and without a gRPC status of its own", async () => {
    await using bed = await openBed();
    const error = await failure(bed.provider.check({}, { path: bed.path, content: "unreachable", __provider: PROVIDER }));
    expect(error).toMatchObject({ message: "the host does not answer", code: 2 });
    expect(bed.provider.output().stderr).not.toContain("    at ");
  });
});

describe("create", () => {
  test("stores outputs without undefined, bigint or Date, with version, completeness and the provider's text", async () => {
    await using bed = await openBed();
    const { id, properties } = await bed.provider.create(bed.inputs);
    expect(id).toBe(bed.path);
    expect(properties).toEqual({
      ...bed.inputs,
      modified: (await stat(bed.path, { bigint: true })).mtime.toISOString(),
      blocks: String((await stat(bed.path)).blocks),
      complete: true,
      schemaVersion: 2,
    });
  });

  test("that failed without a trace fails as a plain error, whatever fields the cause had", async () => {
    await using bed = await openBed();
    const error = await failure(bed.provider.create({ ...bed.inputs, content: "refused" }));
    expect(error).toMatchObject({ message: `${bed.path} is refused`, code: 2, partial: undefined });
  });

  test("gives the sentences inside an error that says nothing itself", async () => {
    await using bed = await openBed();
    const error = await failure(bed.provider.create({ ...bed.inputs, content: "nothing said" }));
    expect(error.message).toBe("connect ECONNREFUSED ::1:22; connect ECONNREFUSED 127.0.0.1:22");
  });

  test("that half succeeded stores what is there, its reason and the provider's text; update then goes on", async () => {
    await using bed = await openBed();
    const inputs = { ...bed.inputs, seal: bed.seal };
    const { partial } = await failure(bed.provider.create(inputs));
    expect(partial).toEqual({
      id: bed.path,
      properties: expect.objectContaining({ ...inputs, complete: false, schemaVersion: 2 }),
      reasons: [`${bed.path} is written, but its seal ${bed.seal} is missing: make it and run pulumi up again`],
    });
    const half = partial?.properties ?? {};
    expect(await bed.provider.diff(bed.path, half, inputs)).toMatchObject({ changes: "some", replaces: [] });
    const refreshed = await bed.provider.read(bed.path, half);
    expect(refreshed.properties).toMatchObject({ complete: false });

    const again = await failure(bed.provider.update(bed.path, refreshed.properties, inputs));
    expect(again.partial?.properties).toMatchObject({ complete: false, __provider: PROVIDER });
    await writeFile(bed.seal, "");
    const whole = await bed.provider.update(bed.path, refreshed.properties, inputs);
    expect(whole).toMatchObject({ complete: true, __provider: PROVIDER });
    expect(await bed.provider.diff(bed.path, whole, inputs)).toMatchObject({ changes: "none" });
  });

  test("whose outputs cannot be stored does not lose the thing", async () => {
    await using bed = await openBed();
    const { partial } = await failure(bed.provider.create({ ...bed.inputs, content: "unstorable" }));
    expect(partial).toEqual({
      id: bed.path,
      properties: { ...bed.inputs, content: "unstorable", complete: false, schemaVersion: 2 },
      reasons: ["outputs.owner cannot be stored: it is a function"],
    });
    await bed.provider.delete(bed.path, partial?.properties ?? {});
    await expect(stat(bed.path)).rejects.toThrow("ENOENT");
  });
});

describe("diff", () => {
  test("leaves a change to the engine's own comparison and names whole properties that replace", async () => {
    await using bed = await openBed();
    const { properties } = await bed.provider.create(bed.inputs);
    expect(await bed.provider.diff(bed.path, properties, bed.inputs)).toMatchObject({ changes: "none" });
    const changed = await bed.provider.diff(bed.path, properties, { ...bed.inputs, content: "bye" });
    expect(changed).toEqual({ changes: "unknown", replaces: [], deleteBeforeReplace: false });
    const moved = await bed.provider.diff(bed.path, properties, { ...bed.inputs, path: "/elsewhere" });
    expect(moved).toEqual({ changes: "unknown", replaces: ["path"], deleteBeforeReplace: true });
  });

  test("never throws: what cannot be compared is left to the engine, with a warning", async () => {
    await using bed = await openBed();
    const { properties } = await bed.provider.create(bed.inputs);
    expect(await bed.provider.diff(bed.path, properties, { ...bed.inputs, content: "incomparable" })).toMatchObject({ changes: "unknown" });
    const newer = await bed.provider.diff(bed.path, { ...properties, schemaVersion: 99 }, bed.inputs);
    expect(newer).toMatchObject({ changes: "unknown" });
    await expect
      .poll(() => bed.provider.output().stdout)
      .toContain("the state was written by a newer virtlift (version 99, this one knows 2)");
  });
});

describe("read, update and delete", () => {
  test("read reports drift in outputs and inputs, and an empty id for what is gone", async () => {
    await using bed = await openBed();
    const { properties } = await bed.provider.create(bed.inputs);
    await writeFile(bed.path, "by hand");
    const drifted = await bed.provider.read(bed.path, properties);
    expect(drifted.inputs).toEqual({ ...bed.inputs, content: "by hand" });
    expect(drifted.properties).toMatchObject({ content: "by hand", complete: true, schemaVersion: 2, __provider: PROVIDER });
    await rm(bed.path);
    expect(await bed.provider.read(bed.path, properties)).toMatchObject({ id: "" });
  });

  test("a state of an older version is brought up on every way in", async () => {
    await using bed = await openBed();
    await bed.provider.create(bed.inputs);
    const old = { path: bed.path, text: "hello", sizeBytes: 5, complete: true, __provider: PROVIDER };
    expect(await bed.provider.diff(bed.path, old, bed.inputs)).toMatchObject({ changes: "none" });
    const { properties } = await bed.provider.read(bed.path, old);
    expect(properties).toMatchObject({ content: "hello", schemaVersion: 2 });
    expect(properties).not.toHaveProperty("text");
  });

  test("delete of what is gone already is done", async () => {
    await using bed = await openBed();
    const { properties } = await bed.provider.create(bed.inputs);
    expect(await readFile(bed.path, "utf8")).toBe("hello");
    await bed.provider.delete(bed.path, properties);
    await bed.provider.delete(bed.path, properties);
    await expect(stat(bed.path)).rejects.toThrow("ENOENT");
  });

  test("a state of a newer virtlift is refused with the remedy", async () => {
    await using bed = await openBed();
    const { properties } = await bed.provider.create(bed.inputs);
    const error = await failure(bed.provider.read(bed.path, { ...properties, schemaVersion: 3 }));
    expect(error.message).toBe("the state was written by a newer virtlift (version 3, this one knows 2): update the package virtlift");
  });
});
