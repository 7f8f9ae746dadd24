/** Opens the hosts that resources name, with what the stack's configuration adds. */
import type { Host, HostSpec } from "../host/hosts.ts";
import type { z } from "zod";
import type { HostSchema } from "./schema.ts";
import type { Context } from "./resource.ts";

/** A host as it stands in checked inputs. */
export type DeclaredHost = z.output<typeof HostSchema>;

/** The shared Host of a declaration. Passphrase and password come from the secret configuration `virtlift:passphrase` and `virtlift:password` where it gives none. */
export function openHost(context: Context, declared: DeclaredHost): Host {
  const spec: Record<string, unknown> = { ...declared };
  for (const secret of ["passphrase", "password"] as const) spec[secret] ??= context.config(`virtlift:${secret}`);
  const given = Object.fromEntries(Object.entries(spec).filter(([, value]) => value !== undefined));
  return context.hosts.open(given as unknown as HostSpec);
}

/** The configured default host: `virtlift:host`, a URI or the JSON of a host object; undefined when unset. */
export function configuredHost(context: Context): unknown {
  const configured = context.config("virtlift:host");
  if (configured === undefined || !configured.trimStart().startsWith("{")) return configured;
  try {
    return JSON.parse(configured);
  } catch {
    return configured;
  }
}

/** Which machine and daemon a declaration means, whatever way leads there: user, port, keys and parameters may change without it being another one. */
export function daemonOf(declared: DeclaredHost): string {
  const match = /^([a-z]+)(?:\+[a-z0-9]+)?:\/\/(?:[^@/]*@)?(\[[^\]]*\]|[^:/?]*)(?::\d+)?(\/[^?]*)?/i.exec(declared.uri);
  const socket = /[?&]socket=([^&]*)/.exec(declared.uri)?.[1] ?? "";
  return match ? `${match[1]!.toLowerCase()}://${match[2]!.toLowerCase()}${match[3] ?? ""}${match[2] === "" ? socket : ""}` : declared.uri;
}
