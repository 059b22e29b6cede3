#!/usr/bin/env bash
# Waits for the cloud's notice that this machine will be taken away, and passes it on to Ray by drain.sh:
#   cluster/launcher/spot_notice.sh aws|gcp
# AWS gives two minutes (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html), Google
# 30 seconds (https://cloud.google.com/compute/docs/instances/preemptible#preemption-process). Ends after the notice.
set -euo pipefail

cloud=${1:-}
metadata=${RAYDMD_METADATA:-}
every=${RAYDMD_NOTICE_EVERY:-5}
drain=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/drain.sh
get() { curl --silent --fail --max-time 10 --noproxy '*' "$@"; }

case $cloud in
aws)
    metadata=${metadata:-http://169.254.169.254}
    seconds=110
    noticed() {
        local token
        token=$(get --request PUT "$metadata/latest/api/token" --header 'X-aws-ec2-metadata-token-ttl-seconds: 60') || return 1
        # 404 until there is one.
        get --header "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action" >/dev/null
    }
    ;;
gcp)
    metadata=${metadata:-http://metadata.google.internal}
    seconds=25
    noticed() {
        [[ $(get --header 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted") == TRUE ]]
    }
    ;;
*)
    echo "usage: spot_notice.sh aws|gcp" >&2
    exit 2
    ;;
esac

until noticed; do
    sleep "$every"
done
echo "spot_notice.sh: $cloud takes this machine away"
exec "$drain" "$seconds"
