/** Who we are to an SSH server: the keys, agents and passwords to try, in the order of ssh(1). Connects to an agent, never to a server. */
import { readFile, stat } from "node:fs/promises";
import ssh2, { type AnyAuthMethod, type BaseAgent, type ParsedKey, type SignCallback, type SigningRequestOptions } from "ssh2";
import { ConnectionError } from "../errors.ts";
import { fingerprintOf } from "./known-hosts.ts";
import type { SshSettings } from "./ssh-config.ts";

const MAX_KEY_FILE_BYTES = 64 * 1024;
const AGENT_TIMEOUT_MS = 5000;

/** What the user gave for one host, beyond ssh_config. Secrets. */
export interface Credentials {
  /** Absolute path; tried before all others, and an error when it cannot be used. */
  readonly identityFile?: string;
  /** For the identity file, and for encrypted keys of ssh_config when there is none. */
  readonly passphrase?: string;
  readonly password?: string;
}

/** One thing to try. `name` is for messages and holds no secret: `key /root/.ssh/id_ed25519`, `agent key SHA256:...`, `password`. */
interface LoginAttempt {
  readonly name: string;
  readonly method: "publickey" | "keyboard-interactive" | "password";
  readonly auth: AnyAuthMethod;
}

/** All that can be tried, and one remark for each thing that could not be. */
export interface LoginPlan {
  readonly attempts: readonly LoginAttempt[];
  readonly remarks: readonly string[];
}

interface KeyFile {
  readonly path: string;
  /** Wire blob of the public half, where it is known. */
  readonly publicBlob: Buffer | undefined;
  /** Absent when the file is encrypted without a passphrase, or holds a public key only. */
  readonly privateKey: ParsedKey | undefined;
  readonly problem: string | undefined;
}

/**
 * Collects what to try for `settings.user`: the identity file that the user gave, the agent's keys that ssh_config names, the agent's others, key files,
 * and the password by keyboard-interactive and as itself.
 *
 * Throws ConnectionError (phase "login") when the given identity file is missing, unreadable, or encrypted with no or another passphrase and not in the agent.
 * Source of the order: OpenSSH sshconnect2.c pubkey_prepare; ssh_config(5) PreferredAuthentications.
 */
export async function planLogin(settings: SshSettings, credentials: Credentials, label: string): Promise<LoginPlan> {
  const { user } = settings;
  const attempts: LoginAttempt[] = [];
  const remarks: string[] = [];
  const agent = settings.agentSocket === undefined ? undefined : ssh2.createAgent(settings.agentSocket);
  const agentKeys = await listAgentKeys(agent, settings.agentSocket, remarks);
  const offered = new Set<string>();
  const offerAgentKey = (key: ParsedKey): void => {
    const blob = key.getPublicSSH();
    const fingerprint = fingerprintOf(blob);
    if (agent === undefined || offered.has(fingerprint)) return;
    offered.add(fingerprint);
    attempts.push({
      name: `agent key ${fingerprint}`,
      method: "publickey",
      auth: { type: "agent", username: user, agent: new OneKeyAgent(agent, key) },
    });
  };
  const inAgent = (file: KeyFile): ParsedKey | undefined => agentKeys.find((key) => file.publicBlob?.equals(key.getPublicSSH()));
  const offerFile = (file: KeyFile): void => {
    if (file.privateKey === undefined) {
      if (file.problem !== undefined && inAgent(file) === undefined) remarks.push(file.problem);
      return;
    }
    const fingerprint = fingerprintOf(file.privateKey.getPublicSSH());
    if (offered.has(fingerprint)) return;
    offered.add(fingerprint);
    attempts.push({ name: `key ${file.path}`, method: "publickey", auth: { type: "publickey", username: user, key: file.privateKey } });
  };

  if (credentials.identityFile !== undefined) {
    const given = await readKeyFile(credentials.identityFile, credentials.passphrase);
    const agentKey = given === undefined ? undefined : inAgent(given);
    if (agentKey === undefined && given?.privateKey === undefined) {
      const problem =
        given === undefined ? `${credentials.identityFile} does not exist` : (given.problem ?? `${given.path} holds no private key`);
      throw new ConnectionError(`the identity file of ${label} cannot be used: ${problem}`, { host: label, phase: "login" });
    }
    if (agentKey !== undefined) offerAgentKey(agentKey);
    else if (given !== undefined) offerFile(given);
  }
  const passphrase = credentials.identityFile === undefined ? credentials.passphrase : undefined;
  const read = await Promise.all(settings.identityFiles.map((path) => readKeyFile(path, passphrase)));
  const files = read.filter((file) => file !== undefined);
  for (const file of files) {
    const key = inAgent(file);
    if (key !== undefined) offerAgentKey(key);
  }
  if (!settings.identitiesOnly) agentKeys.forEach(offerAgentKey);
  files.forEach(offerFile);

  const { password } = credentials;
  if (password !== undefined) {
    // Only questions whose answer is hidden are for the password: a one-time code is asked for openly.
    const prompt = (...[, , , prompts, answer]: PromptArguments): void =>
      answer(prompts.map((each) => (each.echo === true ? "" : password)));
    attempts.push({
      name: "password (keyboard-interactive)",
      method: "keyboard-interactive",
      auth: { type: "keyboard-interactive", username: user, prompt },
    });
    attempts.push({ name: "password", method: "password", auth: { type: "password", username: user, password } });
  }
  return { attempts, remarks };
}

