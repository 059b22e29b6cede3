"""A sweep from the command line, on a Ray of its own: stopped on its way, gone on with, tracked, shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tests.listening import far, listening

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HERE = Path(__file__).parents[2]
SWEEP: dict[str, Any] = {
    "name": "tiny",
    "objectives": {"frechet": "min", "coverage_entropy": "max"},
    "space": {"method.guidance": [1.5, 3.5, 6.0], "method.decouple.augment": {"low": 0.5, "high": 1.5}},
    "search": {"kind": "random"},
    "stopping": {"reduction": 2.0},
    "budget": {"trials": 2},
    "verdict": {"seeds": 2},
    "recipe": {
        "model.path": "sd35-tiny",
        "method": {"name": "decoupled", "shift": 3.0},
        "training": {
            "cycles": 160,
            "batch": 8,
            "fake_updates": 1,
            "precision": "fp32",
            "report_every": 10,
            "student": {"lora": None},
        },
        "checkpoints.every": 40,
        "evaluation": {"every": 80, "samples": 16, "teacher_steps": 3, "grid": 2},
        "placement": {"worker_cpus": 0.5, "teacher_cpus": 0.25},
        "monitor.diversity": None,
    },
}


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "raydmd", "sweep", *words],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    asked = command(folder, "status", "runs/tiny", "--json")
    out, _ = asked.communicate(timeout=180)
    assert asked.returncode == 0, out
    found: list[dict[str, Any]] = json.loads(out[out.index("{") :])["trials"]
    return found


def cycles(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["cycle"]) if lines else 0


def beaten(verdict: dict[str, Any]) -> int:
    pairs = zip(verdict["found"]["frechet"], verdict["default"]["frechet"], strict=True)
    return sum(found < default for found, default in pairs)


@pytest.mark.sweep
def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False), encoding="utf-8")
    first = command(tmp_path, "run", "s.yaml", "--cluster", "here")
    trials = tmp_path / "runs" / "tiny" / "trials"
    deadline = time.monotonic() + 300
    while cycles(trials / "0000") < 60:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not far(listening(first.pid), groups=2)  # two trials at a time
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=200)
    assert first.returncode == 3, out
    assert "the same command goes on with it" in out
    before = [row for row in rows(tmp_path) if row["state"] != "lost"]
    assert {row["state"] for row in before} <= {"waiting", "finished", "stopped early"}

    again = command(tmp_path, "run", "s.yaml", "--cluster", "here")
    out, _ = again.communicate(timeout=500)
    assert again.returncode == 0, out
    after = [row for row in rows(tmp_path) if row["state"] != "lost"]
    assert len(after) == 2
    assert {row["state"] for row in after} <= {"finished", "stopped early"}
    assert sorted(row["trial"] for row in after) == sorted({row["trial"] for row in after})
    finished = [row for row in after if row["state"] == "finished"]
    assert finished
    assert all(set(row["values"]) == {"frechet", "coverage_entropy"} for row in finished)
    # The trial that was stopped went on from its checkpoint.
    events = [json.loads(line) for line in (trials / "0000" / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "resume" and event["cycle"] > 0 for event in events)
    # The teacher's clips are made once for all trials, and once more for each held-out seed.
    assert len(list((tmp_path / "runs" / "tiny" / "conditions").glob("clips-*"))) == 2 * (1 + SWEEP["verdict"]["seeds"])

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "raydmd"]
    found = client.search_runs([experiment.experiment_id])
    parents = [r for r in found if MLFLOW_PARENT_RUN_ID not in r.data.tags]
    assert len(parents) == 1
    children = [r for r in found if r.data.tags.get(MLFLOW_PARENT_RUN_ID) == parents[0].info.run_id]
    assert {r.data.tags["raydmd.trial"] for r in children} == {"default", *(f"{row['trial']:04d}" for row in after)}
    assert {r.data.tags["raydmd.cluster"] for r in children} == {"here"}
    for run in children:
        for key in ("cycle", "evaluation/frechet"):
            steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), (run.info.run_name, key, steps)

    best = min(finished, key=lambda row: row["values"]["frechet"])["trial"]
    registered = client.get_model_version_by_alias("tiny", "best")
    assert client.get_run(registered.run_id).data.tags["raydmd.trial"] == f"{best:04d}"
    packed = Path(unquote(urlparse(client.get_model_version_download_uri("tiny", registered.version)).path))
    index = next(packed.rglob("pipeline/model_index.json"))
    assert index.is_file()
    # As somebody loads it who knows no raydmd: the same prompt and seed, the same picture.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    [picture] = mlflow.pyfunc.load_model("models:/tiny@best").predict(["a red cat"], params={"seed": 3})
    assert picture.shape[-1] == 3
    how = json.loads(next(packed.rglob("how.json")).read_text())
    pipe = DiffusionPipeline.from_pretrained(index.parent, **dict.fromkeys(how["absent"]))
    torch.manual_seed(3)  # its scheduler draws noise of its own
    drawn = pipe("a red cat", generator=torch.Generator().manual_seed(3), output_type="np", **how["call"]).images
    assert np.array_equal(drawn, picture)

    verdict = json.loads((tmp_path / "runs" / "tiny" / "verdict.json").read_text())
    assert verdict["trial"] == best
    assert len(set(verdict["default"]["frechet"] + verdict["found"]["frechet"])) == 4
    sentence = f"trial {best:04d} {'beats' if beaten(verdict) == 2 else 'does NOT beat'} the recipe: frechet is better"
    assert f"{sentence} on {beaten(verdict)} of 2, coverage_entropy is better on" in out
    assert sentence in (tmp_path / "runs" / "tiny" / "compare.html").read_text()

    done = command(tmp_path, "run", "s.yaml", "--cluster", "here")
    out, _ = done.communicate(timeout=180)
    assert done.returncode == 0
    assert "is finished" in out
    assert sentence in out
    for which in ("best", "front"):
        shown = command(tmp_path, which, "runs/tiny")
        out, _ = shown.communicate(timeout=180)
        assert shown.returncode == 0, out
        assert "finished" in out


def test_a_study_of_another_recipe_is_refused_before_the_start(tmp_path: Path) -> None:
    from raydmd.recipe import Recipe, derive
    from raydmd.tuning.checks import pinned
    from raydmd.tuning.spec import read_sweep
    from raydmd.tuning.storage import storage_url
    from raydmd.tuning.study import Study

    given = {k: v for k, v in SWEEP.items() if k != "recipe"}
    spec, other = read_sweep(given), derive(Recipe(), {**SWEEP["recipe"], "output": tmp_path / "runs", "seed": 5})
    base = pinned(spec, other)
    base.output.parent.mkdir(parents=True)
    Study(spec, base, storage_url(spec, base.output.parent), "there")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False), encoding="utf-8")
    asked = command(tmp_path, "run", "s.yaml")
    out, _ = asked.communicate(timeout=180)
    assert asked.returncode == 2, out
    assert "is of another sweep: recipe.seed differ" in out
    assert not (tmp_path / "runs" / "tiny" / "trials").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"frechett": "min"}}, "no trial reports 'frechett'"),
        ({"space": {"method.guidanse": [1, 2]}}, "did you mean 'method.guidance'"),
        ({"recipe": {**SWEEP["recipe"], "evaluation": {"every": 0}}}, "set evaluation.every"),
        ({"space": {"method.boundaries": {"of": [[0.5, 0.9]]}}}, "boundaries must fall"),
        ({"budget": {"gpu_hours": 3}}, "does nothing where placement.worker_gpus=0"),
        ({"space": {"seed": [1, 2]}, "repeats": 2}, "'seed' is not searched"),
    ],
)
def test_bad_input_is_refused_before_the_start(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False), encoding="utf-8")
    asked = command(tmp_path, "run", "s.yaml")
    out, _ = asked.communicate(timeout=180)
    assert asked.returncode == 2, out
    assert message in out
    assert not (tmp_path / "runs" / "tiny" / "study.db").exists()
