#!/usr/bin/env bash
# Tells Ray that this node will be gone in SECONDS (default 110), and waits until its workers have left, at most so long:
#   cluster/drain.sh [SECONDS]
# raydmd heeds it with a checkpoint when its cycle ends and goes on elsewhere, which is no failure. For preStop hooks, spot
# notices and whoever takes a node away by hand. It fails if no Ray runs here, and if a head does not take it.
set -euo pipefail

seconds=${1:-110}
[[ $seconds =~ ^[0-9]+$ ]] || { echo "drain.sh: SECONDS must be a number, got '$seconds'" >&2; exit 2; }

# Every raylet of this node: of several clusters, if they share it. Whoever shares this node's processes alone (containers, or
# nodes that are played on one machine) has a network of its own.
network=$(readlink /proc/self/ns/net)
raylets=() nodes=() heads=()
for process in /proc/[0-9]*; do
    words=$(tr '\0' '\n' <"$process/cmdline" 2>/dev/null) || continue
    [[ ${words%%$'\n'*} == */raylet/raylet ]] || continue
    [[ $(readlink "$process/ns/net") == "$network" ]] || continue
    raylets+=("${process#/proc/}")
    nodes+=("$(sed -n 's/^--node_id=//p' <<<"$words")")
    heads+=("$(sed -n 's/^--gcs-address=//p' <<<"$words")")
done
((${#raylets[@]})) || { echo "drain.sh: no Ray that $(id -un) can see runs on this node" >&2; exit 1; }

end=$((SECONDS + seconds)) told=()
for i in "${!raylets[@]}"; do
    # All at once, and none for long: a head that is down must not take another's notice.
    (timeout 60 ray drain-node --address "${heads[i]}" --node-id "${nodes[i]}" --reason DRAIN_NODE_REASON_PREEMPTION \
        --reason-message "drain.sh: this node goes in $seconds s" --deadline-remaining-seconds "$seconds" &&
        echo "drain.sh: node ${nodes[i]} of ${heads[i]} has $seconds s") &
    told+=($!)
done
code=0
for process in "${told[@]}"; do
    wait "$process" || code=1
done

# Idle workers are titled ray::IDLE; the others work.
busy() { pgrep -P "$(IFS=,; echo "${raylets[*]}")" -f '^ray::[^I]' >/dev/null; }
while ((SECONDS < end)) && busy; do
    sleep 1
done
exit "$code"
