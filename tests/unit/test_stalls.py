"""The driver's eye on workers that give no sign of life."""

from __future__ import annotations

import faulthandler
from typing import TYPE_CHECKING

import pytest

from raydmd.training import attempts
from raydmd.training.attempts import LOOKS, Stalls
from raydmd.training.groups import RESERVED
from raydmd.training.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _awake() -> Iterator[None]:
    yield
    faulthandler.cancel_dump_traceback_later()


def test_who_writes_nothing_for_too_long_is_ended_and_nobody_else(tmp_path: Path, monkeypatch) -> None:
    now, ended = 0.0, list[int]()

    def end(pid: int, node: str, title: str) -> str:
        assert title == "RayTrainWorker"
        ended.append(int(node))
        return "" if len(ended) == 1 else "stopped"  # the first time its process is not found

    monkeypatch.setattr(attempts.time, "monotonic", lambda: now)
    monkeypatch.setattr(attempts, "end_process", end)
    lively, stuck = (Watchdog(tmp_path, rank=rank, world=2, seconds=600, node=f"{rank}") for rank in (0, 1))
    stalls = Stalls(tmp_path, 60.0)
    stuck.doing("cycle 1")
    for cycle in range(40):
        lively.doing(f"cycle {cycle}")
        now += LOOKS
        stalls.look()
        assert set(ended) <= {1}
        assert bool(ended) == (now - LOOKS > 60.0), now
    assert len(ended) == 3, "each try has its own time"
    assert list(stalls.ended) == [1]
    assert stalls.ended[1].endswith("cycle 1 (the process was stopped)")


def test_whom_it_waits_for_is_no_sign_of_life(tmp_path: Path, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now)
    monkeypatch.setattr(attempts, "end_process", lambda *_: "sleeping")
    stuck, stalls = Watchdog(tmp_path, rank=0, world=1, seconds=600), Stalls(tmp_path, 60.0)
    stuck.doing("cycle 7")
    for k in range(20):
        stuck.waits(f"waits for replica {k}")
        now += LOOKS
        stalls.look()
    assert "cycle 7; waits for replica" in stalls.ended[0]


def test_a_controller_that_does_not_notice_that_its_workers_are_gone_is_ended(tmp_path: Path, monkeypatch) -> None:
    now, ended = 0.0, list[tuple[int, str, str]]()

    def end(pid: int, node: str, title: str) -> str:
        ended.append((pid, node, title))
        return ""

    monkeypatch.setattr(attempts.time, "monotonic", lambda: now)
    monkeypatch.setattr(attempts, "end_process", end)
    (tmp_path / RESERVED).write_text('{"group": "00", "pid": 77, "node": "first"}')
    gone, stalls = Watchdog(tmp_path, rank=0, world=1, seconds=600, node="second"), Stalls(tmp_path, 60.0)
    gone.doing("cycle 7")
    while now < 110:
        now += LOOKS
        stalls.look()
    assert ended == [(gone.post.pid, "second", "RayTrainWorker")]
    while now < 140:
        now += LOOKS
        stalls.look()
    assert ended[1:] == [(gone.post.pid, "second", "RayTrainWorker"), (77, "first", "TrainController")]
    assert stalls.ended == {}
