"""The experiment on the zoo's image member in one process: train, export, evaluate, report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, derive
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.finish import finish_run
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker

pytestmark = pytest.mark.local
PROMPTS = ["a red bag top left large", "something bottom right", "something", "a blue coat"]


def experiment() -> Recipe:
    file = Path(__file__).parents[2] / "experiments" / "dp_dmd_sd35.py"
    spec = importlib.util.spec_from_file_location("dp_dmd_sd35", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ZOO


@pytest.mark.parametrize("method", [{}, {"name": "amd", "shift": 3.0}], ids=["dp_dmd", "amd"])
def test_the_experiment_runs_to_its_report(tmp_path, method):
    """And AMD, whose reward is the judge of pictures."""
    torch.set_num_threads(1)
    r = derive(
        experiment(),
        {
            "name": "run",
            "output": tmp_path,
            "method": method,
            "training": {"cycles": 2, "batch": 8, "fake_updates": 1, "fake_warmup": 1, "report_every": 1},
            "placement": {"workers": 1},
            "evaluation": {"samples": 16, "teacher_steps": 4, "grid": 3},
        },
    )
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    rewards = LocalClient(load_reward_engine(r, PROMPTS, "cpu")) if r.method.adapt else None
    session = FolderSession(r.folder)
    job = Job(recipe=r, family=family, conditions=table)
    assert Worker(job, teacher, session, EventLog(r.folder / "events.jsonl"), rewards).run() == "finished"
    rows = [row for row in session.reports if "student/gradient" in row]
    assert all(("student/reward" in row) == (r.method.adapt is not None) for row in rows)

    checkpoint = max(r.folder.glob("cycle-*final"))
    figures, files, table_text = finish_run(r, str(checkpoint), PROMPTS, {}, None)
    assert all(Path(f).exists() for f in files)
    assert {"evaluation/joint", "evaluation/accuracy_place", "evaluation/accuracy_size"} <= set(figures)
    assert not {"evaluation/flow", "evaluation/dynamic_degree", "evaluation/accuracy_speed"} & set(figures)
    assert "flow" not in table_text
    rows = json.loads((r.folder / "result.json").read_text())["rows"]
    assert {row["name"] for row in rows} >= {"teacher", "reference", "undistilled", "student"}
    pipe = StableDiffusion3Pipeline.from_pretrained(r.folder / "pipeline")
    assert pipe.scheduler.config.stochastic_sampling == (r.method.solver == "renoise")
