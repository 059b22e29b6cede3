"""The loop in one process, without Ray, on a pipeline that raydmd did not make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import WanPipeline

from raydmd.errors import InputError, NonFiniteError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.process import step_grid
from raydmd.recipe import Model, Recipe, derive
from raydmd.sampling import sample
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog, read_lines
from raydmd.training.export import export, load_student, student_experts
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog jumps", "a cat jumps"]
SIZE = {"frames": 5, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one_expert(tmp_path_factory) -> Path:
    """Other widths, one expert."""
    return wan_pipeline(tmp_path_factory.mktemp("one"), experts=1, heads=3, layers=1)


def recipe(pipeline: Path, output: Path, **changes) -> Recipe:
    base = derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model": {"path": str(pipeline), **SIZE},
            "checkpoints.every": 2,
            "training": {
                "cycles": 6,
                "batch": 4,
                "fake_updates": 2,
                "fake_warmup": 1,
                "precision": "fp32",
                "report_every": 1,
                "ema": 0.9,
                "decay": 0.5,
                "student": {"rate": 1e-3, "lora": None},
                "fake": {"rate": 1e-3},
            },
        },
    )
    return derive(base, changes)


def work(r: Recipe, *, stop_at: int | None = None, teacher=None) -> tuple[Worker, str]:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    session = FolderSession(r.folder)
    teacher = teacher or LocalClient(TeacherEngine(load_teacher(family, "fp32", device=session.device), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at)
    worker = Worker(job, teacher, session, EventLog(r.folder / "events.jsonl"))
    return worker, worker.run()


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("method", ["phased", "dmd2"])
def test_a_stopped_and_resumed_run_ends_bit_identical(two_experts, tmp_path, stops, method):
    """Stops inside a phase, at its end and in the next; every tensor of both roles is compared."""
    whole, end = work(recipe(two_experts, tmp_path / "whole", method={"name": method}))
    assert end == "finished"
    r = recipe(two_experts, tmp_path / "parts", method={"name": method})
    for stop in stops:
        assert work(r, stop_at=stop)[1] == "stopped"
    parts, end = work(r)
    assert end == "finished"
    events = [e["event"] for e in read_lines(r.folder / "events.jsonl")]
    assert events.count("resume") == len(stops), "the comparison would be between two undisturbed runs"
    ours, theirs = parts.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_training_moves_the_student_and_the_fake_and_not_the_teacher(two_experts, tmp_path):
    r = recipe(two_experts, tmp_path)
    family = load_family(r.model)
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    before = {n: p.clone() for n, p in teacher.modules["transformer"].named_parameters()}
    table = Conditions.read(family.encode(PROMPTS, tmp_path / "c"))
    worker, _ = work(r, teacher=LocalClient(TeacherEngine(teacher, table)))
    for expert in ("transformer", "transformer_2"):
        start = dict(teacher.modules[expert].network.named_parameters())
        moved = dict(worker.student.denoisers[expert].network.named_parameters())
        assert any(not torch.equal(moved[n], p) for n, p in start.items()), expert
    for name, p in teacher.modules["transformer"].named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 2.0}], ids=["full", "lora"])
@pytest.mark.parametrize("pipeline", ["two_experts", "one_expert"])
@pytest.mark.parametrize("method", ["phased", "dmd2"])
def test_the_export_gives_stock_diffusers_the_same_frames(request, tmp_path, pipeline, method, lora):
    folder = request.getfixturevalue(pipeline)
    r = recipe(folder, tmp_path, method={"name": method}, training={"student": {"rate": 1e-2, "lora": lora}})
    work(r)
    family = load_family(r.model)
    denoisers = load_student(r, family, max(r.folder.glob("cycle-*-final")))
    student = student_experts(r, family, denoisers)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    noise = torch.randn(1, *family.shape().latent, generator=torch.Generator().manual_seed(1))
    cond = table.rows([1])
    # DMD2 puts fresh noise between its steps; the stock scheduler draws it from torch's global generator.
    fresh = (lambda _: torch.randn(noise.shape)) if method == "dmd2" else None
    torch.manual_seed(0)
    latents = sample(student, noise, cond, cond, grid=step_grid(4, 5.0), guidance=Guidance(), fresh=fresh)
    ours = family.decode(latents)
    written = export(r, family, denoisers, r.folder)

    pipe = WanPipeline.from_pretrained(r.folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": PROMPTS[0],
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "max_sequence_length": family.text_length(),
        "latents": noise,
        "output_type": "pt",
    }
    torch.manual_seed(0)
    assert (pipe(**call).frames - ours).abs().max() < 1e-4
    if lora is not None:
        assert [p.name for p in written] == ["lora", "pipeline"]
        base = WanPipeline.from_pretrained(folder)
        base.set_progress_bar_config(disable=True)
        if pipeline == "one_expert" and method == "phased":  # the adapters of phase 2 need a base of their own
            base.register_modules(transformer_2=WanPipeline.from_pretrained(folder).transformer)
            base.register_to_config(boundary_ratio=0.875)
        for name, second in (("transformer", False), ("transformer_2", True)):
            if name in denoisers:
                base.load_lora_weights(
                    r.folder / "lora", weight_name=f"{name}.safetensors", load_into_transformer_2=second
                )
        base.scheduler = pipe.scheduler
        torch.manual_seed(0)
        assert (base(**call).frames - ours).abs().max() < 1e-4


def test_x0_is_what_the_stock_pipeline_computes(two_experts):
    """Guidance included, at every step of the teacher's own walk."""
    family = load_family(Model(path=str(two_experts), **SIZE))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe = WanPipeline.from_pretrained(two_experts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = __import__("diffusers").FlowMatchEulerDiscreteScheduler(shift=5.0)
    noise = torch.randn(1, *family.shape().latent, generator=torch.Generator().manual_seed(2))
    kept: list[torch.Tensor] = []

    def keep(_pipe, _step, _t, values):
        kept.append(values["latents"].clone())
        return values

    length = family.text_length()
    pipe(PROMPTS[0], negative_prompt="", num_inference_steps=5, guidance_scale=3.0, num_frames=5, height=32, width=32,
         max_sequence_length=length, latents=noise, output_type="latent", callback_on_step_end=keep)  # fmt: skip
    sigmas = [float(s) for s in pipe.scheduler.sigmas]
    embeds = [
        pipe.encode_prompt(p, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        for p in (PROMPTS[0], "")
    ]
    cond, uncond = (Conditions(embeds=e) for e in embeds)
    x = noise
    for after, now, nxt in zip(kept, sigmas, sigmas[1:], strict=False):
        t, s = torch.tensor([now]), torch.tensor([nxt])
        x = family.process.step(x, teacher.guided_x0(x, t, cond, uncond, Guidance(3.0)), t, s)
        torch.testing.assert_close(x, after, rtol=0, atol=2e-5)


def test_a_non_finite_teacher_stops_the_run_before_anything_moves(two_experts, tmp_path):
    r = recipe(two_experts, tmp_path)
    family = load_family(r.model)
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    with torch.no_grad():
        next(teacher.modules["transformer"].parameters()).fill_(float("nan"))
    table = Conditions.read(family.encode(PROMPTS, tmp_path / "c"))
    with pytest.raises(NonFiniteError, match="cycle 0"):
        work(r, teacher=LocalClient(TeacherEngine(teacher, table)))


def test_prompts_are_encoded_once(two_experts, tmp_path):
    family = load_family(Model(path=str(two_experts), **SIZE))
    file = family.encode(PROMPTS, tmp_path)
    stamp = file.stat().st_mtime_ns
    assert family.encode(PROMPTS, tmp_path) == file
    assert file.stat().st_mtime_ns == stamp
    assert family.encode([*PROMPTS, "a dog runs"], tmp_path) != file
    assert len(Conditions.read(file)) == 1 + len(PROMPTS)


def test_bad_models_are_refused(two_experts, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_family(Model(path=str(tmp_path / "absent")))
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_family(Model(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(InputError, match="is a KandinskyPipeline; this version of raydmd distils WanPipeline"):
        load_family(Model(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(InputError, match="has no transformer, vae, text_encoder, tokenizer"):
        load_family(Model(path=str(tmp_path)))
    with pytest.raises(InputError, match=r"frames must be 1 \+ a multiple of 4, height of 16"):
        load_family(Model(path=str(two_experts), frames=6, height=32, width=32))
