"""A node with a trainer and a teacher goes, comes back, is slow or cut off; the run ends by itself, the same bits."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from raydmd.errors import DONE
from raydmd.training.events import METRICS, read_lines
from tests.launch import CYCLES, Launch, same_bits
from tests.sites import Node, Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
PLACED = ("--placement.worker_resources={trainer: 1}", "--placement.teacher_resources={teacher: 1}")
EACH = {"trainer": 1, "teacher": 1}


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two, each with room for a trainer and a teacher."""
    with Nodes() as nodes:
        yield nodes.start(cpus=2, resources=EACH), nodes.start(cpus=2, resources=EACH)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Launch:
    with Nodes() as nodes:
        head, other = (nodes.start(cpus=2, resources=EACH) for _ in range(2))
        run = begin(home, "undisturbed", head)
        on_both(run, head, other)
        assert run.end() == DONE, run.log.read_text()[-3000:]
    assert not run.events("resume")
    return run


def begin(home: Path, name: str, head: Node) -> Launch:
    return Launch(home, name, *PLACED, teachers=2, at=head)


def on_both(run: Launch, head: Node, other: Node) -> None:
    """The run is on its way, with a trainer and a teacher on each node."""
    run.wait_for("committed")  # there is something to go on from
    for node in (head, other):
        for title in ("ray::RayTrainWorker", "ray::Replica"):
            assert len(node.find(title)) == 1, f"{title} on {node.name}: {[p.cmdline() for p in node.processes()]}"


def longest_silence(run: Launch) -> float:
    """Seconds between two rows of the first attempt's metrics, at most."""
    times = [row["time"] for row in read_lines(run.folder / METRICS)]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def test_a_node_is_removed_and_added_back(home: Path, nodes: tuple[Node, Node], undisturbed: Launch) -> None:
    head, other = nodes
    run = begin(home, "removed", head)
    on_both(run, head, other)
    [left] = head.find("ray::RayTrainWorker")
    other.kill()
    left.wait(120)  # alone it can't go on
    run.wait_for("waiting", seconds=300)
    other.start()
    assert run.end() == DONE, run.log.read_text()[-3000:]
    [resumed] = run.events("resume")
    assert resumed["world"] == 2
    assert 0 < resumed["cycle"] < CYCLES
    same_bits(run.student(), undisturbed.student())


def test_a_slow_node_and_a_short_cut_need_no_restart(home: Path, nodes: tuple[Node, Node], undisturbed: Launch) -> None:
    head, other = nodes
    other.slow(kilobits=50_000)
    run = begin(home, "slow", head)
    on_both(run, head, other)
    cut = 6.0
    other.cut()
    time.sleep(cut)
    other.mend()
    assert run.end() == DONE, run.log.read_text()[-3000:]
    assert longest_silence(run) > cut - 1, "the cut was not felt"
    assert not run.events("resume")
    assert not run.events("restart")
    same_bits(run.student(), undisturbed.student())


def test_a_node_that_stays_cut_off_is_given_up(home: Path, nodes: tuple[Node, Node], undisturbed: Launch) -> None:
    """Its trainer runs on and waits for the others; it must not disturb those that follow."""
    head, other = nodes
    run = begin(home, "cut", head)
    on_both(run, head, other)
    other.cut()
    run.wait_for("restart", seconds=300)
    other.mend()
    other.kill()
    other.start()
    assert run.end() == DONE, run.log.read_text()[-3000:]
    assert [e["world"] for e in run.events("resume")] == [2]
    same_bits(run.student(), undisturbed.student())


def test_a_teacher_that_is_cut_off_is_stood_in_for(home: Path, undisturbed: Launch) -> None:
    """The workers ask the other replica, and go on."""
    with Nodes() as nodes:
        head = nodes.start(cpus=2, resources={"trainer": 2, "teacher": 1})
        other = nodes.start(cpus=1, resources={"teacher": 1})
        run = begin(home, "alone", head)
        run.wait_for("committed")
        assert len(other.find("ray::Replica")) == 1
        assert len(head.find("ray::Replica")) == 1
        other.cut()
        assert run.end() == DONE, run.log.read_text()[-3000:]
        assert max(m.get("teacher/retries", 0) for m in read_lines(run.folder / METRICS)) > 0, "the cut was not felt"
        assert not run.events("restart")
        assert not run.events("resume")
    same_bits(run.student(), undisturbed.student())
