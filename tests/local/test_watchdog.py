"""A process that hangs is ended by its watchdog, and what it hung in is told by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raydmd.training.events import EventLog, read_lines
from raydmd.training.watchdog import DUMPED, STACKS, Watchdog

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
waits_for_nobody()
"""


def test_stacks_are_kept_and_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 1
    text = (tmp_path / STACKS / "rank00003.txt").read_text()
    first, _, rest = text.partition("\n")
    assert first.startswith("rank 3 of 8, ")
    assert first.endswith(": cycle 7")
    assert DUMPED in rest
    assert "waits_for_nobody" in rest

    after = Watchdog(tmp_path, rank=3, world=8, seconds=60)
    log = EventLog(tmp_path / "events.jsonl")
    after.tell(log)
    after.doing("cycle 1")
    [event] = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["doing"]) == ("stalled", first)
    assert Path(event["stacks"]).read_text() == text
    after.close()
    assert [f.name for f in (tmp_path / STACKS).iterdir()] == [Path(event["stacks"]).name]

    Watchdog(tmp_path, rank=3, world=8, seconds=60).tell(log)  # told once
    assert len(list(read_lines(tmp_path / "events.jsonl"))) == 1


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
