/** The rules about what keeps a check from looking any further: nothing can be planned then, so they cannot be waived. Pure. */
import { CommandError, ConnectionError, LibvirtError } from "../../errors.ts";
import { PoolError } from "../pool.ts";
import { PlacementError } from "../virtual-machine-host.ts";
import type { Rule } from "./rule.ts";

/** What was thrown while the plan was made. */
export interface Trouble {
  readonly error: unknown;
}

export const TROUBLE_RULES: readonly Rule<Trouble>[] = [
  {
    id: "virtlift/host",
    level: "block",
    isFixed: true,
    summary: "The host cannot be reached, refuses the login, or its libvirt refuses what is asked.",
    remedy: "The sentence names host, user and remedy.",
    test: ({ error }) =>
      error instanceof ConnectionError || error instanceof CommandError || error instanceof LibvirtError
        ? [{ property: "host", sentence: error.message }]
        : [],
  },
  {
    id: "virtlift/pool",
    level: "block",
    isFixed: true,
    summary: "The host has no such pool, it is not active, or it is of a kind that disks are not imported into.",
    remedy: "Name one of the pools that it has, or start it: `virsh pool-start`.",
    test: ({ error }) => (error instanceof PoolError ? [{ property: "pool", sentence: error.message }] : []),
  },
  {
    id: "virtlift/placement",
    level: "block",
    isFixed: true,
    summary:
      "A pool, volume or template that the machine names is not there, or its format cannot be told; or the host runs no such machines.",
    remedy: "Mend the name, refresh the pool, or say the format.",
    test: ({ error }) =>
      error instanceof PlacementError ? [{ property: error.property, sentence: error.message.slice(error.property.length + 2) }] : [],
  },
];
