"""A population from the command line, on a Ray of its own: taking turns, a takeover, a stop in the middle, the end."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from raydmd.recipe import Recipe, load
from tests.ray.test_sweep import SWEEP, command, rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

POPULATION: dict[str, Any] = {
    "name": "tiny",
    "objectives": {"frechet": "min"},
    # With this seed the first one gets the rate that ruins its student.
    "space": {"training.student.rate": [2e-4, 1e-2], "method.guidance": {"low": 2.0, "high": 5.0}},
    "search": {"seed": 5},
    "population": {"resample": 0.0},
    "budget": {"trials": 2},
    "parallel": 1,
    "recipe": {
        **SWEEP["recipe"],
        "training": {**SWEEP["recipe"]["training"], "cycles": 100},
        "checkpoints.every": 20,
        "evaluation": {"every": 50, "samples": 16, "teacher_steps": 3, "grid": 2},
        # Two workers have no room beside the teacher: a placement group that stayed would keep the next leg waiting.
        "placement": {"worker_cpus": 1.0, "teacher_cpus": 0.25},
    },
}


def events(run: Path) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def gone(pid: int) -> bool:
    """Whether a process has ended, in a moment."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.sweep
def test_members_take_turns_take_over_and_go_on_after_a_stop(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(POPULATION, sort_keys=False), encoding="utf-8")
    first = command(tmp_path, "run", "s.yaml", "--cluster", "here")
    runs = [tmp_path / "runs" / "tiny" / "trials" / name for name in ("0000", "0001")]
    deadline, checked = time.monotonic() + 400, set[int]()

    def taker() -> Path | None:
        return next((run for run in runs if any(e["event"] == "exploit" for e in events(run))), None)

    while True:
        for run in runs:  # a leg that is over has left no worker
            for leg, stop in ((e, s) for e in events(run) if e["event"] == "leg" for s in events(run)):
                if stop["event"] == "stopped" and stop["cycle"] == leg["cycle"] and stop["pid"] not in checked:
                    assert gone(stop["pid"])
                    checked.add(stop["pid"])
        if (run := taker()) and events(run)[-1]["event"] in ("resume", "checkpoint"):
            break
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert len(checked) == 2
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=200)
    assert first.returncode == 3, out
    assert "the same command goes on with it" in out
    assert all(gone(e["pid"]) for run in runs for e in events(run))
    assert {row["state"] for row in rows(tmp_path) if row["state"] != "lost"} == {"waiting"}

    again = command(tmp_path, "run", "s.yaml", "--cluster", "here")
    out, _ = again.communicate(timeout=500)
    assert again.returncode == 0, out
    assert "takes over" not in out, "a takeover was done twice"
    after = [row for row in rows(tmp_path) if row["state"] != "lost"]
    assert [row["state"] for row in after] == ["finished", "finished"]
    took = taker()
    assert took is not None
    donor = next(run for run in runs if run != took)
    said = [e["event"] for e in events(took)]
    assert [e for e in said if e in ("start", "leg", "exploit", "finished")] == ["start", "leg", "exploit", "finished"]
    [exploit] = [e for e in events(took) if e["event"] == "exploit"]
    assert (exploit["donor"], exploit["cycle"]) == (donor.name, 50)
    [there] = [e["cycle"] for e in events(took) if e["event"] == "stopped" and e["cycle"] not in (50, 100)]
    back = [e["cycle"] for e in events(took) if e["event"] == "resume"]
    assert back == [50, there], "what was trained before the stop was lost"
    assert [e["event"] for e in events(donor)].count("start") == 1
    assert not (took / "taken").exists()

    [row] = [row for row in after if f"{row['trial']:04d}" == took.name]
    assert load(took / "recipe.yaml", Recipe()).method.guidance == pytest.approx(row["changes"]["method.guidance"])
    path = [(e["cycle"], e["donor"]) for e in row["schedule"]]
    assert path == [(0, None), (50, int(donor.name))]
    assert row["schedule"][1]["changes"] == row["changes"] == exploit["changes"]
    other = next(r for r in after if r is not row)
    assert row["schedule"][0]["changes"] == other["changes"]
    # The ruined student is no more: what was taken over is as good as its donor.
    at = [r["evaluations"]["50"]["frechet"] for r in (row, other)]
    assert at[0] > at[1]

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "raydmd"]
    children = [r for r in client.search_runs([experiment.experiment_id]) if MLFLOW_PARENT_RUN_ID in r.data.tags]
    assert len(children) == 2
    for run_of in children:
        for key, last in (("cycle", 100), ("evaluation/frechet", 100)):
            steps = [m.step for m in client.get_metric_history(run_of.info.run_id, key)]
            assert steps == sorted(set(steps)), (run_of.info.run_name, key, steps)
            assert steps[-1] == last
    [tags] = [r.data.tags for r in children if r.data.tags["raydmd.trial"] == took.name]
    assert tags["raydmd.taken_over"] == f"cycle 50 from {donor.name}"

    shown = command(tmp_path, "best", "runs/tiny")
    out, _ = shown.communicate(timeout=60)
    assert "from cycle 0: training.student.rate=0.0002" in out
    refused = command(tmp_path, "run", "s.yaml", "--cluster", "there")
    out, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "its population belongs to cluster 'here'" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"training.batch": [8, 16]}}, "'training.batch' can't change under a training state"),
        ({"space": {"training.ema": [0.0, 0.9]}}, "train other networks"),
    ],
)
def test_bad_input_is_refused_before_the_start(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**POPULATION, **changes}), encoding="utf-8")
    asked = command(tmp_path, "run", "s.yaml")
    out, _ = asked.communicate(timeout=120)
    assert asked.returncode == 2, out
    assert message in out
    assert not (tmp_path / "runs" / "tiny" / "study.db").exists()
