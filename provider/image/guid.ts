/** GUIDs as Microsoft's formats and GPT store them. */
import { viewOf } from "./bytes.ts";

/** The nil GUID: "none" wherever a GUID is optional. */
export const NIL_GUID = "00000000-0000-0000-0000-000000000000";

/** The 16 bytes at `offset` in lower-case text form; the first three groups are stored little-endian. Source: UEFI specification 2.10, appendix A. */
export function guidAt(bytes: Uint8Array, offset: number): string {
  const view = viewOf(bytes);
  const hex = (value: number, digits: number): string => value.toString(16).padStart(digits, "0");
  const tail = Array.from(bytes.subarray(offset + 8, offset + 16), (byte) => hex(byte, 2)).join("");
  const head = [hex(view.getUint32(offset, true), 8), hex(view.getUint16(offset + 4, true), 4), hex(view.getUint16(offset + 6, true), 4)];
  return [...head, tail.slice(0, 4), tail.slice(4)].join("-");
}
