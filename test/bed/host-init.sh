# First process of a private host; "$1" is its folder, "$2" the cache that it shares with others. Runs in its own mount, network, process and name space.
set -e
root=$1
mount --make-rprivate /
hostname "$(cat "$root/hostname")"
# Two daemons that number their machines alike would put them into one control group, and each would kill the other's.
umount -R -l /sys/fs/cgroup 2> /dev/null || true
for folder in etc run; do mount --bind "$root/$folder" "/$folder"; done
for folder in lib log; do mount --bind "$root/$folder" "/var/$folder/libvirt"; done
mount --bind "$2" /var/cache/libvirt
# Devices without KVM, so that tests meet the same on every machine. Besides, where QEMU's user may not open a /dev/kvm that works for root,
# libvirt throws its knowledge of QEMU away and probes again at each look, for seconds.
mkdir -p "$root/dev"
mount -t tmpfs -o mode=0755 virtlift-test "$root/dev"
for device in null zero full random urandom tty ptmx net fuse fd stdin stdout stderr loop-control; do
  [ -e "/dev/$device" ] && cp --archive "/dev/$device" "$root/dev/"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount --bind /dev/pts "$root/dev/pts"
mount -t tmpfs -o mode=1777 virtlift-test "$root/dev/shm"
umount -R -l /dev
mount --move "$root/dev" /dev
ip link set lo up
rm -rf /run/*
mkdir -p /run/dbus /run/sshd
dbus-daemon --system --fork
virtlogd -d
# A daemon that was killed comes back, as a service manager would see to it. The shell stays, to bury the orphans that a first process inherits.
while :; do
  libvirtd &
  wait "$!" || true
done
