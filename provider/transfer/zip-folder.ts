/** The members of a zip archive as files beside each other. Each is copied out, inflated and compared with its checksum, when it is first read. */
import { posix } from "node:path";
import { locateMember, parseZip, selectMember, type ZipMember } from "../image/zip.ts";
import { drive, type Folder, MissingFile, Range, refusePath } from "./range.ts";
import { chunksOf, type Packing, peekInside, stage, type Staged } from "./unwrap.ts";

export interface ZipOptions {
  /** The folder of the temporary copies. */
  readonly scratchFolder: string;
  readonly signal?: AbortSignal | undefined;
}

/** The start of a member, inflated. `isWhole` says that there is no more. */
export interface MemberStart {
  readonly bytes: Buffer;
  readonly isWhole: boolean;
}

/** The folder of one chosen member. Close it. */
export class ZipFolder implements Folder {
  readonly #archive: Range;
  readonly #members: readonly ZipMember[];
  readonly #chosen: ZipMember;
  readonly #options: ZipOptions;
  readonly #files = new Map<ZipMember, Range>();
  readonly #staged = new Map<ZipMember, Promise<Staged>>();

  private constructor(archive: Range, members: readonly ZipMember[], chosen: ZipMember, options: ZipOptions) {
    this.#archive = archive;
    this.#members = members;
    this.#chosen = chosen;
    this.#options = options;
  }

  /** Reads the archive's directory, and chooses as `selectMember` does. Throws ImageError. */
  static async open(archive: Range, wanted: number | string | undefined, options: ZipOptions): Promise<ZipFolder> {
    const members = await drive(parseZip(archive.sizeBytes), () => Promise.resolve(archive));
    return new ZipFolder(archive, members, selectMember(members, wanted), options);
  }

  /** The chosen member for "", else one of that plain name in the same folder. Its size is known before it is read. */
  async file(name: string): Promise<Range> {
    const member = this.#member(name);
    let file = this.#files.get(member);
    if (!file) {
      const readAt = async (offset: number, length: number): Promise<Buffer> => (await this.#copied(member)).range.read(offset, length);
      file = new Range(posix.basename(member.name), { sizeBytes: member.sizeBytes }, { readAt });
      this.#files.set(member, file);
    }
    return file;
  }

  /** The first few MiB of a member, without copying it. */
  async peek(name: string): Promise<MemberStart> {
    const { range, packing } = await this.#packed(this.#member(name));
    return peekInside(range, packing);
  }

  /** What the archive lies in is watched by whoever opened that. */
  async assertUnchanged(): Promise<void> {}

  async close(): Promise<void> {
    const staged = await Promise.allSettled(this.#staged.values());
    for (const each of staged) if (each.status === "fulfilled") await each.value.close();
  }

  #member(name: string): ZipMember {
    if (name === "") return this.#chosen;
    refusePath(name);
    const path = posix.join(posix.dirname(this.#chosen.name), name);
    const member = this.#members.find((each) => posix.normalize(each.name) === path);
    if (member) return member;
    throw new MissingFile(`the zip archive ${this.#archive.name} holds no ${path}`, { step: "source", path });
  }

  #copied(member: ZipMember): Promise<Staged> {
    let staged = this.#staged.get(member);
    if (!staged) {
      staged = this.#copy(member);
      this.#staged.set(member, staged);
    }
    return staged;
  }

  async #copy(member: ZipMember): Promise<Staged> {
    const { scratchFolder: folder, signal } = this.#options;
    const { range, packing } = await this.#packed(member);
    const { sizeBytes, crc32 } = member;
    return stage(range.name, chunksOf(range), { folder, packing, expected: undefined, promised: { sizeBytes, crc32 }, signal });
  }

  /** A member as it lies in the archive. */
  async #packed(member: ZipMember): Promise<{ readonly range: Range; readonly packing: Packing | undefined }> {
    const { offset, lengthBytes, isDeflated } = await drive(locateMember(member), () => Promise.resolve(this.#archive));
    return { range: this.#archive.slice(member.name, offset, lengthBytes), packing: isDeflated ? "deflate" : undefined };
  }
}
