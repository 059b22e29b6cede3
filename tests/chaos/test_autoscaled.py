"""Ray's own autoscaler brings a run's nodes, replaces one that goes, and takes all of them back."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from raydmd.errors import DONE, FAILED
from tests.launch import Launch
from tests.sites import NET, PORT, Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sites import Node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
HEAD = "f" * 51 + "00000"
"""What Ray's provider of nodes on one machine calls the head."""
IDLE = 0.3
"""Minutes that an idle node stays."""
PLACED = ("--placement.worker_resources={trainer: 1}", "--placement.teacher_resources={teacher: 1}")


def kind(**resources: float) -> dict[str, Any]:
    resources["object_store_memory"] = 100_000_000
    return {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Node]:
    """A head with nothing to compute on, and an autoscaler that starts nodes as processes beside it."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    config = {
        "cluster_name": "grown",
        "max_workers": 8,
        "idle_timeout_minutes": IDLE,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "head_node_id": HEAD,
            "gcs_address": f"{NET}.1:{PORT}",
        },
        "auth": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "trainer": kind(CPU=1, trainer=1),
            "teacher": kind(CPU=1, teacher=1),
        },
        "head_node_type": "ray.head.default",
        **{f"{k}_commands": [] for k in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{k}_start_ray_commands": [] for k in ("head", "worker")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    env = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }
    with Nodes(**env) as nodes:
        if not nodes.apart:
            pytest.skip("a head with an address that is known beforehand needs root")
        yield nodes.start(cpus=0, more=[f"--autoscaling-config={file}"])


def test_nodes_come_for_a_run_and_go_after_it(home: Path, head: Node) -> None:
    grown = Launch(home, "grown", *PLACED, "--placement.autoscaled=true", at=head, cycles=60, fake_updates=5)
    begun = grown.wait_for("checkpoint", cycle=8)
    assert begun["cycle"] < 60, "it was over before a node could go"
    [asked] = grown.events("waiting")
    assert "too little CPU, teacher, trainer" in asked["message"]
    [*_, trainer] = [p for p in head.find("raylet/raylet") if "trainer" in " ".join(p.cmdline())]
    killed = time.time()
    trainer.send_signal(signal.SIGKILL)
    assert grown.end() == DONE, grown.log.read_text()[-3000:]
    assert [e["world"] for e in grown.events("start") + grown.events("resume")] == [2, 2]
    assert [e for e in grown.events("waiting") if e["time"] > killed], "nothing was lacking"
    deadline = time.monotonic() + 60 * IDLE + 60
    while len(head.find("raylet/raylet")) > 1:
        assert time.monotonic() < deadline, "its nodes stay"
        time.sleep(1)


def test_what_no_node_can_have_is_given_up_in_time(home: Path, head: Node) -> None:
    words = ("--placement.autoscaled=true", "--placement.room_timeout=5")
    begun = time.monotonic()
    asked = Launch(home, "asked", *words, at=head, settings={"placement.worker_cpus": 4})
    assert asked.end() == FAILED
    assert 5 < time.monotonic() - begun < 120
    said = asked.log.read_text()
    assert "Ray's autoscaler was asked for it and did not bring it within placement.room_timeout=5 s" in said
    assert "2 x worker" in said
