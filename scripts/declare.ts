/**
 * Gives the compiled declarations the documentation of the arguments back: TypeScript writes the types of the schemas out, and leaves the comments on
 * their keys behind. Argument: the folder that tsc has filled.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join, resolve, sep } from "node:path";
import { argv } from "node:process";
import ts from "typescript";

/** The types of arguments, and the module that exports them. */
const MODULE = "sdk/index";
const TYPES = ["ImportedDiskArgs", "VirtualMachineArgs"];

/** Deeper no argument is nested. */
const MAX_DEPTH = 6;

const root = resolve(import.meta.dirname, "..");
const built = resolve(root, argv[2] ?? "dist");

/** A type as one program sees it. */
interface Seen {
  readonly type: ts.Type;
  readonly checker: ts.TypeChecker;
}

/** Comments by the place where they belong, in files of the build. */
const comments = new Map<string, Map<number, string>>();

const [source, declared] = [open(join(root, `${MODULE}.ts`)), open(join(built, `${MODULE}.d.ts`))];
for (const name of TYPES) document(source(name), declared(name), 0);
for (const [file, places] of comments) {
  let text = readFileSync(file, "utf8");
  for (const [at, comment] of [...places].sort(([a], [b]) => b - a)) text = `${text.slice(0, at)}${comment}\n${text.slice(at)}`;
  writeFileSync(file, text);
}

/** Finds the types that a module exports. */
function open(file: string): (name: string) => Seen {
  const { config } = ts.readConfigFile(join(root, "tsconfig.json"), (path) => ts.sys.readFile(path)) as {
    config: { compilerOptions: object };
  };
  const { options } = ts.convertCompilerOptionsFromJson(config.compilerOptions, root);
  const program = ts.createProgram([file], { ...options, noEmit: true });
  const checker = program.getTypeChecker();
  const module = program.getSourceFile(file);
  const symbol = module && checker.getSymbolAtLocation(module);
  const found = symbol ? checker.getExportsOfModule(symbol) : [];
  return (name) => {
    const exported = found.find((each) => each.name === name);
    if (exported === undefined) throw new Error(`${file} exports no type ${name}`);
    const own = exported.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(exported) : exported;
    return { type: checker.getDeclaredTypeOfSymbol(own), checker };
  };
}

/** Notes the comments of a type's keys, and of what is nested in them, that its declaration lacks. */
function document(source: Seen, declared: Seen, depth: number): void {
  if (depth > MAX_DEPTH) return;
  const others = new Map(objects(source).map((type) => [keysOf(type), type]));
  for (const type of objects(declared)) {
    const other = others.get(keysOf(type));
    if (other === undefined) continue;
    for (const key of type.getProperties()) {
      const original = other.getProperty(key.name);
      if (original === undefined) continue;
      noteComment(original, key);
      document(
        { type: source.checker.getTypeOfSymbol(original), checker: source.checker },
        { type: declared.checker.getTypeOfSymbol(key), checker: declared.checker },
        depth + 1,
      );
    }
  }
}

function noteComment(source: ts.Symbol, declared: ts.Symbol): void {
  const comment = source.declarations
    ?.flatMap((each) => ts.getJSDocCommentsAndTags(each))
    .find(ts.isJSDoc)
    ?.getText();
  if (comment === undefined) return;
  for (const place of declared.declarations ?? []) {
    const file = place.getSourceFile().fileName;
    if (!resolve(file).startsWith(built + sep) || ts.getJSDocCommentsAndTags(place).length > 0) continue;
    const places = comments.get(file) ?? new Map<number, string>();
    comments.set(file, places.set(place.getStart(), comment));
  }
}

/** The object types that a value may have, those in arrays too; what a promise or an output gives is among them already. */
function objects({ type, checker }: Seen): readonly ts.Type[] {
  if (type.isUnion()) return type.types.flatMap((each) => objects({ type: each, checker }));
  if (checker.isArrayLikeType(type)) {
    const item = type.getNumberIndexType();
    return item ? objects({ type: item, checker }) : [];
  }
  const isPlain = type.flags & (ts.TypeFlags.Object | ts.TypeFlags.Intersection) && type.getCallSignatures().length === 0;
  return isPlain && type.getProperty("then") === undefined && type.getProperty("apply") === undefined ? [type] : [];
}

function keysOf(type: ts.Type): string {
  return type
    .getProperties()
    .map(({ name }) => name)
    .sort()
    .join(" ");
}
