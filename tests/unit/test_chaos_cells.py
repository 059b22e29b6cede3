"""The table of faults: it is whole, and a log without the recovery is not taken for one with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.cells import CYCLES, KINDS, LEFT_OUT, MOMENTS, Cell, absent, cells, recovery, runs
from benchmarks.chaos.checks import tracked
from benchmarks.chaos.soak import CUT_OFF, FAULTS, tell
from benchmarks.chaos.soak import KINDS as SOAKED
from benchmarks.chaos.table import rendered

pytestmark = pytest.mark.unit

INJECT = Path(__file__).parents[2] / "benchmarks" / "chaos" / "inject"


def event(time: float, kind: str, pid: int = 1, **facts: Any) -> dict[str, Any]:
    return {"time": time, "pid": pid, "event": kind, **facts}


BEGUN = [event(1, "start", pid=10, world=2), event(5, "checkpoint", pid=10, cycle=4)]
LOST = event(11, "restart", failure="death", rank=1, message="rank 1: its process is gone")
RESUMED = event(20, "resume", pid=11, cycle=8)
TRAINED = [*BEGUN, event(8, "finished", pid=10), event(9, "export", pid=12)]


def test_there_are_forty_faults_of_every_kind_at_every_moment() -> None:
    found = cells()
    assert len(found) >= 40
    assert {c.kind for c in found} == set(KINDS)
    assert {c.moment for c in found} == set(MOMENTS)
    assert runs(found, apart=True) == [[cell] for cell in found]
    assert [len(chain) for chain in runs(found, apart=False)] == [sum(c.kind == k for c in found) for k in KINDS]
    assert len({c.name for c in found}) == len(found) == len(KINDS) * len(MOMENTS) - len(LEFT_OUT)
    assert all(LEFT_OUT.values())
    assert {c.rank for c in found if c.kind == "worker"} == {0, 1}
    assert cells(("worker",), ("start", "export")) == [Cell("worker", "start"), Cell("worker", "export")]


@pytest.mark.parametrize(
    ("cell", "after"),
    [
        (Cell("worker", "rollout"), [LOST, RESUMED]),
        (Cell("node", "rollout"), [LOST, RESUMED]),
        (Cell("controller", "rollout"), [LOST, RESUMED]),
        (Cell("driver", "rollout"), [RESUMED]),
        (Cell("teacher", "rollout"), [event(11, "replica", replica="teacher-wan22-1/0", state="lost")]),
        (Cell("reward", "rollout"), [event(11, "replica", replica="reward-wan22-1/0", state="lost")]),
        (Cell("pool network", "rollout"), [event(11, "replica", replica="teacher-wan22-1/0", state="lost")]),
    ],
    ids=lambda given: given.kind if isinstance(given, Cell) else "",
)
def test_the_log_must_tell_of_the_recovery(cell: Cell, after: list[dict[str, Any]]) -> None:
    told, wrong = recovery(cell, [*BEGUN, *after], 10.0)
    assert told
    assert not wrong
    for missing in after:
        assert recovery(cell, [*BEGUN, *(e for e in after if e is not missing)], 10.0)[1]
    undisturbed = [*BEGUN, event(30, "finished", pid=10), event(31, "export", pid=12)]
    assert recovery(cell, undisturbed, 10.0)[1]


def test_a_recovery_by_the_wrong_means_is_none() -> None:
    worker, teacher = Cell("worker", "rollout"), Cell("teacher", "rollout")
    same = event(20, "resume", pid=10, cycle=8)
    assert "the same process went on" in recovery(worker, [*BEGUN, LOST, same], 10.0)[1]
    far = event(20, "resume", pid=11, cycle=0)
    assert recovery(worker, [*BEGUN, LOST, far], 10.0)[1] == ["resumed at cycle 0: more than one checkpoint was lost"]
    reward = event(11, "replica", replica="reward-wan22-1/0", state="lost")
    assert recovery(teacher, [*BEGUN, reward], 10.0)[1] == ["the log has no lost replica of the teacher"]
    lost = event(11, "replica", replica="teacher-wan22-1/0", state="lost")
    assert recovery(teacher, [*BEGUN, lost, RESUMED], 10.0)[1] == ["workers were started anew"]


def test_faults_of_one_run_have_each_a_recovery_of_its_own() -> None:
    chain = [Cell("worker", "fake update"), Cell("worker", "rollout")]
    assert runs([chain[1], chain[0]], apart=False) == [chain]
    events = [*BEGUN, LOST, event(20, "resume", pid=11, cycle=2), event(31, "restart", failure="death", rank=0)]
    assert recovery(chain[0], events, 10.0, 30.0)[1] == []
    assert recovery(chain[1], events, 30.0)[1] == ["no workers were started after the fault"]
    lost, back = event(1, "replica", replica="a", state="lost"), event(2, "replica", replica="a", state="back")
    assert absent([lost]) == ["a"]
    assert absent([lost, back]) == []


def test_an_export_is_done_again_by_another_process() -> None:
    cell = Cell("worker", "export")
    assert recovery(cell, [*TRAINED, event(12, "export", pid=13)], 10.0)[1] == []
    assert recovery(cell, [*TRAINED, event(12, "export", pid=12)], 10.0)[1] == ["no other process exported again"]
    assert recovery(cell, [*TRAINED, RESUMED, event(12, "export", pid=13)], 10.0)[1]


def test_mlflow_must_have_every_step_once() -> None:
    whole = [(c, 0.5) for c in range(1, CYCLES + 1)]
    assert tracked(["FINISHED"], {"fake/loss": whole}, CYCLES) == []
    assert tracked(["FINISHED"], {"fake/loss": [*whole, (3, 0.5)]}, CYCLES)
    assert tracked(["FINISHED"], {"fake/loss": whole[1:]}, CYCLES)
    assert tracked(["FINISHED", "FINISHED"], {"fake/loss": whole}, CYCLES)
    assert tracked(["RUNNING"], {"fake/loss": whole}, CYCLES)


def test_the_table_shows_what_failed_and_what_was_left_out() -> None:
    row = {"ok": True, "seconds": 12.3, "recovery": "resumed", "starts": 1, "wrong": [], "faults_of_its_run": 1}
    rows = [
        row | {"kind": "worker", "moment": "start"},
        row | {"kind": "worker", "moment": "rollout", "ok": False, "wrong": ["files differ"]},
    ]
    text = rendered(rows, cut=15.0, machine="a machine", took=60.0)
    [worker] = [one for one in text.splitlines() if one.startswith("| worker |")]
    assert worker.split(" | ")[1:4] == ["1, 12 s", "FAILED", ""]
    assert "FAILED worker x rollout: files differ" in text
    [controller] = [one for one in text.splitlines() if one.startswith("| controller |")]
    assert controller.split(" | ")[8] == "-"
    assert f"controller x export: {LEFT_OUT['controller', 'export']}" in text


HOLDS = """
import threading, time
from pathlib import Path
from raydmd.training import manifest
import sitecustomize

