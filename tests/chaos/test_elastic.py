"""Nodes go, with or without notice, and come back: runs that may shrink do, and notices are heeded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from raydmd.errors import DONE
from tests.courses import reported, same_course
from tests.launch import Launch, same_bits
from tests.sites import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
PLACED = ("--placement.worker_resources={trainer: 1}", "--placement.teacher_resources={teacher: 1}")
CYCLES, UPDATES, BATCH = 60, 20, 4
LONG = {"cycles": CYCLES, "fake_updates": UPDATES, "batch": BATCH, "report_every": 1, "sample_log": "true"}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def fixed(home: Path) -> Launch:
    """Two workers throughout."""
    run = Launch(home, "fixed", **LONG)
    assert run.end() == DONE, run.log.read_text()[-3000:]
    return run


def test_a_run_shrinks_when_a_node_goes_and_grows_when_it_is_back(home: Path, nodes: Nodes, fixed: Launch) -> None:
    head = nodes.start(cpus=2, resources={"trainer": 1, "teacher": 1})
    other = nodes.start(cpus=2, resources={"trainer": 1})
    elastic = ("--placement.workers_least=1", "--placement.resize_every=5")
    run = Launch(home, "elastic", *PLACED, *elastic, at=head, **LONG)
    run.wait_for("checkpoint", cycle=8)
    other.kill()
    assert run.wait_for("resume")["world"] == 1
    other.start()
    assert run.end() == DONE, run.log.read_text()[-3000:]
    assert [e["world"] for e in run.events("start") + run.events("resume")] == [2, 1, 2]
    slots = {"student": 0, **{f"fake.{k}": k + 1 for k in range(UPDATES)}}
    both = [(r.folder, reported(r.folder)) for r in (run, fixed)]
    assert same_course(*both, CYCLES, BATCH, slots) == {1, 2}


@pytest.fixture
def others() -> Iterator[Nodes]:
    """Another cluster beside it, whose nodes have the same addresses in networks of their own."""
    with Nodes() as nodes:
        nodes.start()
        nodes.start()
        yield nodes


def test_a_notice_that_a_node_goes_is_heeded_with_a_checkpoint(
    home: Path, others: Nodes, nodes: Nodes, fixed: Launch
) -> None:
    """With no failure allowed: a node that was to go is none. Another cluster's node is not told in its place."""
    if not (nodes.apart and others.apart):
        pytest.skip("nodes with addresses of their own need root")
    head = nodes.start(cpus=2, resources={"trainer": 1, "teacher": 1})
    other = nodes.start(cpus=2, resources={"trainer": 1})
    run = Launch(home, "preempted", *PLACED, at=head, every=1000, max_failures=0, **LONG)
    run.wait_for("start")
    grace = 30
    other.drain(grace)
    deadline = time.time() + grace
    [own] = [word for word in other.find("raylet/raylet")[0].cmdline() if word.startswith("--node_id=")]
    told = run.wait_for("preempted")
    assert len(told["ranks"]) == 1
    assert abs(told["deadline"] - deadline) < 10
    written = run.wait_for("checkpoint", cycle=told["cycle"])
    assert written["cycle"] == told["cycle"]
    assert written["time"] < deadline
    time.sleep(max(0.0, deadline - time.time()))
    said = (other.folder / f"{other.name}-drain.log").read_text()
    assert said.count(" has ") == said.count(f"drain.sh: node {own.partition('=')[2]} of ") == 1, said
    other.kill()
    other.start()
    assert run.end() == DONE, run.log.read_text()[-3000:]
    [resumed] = run.events("resume")
    assert resumed["cycle"] >= told["cycle"], "the checkpoint that the notice was heeded with was not used"
    assert not run.events("restart"), "it counted as a failure"
    same_bits(run.student(), fixed.student())
