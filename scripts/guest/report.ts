/** Reads what the proof guest says on its serial console. Pure. */

/** A disk as the guest sees it; `sha256` is there when the guest hashed it. */
export interface GuestDisk {
  /** `/dev/vda` on virtio, `/dev/sda` on SATA, IDE and SCSI. */
  readonly device: string;
  readonly sizeBytes: number;
  readonly sha256: string | undefined;
}

export interface GuestInterface {
  /** Lower case with colons. */
  readonly mac: string;
  readonly driver: string;
}

export interface GuestReport {
  /** As `uname -r` says. */
  readonly kernel: string;
  readonly firmware: "bios" | "uefi";
  readonly vcpus: number;
  /** What the kernel has to give away: somewhat less than the machine's memory. */
  readonly memoryKiB: number;
  /** SMBIOS system UUID in lower case; empty when the machine has none. */
  readonly uuid: string;
  readonly interfaces: readonly GuestInterface[];
  readonly disks: readonly GuestDisk[];
  /** Addresses from DHCP, as far as they have come; only a guest that stays asks for them. */
  readonly ipv4Addresses: readonly string[];
}

/** The last boot in the console's text, once the guest has told all that it found at boot; undefined before that. Other lines are ignored. */
export function parseGuestReport(console: string): GuestReport | undefined {
  const lines = console.split("\n").flatMap((line) => {
    const told = /^virtlift-guest (.*?)\s*$/.exec(line)?.[1];
    return told === undefined ? [] : [told];
  });
  const boot = lines.slice(lines.findLastIndex((line) => line.startsWith("kernel=")));
  if (!boot.includes("done")) return undefined;
  const facts = boot.map((line) => new Map(line.split(" ").map((word) => splitOnce(word))));
  const machine = facts[0] ?? new Map<string, string>();
  return {
    kernel: machine.get("kernel") ?? "",
    firmware: machine.get("firmware") === "uefi" ? "uefi" : "bios",
    vcpus: Number(machine.get("vcpus")),
    memoryKiB: Number(machine.get("memory-kib")),
    uuid: (machine.get("uuid") ?? "").toLowerCase(),
    interfaces: facts.flatMap((fact) => {
      const mac = fact.get("mac");
      return mac === undefined ? [] : [{ mac, driver: fact.get("driver") ?? "" }];
    }),
    disks: facts.flatMap((fact) => {
      const device = fact.get("disk");
      return device === undefined ? [] : [{ device, sizeBytes: Number(fact.get("bytes")), sha256: fact.get("sha256") }];
    }),
    ipv4Addresses: facts.flatMap((fact) => fact.get("ipv4") ?? []),
  };
}

function splitOnce(word: string): [string, string] {
  const at = word.indexOf("=");
  return at < 0 ? [word, ""] : [word.slice(0, at), word.slice(at + 1)];
}
