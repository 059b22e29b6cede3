"""Lines of several processes in one file."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from raydmd.training import events
from raydmd.training.events import append, read_lines

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

pytestmark = pytest.mark.unit
HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def held(log: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, log, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_line_waits_for_anothers(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    holder = held(log, 0.5)
    start = time.monotonic()
    append(log, {"event": "a"})
    assert time.monotonic() - start > 0.3
    assert [row["event"] for row in read_lines(log)] == ["a"]
    assert holder.wait(10) == 0


def test_a_line_is_there_before_the_next_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, sizes = tmp_path / "events.jsonl", list[int]()

    def lockf(file: BinaryIO, how: int) -> None:
        if how == fcntl.LOCK_UN:
            sizes.append(log.stat().st_size)

    monkeypatch.setattr(events.fcntl, "lockf", lockf)
    append(log, {"event": "a"})
    assert sizes == [log.stat().st_size]
    assert sizes[0] > 0


def test_nobody_keeps_a_line_out_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PATIENCE", 0.2)
    log = tmp_path / "events.jsonl"
    holder = held(log, 30)
    append(log, {"event": "a"})
    assert holder.poll() is None
    assert [row["event"] for row in read_lines(log)] == ["a"]
    holder.kill()
    holder.wait(10)
