# Takes KVM out of this mount name space: the devices that daemons and QEMU need go to a /dev of their own. To be run in a name space that nobody else is in.
# A file over /dev/kvm would not do: libvirt carries mounts below /dev into each machine's name space, where that one fails.
set -e
stage=$(mktemp -d -p /run)
mount -t tmpfs -o mode=0755 virtlift-dev "$stage"
for device in null zero full random urandom tty ptmx net fuse fd stdin stdout stderr loop-control; do
  if [ -e "/dev/$device" ]; then cp --archive "/dev/$device" "$stage/"; fi
done
mkdir "$stage/pts" "$stage/shm"
mount --bind /dev/pts "$stage/pts"
mount -t tmpfs -o mode=1777 virtlift-shm "$stage/shm"
umount -R -l /dev
mount --move "$stage" /dev
rmdir "$stage"
