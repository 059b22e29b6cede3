"""The collapse monitor in a run: what it does to the loop, and that it leaves a healthy one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.recipe import Recipe, derive
from raydmd.training import checkpoint
from raydmd.training.events import read_lines
from tests.local.test_worker import recipe, work
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local

QUICK = {"settle": 3, "window": 2, "patience": 2, "every": 1}
"""For runs of a dozen cycles: the lookback is 5 of them."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("one"), experts=1, layers=1)


def watched(pipeline: Path, output: Path, *, rate: float, cycles: int = 15, **monitor: object) -> Recipe:
    settings = {"cycles": cycles, "decay": 0.0, "student": {"rate": rate}}
    method = {"name": "dmd2", "steps": 2}
    changes = {"method": method, "training": settings, "checkpoints.every": 3, "monitor": {**QUICK, **monitor}}
    return derive(recipe(pipeline, output), changes)


def events(r: Recipe, kind: str) -> list[dict]:
    return [e for e in read_lines(r.folder / "events.jsonl") if e["event"] == kind]


ABSURD = 0.3


def test_a_healthy_run_is_silent_and_measured(pipeline, tmp_path):
    r = watched(pipeline, tmp_path, rate=1e-4, cycles=12)
    worker, end = work(r)
    assert end == "finished"
    assert events(r, "alarm") == []
    row = worker.session.reports[-2]
    assert row["cycle"] == 12
    assert row["monitor/alarm"] == 0
    assert {f"monitor/{k}" for k in ("gradient", "fake_error", "spread", "saturation", "diversity")} <= row.keys()
    assert row["student/diversity"] > 0


def test_a_collapse_is_rolled_back_and_the_run_goes_on_otherwise(pipeline, tmp_path):
    r = watched(pipeline, tmp_path, rate=ABSURD, action="rollback", cut=1e-4, ratio=1.5)
    worker, end = work(r)
    assert end == "finished"
    (back,) = events(r, "rollback")
    (alarm,) = events(r, "alarm")
    assert alarm["action"] == "rollback"
    assert back["since"] == alarm["cycle"]
    assert back["cycle"] <= max(alarm["cycle"] - r.monitor.lookback, 0), "the checkpoint may be in the alarm's window"
    assert all(bool(torch.isfinite(v).all()) for v in worker.state().values())
    assert (worker.watch.measures.attempt, worker.watch.measures.fake_updates) == (1, 3)
    assert worker.session.reports[-2]["student/rate"] == pytest.approx(ABSURD * 1e-4)
    assert worker.session.reports[-2]["student/x0_std"] < 3
    names = sorted(f.name for f in r.folder.glob("cycle-*"))
    assert names[0] == "cycle-00000000"
    assert names[-1] == "cycle-r01-00000015-final"
    progress = checkpoint.read_progress(r.folder / f"cycle-r01-{back['cycle']:08d}")
    assert progress.monitor["measures"]["actions"] == 1, "a crash now would forget the rollback"


def test_other_draws_alone_do_not_help_and_the_run_stops_until_it_is_resumed_with_other_settings(pipeline, tmp_path):
    r = watched(pipeline, tmp_path, rate=ABSURD, action="rollback", cut=1.0, ratio=1.0, limit=2)
    worker, end = work(r)
    assert end == "stopped"
    assert [e["action"] for e in events(r, "alarm")] == ["rollback", "rollback", "stop"]
    attempts = [{c["cycle"]: c for c in worker.session.reports if c.get("monitor/attempt") == k} for k in range(2)]
    both = attempts[0].keys() & attempts[1].keys()
    assert both
    assert all(attempts[0][c]["student/gradient"] != attempts[1][c]["student/gradient"] for c in both), "same draws"
    (stopped,) = events(r, "stopped")
    assert "limit=2" in stopped["alarm"]
    assert (r.folder / checkpoint.name_of(stopped["cycle"], 2)).is_dir()
    warned = derive(r, {"monitor": {"action": "warn", "limit": 2, "cut": 0.5, "ratio": 1.5}})
    worker, end = work(warned)
    assert end == "finished"
    assert events(r, "resume")[0]["cycle"] == stopped["cycle"]
    assert worker.watch.measures.attempt == 2


REPEATED = {"rate": ABSURD, "action": "rollback", "cut": 1e-2, "cycles": 15}
"""Collapses at once, and once more."""


def test_a_run_that_rolls_back_resumes_bit_identical(pipeline, tmp_path):
    """Stopped after the first rollback, where no checkpoint is due, and after the second."""
    whole, end = work(watched(pipeline, tmp_path / "whole", **REPEATED))
    assert (end, whole.watch.measures.attempt) == ("finished", 2)
    r = watched(pipeline, tmp_path / "parts", **REPEATED)
    for stop in (7, 13):
        assert work(r, stop_at=stop)[1] == "stopped"
    parts, end = work(r)
    assert end == "finished"
    assert len(events(r, "resume")) == 2
    assert len(events(r, "rollback")) == 2
    assert parts.watch.state() == whole.watch.state()
    theirs = whole.state()
    for key, value in parts.state().items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(("action", "key"), [("raise_ratio", "fake_updates"), ("cut_rate", "rate")])
def test_milder_actions_go_on_where_they_are(pipeline, tmp_path, action, key):
    r = watched(pipeline, tmp_path, rate=ABSURD, action=action, cycles=6, limit=9)
    worker, end = work(r)
    assert end == "finished"
    assert events(r, "alarm")
    assert not events(r, "rollback")
    now = worker.watch.measures
    assert (now.fake_updates > 2, now.rate < 1) == (key == "fake_updates", key == "rate")
    if key == "rate":
        rates = [row["student/rate"] for row in worker.session.reports if "student/rate" in row]
        assert rates[0] == ABSURD
        assert rates[-1] <= ABSURD / 2
