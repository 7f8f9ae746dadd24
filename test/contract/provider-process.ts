/** The SDK's own dynamic provider process, driven as the engine drives it: over gRPC, with the SDK's stubs. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import type * as Messages from "@pulumi/pulumi/proto/provider_pb.js";

type Bag = Record<string, unknown>;
type Struct = NonNullable<ReturnType<Messages.CheckRequest["getOlds"]>>;

/** What gRPC gives for a call that failed. Source: @grpc/grpc-js `ServiceError`. */
interface ServiceError {
  readonly code: number;
  readonly details: string;
  readonly metadata: { get(key: string): readonly (string | Buffer)[] };
}

// The SDK's own copies of gRPC and protobuf: others would not take its messages.
const requireFromSdk = createRequire(fileURLToPath(import.meta.resolve("@pulumi/pulumi")));
const { credentials } = requireFromSdk("@grpc/grpc-js") as { credentials: { createInsecure(): unknown } };
const { Struct: StructMessage } = requireFromSdk("google-protobuf/google/protobuf/struct_pb") as {
  Struct: { fromJavaScript(bag: Bag): Struct };
};
const messages = requireFromSdk("@pulumi/pulumi/proto/provider_pb") as typeof Messages;
const { Status } = requireFromSdk("@pulumi/pulumi/proto/status_pb") as {
  Status: {
    deserializeBinary(bytes: Uint8Array): { getDetailsList(): { unpack(read: (bytes: Uint8Array) => unknown, name: string): unknown }[] };
  };
};
const { ResourceProviderClient } = requireFromSdk("@pulumi/pulumi/proto/provider_grpc_pb") as {
  ResourceProviderClient: new (address: string, channel: unknown) => Record<string, Method> & { close(): void };
};

type Method = (request: unknown, callback: (error: ServiceError | null, response: never) => void) => void;
/** What the engine stores when a create or update threw the partial shape. */
export interface Partial {
  readonly id: string;
  readonly properties: Bag;
  readonly reasons: readonly string[];
}

/** A call that failed. `code` is the gRPC status; `partial` is set when the engine would store the resource all the same. */
export class CallError extends Error {
  readonly code: number;
  readonly partial: Partial | undefined;

  constructor(error: ServiceError) {
    super(error.details);
    this.code = error.code;
    const [status] = error.metadata.get("grpc-status-details-bin");
    this.partial = status instanceof Buffer ? decodePartial(status) : undefined;
  }
}

function decodePartial(status: Buffer): Partial | undefined {
  const [detail] = Status.deserializeBinary(status).getDetailsList();
  const failed = detail?.unpack((bytes) => messages.ErrorResourceInitFailed.deserializeBinary(bytes), "pulumirpc.ErrorResourceInitFailed");
  if (!(failed instanceof messages.ErrorResourceInitFailed)) return undefined;
  return { id: failed.getId(), properties: failed.getProperties()?.toJavaScript() ?? {}, reasons: failed.getReasonsList() };
}

export interface ProviderProcess extends AsyncDisposable {
  readonly pid: number;
  /** What it wrote to stdout behind its port, and to stderr. */
  output(): { readonly stdout: string; readonly stderr: string };
  /** Resolves with the exit code, undefined when a signal ended it. */
  readonly exited: Promise<number | undefined>;
  configure(config: Readonly<Record<string, string>>): Promise<void>;
  check(olds: Bag, news: Bag): Promise<{ readonly inputs: Bag; readonly failures: readonly { property: string; reason: string }[] }>;
  diff(
    id: string,
    olds: Bag,
    news: Bag,
  ): Promise<{ changes: "unknown" | "none" | "some"; replaces: readonly string[]; deleteBeforeReplace: boolean }>;
  create(inputs: Bag): Promise<{ readonly id: string; readonly properties: Bag }>;
  read(id: string, properties: Bag): Promise<{ readonly id: string; readonly properties: Bag; readonly inputs: Bag | undefined }>;
  update(id: string, olds: Bag, news: Bag): Promise<Bag>;
  delete(id: string, properties: Bag): Promise<void>;
}

