/**
 * The way from a fresh clone to a script of ours: `node scripts/bootstrap.mjs <name> [arguments]`.
 * Runs on Node 20 without any dependency. Installs the npm packages, a current Node among them, when package-lock.json asks for others than are there;
 * compiles dist/ when it is not what the sources say; then runs scripts/<name>.ts on the current Node, and exits as that does.
 */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const NODE = join(ROOT, "node_modules/.bin/node");
/** Hold the hash of what the folder was made from; written last, so that an interrupted run counts for nothing. */
const INSTALLED = join(ROOT, "node_modules/.virtlift-lock");
const BUILT = join(ROOT, "dist/.virtlift-sources");

/** Runs argv in the root to its end, passing our signals on. Gives its exit code, 128 and more for a signal. */
function run(argv) {
  return new Promise((resolve, reject) => {
    const child = spawn(argv[0], argv.slice(1), { cwd: ROOT, stdio: "inherit" });
    const pass = (signal) => child.kill(signal);
    for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, pass);
    child.once("error", reject);
    child.once("exit", (code, signal) => {
      for (const each of ["SIGINT", "SIGTERM"]) process.removeListener(each, pass);
      resolve(signal === null ? code : 128 + (signal === "SIGINT" ? 2 : 15));
    });
  });
}

async function step(title, argv) {
  const started = performance.now();
  process.stdout.write(`  ${title} ...\n`);
  const code = await run(argv);
  if (code !== 0) {
    process.stderr.write(`✗ ${title}: ${argv.slice(0, 2).join(" ")} exited ${code}\n`);
    process.exit(code);
  }
  process.stdout.write(`✓ ${title}  ${((performance.now() - started) / 1000).toFixed(1)} s\n`);
}

function hashOf(paths) {
  const hash = createHash("sha256");
  for (const path of paths) hash.update(`${path}\0`).update(readFileSync(join(ROOT, path)));
  return hash.digest("hex");
}

function holds(file, text) {
  return existsSync(file) && readFileSync(file, "utf8").trim() === text;
}

function sources(folder) {
  const names = readdirSync(join(ROOT, folder), { recursive: true }).map((name) => join(folder, String(name)));
  return names.filter((name) => name.endsWith(".ts")).sort();
}

async function install() {
  const wanted = hashOf(["package-lock.json"]);
  if (holds(INSTALLED, wanted) && existsSync(NODE)) return;
  // Not `npm ci`: it refuses a lock file made where the optional packages of other platforms could not be had. This one installs what the file says too.
  await step("npm packages", ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"]);
  writeFileSync(INSTALLED, `${wanted}\n`);
}

/** Compiles into a folder beside dist/ and swaps, so that a program that runs meanwhile finds either the old or the new one. */
async function build() {
  const wanted = hashOf([
    "package-lock.json",
    "tsconfig.json",
    "tsconfig.build.json",
    "scripts/declare.ts",
    ...sources("provider"),
    ...sources("sdk"),
  ]);
  if (holds(BUILT, wanted)) return;
  const fresh = join(ROOT, `dist-${process.pid}`);
  const old = join(ROOT, `dist-${process.pid}-old`);
  process.on("exit", () => [fresh, old].forEach((folder) => rmSync(folder, { recursive: true, force: true })));
  await step("compile", [NODE, "node_modules/typescript/bin/tsc", "-p", "tsconfig.build.json", "--outDir", fresh]);
  await step("declarations", [NODE, "scripts/declare.ts", fresh]);
  mkdirSync(fresh, { recursive: true });
  writeFileSync(join(fresh, ".virtlift-sources"), `${wanted}\n`);
  if (existsSync(join(ROOT, "dist"))) renameSync(join(ROOT, "dist"), old);
  renameSync(fresh, join(ROOT, "dist"));
  rmSync(old, { recursive: true, force: true });
}

const [name, ...rest] = process.argv.slice(2);
const script = join("scripts", `${name}.ts`);
if (name === undefined || !existsSync(join(ROOT, script))) {
  process.stderr.write(`usage: node scripts/bootstrap.mjs <name> [arguments]; there is no ${script}\n`);
  process.exit(2);
}
await install();
await build();
process.exit(await run([NODE, script, ...rest]));
