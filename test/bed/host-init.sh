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
# Tests meet the same on every machine. Besides, where QEMU's user may not open a /dev/kvm that works for root,
# libvirt throws its knowledge of QEMU away and probes again at each look, for seconds.
sh "$(dirname "$0")/../../scripts/setup/hide-kvm.sh"
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
