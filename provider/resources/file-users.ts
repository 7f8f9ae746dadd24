/** Which machines reach a file, whatever they call it: by another name of the same file, or through files that are based on it. */
import { XMLParser } from "fast-xml-parser";
import { isNotFound } from "../errors.ts";
import type { Host } from "../host/hosts.ts";
import { DOMAIN_XML } from "../libvirt/constants.ts";

/** Attributes are never trimmed: a blank at the end of a path is part of it. */
const parser = new XMLParser({ ignoreAttributes: false, attributeNamePrefix: "", parseAttributeValue: false, trimValues: false });

/**
 * Reads `FORMAT PATH` lines, answers the PATHs that lead to the file $1. From a qcow2 it follows the backing files, 100 at most; it reads nothing
 * but their headers. Source: qcow2.rst, bytes 8 to 19; a relative name counts from the file that has it.
 */
const FOLLOW = `
final=$1
while IFS= read -r line; do
  format=\${line%% *} named=\${line#* } depth=0
  at=$named
  while [ -e "$at" ] && [ "$depth" -lt 100 ]; do
    if [ "$at" -ef "$final" ]; then printf '%s\\n' "$named"; break; fi
    [ "$format" = qcow2 ] && [ -f "$at" ] || break
    set -- $(od -An -v -tu1 -N 20 "$at")
    [ $# -eq 20 ] && [ "$1 $2 $3 $4" = '81 70 73 251' ] || break
    offset=$(((\${13} << 24) + (\${14} << 16) + (\${15} << 8) + \${16})) length=$(((\${17} << 24) + (\${18} << 16) + (\${19} << 8) + \${20}))
    [ "$offset" -gt 0 ] && [ "$length" -gt 0 ] && [ "$length" -le 1023 ] || break
    name=$(dd if="$at" bs=1 skip="$offset" count="$length" status=none)
    name=\${name#file:}
    case $name in
    /*) at=$name ;;
    *:*) break ;;
    *) at=\${at%/*}/$name ;;
    esac
    depth=$((depth + 1))
  done
done
`;

/**
 * Names of the machines, running or only defined, one of whose disks is the file, or is based on it. The comparison is the host's own, by device and
 * inode, so that links and mounts hide nothing. Empty when the file does not exist. Throws CommandError where no commands can be run.
 */
export async function machinesReaching(host: Host, path: string): Promise<readonly string[]> {
  const libvirt = await host.libvirt();
  const users = new Map<string, Set<string>>();
  for (const domain of await libvirt.connectListAllDomains()) {
    for (const flags of [0, DOMAIN_XML.inactive]) {
      let xml: string;
      try {
        xml = await libvirt.domainGetXMLDesc(domain, flags);
      } catch (error) {
        // Another user may remove a machine between the list and the look at it.
        if (isNotFound(error)) break;
        throw error;
      }
      for (const line of diskLines((parser.parse(xml) as DomainXml).domain?.devices)) {
        users.set(line, (users.get(line) ?? new Set()).add(domain.name));
      }
    }
  }
  const input = [...users.keys()].map((line) => `${line}\n`).join("");
  const { stdout } = await host.run(["sh", "-c", FOLLOW, "virtlift", path], { input });
  const reaching = new Set(stdout.toString("utf8").split("\n"));
  return [...new Set([...users].flatMap(([line, names]) => (reaching.has(line.slice(line.indexOf(" ") + 1)) ? [...names] : [])))];
}

interface DomainXml {
  readonly domain?: { readonly devices?: unknown };
}

/** `FORMAT PATH` of every file that the node names as a disk's source, at any depth; of several disks under one tag too. */
function diskLines(node: unknown): readonly string[] {
  if (Array.isArray(node)) return node.flatMap(diskLines);
  if (typeof node !== "object" || node === null) return [];
  const { source, driver, format } = node as { readonly source?: unknown; readonly driver?: unknown; readonly format?: unknown };
  const path = attribute(source, "file") ?? attribute(source, "dev");
  const isPath = path?.startsWith("/") === true && !path.includes("\n");
  const own = isPath ? [`${attribute(driver, "type") ?? attribute(format, "type") ?? "raw"} ${path}`] : [];
  return [...own, ...Object.values(node).flatMap(diskLines)];
}

function attribute(node: unknown, name: string): string | undefined {
  const value: unknown = typeof node === "object" && node !== null ? (node as Readonly<Record<string, unknown>>)[name] : undefined;
  return typeof value === "string" ? value : undefined;
}
