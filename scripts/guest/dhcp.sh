#!/bin/busybox sh
# udhcpc's script: takes the offered address and says so.
case "$1" in
  deconfig) ip link set "$interface" up ;;
  bound)
    ip address replace "$ip/$mask" dev "$interface"
    [ -n "$router" ] && ip route replace default via "${router%% *}"
    echo "virtlift-guest ipv4=$ip interface=$interface" > /dev/console
    ;;
esac
