/** The engine that started this process: the calls it waits for, and the end of the process when it is gone. Knows no resource. */
import { once } from "node:events";
import { connect } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";

/** How often a gone engine is looked for, and how many refusals in a row prove it. */
const POLL_MS = 2000;
const REFUSALS = 3;

/** How long calls may take to end after they were told to. The engine itself kills its providers 5 s after an interrupt. */
const GRACE_MS = 4000;

/** Where the engine listens, as the last argument of its providers says. */
export interface EngineAddress {
  readonly host: string;
  readonly port: number;
}

/** `127.0.0.1:34567` -> its parts; undefined when the text is no such address. */
export function parseEngineAddress(text: string | undefined): EngineAddress | undefined {
  const [, host, port] = /^([\w.-]+):(\d{1,5})$/.exec(text ?? "") ?? [];
  return host === undefined || port === undefined || Number(port) > 65535 ? undefined : { host, port: Number(port) };
}

/**
 * Resolves when nobody has listened at the address for three polls in a row: a killed engine leaves its providers alive and working.
 * Only a refusal counts; an engine that is too busy to answer is there. The waiting keeps no process alive. `pollMs`: default 2,000.
 */
export async function engineGone(address: EngineAddress, pollMs = POLL_MS): Promise<void> {
  for (let refusals = 0; refusals < REFUSALS; refusals = (await isRefused(address)) ? refusals + 1 : 0)
    await sleep(pollMs, undefined, { ref: false });
}

async function isRefused({ host, port }: EngineAddress): Promise<boolean> {
  const socket = connect({ host, port, timeout: POLL_MS });
  socket.unref();
  socket.once("timeout", () => socket.destroy(new Error("no answer")));
  try {
    await once(socket, "connect");
    return false;
  } catch (error) {
    return error instanceof Error && "code" in error && error.code === "ECONNREFUSED";
  } finally {
    socket.destroy();
  }
}

/** The calls of the engine that are being worked on. */
export class Calls {
  readonly #stop = new AbortController();
  readonly #running = new Set<Promise<unknown>>();

  /** Aborted by `end`, with its reason. */
  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  /** Counts a call until it settles. Throws the reason of the end when it has come. */
  async run<Result>(work: () => Promise<Result>): Promise<Result> {
    this.#stop.signal.throwIfAborted();
    const running = work();
    this.#running.add(running);
    try {
      return await running;
    } finally {
      this.#running.delete(running);
    }
  }

  /** Tells every call to stop, and resolves when all have, after 4 s at the latest. May be called twice. */
  async end(reason: string): Promise<void> {
    this.#stop.abort(new Error(reason));
    await Promise.race([Promise.allSettled(this.#running), sleep(GRACE_MS, undefined, { ref: false })]);
  }
}
