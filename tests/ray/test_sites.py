"""The nodes that other tests kill and cut off are nodes of one cluster, with addresses of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sites import Node, Nodes

pytestmark = pytest.mark.ray
ASK = """
import ray
ray.init(log_to_driver=False)

@ray.remote(resources={"there": 1})
def where():
    return ray.util.get_node_ip_address()

try:
    print(ray.get(where.remote(), timeout=8))
except ray.exceptions.GetTimeoutError:
    print("nobody")
"""


def ask(node: Node) -> str:
    """The address at which a task runs that only the other node has the resource for."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | node.env
    done = subprocess.run(
        [*node.enter, sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("apart", [None, False], ids=["apart", "shared address"])
def test_a_node_is_killed_added_back_and_cut_off(apart: bool | None) -> None:
    with Nodes(apart=apart) as nodes:
        head, other = nodes.start(), nodes.start(resources={"there": 1})
        there = ask(head)
        assert (there == other.address) or not nodes.apart
        other.kill()
        assert not other.processes()
        assert ask(head) == "nobody"
        other.start()
        assert ask(head) == there
        other.cut()
        assert ask(head) == "nobody"
        other.mend()
        assert ask(head) == there
        folder = nodes.folder
    assert not [*head.processes(), *other.processes()]
    assert not folder.exists()
