#!/usr/bin/env bash
# Trains on separate "hosts" of this machine: network namespaces with an address of their own, joined by a bridge.
#
#   sudo benchmarks/hosts.sh N PYTHON --config FILE [--SECTION.FIELD VALUE ...]
#
# Each host runs one process of scripts/train.py; they share the files and nothing else. Needs root and iproute2.
# The exit code is the first that is not 0. What each host prints goes to hosts.<i>.log in this folder.
set -euo pipefail

count=$1 python=$2
shift 2
bridge=jaxlm-br subnet=10.77.0

remove() {
  for ((i = 0; i < count; i++)); do ip netns del "jaxlm$i" 2>/dev/null || true; done
  ip link del "$bridge" 2>/dev/null || true
}
trap remove EXIT
remove

ip link add "$bridge" type bridge
ip link set "$bridge" up
for ((i = 0; i < count; i++)); do
  ip netns add "jaxlm$i"
  ip link add "jaxlm-v$i" type veth peer name eth0 netns "jaxlm$i"
  ip link set "jaxlm-v$i" master "$bridge" up
  ip -n "jaxlm$i" address add "$subnet.$((i + 1))/24" dev eth0
  ip -n "jaxlm$i" link set eth0 up
  ip -n "jaxlm$i" link set lo up
done

pids=()
for ((i = 0; i < count; i++)); do
  # Gloo, the collectives of the CPU, looks its own address up by the host's name.
  ip netns exec "jaxlm$i" unshare --uts bash -c 'hostname "$1"; shift; exec "$@"' - "$subnet.$((i + 1))" \
    "$python" "$(dirname "$0")/../scripts/train.py" "$@" \
    --coordinator_address "$subnet.1:8476" --num_processes "$count" --process_id "$i" >"hosts.$i.log" 2>&1 &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || { this=$?; ((code)) || code=$this; }
done
exit "$code"
