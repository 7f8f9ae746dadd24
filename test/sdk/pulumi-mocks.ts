/** Runs resource classes without an engine: Pulumi's own mock monitor records what they register. */
import * as pulumi from "@pulumi/pulumi";

export interface Registered {
  readonly type: string;
  readonly name: string;
  readonly inputs: Readonly<Record<string, unknown>>;
}

/**
 * Makes Pulumi register with a monitor that answers with the inputs and `outputs`, as project `project`, stack `dev` of `organization`.
 * Process-wide: once per test file. The returned list grows with each registration.
 */
export async function recordRegistrations(outputs: Readonly<Record<string, unknown>> = {}): Promise<readonly Registered[]> {
  const registered: Registered[] = [];
  await pulumi.runtime.setMocks(
    {
      newResource({ type, name, inputs }) {
        registered.push({ type, name, inputs });
        return { id: `${name}-id`, state: { ...inputs, ...outputs } };
      },
      call: ({ inputs }) => inputs,
    },
    "project",
    "dev",
    false,
    "organization",
  );
  return registered;
}

/** The value of an output once it is known, and whether it is a secret. */
export async function settled<Value>(output: pulumi.Output<Value>): Promise<{ readonly value: Value; readonly isSecret: boolean }> {
  const value = await new Promise<Value>((resolve) => output.apply(resolve));
  return { value, isSecret: await pulumi.isSecret(output) };
}
