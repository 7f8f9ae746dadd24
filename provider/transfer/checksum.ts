/** The digest that a user promises of a source: given, or found by the source's name in a list on a web server. */
import { DiskError } from "../errors.ts";
import { type Digest, MAX_MANIFEST_BYTES, parseDigest, parseDigestList } from "../image/manifest.ts";
import { ImageError } from "../image/parser.ts";
import { WebFolder } from "./url.ts";

/**
 * The promised digest of the file `name`. `checksum` is `sha256:<hex>` (also sha1, sha512), or the URL of a list as sha256sum(1) writes it.
 * Throws DiskError (step "source") when there is no list or the name is not in it, ConnectionError when its server cannot be reached.
 */
export async function resolveChecksum(
  checksum: string,
  name: string,
  options: { readonly signal?: AbortSignal | undefined; readonly silenceMs?: number | undefined } = {},
): Promise<Digest> {
  if (!/^https?:/i.test(checksum)) return parseDigest(checksum);
  const folder = new WebFolder({ url: checksum }, options);
  try {
    const range = await folder.file("");
    const bytes = await range.read(0, MAX_MANIFEST_BYTES + 1);
    if (bytes.length > MAX_MANIFEST_BYTES) throw new ImageError(`it has more than ${MAX_MANIFEST_BYTES} bytes`);
    const digest = parseDigestList(bytes.toString("utf8")).get(name);
    if (digest === undefined) throw new ImageError(`it says nothing about ${name}`);
    return digest;
  } catch (error) {
    if (!(error instanceof ImageError)) throw error;
    const message = `the list of checksums ${checksum.replace(/\?.*/s, "?...")} is of no use: ${error.message}`;
    throw new DiskError(message, { step: "source", path: name, cause: error });
  } finally {
    await folder.close();
  }
}
