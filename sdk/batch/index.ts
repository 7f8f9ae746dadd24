/** The batch for programs: what the command `virtlift` does, without its output. */
export {
  Batch,
  type BatchOptions,
  type BatchResult,
  type MachineResult,
  type MachineStatus,
  openBatch,
  readBatch,
  type Selection,
} from "./driver.ts";
export type { BatchEvent, Phase } from "./events.ts";
export type { Made, MachineStanding, MachineState } from "./journal.ts";
export { type BatchMachine, type Manifest, ManifestError, manifestJsonSchema, parseManifest } from "./manifest.ts";
export type { BatchPlan, Finding, MachinePlan } from "./plan.ts";
export { type BatchReport, readReport, renderReport } from "./report.ts";
