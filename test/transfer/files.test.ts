import { appendFile, link, stat, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { LocalFolder } from "../../provider/transfer/files.ts";
import { openDirectory } from "../bed/directory.ts";

/** A file of a whole second's time, opened as a source. */
async function openFolder() {
  const directory = await openDirectory("folder");
  const path = join(directory.path, "disk.raw");
  const setBack = () => utimes(path, 1_700_000_000, 1_700_000_000);
  await writeFile(path, "bytes");
  await setBack();
  const folder = new LocalFolder(path);
  await folder.file("");
  return {
    folder,
    path,
    setBack,
    async [Symbol.asyncDispose]() {
      await folder.close();
      await directory[Symbol.asyncDispose]();
    },
  };
}

test("notices more bytes, other bytes, and other bytes whose time was set back in a file that was opened", async () => {
  const changes: readonly ((path: string, setBack: () => Promise<void>) => Promise<void>)[] = [
    (path) => appendFile(path, "more"),
    (path) => writeFile(path, "other", { flag: "r+" }),
    async (path, setBack) => {
      const { ctimeNs } = await stat(path, { bigint: true });
      // The kernel's clock of file times goes in steps of some milliseconds.
      while ((await stat(path, { bigint: true })).ctimeNs === ctimeNs) {
        await writeFile(path, "other", { flag: "r+" });
        await setBack();
      }
    },
  ];
  for (const change of changes) {
    await using opened = await openFolder();
    await opened.folder.assertUnchanged();
    await change(opened.path, opened.setBack);
    await expect(opened.folder.assertUnchanged()).rejects.toThrow("disk.raw changed while it was read: stop what writes it");
  }
});

test("takes a file that only got another link as unchanged, as a backup makes one", async () => {
  await using opened = await openFolder();
  await link(opened.path, `${opened.path}.backup`);
  await expect(opened.folder.assertUnchanged()).resolves.toBeUndefined();
});