const URN = "urn:pulumi:dev::project::pulumi-nodejs:dynamic/virtlift:ImportedDisk::disk";

/** Starts it in `cwd` (where `require` of the provider's text begins) with the address of an engine, which it does not call by itself. */
export async function openProviderProcess(options: { readonly cwd: string; readonly engineAddress?: string }): Promise<ProviderProcess> {
  const script = requireFromSdk.resolve("@pulumi/pulumi/cmd/dynamic-provider");
  const child = spawn(process.execPath, [script, options.engineAddress ?? "127.0.0.1:9"], {
    cwd: options.cwd,
    env: { ...process.env, PULUMI_NODEJS_PROJECT: "project", NODE_OPTIONS: "" },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const exited = once(child, "exit").then(([code]) => (code === null ? undefined : Number(code)));
  const output = { stdout: "", stderr: "" };
  child.stderr.setEncoding("utf8").on("data", (text: string) => (output.stderr += text));
  const lines = createInterface({ input: child.stdout });
  const [port] = (await Promise.race([once(lines, "line"), exited.then(() => ["ended"])])) as [string];
  if (!/^\d+$/.test(port)) throw new Error(`the provider process did not start: ${output.stderr}`);
  lines.on("line", (line) => (output.stdout += `${line}\n`));

  const client = new ResourceProviderClient(`127.0.0.1:${port}`, credentials.createInsecure());
  const call = <Response>(method: string, request: unknown): Promise<Response> =>
    new Promise((resolve, reject) => {
      client[method]?.call(client, request, (error: ServiceError | null, response: Response) =>
        error === null ? resolve(response) : reject(new CallError(error)),
      );
    });
  const struct = (bag: Bag): Struct => StructMessage.fromJavaScript(bag);

  return {
    pid: child.pid ?? 0,
    output: () => ({ ...output }),
    exited,
    async configure(config) {
      const request = new messages.ConfigureRequest();
      request.setArgs(struct(config));
      await call("configure", request);
    },
    async check(olds, news) {
      const request = new messages.CheckRequest();
      request.setUrn(URN);
      request.setOlds(struct(olds));
      request.setNews(struct(news));
      const response = await call<Messages.CheckResponse>("check", request);
      const failures = response.getFailuresList().map((each) => ({ property: each.getProperty(), reason: each.getReason() }));
      return { inputs: response.getInputs()?.toJavaScript() ?? {}, failures };
    },
    async diff(id, olds, news) {
      const request = new messages.DiffRequest();
      request.setId(id);
      request.setOlds(struct(olds));
      request.setNews(struct(news));
      const response = await call<Messages.DiffResponse>("diff", request);
      const changes = (["unknown", "none", "some"] as const)[response.getChanges()] ?? "unknown";
      return { changes, replaces: response.getReplacesList(), deleteBeforeReplace: response.getDeletebeforereplace() };
    },
    async create(inputs) {
      const request = new messages.CreateRequest();
      request.setProperties(struct(inputs));
      const response = await call<Messages.CreateResponse>("create", request);
      return { id: response.getId(), properties: response.getProperties()?.toJavaScript() ?? {} };
    },
    async read(id, properties) {
      const request = new messages.ReadRequest();
      request.setId(id);
      request.setProperties(struct(properties));
      const response = await call<Messages.ReadResponse>("read", request);
      return {
        id: response.getId(),
        properties: response.getProperties()?.toJavaScript() ?? {},
        inputs: response.getInputs()?.toJavaScript(),
      };
    },
    async update(id, olds, news) {
      const request = new messages.UpdateRequest();
      request.setId(id);
      request.setOlds(struct(olds));
      request.setNews(struct(news));
      return (await call<Messages.UpdateResponse>("update", request)).getProperties()?.toJavaScript() ?? {};
    },
    async delete(id, properties) {
      const request = new messages.DeleteRequest();
      request.setId(id);
      request.setProperties(struct(properties));
      await call("delete", request);
    },
    async [Symbol.asyncDispose]() {
      client.close();
      child.kill("SIGKILL");
      await exited;
    },
  };
}
