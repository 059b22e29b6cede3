"""The image family: what raydmd computes is what stock StableDiffusion3Pipeline computes, before and after training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.sd3 import StableDiffusion3Denoiser
from raydmd.process import step_grid
from raydmd.recipe import Model, Recipe, derive
from raydmd.sampling import sample
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.export import export, load_student, student_experts
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.pipelines import sd3_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog jumps", "a cat jumps"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return sd3_pipeline(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def dropped(tmp_path_factory) -> Path:
    """Other widths, no T5."""
    return sd3_pipeline(tmp_path_factory.mktemp("dropped"), heads=3, layers=1, t5=False)


def stock(folder: Path) -> StableDiffusion3Pipeline:
    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(family) -> torch.Tensor:
    return torch.randn(1, *family.shape().latent, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pipeline", ["whole", "dropped"])
def test_x0_is_what_the_stock_pipeline_computes(request, tmp_path, pipeline):
    """Guidance included, at every step of the teacher's own walk, on conditions from raydmd's own table."""
    folder = request.getfixturevalue(pipeline)
    family = load_family(Model(path=str(folder)))
    assert (family.shape().latent, family.shape().frames) == ((8, 8, 8), 1)
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, noise, kept = stock(folder), seeded(family), []

    def keep(_pipe, _step, _t, values):
        kept.append(values["latents"].clone())
        return values

    call = {"num_inference_steps": 5, "guidance_scale": 3.5, "height": 16, "width": 16, "latents": noise}
    call |= {"max_sequence_length": family.text_length()}
    pipe(PROMPTS[0], negative_prompt="", output_type="latent", callback_on_step_end=keep, **call)
    sigmas = [float(s) for s in pipe.scheduler.sigmas]
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    x = noise
    for after, now, nxt in zip(kept, sigmas[:-1], sigmas[1:], strict=True):
        t, s = torch.tensor([now]), torch.tensor([nxt])
        x0 = teacher.guided_x0(x, t, table.rows([1]), table.rows([0]), Guidance(3.5))
        x = family.process.step(x, x0, t, s)
        torch.testing.assert_close(x, after, rtol=0, atol=1e-5)
    pixels = pipe(PROMPTS[0], negative_prompt="", output_type="pt", **call).images
    ours = family.decode(x)
    assert ours.shape == (1, 1, 3, 16, 16)
    torch.testing.assert_close(ours[:, 0], pixels, rtol=0, atol=1e-5)


def test_velocities_are_the_stock_transformers(whole, tmp_path):
    family = load_family(Model(path=str(whole)))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe = stock(whole)
    embeds, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=6
    )
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    torch.testing.assert_close(table.embeds[1:], embeds)
    torch.testing.assert_close(table.pooled[1:], pooled)
    x, t = torch.randn(3, 8, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    theirs = pipe.transformer(x, embeds, pooled, t * 1000, return_dict=False)[0]
    torch.testing.assert_close(teacher.raw(x, t, table.rows([1, 2, 3])), theirs, rtol=0, atol=1e-5)


def recipe(pipeline: Path, output: Path, method: dict, lora: dict | None) -> Recipe:
    return derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model.path": str(pipeline),
            "method": {"shift": 3.0, **method},
            "training": {
                "cycles": 2,
                "batch": 4,
                "fake_updates": 1,
                "precision": "fp32",
                "student": {"rate": 1e-2, "lora": lora},
                "fake": {"rate": 1e-3},
            },
        },
    )


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 2.0}], ids=["full", "lora"])
@pytest.mark.parametrize("pipeline", ["whole", "dropped"])
@pytest.mark.parametrize("method", ["dp_dmd", "dmd2"])
def test_the_export_gives_stock_diffusers_the_same_picture(request, tmp_path, pipeline, method, lora):
    torch.set_num_threads(1)
    folder = request.getfixturevalue(pipeline)
    extra = {"anchor": {"steps": 2, "of": 6}} if method == "dp_dmd" else {}
    r = recipe(folder, tmp_path, {"name": method, **extra}, lora)
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    client = LocalClient(TeacherEngine(teacher, table, sample_shape=family.shape().latent))
    session = FolderSession(r.folder)
    job = Job(recipe=r, family=family, conditions=table)
    assert Worker(job, client, session, EventLog(r.folder / "events.jsonl")).run() == "finished"

    denoisers = load_student(r, family, max(r.folder.glob("cycle-*-final")))
    student = student_experts(r, family, denoisers)
    start = dict(teacher.modules["transformer"].network.named_parameters())
    if lora is None:
        assert any(not torch.equal(p, start[n]) for n, p in denoisers["transformer"].network.named_parameters())
    noise, cond = seeded(family), table.rows([1])
    # The stock scheduler draws its fresh noise from torch's global generator.
    fresh = (lambda _: torch.randn(noise.shape)) if method == "dmd2" else None
    torch.manual_seed(0)
    steps = r.method.steps
    latents = sample(student, noise, cond, cond, grid=step_grid(steps, 3.0), guidance=Guidance(), fresh=fresh)
    ours = family.decode(latents)[:, 0]
    written = export(r, family, denoisers, r.folder)

    pipe = stock(r.folder / "pipeline")
    call = {
        "prompt": PROMPTS[0],
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": family.text_length(),
        "latents": noise,
        "output_type": "pt",
    }
    torch.manual_seed(0)
    assert (pipe(**call).images - ours).abs().max() < 1e-4
    undistilled = stock(folder)
    undistilled.scheduler = pipe.scheduler
    torch.manual_seed(0)
    assert (undistilled(**call).images - ours).abs().max() > 1e-3, "the test would not see an untrained export"
    if lora is not None:
        assert [p.name for p in written] == ["lora", "pipeline"]
        adapted = load_file(r.folder / "lora" / "transformer.safetensors")
        both = (
            StableDiffusion3Denoiser.lora_targets if pipeline == "whole" else ("to_q",)
        )  # a last block has one stream
        for target in both:
            assert any(f".{target}.lora_A" in key for key in adapted), target
        undistilled.load_lora_weights(r.folder / "lora", weight_name="transformer.safetensors")
        torch.manual_seed(0)
        assert (undistilled(**call).images - ours).abs().max() < 1e-4


def test_prompts_are_encoded_once(whole, tmp_path):
    family = load_family(Model(path=str(whole)))
    file = family.encode(PROMPTS, tmp_path)
    stamp = file.stat().st_mtime_ns
    assert family.encode(PROMPTS, tmp_path) == file
    assert file.stat().st_mtime_ns == stamp
    table = Conditions.read(file)
    assert (table.embeds.shape, table.pooled.shape) == ((4, 12, 24), (4, 20))


def test_what_does_not_fit_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match="it makes images, of one frame"):
        load_family(Model(path=str(whole), frames=5))
    with pytest.raises(InputError, match="multiples of 4, at most 24"):
        load_family(Model(path=str(whole), height=18, width=16))
    with pytest.raises(InputError, match="multiples of 4, at most 24"):
        load_family(Model(path=str(whole), height=16, width=28))
    family = load_family(Model(path=str(whole)))
    denoiser = family.denoiser("transformer", dtype=torch.float32)
    with pytest.raises(InputError, match="needs pooled embeddings"):
        denoiser(torch.zeros(1, 8, 8, 8), torch.ones(1), Conditions(embeds=torch.zeros(1, 2, 24)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(InputError, match="has no transformer, vae, text_encoder, tokenizer, text_encoder_2"):
        load_family(Model(path=str(tmp_path)))
