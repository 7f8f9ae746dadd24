#!/bin/busybox sh
# The proof guest's only program: says on the serial console what the machine is made of, and the hash of its own disks.
# Every line it prints starts with "virtlift-guest"; `report.ts` reads them.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin

say() { echo "virtlift-guest $*"; }
declared() { grep -qw "$1" /proc/cmdline; }

while read -r module; do insmod "/modules/$module"; done < /modules/order

disks() { for each in /sys/block/[shv]d*; do [ -e "$each" ] && basename "$each"; done; }
interfaces() { for each in /sys/class/net/*/device; do [ -e "$each" ] && basename "$(dirname "$each")"; done; }

# Drivers find their devices some time after they are loaded: wait until the list has been still for half a second, 15 seconds at most.
before=none
still=0
for _ in $(seq 150); do
  now="$(disks) $(interfaces)"
  if [ "$now" = "$before" ] && [ -n "$(disks)" ]; then still=$((still + 1)); else still=0; fi
  [ "$still" -ge 5 ] && break
  before="$now"
  sleep 0.1
done

tell_interface() {
  say "mac=$(cat "/sys/class/net/$1/address") interface=$1 driver=$(basename "$(readlink "/sys/class/net/$1/device/driver")")"
}

tell_disk() {
  bytes=$(($(cat "/sys/block/$1/size") * 512))
  if declared virtlift.hash && [ "$bytes" -le 268435456 ]; then
    say "disk=/dev/$1 bytes=$bytes sha256=$(sha256sum "/dev/$1" | cut -d' ' -f1)"
  else
    say "disk=/dev/$1 bytes=$bytes"
  fi
}

# Tells what has appeared since the last call.
told=""
tell_new() {
  for each in $(interfaces) $(disks); do
    case " $told " in *" $each "*) continue ;; esac
    told="$told $each"
    if [ -e "/sys/class/net/$each" ]; then
      tell_interface "$each"
      declared virtlift.stay && udhcpc -b -i "$each" -s /dhcp > /dev/null 2>&1 &
    else
      tell_disk "$each"
    fi
  done
}

# What can change while the guest runs, a line each.
facts() {
  for each in $(interfaces); do echo "present=$(cat "/sys/class/net/$each/address") carrier=$(cat "/sys/class/net/$each/carrier" 2> /dev/null)"; done
  for each in $(disks); do echo "present=/dev/$each bytes=$(($(cat "/sys/block/$each/size") * 512))"; done
  echo "vcpus=$(nproc)"
  # The balloon moves in small steps, and the rest of the kernel a little too.
  echo "memory-mib=$(awk '/^MemTotal/ { print int($2 / 16384) * 16 }' /proc/meminfo)"
  for each in /sys/block/sr*; do
    [ -e "$each" ] || continue
    mkdir -p /medium
    if mount -t iso9660 -o ro "/dev/$(basename "$each")" /medium 2> /dev/null; then
      echo "medium=$(basename "$each") files=$(ls /medium | tr '\n' ',') user-data=$(sha256sum /medium/user-data 2> /dev/null | cut -d' ' -f1)"
      umount /medium
    else
      echo "medium=$(basename "$each") files="
    fi
  done
}

# Tells each fact that is new, and each that is no longer so.
known=/facts
tell_changes() {
  # A CPU that is plugged in waits to be switched on.
  for each in /sys/devices/system/cpu/cpu*/online; do [ -e "$each" ] && [ "$(cat "$each")" = 0 ] && echo 1 > "$each"; done
  facts > /facts.new
  # busybox's grep takes an empty list for one that fits everything.
  [ -e "$known" ] || echo nothing > "$known"
  grep -vxFf "$known" /facts.new | while read -r fact; do say "now $fact"; done
  grep -vxFf /facts.new "$known" | grep -vx nothing | while read -r fact; do say "no more $fact"; done
  mv /facts.new "$known"
}

addresses() {
  ip -o addr | awk '{
    split($4, address, "/")
    printf "%s{\"name\":\"%s\",\"ip-addresses\":[{\"ip-address-type\":\"%s\",\"ip-address\":\"%s\",\"prefix\":%s}]}", (NR > 1 ? "," : ""), $2, ($3 == "inet6" ? "ipv6" : "ipv4"), address[1], address[2]
  }'
}

# As much of QEMU's guest agent as libvirt asks for. A port is opened once only, for both directions, and has nothing to read until libvirt comes.
agent() {
  exec 3<> "$1"
  while true; do
    read -r call <&3 || sleep 1
    case "$call" in
      "") ;;
      *guest-sync*) echo "{\"return\":$(echo "$call" | sed 's/.*"id": *\([0-9]*\).*/\1/')}" >&3 ;;
      *guest-ping*) echo '{"return":{}}' >&3 ;;
      *guest-get-host-name*) echo '{"return":{"host-name":"proof"}}' >&3 ;;
      *guest-network-get-interfaces*) echo "{\"return\":[$(addresses)]}" >&3 ;;
      *) echo '{"error":{"class":"CommandNotFound","desc":"not known here"}}' >&3 ;;
    esac
  done
}

firmware=bios
[ -e /sys/firmware/efi ] && firmware=uefi
say "kernel=$(uname -r) firmware=$firmware vcpus=$(nproc) memory-kib=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo) uuid=$(cat /sys/class/dmi/id/product_uuid 2> /dev/null)"
tell_new
say "done"

if declared virtlift.stay; then
  for event in /sys/class/input/event*; do
    [ "$(cat "$event/device/name")" = "Power Button" ] || continue
    (dd if="/dev/input/$(basename "$event")" of=/dev/null bs=24 count=1 2> /dev/null && say "power button" && sleep 0.3 && poweroff -f) &
  done
  if declared virtlift.agent; then
    ip link set lo up
    ip -6 address add 2001:db8::77/64 dev "$(interfaces | head -n 1)"
    for _ in $(seq 15); do
      port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name 2> /dev/null) && break
      sleep 1
    done
    [ -n "$port" ] && agent "/dev/$(basename "$(dirname "$port")")" &
  fi
  while sleep 0.5; do
    tell_new
    tell_changes
  done
fi
# The serial port's last bytes leave the guest by interrupts, which power off does not wait for.
sleep 0.3
poweroff -f
