/** Where a machine with all its disks lies, as programs and manifests declare it. Knows no Pulumi: the batch's driver uses it too. */
import { dirname, join } from "node:path";
import type { DescribedDisk } from "../provider/resources/machine-description.ts";

/** An OVA, an OVF beside its disks, a zip archive of either, or a VMX beside its VMDKs. */
export type PackageSource =
  | {
      /** Path of an OVA or an OVF, or of a zip archive that holds an OVA, or an OVF and its disks. */
      readonly ova: string;
    }
  | {
      /** Path of a VMX. */
      readonly vmx: string;
    };

/** The package in a declared source; undefined when it is of another kind, such as a single image. */
export function packageIn(source: object): PackageSource | undefined {
  if ("ova" in source && typeof source.ova === "string") return { ova: source.ova };
  return "vmx" in source && typeof source.vmx === "string" ? { vmx: source.vmx } : undefined;
}

/** The path as declared. */
export function packagePath(source: PackageSource): string {
  return "vmx" in source ? source.vmx : source.ova;
}

/** A disk of the package as a source of `ImportedDisk`; undefined when it is blank. */
export function diskSource(
  source: PackageSource,
  { file, index }: DescribedDisk,
): { readonly ova: string; readonly disk: number } | { readonly file: string; readonly vmx: string } | undefined {
  if (file === undefined) return undefined;
  return "vmx" in source ? { file: join(dirname(source.vmx), file), vmx: source.vmx } : { ova: source.ova, disk: index };
}
