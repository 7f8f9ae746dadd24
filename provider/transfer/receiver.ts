/** The program that the host runs while a disk arrives, and what it needs there. */

/** After this a writer that only waits is taken for dead. Frames are sent from memory, so a live one waits for its source, or for nobody. */
const SILENCE_SECONDS = 30;

/** How long a frame may take to be unpacked: a thousand times as long as it does. */
const UNPACK_SECONDS = 60;

/**
 * The program that runs on the host while a disk arrives: POSIX sh, coreutils and flock, nothing to install.
 *
 * Arguments: the work folder, the import's id, the path to publish. It holds a lock on the part file until its stdin ends, reads one command a
 * line, and answers one line each:
 *
 * | command               | does                                                                | answers                                    |
 * |-----------------------|---------------------------------------------------------------------|--------------------------------------------|
 * | (start)               | takes the lock                                                      | `ready`, `ready zstd`, `busy`, or `exists` |
 * | `resume`              | hashes the frames that an earlier run noted, or empties the part    | `have OFFSET LENGTH SHA256`..., then `ok`  |
 * | `write OFFSET LENGTH` | writes the LENGTH bytes that follow, then hashes them from the file | `have OFFSET LENGTH SHA256`, in any order  |
 * | `unpack OFFSET LENGTH PACKED` | the same of LENGTH bytes that follow as PACKED bytes of zstd, which it has | the same                    |
 * | `clear OFFSET LENGTH` | makes zeros of a range, as far as the part reaches                  | `ok`                                       |
 * | `size BYTES`          | sets the part's size                                                | `ok`                                       |
 * | `allocate BYTES`      | allocates the part in full                                          | `ok`                                       |
 * | `sync`                | makes part and folder durable                                       | `ok`                                       |
 * | `digest OFFSET`       | hashes the part from OFFSET to its end                              | `digest SHA256`                            |
 * | `stamp LENGTH`        | keeps the LENGTH bytes that follow beside the part, with its inode  | `ok`                                       |
 * | `guest FORMAT`        | has qemu-img read the part into a raw file beside it                | `data OFFSET LENGTH`..., then `guest SIZE` |
 * | `content OFFSET LENGTH` | hashes a range of what qemu-img read                              | `have OFFSET LENGTH SHA256`                |
 * | `run LENGTH INPUT`    | runs the LENGTH bytes of sh that follow, on INPUT bytes as stdin    | `ok`                                       |
 * | `publish SECONDS`     | sets the time, links the part to the path without overwriting       | `published BYTES-ALLOCATED`, or `exists`   |
 * | `discard`             | removes part, journal and stamp                                     | `ok`                                       |
 *
 * The lock file says whether the program works or waits for its client: one that has waited for SILENCE_SECONDS is killed by the next writer that comes.
 * Whatever fails answers `error SENTENCE` and ends, with exit 0: an answer was given. So does `broken SENTENCE`, after which the next run may go on. The lock file is removed at the end of a finished or discarded import, so whoever takes the
 * lock checks that the file he locked is still the one under that name.
 *
 * Sources: dd(1) and sync(1) of coreutils (`iflag=fullblock,count_bytes`, `sync FILE` since 8.24), flock(1) of util-linux.
 */