type PromptArguments = Parameters<Extract<AnyAuthMethod, { readonly type: "keyboard-interactive" }>["prompt"]>;

/** An agent that shows one of its keys, so that each key is an attempt of its own. */
class OneKeyAgent extends ssh2.BaseAgent<ParsedKey> {
  readonly #agent: BaseAgent;
  readonly #key: ParsedKey;

  constructor(agent: BaseAgent, key: ParsedKey) {
    super();
    this.#agent = agent;
    this.#key = key;
  }

  override getIdentities(callback: Parameters<BaseAgent<ParsedKey>["getIdentities"]>[0]): void {
    callback(undefined, [this.#key]);
  }

  override sign(key: ParsedKey, data: Buffer, ...rest: readonly unknown[]): void {
    const [options, callback] = rest.length > 1 ? rest : [{}, rest[0]];
    this.#agent.sign(key, data, options as SigningRequestOptions, callback as SignCallback);
  }
}

async function listAgentKeys(agent: BaseAgent | undefined, socket: string | undefined, remarks: string[]): Promise<readonly ParsedKey[]> {
  if (agent === undefined) return [];
  const listed = await new Promise<readonly unknown[] | undefined>((resolve) => {
    const timer = setTimeout(() => resolve(undefined), AGENT_TIMEOUT_MS);
    agent.getIdentities((error, keys) => {
      clearTimeout(timer);
      resolve(error ? undefined : (keys ?? []));
    });
  });
  if (listed === undefined) remarks.push(`the agent at ${socket} does not answer`);
  return (listed ?? []).filter(isParsedKey);
}

function isParsedKey(key: unknown): key is ParsedKey {
  return typeof key === "object" && key !== null && "getPublicSSH" in key && "sign" in key;
}

/** A key file, understood as far as possible; undefined when there is none. */
async function readKeyFile(path: string, passphrase: string | undefined): Promise<KeyFile | undefined> {
  const unusable = (problem: string): KeyFile => ({ path, publicBlob: undefined, privateKey: undefined, problem });
  let text: Buffer;
  try {
    if ((await stat(path)).size > MAX_KEY_FILE_BYTES) return unusable(`${path} is too large for a key`);
    text = await readFile(path);
  } catch (error) {
    // A default identity that the user does not have.
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return undefined;
    return unusable(`${path} cannot be read: ${error instanceof Error ? error.message : String(error)}`);
  }
  const key = parseKey(text, passphrase);
  if (!(key instanceof Error)) {
    return { path, publicBlob: key.getPublicSSH(), privateKey: key.isPrivateKey() ? key : undefined, problem: undefined };
  }
  const publicKey = await readFile(`${path}.pub`).then(
    (bytes) => parseKey(bytes, undefined),
    // Without its public half beside it an encrypted key cannot be recognised in the agent.
    () => undefined,
  );
  const isEncrypted = /encrypted|passphrase|integrity/i.test(key.message);
  const problem = !isEncrypted
    ? `${path} is no private key that is understood: ${key.message}`
    : passphrase === undefined
      ? `${path} is encrypted: set its passphrase, or add it to an agent by ssh-add`
      : `${path} does not open with the passphrase that is set`;
  return {
    path,
    publicBlob: publicKey === undefined || publicKey instanceof Error ? undefined : publicKey.getPublicSSH(),
    privateKey: undefined,
    problem,
  };
}

function parseKey(text: Buffer, passphrase: string | undefined): ParsedKey | Error {
  // ssh2 gives an array for files with several keys, which its types do not know.
  const parsed: unknown = ssh2.utils.parseKey(text, passphrase);
  const first: unknown = Array.isArray(parsed) ? parsed[0] : parsed;
  if (first instanceof Error) return first;
  return isParsedKey(first) ? first : new Error("no key in the file");
}
