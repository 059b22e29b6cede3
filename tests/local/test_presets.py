"""Every preset and a mixture through the loop, from a pipeline to an exported student, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from raydmd.data.real import inspect, load_real, prepare
from raydmd.errors import RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.pairs.make import begin, make_pairs
from raydmd.pairs.origin import folder_of, origin_of
from raydmd.recipe import Recipe, derive, load
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.export import export, load_student
from raydmd.training.pairing import Pairing, check_pairs, open_pairs
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.serving.client import Client

pytestmark = pytest.mark.local
PROMPTS = ["a red bag moving left fast", "something moving up", "something", "a blue coat"]


def recipe(output: Path, method: dict) -> Recipe:
    return derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model.path": "wan22-tiny",
            "training": {
                "cycles": 2,
                "batch": 4,
                "fake_updates": 1,
                "precision": "fp32",
                "report_every": 1,
                "student": {"rate": 1e-3, "lora": None},
                "fake": {"rate": 1e-3},
            },
            "method": method,
        },
    )


def pairing(r: Recipe, family: Family, teacher: Client) -> Pairing | None:
    """Pairs made here, checked and opened as a run does."""
    if r.method.regression is None:
        return None
    folder = folder_of(r)
    if folder.is_dir():  # another rank's
        return open_pairs(r, family, family.encode(PROMPTS, r.output / "conditions"), torch.device("cpu"))
    folder.mkdir()
    manifest = begin(folder, origin_of(r, family, PROMPTS, 6, shard=4), "", PROMPTS)
    make_pairs(folder, manifest, len(PROMPTS), teacher, ahead=1)
    prompts = check_pairs(r, family)
    assert prompts == PROMPTS
    return open_pairs(r, family, family.encode(prompts, r.output / "conditions"), torch.device("cpu"))


def build(r: Recipe, session: FolderSession) -> Worker:
    """A worker with all that its method asks for."""
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.output / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    rewards = LocalClient(load_reward_engine(r, PROMPTS, "cpu")) if r.method.adapt else None
    real = None
    if r.method.gan:
        source = inspect(r.method.gan, family.shape())
        real = load_real(prepare(source, r.model, family, r.output / "real", print))
    job = Job(recipe=r, family=family, conditions=table, real=real, pairing=pairing(r, family, teacher))
    return Worker(job, teacher, session, EventLog(r.folder / "events.jsonl"), rewards)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dmd", "regression": {"loss": "l2", "steps": 4}},
        {"name": "dmd", "steps": 2, "regression": {"loss": "ssim", "steps": 4, "frames": 2, "resample": 0.5}},
        {"name": "dmd2"},
        {"name": "phased"},
        {"name": "decoupled"},
        {"name": "amd"},
        {"name": "dp_dmd", "anchor": {"steps": 2, "of": 6}},
        {"name": "phased", "decouple": {"schedule": "constrained"}, "anchor": {"steps": 2, "of": 6}, "adapt": {}},
        {"name": "amd", "moments": {"weight": {"balance": 0.1}}, "gan": {"weight": {"balance": 0.2}, "r1": {}}},
    ],
    ids=lambda m: m["name"] + ("+" if len(m) > 2 else "") + ("gan" if "gan" in m else ""),
)
def test_a_method_trains_and_exports(tmp_path, method):
    torch.set_num_threads(1)
    if "gan" in method:
        method = {**method, "gan": {**method["gan"], "data": str(tmp_path / "real.safetensors")}}
    r = recipe(tmp_path, method)
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    if r.method.gan:
        save_file({"latents": torch.randn(5, *family.shape().latent)}, r.method.gan.data)
    session = FolderSession(r.folder)
    worker = build(r, session)
    assert worker.run() == "finished"
    rows = [row for row in session.reports if "student/gradient" in row]
    assert all(row["student/gradient"] > 0 for row in rows)
    assert all((row.get("student/regression", 0) > 0) == (r.method.regression is not None) for row in rows)
    assert all(("gan/student" in row) == ("gan/r1" in row) == (r.method.gan is not None) for row in rows)
    assert all(("student/reward" in row) == (r.method.adapt is not None) for row in rows)
    student = load_student(r, family, max(r.folder.glob("cycle-*final")))
    for expert, denoiser in student.items():
        source = "transformer" if expert == "transformer" else "transformer_2"
        start = dict(family.denoiser(source, dtype=torch.float32).network.named_parameters())
        moved = [n for n, p in denoiser.network.named_parameters() if not torch.equal(p, start[n])]
        assert moved or r.method.name in ("dmd", "dmd2"), expert
    export(r, family, student, r.folder)
    pipeline = WanPipeline.from_pretrained(r.folder / "pipeline")
    assert pipeline.scheduler.config.stochastic_sampling == (r.method.solver == "renoise")


def test_samples_of_a_group_share_a_prompt_and_nothing_else(tmp_path):
    r = recipe(tmp_path, {"name": "amd", "adapt": {"group": 2}})
    r.folder.mkdir(parents=True)
    worker = build(r, FolderSession(r.folder))
    assert worker.run() == "finished"
    batch = worker.stream.batch(0, "student")
    assert batch.conditions[0] == batch.conditions[1] != batch.conditions[2] == batch.conditions[3]
    noise = batch.draws.normal("noise", (3,))
    assert not torch.equal(noise[0], noise[1])


def test_the_published_mixture_trains_from_its_file(tmp_path):
    file = Path(__file__).parents[2] / "experiments" / "mixture_wan22.yaml"
    assert len(file.read_text().splitlines()) < 25
    small = {"cycles": 2, "batch": 4, "fake_updates": 1, "report_every": 1}
    r = derive(load(file, Recipe()), {"output": tmp_path, "training": small, "method.anchor": {"steps": 2, "of": 6}})
    r.folder.mkdir(parents=True)
    session = FolderSession(r.folder)
    worker = build(r, session)
    assert worker.run() == "finished"
    assert worker.recipe.method.boundaries
    rows = [row for row in session.reports if "student/gradient" in row]
    assert len(rows) == 2
    assert all({"student/reward", "student/gradient"} <= row.keys() for row in rows)


@pytest.mark.parametrize("missing", ["adapt", "regression"])
def test_a_worker_without_what_its_method_asks_for_says_so(tmp_path, missing):
    r = recipe(tmp_path, {"name": "amd"} if missing == "adapt" else {"name": "dmd", "regression": {"loss": "l2"}})
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, tmp_path / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table)
    with pytest.raises(RunFailed, match=f"method.{missing} is on, but the worker was given nothing"):
        Worker(job, teacher, FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))