export const RECEIVER = `
set -u
umask 077
work=$1 id=$2 final=$3
part=$work/$id.part journal=$work/$id.journal lock=$work/$id.lock stamp=$work/$id.stamp guest=$work/$id.guest packed=$work/$id.packed log=$work/$id.log fetched=$work/$id.source job=
fail() { printf 'error %s\\n' "$(printf '%s' "$*" | tr '\\n' ' ')"; exit 0; }
# As fail, where the next run may go on with what is there.
broken() { printf 'broken %s\\n' "$(printf '%s' "$*" | tr '\\n' ' ')"; exit 0; }
if command -v openssl >/dev/null 2>&1; then sha='openssl dgst -sha256 -r'; else sha=sha256sum; fi
# sum FILE OFFSET [dd's count=LENGTH]: sets \`digest\`. What dd complains of comes before the hash of what it could read.
sum() {
  digest=$({ { dd if="$1" bs=1048576 iflag=skip_bytes,count_bytes skip="$2" \${3:+"$3"} status=none 2>&3 || echo "cannot read $1" >&3; } | $sha; } 3>&1)
  case \${digest%% *} in '' | *[!0-9a-f]*) fail "$1 cannot be hashed: $(printf '%s' "$digest" | head -n 1)" ;; esac
  digest=\${digest%% *}
}
hash() {
  sum "$1" "$2" "count=$3"
  printf 'have %s %s %s\\n' "$2" "$3" "$digest"
}
# stop STATUS MESSAGE: a program that was killed says nothing against the disk.
stop() { if [ "$1" -gt 128 ]; then broken "a program of the copy was killed there"; else fail "$2"; fi; }
# The frame in \`packed\`; that it failed goes to 3, but not that nobody wanted it any more (SIGPIPE).
unpacked() { timeout ${UNPACK_SECONDS} zstd -q -d -c <"$packed" 9>&- || [ "$?" = 141 ] || echo "zstd failed there" >&3; }
# Writes what comes to the place of the frame.
put() { dd of="$part" bs=1048576 iflag=fullblock,count_bytes oflag=seek_bytes seek="$first" count="$second" conv=notrunc status=none; }
leads_away() { [ -L "$1" ] || { [ -e "$1" ] && [ "$(stat -c %h -- "$1" 2>/dev/null || echo 1)" -gt 1 ]; }; }
[ ! -L "$work" ] || fail "$work is a symbolic link"
# A writer whose client vanished without a word waits for the next command, or for the rest of a frame, and sshd may take hours to notice.
reclaim() {
  read -r state holder <"$lock" && [ "$state" = waiting ] || return
  now=$(date +%s)
  for each in "$lock" "$part"; do
    [ $((now - $(stat -c %Y -- "$each"))) -gt ${SILENCE_SECONDS} ] || return
  done
  tr '\\0' '\\n' <"/proc/$holder/cmdline" | grep -qxF -e "$id" || return
  kill -s KILL -- "-$(cut -d ' ' -f 5 "/proc/$holder/stat")"
}
tries=0
while :; do
  # Another import that ends removes the empty folder. \`command\` keeps the shell alive where the file cannot be made.
  if leads_away "$lock"; then rm -f -- "$lock"; fi
  if message=$(mkdir -p -- "$work" 2>&1) && command exec 9>>"$lock"; then
    flock -n 9 || { reclaim 2>/dev/null; echo busy; exit 0; }
    [ "$lock" -ef /dev/fd/9 ] && break
    message="the lock $lock keeps changing"
  fi
  tries=$((tries + 1))
  [ "$tries" -lt 20 ] || fail "\${message:-cannot write $lock}"
done
finish() { rm -f -- "$lock" "$guest" "$packed" "$log" "$fetched" "$fetched.etag"; rmdir -- "$work" 2>/dev/null; }
if [ -e "$final" ] || [ -L "$final" ]; then
  # A host that lost its power while it published has both names of the one file.
  if [ "$part" -ef "$final" ]; then rm -f -- "$part" "$journal"; fi
  [ -e "$part" ] || finish
  echo exists
  exit 0
fi
# A name in our folder that leads to a file elsewhere: only the name is ours.
for each in "$part" "$journal" "$stamp" "$packed" "$log" "$fetched" "$fetched.etag"; do
  if leads_away "$each"; then rm -f -- "$each"; fi
done
: >>"$part"
rm -f -- "$guest" "$packed"
trap 'rm -f -- "$guest" "$packed"' EXIT
# One that is there may not work.
if [ "$(printf virtlift | timeout 10 zstd -q -c 2>/dev/null | timeout 10 zstd -q -d -c 2>/dev/null)" = virtlift ]; then echo ready zstd; else echo ready; fi
idle=waiting
while echo "$idle $$" >/dev/fd/9; IFS=' ' read -r verb first second third; do
  case $verb in write | unpack) ;; *) echo working >/dev/fd/9 ;; esac
  idle=waiting
  case $verb in
  resume)
    # A host that lost its power may have kept any bytes of it.
    if [ -e "$journal" ]; then
      message=$({ tr '\\0' '\\n' <"$journal" | LC_ALL=C sed -n '/^[0-9]\\{1,15\\} [1-9][0-9]\\{0,14\\}$/p' | sort -u -o "$journal"; } 2>&1) || fail "$message"
    fi
    if [ -s "$journal" ]; then
      while IFS=' ' read -r offset length; do hash "$part" "$offset" "$length"; done <"$journal"
    else
      message=$(truncate -s 0 -- "$part" 2>&1) || fail "$message"
    fi
    echo ok ;;
  write | unpack)
    if [ "$verb" = unpack ]; then
      # All of it is taken off stdin before anything looks at it: what is left would be read as commands.
      message=$(dd of="$packed" bs=1048576 iflag=fullblock,count_bytes count="$third" status=none 2>&1) || fail "$message"
      reason=$({ unpacked 2>"$log" | put 2>&3; } 3>&1) || stop "$?" "$reason"
      said=$(head -n 1 -- "$log")
      [ -z "$reason" ] || broken "$reason\${said:+: $said}"
      rm -f -- "$log"
    else
      message=$(put 2>&1) || stop "$?" "$message"
    fi
    message=$({ printf '%s %s\\n' "$first" "$second" >>"$journal"; } 2>&1) || fail "cannot write $journal: $message"
    hash "$part" "$first" "$second" 9>&- </dev/null & ;;
  clear)
    size=$(stat -c %s -- "$part")
    [ "$second" -le "$((size - first))" ] || second=$((size - first))
    if [ "$second" -gt 0 ]; then
      # Not every file system knows how to make a hole.
      fallocate -p -o "$first" -l "$second" -- "$part" 2>/dev/null ||
        message=$(dd if=/dev/zero of="$part" bs=1048576 iflag=count_bytes oflag=seek_bytes seek="$first" count="$second" conv=notrunc status=none 2>&1) || fail "$message"
    fi
    echo ok ;;
  size)
    message=$(truncate -s "$first" -- "$part" 2>&1) || fail "$message"
    echo ok ;;
  allocate)
    message=$(fallocate -l "$first" -- "$part" 2>&1) || fail "$message"
    echo ok ;;
  sync)
    wait
    message=$(sync -- "$part" "$work" 2>&1) || fail "$message"
    echo ok ;;
  digest)
    sum "$part" "$first"
    printf 'digest %s\\n' "$digest" ;;
  stamp)
    { stat -c %i -- "$part" && dd bs=65536 iflag=fullblock,count_bytes count="$first" status=none; } >"$stamp" || fail "cannot write $stamp"
    message=$(sync -- "$stamp" "$work" 2>&1) || fail "$message"
    echo ok ;;
  guest)
    command -v qemu-img >/dev/null 2>&1 || fail "qemu-img is not installed there, and the content of the disk is to be verified with it"
    message=$(qemu-img convert -f "$first" -O raw "$part" "$guest" 2>&1 9>&- </dev/null) || fail "$message"
    {
      { qemu-img map -f raw "$guest" 2>"$log" 9>&- </dev/null || printf 'error %s\\n' "$(tr '\\n' ' ' <"$log")" >&3; } |
        tail -n +2 | while IFS=' ' read -r offset length rest; do
          printf 'data %s %s\\n' "$((offset))" "$((length))"
        done
    } 3>&1
    rm -f -- "$log"
    size=$(stat -c %s -- "$guest" 2>&1) || fail "$size"
    printf 'guest %s\\n' "$size" ;;
  content)
    hash "$guest" "$first" "$second" 9>&- </dev/null ;;
  run)
    script=$(dd bs=65536 iflag=fullblock,count_bytes count="$first" status=none)
    input=$(dd bs=65536 iflag=fullblock,count_bytes count="$second" status=none)
    (
      printf '%s\\n' "$input" | (eval "$script") >"$log" 2>&1 &
      child=$!
      trap 'kill "$child" 2>/dev/null; exit 0' TERM
      wait "$child"; status=$?
      echo "waiting $$" >/dev/fd/9
      if [ "$status" = 0 ]; then echo ok; else printf 'error %s\\n' "$(tail -n 3 -- "$log" | tr '\\n' ' ')"; fi
      rm -f -- "$log"
    ) </dev/null &
    job=$! idle=working ;;
  publish)
    message=$(chmod 0600 -- "$part" 2>&1 && touch -d "@$first" -- "$part" 2>&1 && sync -- "$part" 2>&1) || fail "$message"
    if message=$(ln -T -- "$part" "$final" 2>&1); then
      if command -v restorecon >/dev/null 2>&1; then restorecon -- "$final" >/dev/null 2>&1; fi
      message=$(sync -- "\${final%/*}" 2>&1) || fail "$message"
      rm -f -- "$part" "$journal"
      finish
      printf 'published %s\\n' "$(($(stat -c %b -- "$final") * 512))"
    elif [ -e "$final" ] || [ -L "$final" ]; then
      echo exists
    else
      fail "$message"
    fi ;;
  discard)
    wait
    rm -f -- "$part" "$journal" "$stamp" "$fetched" "$fetched.etag"
    finish
    echo ok ;;
  *) fail "unknown command" ;;
  esac
done
# Whoever asked for it is gone: what still runs must not outlive him with the lock in its hands.
[ -z "$job" ] || kill "$job" 2>/dev/null
wait
`;

/** What the receiver needs on the host, by the names that `command -v` finds. */
export const RECEIVER_TOOLS: readonly string[] = [
  "sh",
  "dd",
  "flock",
  "sync",
  "stat",
  "truncate",
  "touch",
  "ln",
  "mkdir",
  "sort",
  "sed",
  "tr",
  "sha256sum",
];
