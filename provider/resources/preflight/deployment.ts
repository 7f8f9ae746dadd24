/**
 * What the resources of one deployment have said of themselves so far, so that a rule can see them together. A process serves one run of the engine,
 * whose checks come one after the other. Everything is keyed by the resource's origin: a second check of the same resource, as a replacement has,
 * takes the place of the first and never accuses it.
 */
import type { Hosts } from "../../host/hosts.ts";
import type { GuestTraits } from "./source-facts.ts";
import type { Judgement } from "./rule.ts";

/** A disk as declared. */
export interface DeclaredDisk {
  readonly origin: string;
  /** The daemon that gets it, by `daemonOf`. */
  readonly daemon: string;
  /** Absolute path on the host. */
  readonly path: string;
  readonly importId: string;
  /** What it will take in its pool; 0 when it is there already. */
  readonly neededBytes: number;
  /** What its bytes tell about the guest; undefined when they were not read. */
  readonly content?: GuestTraits | undefined;
}

/** A machine as declared. */
export interface DeclaredMachine {
  readonly origin: string;
  readonly daemon: string;
  readonly name: string;
  readonly uuid: string;
  readonly macs: readonly string[];
  /** The files that it may write to, absolute paths on the host. */
  readonly writablePaths: readonly string[];
  readonly memoryMiB: number;
  readonly isRunning: boolean;
}

/** The resources that were checked in this process with the same hosts. */
export class Deployment {
  readonly #disks = new Map<string, DeclaredDisk>();
  readonly #machines = new Map<string, DeclaredMachine>();
  readonly #judgements = new Map<string, readonly Judgement[]>();
  readonly #said = new Set<string>();

  declareDisk(disk: DeclaredDisk): void {
    this.#disks.set(disk.origin, disk);
  }

  declareMachine(machine: DeclaredMachine): void {
    this.#machines.set(machine.origin, machine);
  }

  /** Takes back what a resource said under the origin that it had before it was renamed. */
  withdraw(origin: string): void {
    this.#disks.delete(origin);
    this.#machines.delete(origin);
  }

  /** The disks of other resources on the same daemon. */
  otherDisks({ origin, daemon }: Pick<DeclaredDisk, "origin" | "daemon">): readonly DeclaredDisk[] {
    return [...this.#disks.values()].filter((disk) => disk.origin !== origin && disk.daemon === daemon);
  }

  /** Whether another resource declares a disk at the path, be it there already or not. */
  isDiskComing(path: string, resource: Pick<DeclaredDisk, "origin" | "daemon">): boolean {
    return this.otherDisks(resource).some((disk) => disk.path === path);
  }

  /** The machines of other resources on the same daemon. */
  otherMachines({ origin, daemon }: Pick<DeclaredMachine, "origin" | "daemon">): readonly DeclaredMachine[] {
    return [...this.#machines.values()].filter((machine) => machine.origin !== origin && machine.daemon === daemon);
  }

  /** What the bytes tell of a disk that is declared to lie at the path; undefined when none is, or its source was not read. */
  contentAt(daemon: string, path: string): GuestTraits | undefined {
    return [...this.#disks.values()].find((disk) => disk.daemon === daemon && disk.path === path)?.content;
  }

  /** Keeps what was found about a resource, instead of what was found before. */
  remember(origin: string, judgements: readonly Judgement[]): void {
    this.#judgements.set(origin, judgements);
  }

  /** What the last check of the resource found; empty when there was none. */
  judgementsOf(origin: string): readonly Judgement[] {
    return this.#judgements.get(origin) ?? [];
  }

  /** Whether the line is new: what a second check of the same resource repeats is said once. */
  isNew(line: string): boolean {
    if (this.#said.has(line)) return false;
    this.#said.add(line);
    return true;
  }
}

const deployments = new WeakMap<Hosts, Deployment>();

/** The deployment that the hosts were opened for. */
export function deploymentOf(hosts: Hosts): Deployment {
  let deployment = deployments.get(hosts);
  if (deployment === undefined) {
    deployment = new Deployment();
    deployments.set(hosts, deployment);
  }
  return deployment;
}
