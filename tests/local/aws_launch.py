"""What ``ray up`` asks of AWS for a configuration, on a mock of EC2: one machine of each kind, told as JSON.

    HOME=/tmp/empty python tests/local/aws_launch.py cluster/launcher/aws.yaml

A process of its own, since the mock and Ray's provider keep state; a key is written into HOME.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import boto3
import yaml
from moto import mock_aws

PROFILE = "ray-autoscaler-v1"
"""Ray's own name for what lets machines start others; it waits for a quarter of a minute after it has made one."""


def launch(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName=PROFILE)
    iam.create_role(RoleName=PROFILE, AssumeRolePolicyDocument="{}")
    iam.add_role_to_instance_profile(InstanceProfileName=PROFILE, RoleName=PROFILE)
    config = prepare_config(config)
    validate_config(config)
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-cluster-name": config["cluster_name"]}
        provider.create_node(kind["node_config"], tags, 1)
    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    found: dict[str, Any] = {}
    for reservation in ec2.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            found[tags["ray-user-node-type"]] = {
                "type": instance["InstanceType"],
                "spot": instance.get("InstanceLifecycle") == "spot",
                "zone": instance["Placement"]["AvailabilityZone"],
                "resources": config["available_node_types"][tags["ray-user-node-type"]]["resources"],
            }
    return found


if __name__ == "__main__":
    with mock_aws(), contextlib.redirect_stdout(sys.stderr):
        told = launch(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(told))
