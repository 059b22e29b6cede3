"""A run's folder is taken over by another machine while the run is under way."""

from __future__ import annotations

import time
from dataclasses import replace

import psutil
import pytest

from raydmd.errors import FAILED
from raydmd.training.lock import LEASE, read_lease
from tests.launch import Launch

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("suspended", [False, True], ids=["driver", "workers"])
def test_a_run_that_another_machine_has_taken_over_ends_without_another_word(home, suspended):
    """Its driver ends by itself; one that is suspended can't, and its workers see for themselves."""
    run = Launch(home, f"taken-over-{suspended:d}", cycles=4000)
    run.wait_for("checkpoint", cycle=4)
    ours = psutil.Process(run.process.pid)
    workers = [p for p in ours.children(recursive=True) if any("RayTrainWorker" in c for c in p.cmdline()[:1])]
    assert len(workers) == 2
    if suspended:
        ours.suspend()
    theirs = replace(read_lease(run.folder), host="elsewhere", token="theirs", lock="another 1", processes="another")
    (run.folder / "partial").write_text(theirs.text())
    (run.folder / "partial").replace(run.folder / LEASE)
    try:
        if suspended:
            time.sleep(20)  # cycles and checkpoints would be many
            before = (run.folder / "events.jsonl").read_text()
            kept = sorted((run.folder / "train").glob("cycle-*"))
            time.sleep(10)
            assert (run.folder / "events.jsonl").read_text() == before
            assert sorted((run.folder / "train").glob("cycle-*")) == kept
    finally:
        ours.resume()
    assert run.end(60) == FAILED, run.log.read_text()[-3000:]
    assert "was taken over by pid" in run.log.read_text()
    assert not psutil.wait_procs(workers, timeout=120)[1], "workers of a run that is somebody else's live on"
    assert not [k for k in ("failed", "finished", "stopped") if run.events(k)]
    assert read_lease(run.folder) == theirs
