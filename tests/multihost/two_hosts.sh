#!/bin/sh
# Run a command on two hosts that are network namespaces of this machine, joined by one cable:
#
#     two_hosts.sh COMMAND...        with HOST=0 or 1 and MASTER=the address of host 0 in its environment
#
# Needs root rights. Each host has an address of its own and no way out; GLOO_SOCKET_IFNAME says which
# interface joins them. Both namespaces are gone afterwards, and the exit code is that of the worse host.
set -eu
name=hdc$$
trap 'for host in 0 1; do ip netns del "$name-$host" 2>/dev/null || true; done' EXIT
for host in 0 1; do
    ip netns add "$name-$host"
    ip -n "$name-$host" link set lo up
done
ip -n "$name-0" link add cable0 type veth peer name cable1 netns "$name-1"
for host in 0 1; do
    ip -n "$name-$host" addr add "10.213.0.$((host + 1))/24" dev "cable$host"
    ip -n "$name-$host" link set "cable$host" up
done
for host in 0 1; do
    ip netns exec "$name-$host" env HOST="$host" MASTER=10.213.0.1 GLOO_SOCKET_IFNAME="cable$host" \
        "$@" &
    eval "process$host=$!"
done
code=0
wait "$process0" || code=$?
wait "$process1" || code=$?
exit $code
