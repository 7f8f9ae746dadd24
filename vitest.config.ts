import { join } from "node:path";
import { env } from "node:process";
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    setupFiles: ["test/setup.ts"],
    // Tests boot machines under an emulated CPU: more of them at a time take longer, not less.
    maxWorkers: 2,
    // On a machine that others load too a test may get a second try; `npm test` names those that needed it.
    retry: env["CI"] === undefined ? 0 : 1,
    testTimeout: 30_000,
    hookTimeout: 30_000,
    restoreMocks: true,
    // Each process that a test starts would compile the sources anew.
    env: { NODE_COMPILE_CACHE: join(import.meta.dirname, "node_modules/.cache/compiled") },
  },
});
