import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { type AddressInfo, createServer } from "node:net";
import { join } from "node:path";
import { expect, test } from "vitest";
import { runCommand } from "../scripts/setup/command.ts";
import { openProviderProcess } from "./contract/provider-process.ts";

const root = join(import.meta.dirname, "..");

/** In every state that was ever stored: these lines may get company, and never change. */
const FROZEN = [
  'exports.handler = () => require("virtlift/provider").importedDisk;',
  'exports.handler = () => require("virtlift/provider").virtualMachine;',
] as const;

test("the package's entry under which states ask for the provider stays", async () => {
  const { name, exports } = JSON.parse(await readFile(join(root, "package.json"), "utf8")) as Record<string, Record<string, unknown>>;
  expect(name).toBe("virtlift");
  expect(exports).toMatchObject({ "./provider": { default: "./dist/provider/index.js" } });
});

test("require loads the door and no package", async () => {
  const script = `
    const names = Object.keys(require("virtlift/provider"));
    const packages = Object.keys(require.cache).filter((path) => path.includes("/node_modules/"));
    console.log(JSON.stringify({ names, packages }));`;
  const { stdout } = await runCommand([process.execPath, "-e", script], { cwd: root });
  expect(JSON.parse(stdout)).toEqual({
    names: ["argumentProblems", "describeMachine", "importedDisk", "openToolbox", "virtualMachine"],
    packages: [],
  });
});

test.for(FROZEN)("the SDK's process serves a state that says %s", async (text) => {
  await using provider = await openProviderProcess({ cwd: root });
  await provider.configure({});
  const { failures } = await provider.check({}, { __provider: text, origin: "organization/project/stack/name" });
  expect(failures.length).toBeGreaterThan(0);
});

test("a provider whose engine is gone ends by itself", async () => {
  const engine = createServer((socket) => socket.destroy()).listen(0, "127.0.0.1");
  await once(engine, "listening");
  const { port } = engine.address() as AddressInfo;
  await using provider = await openProviderProcess({ cwd: root, engineAddress: `127.0.0.1:${port}` });
  await provider.configure({});
  await provider.check({}, { __provider: FROZEN[0] });
  engine.close();
  expect(await provider.exited).toBe(1);
}, 20_000);
