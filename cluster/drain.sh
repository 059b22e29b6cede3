#!/usr/bin/env bash
# Tells Ray that this node will be gone in SECONDS (default 110), and waits until its workers have left, at most so long:
#   cluster/drain.sh [SECONDS]
# raydmd heeds it with a checkpoint when its cycle ends and goes on elsewhere, which is no failure. For preStop hooks, spot
# notices and whoever takes a node away by hand. It fails if no Ray runs here, and if Ray's head does not take it.
set -euo pipefail

seconds=${1:-110}
[[ $seconds =~ ^[0-9]+$ ]] || { echo "drain.sh: SECONDS must be a number, got '$seconds'" >&2; exit 2; }

# The raylet of this node; several nodes of one machine tell themselves apart by their addresses.
own=" $(hostname -I) 127.0.0.1 "
raylet='' words=''
for process in /proc/[0-9]*; do
    words=$(tr '\0' '\n' <"$process/cmdline" 2>/dev/null) || continue
    [[ ${words%%$'\n'*} == */raylet/raylet ]] || continue
    address=$(sed -n 's/^--node_ip_address=//p' <<<"$words")
    if [[ $own == *" $address "* ]]; then
        raylet=${process#/proc/}
        break
    fi
done
[[ $raylet ]] || { echo "drain.sh: no Ray runs on this node" >&2; exit 1; }

node=$(sed -n 's/^--node_id=//p' <<<"$words")
head=$(sed -n 's/^--gcs-address=//p' <<<"$words")
end=$((SECONDS + seconds))
ray drain-node --address "$head" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "drain.sh: this node goes in $seconds s" --deadline-remaining-seconds "$seconds"
echo "drain.sh: node $node of $head has $seconds s"

# Idle workers are titled ray::IDLE; the others work.
busy() { pgrep -P "$raylet" -f '^ray::[^I]' >/dev/null; }
while ((SECONDS < end)) && busy; do
    sleep 1
done
