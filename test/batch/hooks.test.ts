import { expect, test } from "vitest";
import { runHook } from "../../sdk/batch/hooks.ts";

const place = { folder: "/", environment: { PATH: process.env["PATH"] }, variables: { VIRTLIFT_MACHINE: "web; rm -rf /" } };

test("runs a program without a shell, tells it which machine it is about, and gives what it said", async () => {
  expect(await runHook(["printenv", "VIRTLIFT_MACHINE"], place)).toBe("web; rm -rf /");
  expect(await runHook(["echo", "$HOME", "two\nlines"], place)).toBe("$HOME two lines");
});

test("says which program failed, how, and what it said", async () => {
  await expect(runHook(["sh", "-c", "echo no >&2; exit 3"], place)).rejects.toThrow("the hook sh exited 3: no");
  await expect(runHook(["/there/is/none"], place)).rejects.toThrow("the hook /there/is/none cannot be started: ");
});
