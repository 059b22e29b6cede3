"""A process that hangs is ended by its watchdog, and what it hung in is kept for the driver to tell."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from raydmd.training.watchdog import DUMPED, STACKS, Watchdog, kept, posts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.local, pytest.mark.timeout(120)]

HANGS = """
import sys, threading
from pathlib import Path
from raydmd.training.watchdog import Watchdog

def waits_for_nobody():
    threading.Event().wait()

dog = Watchdog(Path(sys.argv[1]), rank=3, world=8, seconds=1.0)
dog.doing("cycle 6")
dog.doing("cycle 7")
dog.waits("waits for replica r-1")
waits_for_nobody()
"""


@pytest.fixture(autouse=True)
def _awake() -> Iterator[None]:
    """No watchdog of this process outlives its test."""
    yield
    faulthandler.cancel_dump_traceback_later()


def test_stacks_are_kept_and_told_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 1
    text = (tmp_path / STACKS / "rank00003.txt").read_text()
    first, _, rest = text.partition("\n")
    assert first.startswith("rank 3 of 8 on ")
    assert first.endswith(": cycle 7; waits for replica r-1")
    assert DUMPED in rest
    assert "waits_for_nobody" in rest
    post = posts(tmp_path)[3]
    assert (post.line(), post.doing, post.world) == (first, "cycle 7", 8)
    assert post.peak >= post.resident > 5

    Watchdog(tmp_path, rank=0, world=8, seconds=60).doing("cycle 1")  # killed, so that its file stays
    [(file, line)] = kept(tmp_path).items()
    assert (line, file.read_text()) == (first, text)
    assert [f.name for f in (tmp_path / STACKS).iterdir()] == [file.name]
    assert not kept(tmp_path)


def test_a_larger_group_before_is_not_taken_for_this_one(tmp_path: Path) -> None:
    for rank in range(3):
        Watchdog(tmp_path, rank=rank, world=3, seconds=60).doing("cycle 1")
    Watchdog(tmp_path, rank=0, world=1, seconds=60).doing("cycle 2")
    assert [p.doing for p in posts(tmp_path).values()] == ["cycle 2"]


def test_one_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    lively = """
import sys, time
from pathlib import Path
from raydmd.training.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), rank=0, world=1, seconds=1.5)
for k in range(5):
    dog.doing(f"cycle {k}")
    time.sleep(0.6)
dog.close()
time.sleep(2)
"""
    done = subprocess.run([sys.executable, "-c", lively, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 0
    assert not list((tmp_path / STACKS).iterdir())
