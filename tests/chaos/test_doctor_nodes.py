"""``raydmd doctor`` on two nodes: well, and with faults that are really there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from raydmd.errors import DONE, FAILED
from tests.sites import Node, Nodes, _clean
from tests.tracking_server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SMI = """#!/bin/sh
echo "NVIDIA H100 80GB HBM3, 580.105.08, 81559, 40000, 3"
"""
TINY = 'mount -t tmpfs -o size=4k none "$0" && exec "$@"'
"""Puts a disk of one page at a folder, for the command that follows alone."""
OWN = 'mount -t tmpfs -o size=64m none "$0" && exec "$@"'


def ask(node: Node, *words: str, **env: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, findings and facts of a doctor on a node."""
    done = subprocess.run(
        [*node.enter, sys.executable, "-m", "raydmd", "doctor", "--json", "--deadline", "10", *words],
        env=_clean() | node.env | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout)
    return done.returncode, told["findings"], told["facts"]


def bad(findings: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[str, str]]:
    """What is bad, and its cure, by check and place."""
    return {(f["check"], f["where"]): (f["said"], f["cure"]) for f in findings if f["level"] == "bad"}


@pytest.fixture
def apart() -> Iterator[Nodes]:
    with Nodes() as nodes:
        if not nodes.apart:
            pytest.skip("nodes with addresses of their own need root")
        yield nodes


def test_two_nodes_that_are_well(apart: Nodes, tmp_path: Path) -> None:
    head = apart.start(cpus=1, resources={"trainer": 1}, dashboard=True)
    other = apart.start(cpus=1, resources={"teacher": 1})
    placed = ("placement.worker_resources={trainer: 1}", "placement.teacher_resources={teacher: 1}")
    code, findings, facts = ask(head, f"output={tmp_path}/shared/runs", *placed)
    assert (code, bad(findings)) == (DONE, {})
    well = {f["check"] for f in findings if f["level"] == "ok"}
    assert well >= {
        "cluster",
        "nodes",
        "versions",
        "token",
        "hostname",
        "network",
        "clock",
        "dashboard",
        "metrics",
        "room",
    }
    assert [n["name"] for n in facts["nodes"]] == [head.address, other.address]
    [gloo] = facts["links"]
    assert gloo["gigabytes"] > 0
    for node in facts["nodes"]:
        [folder] = node["folders"]
        assert folder["sees"] == [head.address, other.address]
        assert abs(node["clock"]) < 1
    assert not (tmp_path / "shared").exists(), "it leaves nothing behind"


def test_a_node_with_faults(apart: Nodes, tmp_path: Path) -> None:
    """Storage of its own, an old package, no GLOO_SOCKET_IFNAME, few files, sick GPUs, and nothing for the recipe."""
    own = tmp_path / "shared"
    own.mkdir()
    old = tmp_path / "old" / "diffusers-0.30.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.30.0\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(SMI)
    (tools / "nvidia-smi").chmod(0o755)
    head = apart.start(cpus=1, dashboard=False)
    path = head.env["PYTHONPATH"]
    sick = apart.start(
        cpus=1,
        before=("prlimit", "--nofile=2048:2048", "unshare", "--mount", "sh", "-c", OWN, str(own)),
        GLOO_SOCKET_IFNAME="",
        PYTHONPATH=f"{path}:{tmp_path / 'old'}",
        PATH=f"{tools}:/usr/bin:/bin",
    )
    port = free_port()
    (own / "prompts.txt").write_text("a cat\n")  # on the head's disk alone
    code, findings, _ = ask(
        head,
        f"output={own}",
        f"data.prompts={own}/prompts.txt",
        f"tracking.uri=http://127.0.0.1:{port}",
        "checkpoints.storage=s3://bucket/runs",
        "placement.worker_resources={trainer: 1}",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="k",
        AWS_SECRET_ACCESS_KEY="s",
        AWS_MAX_ATTEMPTS="1",
    )
    assert code == FAILED
    found = bad(findings)
    cures = {
        ("versions", sick.address): ("diffusers 0.30.0", "pip install diffusers=="),
        ("gpus", sick.address): ("PyTorch sees 0", "built for CUDA"),
        ("hostname", sick.address): ("its name", "GLOO_SOCKET_IFNAME=eth0"),
        ("open files", sick.address): ("2048", "ulimit -n 65536"),
        ("storage", sick.address): (f"not the one of {head.address}", "mount the same shared storage"),
        ("inputs", sick.address): ("prompts.txt", "storage that all nodes see"),
        ("tracking", ""): (str(port), "docker compose"),
        ("dashboard", ""): ("does not run", "--include-dashboard=false"),
        ("room", ""): ("too little trainer", "cluster/README.md"),
    }
    for place, (said, cure) in cures.items():
        assert place in found, f"{place} not found among {found}"
        assert said in found[place][0]
        assert cure in found[place][1]
    memory = [f for f in findings if f["check"] == "gpus" and "uncorrected memory errors" in f["said"]]
    assert memory
    assert "nvidia-smi -r" in memory[0]["cure"]
    assert any(f["check"] == "checkpoints" and "AWS_ENDPOINT_URL" in f["cure"] for f in findings)
    assert not any(where == head.address for _, where in found if _ not in {"network", "storage", "checkpoints"}), found


def test_a_full_disk_a_wrong_token_and_nobody_there(apart: Nodes, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    head = apart.start(cpus=1)
    other = apart.start(cpus=1, before=("unshare", "--mount", "sh", "-c", TINY, str(full)))
    code, findings, _ = ask(head, f"output={full}")
    assert code == FAILED
    said, cure = bad(findings)["storage", other.address]
    assert "No space left" in said
    assert "make room" in cure
    code, findings, _ = ask(head, RAY_AUTH_TOKEN="0" * 64)
    assert code == FAILED
    said, cure = bad(findings)["cluster", ""]
    assert "refuses the token" in said
    assert "~/.ray/auth_token" in cure
    gone = head.env["RAY_ADDRESS"].replace(":6380", ":6999")
    code, findings, _ = ask(head, "--address", gone)
    assert code == FAILED
    said, cure = bad(findings)["cluster", ""]
    assert "nobody listens" in said
    assert "ray status" in cure
    other.cut()
    code, findings, _ = ask(head)
    assert code == FAILED
    said, cure = bad(findings)["nodes", other.address]
    assert "ray status" in cure


def test_a_cluster_without_a_token() -> None:
    with Nodes(RAY_AUTH_MODE="disabled") as nodes:
        code, findings, _ = ask(nodes.start(cpus=1))
    assert code == FAILED
    said, cure = bad(findings)["token", ""]
    assert said == "the cluster asks for none"
    assert "ray get-auth-token --generate" in cure
