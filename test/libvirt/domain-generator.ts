/** Machines by chance, the same for the same seed: every combination that our definitions can have, with texts that need escaping. */
import type { DiskSpec, InterfaceSpec } from "../../provider/libvirt/domain-devices.ts";
import type { DomainSpec } from "../../provider/libvirt/domain.ts";

/** A sequence of numbers in [0, 1): mulberry32. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

const WORDS = [
  "web",
  "a&b",
  "<root>",
  'say "hi"',
  "it's",
  "zwölf",
  "日本",
  "]]>",
  "&#10;",
  "two  spaces",
  "tab\there",
  "line\nbreak",
  "😀",
];

export function generateDomain(seed: number): DomainSpec {
  const next = random(seed);
  const pick = <T>(choices: readonly T[]): T => choices[Math.floor(next() * choices.length)]!;
  const maybe = <T>(value: () => T): T | undefined => (next() < 0.5 ? value() : undefined);
  const several = <T>(make: (index: number) => T): readonly T[] =>
    Array.from({ length: Math.floor(next() * 4) }, (_, index) => make(index));
  const word = (): string => pick(WORDS);
  const hex = (digits: number): string => Array.from({ length: digits }, () => Math.floor(next() * 16).toString(16)).join("");
  const firmware = pick(["bios", "uefi"] as const);
  const memoryKiB = 1024 * (16 + Math.floor(next() * 100_000));
  const vcpus = 1 + Math.floor(next() * 64);
  const isUefi = firmware === "uefi";
  const mode = pick(["maximum", "host-passthrough", "host-model", "custom"]);
  return {
    type: pick(["kvm", "qemu", "test"] as const),
    name: `m${hex(4)}`,
    uuid: `${hex(8)}-${hex(4)}-${hex(4)}-${hex(4)}-${hex(12)}`,
    title: maybe(word),
    description: maybe(word),
    metadata: {
      origin: `acme/shop/${word()}/web`,
      disks: several(() => ({ diskId: word(), source: maybe(word), migrationRef: maybe(word) })),
      volumes: several(() => ({ path: `/images/${word()}`, isUnfinished: next() < 0.5 })),
      tags: Object.fromEntries(several((index) => [`${word()}${index}`, word()])),
      patches: maybe(() => hex(16)),
    },
    memoryKiB,
    maxMemoryKiB: maybe(() => memoryKiB + 1024 * (1 + Math.floor(next() * 1000))),
    hugepagesKiB: maybe(() => pick([0, 2048, 1_048_576])),
    vcpus,
    maxVcpus: maybe(() => vcpus + 1 + Math.floor(next() * 64)),
    pinning: maybe(() => [
      { vcpu: 0, cpus: "0-3" },
      { vcpu: 2, cpus: "5,7-9" },
    ]),
    arch: "x86_64",
    machine: pick(["q35", "pc"] as const),
    firmware,
    secureBoot: isUefi && next() < 0.5,
    loader: isUefi
      ? maybe(() => ({ path: `/fw/${word()}`, nvramTemplate: maybe(() => "/fw/vars"), nvram: maybe(() => "/vars/x.fd") }))
      : undefined,
    smbios: maybe(() => ({
      system: maybe(() => ({ manufacturer: word().trim(), serial: hex(8) })),
      baseBoard: maybe(() => ({ product: hex(4) })),
    })),
    cpu: maybe(() => ({
      mode,
      model: mode === "custom" ? "EPYC" : undefined,
      features: maybe(() => ({ vmx: pick(["require", "disable"]), aes: "require" })),
      isMigratable: mode === "host-passthrough" ? maybe(() => false as const) : undefined,
    })),
    topology: maybe(() => ({ sockets: 1 + Math.floor(next() * 4), cores: 1 + Math.floor(next() * 8), threads: pick([1, 2]) })),
    clock: pick(["utc", "localtime"] as const),
    hasHyperv: next() < 0.5,
    disks: several((index): DiskSpec => ({
      device: pick(["disk", "cdrom"] as const),
      path: `/images/${index} ${word()}`,
      format: pick(["qcow2", "raw"] as const),
      bus: pick(["virtio", "sata", "scsi", "ide"] as const),
      target: `vd${"abcd"[index]}`,
      bootOrder: maybe(() => index + 1),
      serial: maybe(() => hex(8)),
      isReadOnly: next() < 0.5,
      isShareable: maybe(() => true as const),
      cache: maybe(() => pick(["none", "writeback"])),
      io: maybe(() => pick(["native", "threads"])),
      discard: maybe(() => pick(["unmap", "ignore"])),
    })),
    interfaces: several((): InterfaceSpec => {
      const type = pick(["network", "bridge", "direct", "user"] as const);
      return {
        type,
        source: type === "user" ? undefined : word(),
        mac: `52:54:00:${hex(2)}:${hex(2)}:${hex(2)}`,
        model: pick(["virtio", "e1000e"]),
        mode: type === "direct" ? maybe(() => "bridge") : undefined,
        vlan: maybe(() => pick([[42], [7, 8]])),
        isLinkDown: maybe(() => true as const),
        mtu: maybe(() => 9000),
        queues: maybe(() => 4),
      };
    }),
    serialLog: maybe(() => `/logs/${word()}`),
    graphics: maybe(() => ({ type: pick(["vnc", "spice"]), listen: maybe(() => "127.0.0.1") })),
    video: maybe(() => pick(["vga", "virtio"])),
    hasTpm: next() < 0.5,
    hasBalloon: next() < 0.5,
    hasRng: next() < 0.5,
    watchdog: maybe(() => pick(["reset", "poweroff"])),
  };
}
