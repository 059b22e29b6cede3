"""A run goes on with other numbers of workers: the same samples in the same order, and the same losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from raydmd.errors import DONE, STOPPED
from tests.courses import reported, same_course
from tests.launch import CYCLES, Launch
from tests.pipelines import wan_pipeline
from tests.sites import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sites import Node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
BATCH = 6
SLOTS = {"student": 0, "fake.0": 1, "fake.1": 2}
LOGGED = {"batch": BATCH, "report_every": 1, "sample_log": "true"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("workers")
    wan_pipeline(home / "model")
    (home / "prompts.txt").write_text("a cat runs\na dog jumps\na cat jumps\n")
    return home


@pytest.fixture(scope="module")
def head() -> Iterator[Node]:
    with Nodes() as nodes:
        yield nodes.start(cpus=2)


def test_two_workers_then_one_then_three(home: Path, head: Node) -> None:
    fixed = Launch(home, "fixed", at=head, **LOGGED)
    assert fixed.end() == DONE, fixed.log.read_text()[-3000:]
    for workers, until in ((2, 7), (1, 15), (3, None)):
        stop = () if until is None else ("--max-cycles", str(until))
        run = Launch(home, "changing", "--workers", str(workers), *stop, at=head, **LOGGED)
        assert run.end() == (STOPPED if stop else DONE), run.log.read_text()[-3000:]
    assert [(e["cycle"], e["world"]) for e in run.events("resume")] == [(7, 1), (15, 3)]
    both = [(r.folder, reported(r.folder)) for r in (run, fixed)]
    assert same_course(*both, CYCLES, BATCH, SLOTS) == {1, 2, 3}
