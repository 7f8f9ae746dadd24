/** What the resource classes share: types of arguments and outputs, the identity of a resource, and the marking of secrets. */
import * as pulumi from "@pulumi/pulumi";
import type { z } from "zod";
import type { HostSchema } from "../provider/resources/schema.ts";

/**
 * A value that may be known later, at any depth. Documentation on the keys is kept.
 * Where a value may be a `Replaceable` (a plain reference), it may be a `Replacement` (a resource) too.
 */
export type Later<Value, Replaceable = never, Replacement = never> = pulumi.Input<LaterInside<Value, Replaceable, Replacement>>;

type LaterInside<Value, Replaceable, Replacement> = Value extends string | number | boolean | undefined
  ? Value
  : Value extends readonly (infer Element)[]
    ? readonly Later<Element, Replaceable, Replacement>[]
    : | { readonly [Key in keyof Value]: Later<Value[Key], Replaceable, Replacement> }
      | ([Value] extends [Replaceable] ? Replacement : never);

/** The outputs of a resource, one for each property of its state. */
export type Outputs<State> = { readonly [Key in keyof State]-?: pulumi.Output<State[Key]> };

/** A host as programs declare it. */
export type Host = z.input<typeof HostSchema>;

/** `<organization>/<project>/<stack>/<logical name>`: what identifies the resource on its host, whatever it is called there. */
export function originOf(name: string): string {
  return `${pulumi.getOrganization()}/${pulumi.getProject()}/${pulumi.getStack()}/${name}`;
}

/** The host with its passphrase and password marked as secrets, also where the program gave plain text. */
export function withSecrets(host: Later<Host> | undefined): pulumi.Input<unknown> {
  if (host === undefined || typeof host === "string") return host;
  if (host instanceof Promise || pulumi.Output.isInstance(host))
    return pulumi.output(host).apply((known) => pulumi.output(withSecrets(known)));
  const { passphrase, password, ...open } = host;
  return {
    ...open,
    ...(passphrase !== undefined && { passphrase: pulumi.secret(passphrase) }),
    ...(password !== undefined && { password: pulumi.secret(password) }),
  };
}