folder = Path("cycle-00000006")
folder.mkdir()
(folder / "file").write_text("x")
sitecustomize.NOW.update(rank=1)
thread = threading.Thread(target=manifest.seal, args=(folder,))
thread.start()
while not Path("checkpointing.at.json").is_file():
    time.sleep(0.01)
time.sleep(0.2)
assert thread.is_alive() and not list(folder.glob("manifest-*")), "it did not stand still"
Path("checkpointing.released").touch()
thread.join(10)
assert list(folder.glob("manifest-*"))
manifest.seal(folder, rank=1)  # once only
"""


def test_a_process_stands_still_at_its_moment_and_once_alone(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    plan = {"folder": str(tmp_path), "moments": {"checkpointing": {"cycle": 5, "rank": 1}}}
    done = subprocess.run(
        [sys.executable, "-c", HOLDS],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{INJECT}:{Path(__file__).parents[2]}", "RAYDMD_CHAOS": json.dumps(plan)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_fault_of_the_soak_that_the_log_does_not_tell_of_is_wrong() -> None:
    faults = [{"kind": kind, "time": 10.0 * n, "after": 10.0 * n} for n, kind in enumerate(SOAKED, 1)]
    told = [event(10.0 * n + 1, words[-1]) for n, (_, _, words) in enumerate(SOAKED.values(), 1) if words]
    told += [event(10.0 * n + 2, "committed") for n in range(1, len(SOAKED) + 1)]
    waits = next(kind for kind, (_, _, words) in SOAKED.items() if not words)
    faults = [{"kind": waits, "time": 1.0, "after": 1.0}] * (FAULTS - len(faults)) + faults
    ends = [-9, 3, -9, 0]
    assert tell(faults[1:], told, ends) == [f"training was over after {FAULTS - 1} faults of {FAULTS}"]
    assert tell(faults, told, ends) == []
    assert "the driver was hit 3 times" in tell(faults, told, [-9, 3, 0])[0]
    for word, said in (("restart", "hit 3 times, and the log tells of 2"), ("fallback", "tells of 0 falls back")):
        missing = next(e for e in told if e["event"] == word)
        assert said in tell(faults, [e for e in told if e is not missing], ends)[-1]
    groups = [e for e in told if e["event"] != "committed"]
    missing = next(e for e in groups if e["event"] == "restart")
    assert not tell(faults, [e for e in groups if e is not missing], ends), "two hits of one group are one restart"
    cut = next(f["time"] for f in faults if f["kind"] == CUT_OFF)
    another = [event(cut + 0.5, "committed"), event(cut + 1, "resume"), *(e for e in told if e["event"] != "fallback")]
    assert not tell(faults, another, ends), "nobody needs what was cut off where there is a later one"
    late = [e for e in told if e["time"] < 65]
    assert [w for w in tell(faults, late, ends) if w.startswith("nothing")] == [
        f"nothing is told of '{kind}' after {n / 6:.1f} min" for n, kind in enumerate(SOAKED, 1) if n > 6
    ]
