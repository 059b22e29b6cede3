"""Samples for fake updates that are drawn elsewhere, from weights that were written down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import InputError
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, derive
from raydmd.serving.codec import decode_request, encode_request
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training import sampling
from raydmd.training.checkpoint import STUDENT
from raydmd.training.events import EventLog
from raydmd.training.sampling import KEPT, LIVE, SamplerEngine, Samplers, version_folder
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.serving.messages import Request

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog jumps", "a cat jumps"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("two"))


class OverTheWire(LocalClient):
    """Sends a request through the codec first, as a pool does."""

    def submit(self, request: Request):
        return super().submit(decode_request(encode_request(request, "run/rank0")))


def work(
    pipeline: Path, folder: Path, *, samplers: int = 0, lag: int = 1, method: str = "phased", leave=(), student=None
):
    """Train six cycles; the worker, and its reports. ``leave`` are versions of weights that lie there before."""
    torch.set_num_threads(1)
    recipe = derive(
        Recipe(name="run", output=folder),
        {
            "model": {"path": str(pipeline), "frames": 5, "height": 32, "width": 32},
            "method.name": method,
            "training": {
                "cycles": 6,
                "batch": 2,
                "fake_updates": 2,
                "precision": "fp32",
                "report_every": 1,
                "student": student or {"rate": 1e-3, "lora": None},
                "fake": {"rate": 1e-3},
            },
            "checkpoints.every": 100,
            "placement": {"samplers": samplers, **({"sampler_lag": lag} if samplers else {})},
        },
    )
    recipe.folder.mkdir(parents=True)
    family = load_family(recipe.model)
    table = Conditions.read(family.encode(PROMPTS, recipe.folder / "conditions"))
    session = FolderSession(recipe.folder)
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=session.device), table))
    for version in leave:
        old = version_folder(recipe.folder, version) / STUDENT
        old.mkdir(parents=True)
        (old / "nonsense.safetensors").write_bytes(b"of another life")
    drawn = None
    if samplers:
        client = OverTheWire(SamplerEngine(recipe, family, table, session.device))
        drawn = Samplers(client, recipe.folder, every=lag, rank=0)
    job = Job(recipe=recipe, family=family, conditions=table)
    worker = Worker(job, teacher, session, EventLog(recipe.folder / "events.jsonl"), samplers=drawn)
    assert worker.run() == "finished"
    return worker, [row for row in session.reports if "fake/loss" in row]


@pytest.mark.parametrize("method", ["phased", "dmd2"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_student_that_stands_still_is_sampled_elsewhere_as_here(pipeline, tmp_path, method, lora):
    """Bit by bit: the same weights, the same draws, over the wire and back."""
    still = {"rate": 1e-30, "lora": lora}
    here, _ = work(pipeline, tmp_path / "here", method=method, student=still)
    there, rows = work(pipeline, tmp_path / "there", method=method, samplers=1, lag=2, student=still)
    ours, theirs = here.state(), there.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(row["fake/age"] for row in rows) > 0


def test_ages_are_stamped_and_bounded_and_a_phase_begins_afresh(pipeline, tmp_path):
    _, rows = work(pipeline, tmp_path, samplers=1, lag=2)
    # Two phases of three cycles: the first of each draws its own, the next ones what was asked for a cycle before.
    assert [row["fake/age"] for row in rows] == [0, 1, 2, 0, 1, 2]
    live = sorted(f.name for f in (tmp_path / "run" / LIVE).iterdir())
    assert len(live) <= KEPT
    assert live == [f"{3:08d}"]  # the last phase wrote at its start alone


def test_a_run_that_goes_back_follows_its_student_anew(pipeline, tmp_path):
    """What a life before has left is not taken for this one's, though it has had as many updates, or more."""
    _, rows = work(pipeline, tmp_path, samplers=1, leave=(7, 2, 1))
    assert [row["fake/age"] for row in rows] == [0, 1, 1, 0, 1, 1]
    live = sorted(f.name for f in (tmp_path / "run" / LIVE).iterdir())
    assert live == [f"{k:08d}" for k in (3, 4)]


def test_samples_are_of_the_student_as_it_was(pipeline, tmp_path):
    """With a student that moves, samples of an older one make another fake score."""
    fresh, _ = work(pipeline, tmp_path / "fresh")
    stale, _ = work(pipeline, tmp_path / "stale", samplers=1)
    ours, theirs = fresh.state(), stale.state()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_are_not_there_are_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SEEN_WITHIN", 0.2)
    monkeypatch.setattr(sampling, "write_student", lambda *_, **__: None)
    monkeypatch.setattr(Samplers, "_tidy", lambda *_: None)
    with pytest.raises(InputError, match=r"the student's weights are not in .*live/00000000/student"):
        work(pipeline, tmp_path, samplers=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement.sampler_lag": 2}, "sampler_lag=2 does nothing without samplers"),
        ({"placement.samplers": 1, "deterministic": True}, "after a resume, samples are of another age"),
        ({"placement.samplers": 1, "training.fake_updates": 0}, "does nothing with training.fake_updates=0"),
        ({"placement.samplers": 1, "placement.sequence": 2, "placement.workers": 2}, "share each sample"),
        ({"placement.teachers": 3, "placement.teachers_most": 2}, "teachers_most=2 is below teachers=3"),
        ({"placement.teacher": "local", "placement.teacher_compile": "default"}, "does nothing with teacher=local"),
    ],
)
def test_placements_that_cannot_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        derive(Recipe(), changes)
