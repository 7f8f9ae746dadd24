import type { Rule } from "./rule.ts";
export const DISK_RULES: readonly Rule<never>[] = [];
