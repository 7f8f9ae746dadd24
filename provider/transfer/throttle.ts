/** Keeps what leaves this machine under a rate, of one process or of several together: whoever sends asks for its bytes first. Knows no transport. */
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { ConnectionError } from "../errors.ts";

/** The most that is asked for at once: a small part of a second at any rate that is worth a limit. */
const PIECE_BYTES = 256 * 1024;

/** The slowest rate: at less, a piece would wait for hours. */
const MIN_BYTES_PER_SECOND = 1024;

/** How much may leave at once after a pause, in milliseconds of the rate. */
const BURST_MS = 100;

/** A limit on what leaves. */
export interface Throttle {
  readonly bytesPerSecond: number;
  /**
   * Resolves when so many bytes may leave, in the order of the calls. Throws the signal's reason when it is aborted meanwhile, ConnectionError when the
   * process that keeps the limit is gone.
   */
  take(bytes: number, signal?: AbortSignal): Promise<void>;
}

/** Gives the bytes in pieces, each when it may leave; all of them at once where there is no limit. The pieces are views. Throws as `take` does. */
export async function* throttled<Bytes extends Uint8Array>(
  bytes: Bytes,
  throttle: Throttle | undefined,
  signal: AbortSignal,
): AsyncGenerator<Uint8Array, void, undefined> {
  const step = throttle === undefined ? bytes.length : PIECE_BYTES;
  for (let at = 0; at < bytes.length; at += step) {
    const piece = bytes.subarray(at, at + step);
    await throttle?.take(piece.length, signal);
    yield piece;
  }
}

/** A limit of this process's own. */
export function createThrottle(bytesPerSecond: number): Throttle {
  let freeAtMs = 0;
  return {
    bytesPerSecond,
    async take(bytes, signal) {
      signal?.throwIfAborted();
      const nowMs = performance.now();
      freeAtMs = Math.max(freeAtMs, nowMs - BURST_MS) + (bytes / bytesPerSecond) * 1000;
      const waitMs = freeAtMs - nowMs;
      if (waitMs <= 0) return;
      let timer: NodeJS.Timeout | undefined;
      try {
        await unlessAborted(new Promise<void>((resolve) => (timer = setTimeout(resolve, waitMs))), signal);
      } finally {
        clearTimeout(timer);
      }
    },
  };
}

/** Settles as the work does, but throws the signal's reason as soon as it is aborted. */
export async function unlessAborted(work: Promise<void>, signal: AbortSignal | undefined): Promise<void> {
  let abandon = () => {};
  const aborted = new Promise<never>((_resolve, reject) => (abandon = () => reject(signal?.reason as Error)));
  signal?.addEventListener("abort", abandon, { once: true });
  try {
    await Promise.race([work, aborted]);
  } finally {
    signal?.removeEventListener("abort", abandon);
  }
}

/** A limit that other processes of this user share. Close it: whoever shares it then sends nothing more. */
export interface SharedThrottle extends AsyncDisposable {
  /** What `openThrottle` takes: `<bytes per second> <path of a socket>`. */
  readonly setting: string;
}

/** Shares a limit by a socket in a folder that only this user may enter. */
export async function shareThrottle(bytesPerSecond: number): Promise<SharedThrottle> {
  const throttle = createThrottle(bytesPerSecond);
  // A folder of the system's own: a socket's path may have 107 bytes.
  const folder = await mkdtemp(join(tmpdir(), "virtlift-"));
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => {}).once("close", () => sockets.delete(socket));
    createInterface({ input: socket })
      .on("line", (line) => {
        const bytes = /^\d{1,9}$/.test(line) ? Number(line) : 0;
        void throttle.take(Math.min(bytes, PIECE_BYTES)).then(() => socket.writable && socket.write("\n"));
      })
      // The socket's, a second time: whoever asked may die with a grant on its way.
      .on("error", () => {});
  });
  const path = join(folder, "bandwidth");
  server.listen(path);
  await once(server, "listening");
  return {
    setting: `${bytesPerSecond} ${path}`,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy();
      server.close();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

/** The limit of a setting: a number of bytes per second for this process alone, or what `shareThrottle` gives. Throws Error when it is neither, or below 1 KiB/s. */
export function openThrottle(setting: string): Throttle {
  const [, rate, path] = /^([1-9]\d{0,14})(?: (\/.+))?$/.exec(setting.trim()) ?? [];
  if (rate === undefined)
    throw new Error(
      `VIRTLIFT_BANDWIDTH is ${JSON.stringify(setting)}, which is no rate: give a number of bytes per second, such as 50000000`,
    );
  if (Number(rate) < MIN_BYTES_PER_SECOND)
    throw new Error(`VIRTLIFT_BANDWIDTH is ${rate} bytes per second, too little for any disk: give at least ${MIN_BYTES_PER_SECOND}`);
  return path === undefined ? createThrottle(Number(rate)) : new RemoteThrottle(Number(rate), path);
}

/** Asks the process that keeps the limit. Connected at the first use; an idle connection keeps no process alive. */
class RemoteThrottle implements Throttle {
  readonly bytesPerSecond: number;
  readonly #path: string;
  readonly #waiting: { resolve(): void; reject(error: Error): void }[] = [];
  #socket: Socket | undefined;
  /** Calls that were neither granted nor aborted yet. */
  #takers = 0;
  #end: ConnectionError | undefined;

  constructor(bytesPerSecond: number, path: string) {
    this.bytesPerSecond = bytesPerSecond;
    this.#path = path;
  }

  async take(bytes: number, signal?: AbortSignal): Promise<void> {
    if (this.#end) throw this.#end;
    signal?.throwIfAborted();
    const socket = (this.#socket ??= this.#connect());
    const granted = new Promise<void>((resolve, reject) => this.#waiting.push({ resolve, reject }));
    socket.ref().write(`${bytes}\n`);
    this.#takers++;
    try {
      await unlessAborted(granted, signal);
    } finally {
      if (--this.#takers === 0) socket.unref();
    }
  }

  #connect(): Socket {
    const socket = connect(this.#path);
    createInterface({ input: socket })
      .on("line", () => this.#waiting.shift()?.resolve())
      .on("error", () => {});
    socket
      .on("error", () => {})
      .once("close", () => {
        this.#end = new ConnectionError(
          "the process that limits the bandwidth of this run is gone, and nothing more is sent: run up again",
          {
            host: "this machine",
            phase: "aborted",
          },
        );
        for (const waiting of this.#waiting.splice(0)) waiting.reject(this.#end);
      });
    return socket;
  }
}
