"""Holding a run's folder: against processes of this machine for real, and against another machine by its lease."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import FAILED
from raydmd.recipe import Recipe, derive
from raydmd.training import lock
from raydmd.training.checkpoint import Progress
from raydmd.training.events import EventLog
from raydmd.training.lease import RENEWALS, Lease
from raydmd.training.lock import LEASE, Held, LeaseLost, check_held, held, locked, read_lease
from raydmd.training.manifest import damage
from raydmd.training.saving import Saver
from raydmd.training.session import FolderSession
from raydmd.tuning import trial

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.local

HOLD = """
import sys, time
from pathlib import Path
from raydmd.training.lock import locked
with locked(Path(sys.argv[1]), seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


class Holder:
    """A process that holds a folder."""

    def __init__(self, folder: Path, seconds: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n", self.process.communicate()[1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[list[Holder]]:
    made: list[Holder] = []
    yield made
    for holder in made:
        holder.kill()
        holder.process.communicate()


class Elsewhere:
    """Another machine's process that holds a folder, and renews its lease until it dies."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path = folder / LEASE
        self.lease = Lease(
            host="elsewhere",
            lock="another-kernel 1",
            processes="another-kernel pids",
            pid=os.getpid(),
            begun=1,
            token="theirs",
            since=time.time() - 5000,  # its clock is late, and nobody minds
            seconds=seconds,
        )
        folder.mkdir(exist_ok=True)
        self.path.write_text(self.lease.text())
        self.dead = threading.Event()
        self.thread = threading.Thread(target=self.beat)
        self.thread.start()

    def beat(self) -> None:
        while not self.dead.wait(self.lease.seconds / RENEWALS):
            self.lease = replace(self.lease, beat=self.lease.beat + 1)
            with self.path.open("r+") as file:
                file.write(self.lease.text())

    def die(self) -> None:
        self.dead.set()
        self.thread.join()


def test_two_processes_at_once_are_refused_and_a_killed_one_is_followed_at_once(
    tmp_path: Path, holders: list[Holder]
) -> None:
    folder = tmp_path / "run"
    holders.append(Holder(folder))
    pid = holders[0].process.pid
    with pytest.raises(Held, match=rf"run 'run' is in progress in another process: pid {pid} on host \S+, since 20"):
        locked(folder).__enter__()
    assert held(folder)
    holders[0].kill()
    assert (folder / LEASE).is_file()
    assert not held(folder)
    start = time.monotonic()
    with locked(folder) as hold:
        assert time.monotonic() - start < 5
        assert f"pid {pid} on host" in hold.before
        assert read_lease(folder).pid == os.getpid()
    assert not (folder / LEASE).exists()
    with locked(folder) as hold:
        assert hold.before == ""


def test_another_machines_living_lease_refuses_and_says_whose_it_is_and_until_when(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "run", seconds=12.0)
    try:
        start = time.monotonic()
        with pytest.raises(Held) as refusal:
            locked(tmp_path / "run").__enter__()
        assert time.monotonic() - start < 10  # no longer than until the next beat
        for part in (f"pid {os.getpid()} on host elsewhere, since 20", "its lease runs out by"):
            assert part in str(refusal.value)
        assert held(tmp_path / "run")
        assert read_lease(tmp_path / "run").token == "theirs"
    finally:
        there.die()


def test_another_machines_lease_that_is_renewed_no_more_is_taken_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Elsewhere(tmp_path / "run", seconds=6.0)
    there.die()
    died = time.monotonic()
    with locked(tmp_path / "run") as hold:
        assert 5.0 < time.monotonic() - died < 60
        assert "on host elsewhere" in hold.before
        said = capsys.readouterr().out
        assert "run 'run' was held by pid" in said
        assert "is taken over from pid" in said
        assert read_lease(tmp_path / "run").pid == os.getpid()


def test_a_lease_of_long_ago_is_looked_at_for_a_part_of_its_time_alone(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "run", seconds=12.0)
    there.die()
    os.utime(there.path, (1e9, 1e9))
    start = time.monotonic()
    with locked(tmp_path / "run"):
        assert 2.9 < time.monotonic() - start < 11


def test_one_who_waits_gets_a_lease_that_is_let_go(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "run", seconds=6.0)

    def let_go() -> None:
        there.die()
        there.path.unlink()

    threading.Timer(2.0, let_go).start()
    with locked(tmp_path / "run", patience=60) as hold:
        assert hold.before == ""


def test_a_lease_is_renewed_and_comes_back_if_somebody_tidies_up(tmp_path: Path) -> None:
    with locked(tmp_path, seconds=1.2):
        first = read_lease(tmp_path)
        _until(lambda: read_lease(tmp_path).beat > first.beat)
        (tmp_path / LEASE).unlink()
        _until(lambda: (found := read_lease(tmp_path)) is not None and found.token == first.token)
        beat = read_lease(tmp_path).beat
        _until(lambda: read_lease(tmp_path).beat > beat)


def test_a_holder_that_was_suspended_ends_without_touching_what_is_somebody_elses(
    tmp_path: Path, holders: list[Holder]
) -> None:
    folder = tmp_path / "run"
    holders.append(Holder(folder, seconds=1.2))
    process = holders[0].process
    process.send_signal(signal.SIGSTOP)
    mine = read_lease(folder)
    # As another machine does it: a new file in the old one's place.
    theirs = replace(mine, host="elsewhere", token="theirs", lock="another-kernel 1", processes="another-kernel pids")
    (folder / "partial").write_text(theirs.text())
    (folder / "partial").replace(folder / LEASE)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == FAILED
    assert "run 'run' was taken over by pid" in process.communicate()[1]
    assert read_lease(folder) == theirs
    with pytest.raises(LeaseLost, match="on host elsewhere"):
        check_held(folder, mine.token)
    check_held(folder, "theirs")
    check_held(folder, "")


def test_a_checkpoint_under_way_is_not_finished_once_the_run_is_somebody_elses(tmp_path: Path) -> None:
    class Taken(FolderSession):
        def held(self) -> None:
            raise LeaseLost("taken over")

    r, progress = Recipe(name="run", output=tmp_path), Progress(cycle=2, phase=0, monitor={}, recipe="")
    session = Taken(tmp_path / "checkpoints")
    saver = Saver(r, session, EventLog(tmp_path / "events.jsonl"))
    with pytest.raises(LeaseLost):
        saver.write("cycle-00000002", {"w": torch.ones(3)}, progress, {}, wait=False)
    with session.latest() as folder:
        assert folder is None
    assert not (tmp_path / "events.jsonl").exists()
    [left] = session.folder.iterdir()
    assert damage(left)


def test_without_file_locks_processes_of_this_machine_are_looked_for(
    tmp_path: Path, holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    holders.append(Holder(tmp_path))
    monkeypatch.setattr(lock, "_flock", lambda _: None)
    with pytest.raises(Held, match=f"pid {holders[0].process.pid} on"):
        locked(tmp_path).__enter__()
    holders[0].kill()
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 5


def test_a_lease_that_is_no_lease_is_taken_over_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydmd.training.lease.SECONDS", 2.0)
    (tmp_path / LEASE).write_bytes(b"\xff\x00" * 10)
    with locked(tmp_path) as hold:
        assert "can't be read" in hold.before


def test_of_many_at_once_no_two_hold_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom raydmd.training.lock import Held, locked\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    with locked(Path(sys.argv[1]), patience=60):\n"
        "        start = time.monotonic()\n        time.sleep(1)\n        print(start, time.monotonic())\n"
        "except Held:\n    print('refused')\n"
    )
    begin = str(time.time() + 4)
    each = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), begin], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in each]
    spans = sorted((float(start), float(end)) for start, end in said)
    assert len(spans) == 4
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def _until(holds: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_trial_that_was_taken_over_tells_its_sweep_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    monkeypatch.setattr(trial, "TOLD", 0.0)
    monkeypatch.setattr(trial, "leave", left.append)
    ours = object.__new__(trial.RunTrial)
    let_go = threading.Event()
    ours._lost, ours._news = threading.Event(), queue.Queue()
    ours._begun, ours._recipe = time.monotonic(), derive(Recipe(), {"output": tmp_path, "name": "0003"})
    ours._stop, ours._sweeps_stop = ours._recipe.folder / "STOP", tmp_path / "STOP"
    ours._thread = threading.Thread(target=let_go.wait, daemon=True)
    ours._thread.start()
    ours._sweeps_stop.touch()
    ours._leave("taken over by elsewhere")
    last = ours.step()
    assert last[trial.HELD]
    assert last["done"]
    assert left == ["taken over by elsewhere"]
    ours.cleanup()
    assert not ours._stop.exists()
    let_go.set()
