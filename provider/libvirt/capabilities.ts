/** What a host can run, from libvirt's capabilities and domain capabilities. Pure. Source: https://libvirt.org/formatcaps.html, formatdomaincaps.html. */
import { parseXml, type XmlElement } from "../image/xml.ts";

/** The kinds of machines that the host offers for a full PC: `kvm`, `qemu`, `test`. Throws ImageError on what is no XML. */
export function parseDomainTypes(capabilities: string): ReadonlySet<string> {
  const types = all(parseXml(capabilities, "the host's capabilities"), "guest")
    .filter((guest) => all(guest, "os_type").some(({ text }) => text === "hvm"))
    .flatMap((guest) => all(guest, "arch"))
    .flatMap((arch) => all(arch, "domain").map((domain) => ({ arch, type: domain.attributes.get("type") ?? "" })))
    // libvirt's test driver knows no 64 bits, and takes what it is given.
    .filter(({ arch, type }) => arch.attributes.get("name") === "x86_64" || type === "test");
  return new Set(types.map(({ type }) => type));
}

/** Whether UEFI firmware is offered, and one with Secure Boot. Throws ImageError on what is no XML. */
export function parseFirmwares(domainCapabilities: string): { readonly uefi: boolean; readonly secureBoot: boolean } {
  const [os] = all(parseXml(domainCapabilities, "the domain capabilities"), "os");
  const uefi = values(os, "firmware").includes("efi");
  const [loader] = os ? all(os, "loader") : [];
  return { uefi, secureBoot: uefi && values(loader, "secure").includes("yes") };
}

function values(parent: XmlElement | undefined, name: string): readonly string[] {
  const list = parent && all(parent, "enum").find(({ attributes }) => attributes.get("name") === name);
  return list ? all(list, "value").map(({ text }) => text) : [];
}

function all(parent: XmlElement, name: string): readonly XmlElement[] {
  return parent.children.filter((child) => child.name === name);
}
