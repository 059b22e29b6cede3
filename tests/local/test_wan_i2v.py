"""Wan2.2 image to video, against its stock pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from PIL import Image

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.pictured import Pictured
from raydmd.models.untrained import write
from raydmd.recipe import Model, Recipe, derive
from raydmd.training.encoding import training_prompts
from raydmd.training.export import export, load_student
from raydmd.training.show import show
from tests.local.test_families import SEED, final, recipe, seeded, stock, times, trained
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
KIND, SCALE = "wan22-i2v", 3.5
SIZE = {"frames": 5, "height": 32, "width": 32}
PICTURES = {"red.png": (200, 40, 40), "blue.png": (30, 60, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write(KIND, tmp_path_factory.mktemp(KIND), WORDS)
    for k, (name, colour) in enumerate(PICTURES.items()):
        image = Image.new("RGB", (48, 40), colour)
        image.paste((255, 255, 255), (8 * k, 4, 8 * k + 20, 24))
        image.save(folder / name)
    rows = [{"prompt": text, "image": name} for text in ("a cat runs", "a dog") for name in PICTURES]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run_of(folder: Path, output: Path, method: dict[str, Any]) -> Recipe:
    r = recipe("wan22", folder, output, method, None)
    return derive(r, {"model": SIZE, "data.prompts": str(folder / "prompts.jsonl")})


def first(folder: Path) -> dict[str, Any]:
    with Image.open(folder / "red.png") as image:
        return {"image": image.convert("RGB"), "prompt": "a cat runs"}


def test_x0_is_what_the_stock_pipeline_computes(folder, tmp_path):
    """Guidance included, at every step, across both experts; the picture is there with the negative prompt too."""
    r = run_of(folder, tmp_path, {"name": "dmd2"})
    family = load_family(r.model)
    prompts = training_prompts(r, family)
    assert [(str(p), p.picture.name) for p in prompts if isinstance(p, Pictured)][:2] == [
        ("a cat runs", "red.png"),
        ("a cat runs", "blue.png"),
    ]
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, noise, kept = stock(family, folder), seeded(family), []
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)  # of the first order: its steps tell x0

    def keep(_pipe, _step, _t, values):
        kept.append(values["latents"].clone())
        return values

    call = family.sampling(steps=5) | {"guidance_scale": SCALE, "negative_prompt": "", "latents": noise}
    pipe(**first(folder), output_type="latent", callback_on_step_end=keep, **call)
    table = Conditions.read(family.encode(prompts, tmp_path))
    x, walk = noise, times(family, pipe)
    assert {family.routing().expert(t) for t in walk[:-1]} == {"transformer", "transformer_2"}
    for after, now, nxt in zip(kept, walk, walk[1:], strict=False):
        t, s = torch.tensor([now]), torch.tensor([nxt])
        x0 = teacher.guided_x0(x, t, table.rows([1]), table.rows([0]), Guidance(SCALE), as_stock=True)
        x = family.process.step(x, x0, t, s)
        torch.testing.assert_close(x, after, rtol=0, atol=2e-5)
        x = after
    t = torch.tensor([0.95])
    blue = teacher.raw(noise, t, table.rows([2]))
    assert (blue - teacher.raw(noise, t, table.rows([1]))).abs().max() > 1e-4, "blind to its picture"


@pytest.mark.parametrize("method", [{"name": "phased", "boundaries": [0.9]}, {"name": "dmd2"}], ids=["phased", "dmd2"])
def test_the_export_gives_stock_diffusers_the_same_clip(folder, tmp_path, method):
    r = run_of(folder, tmp_path, {**method, "steps": 4, "shift": 5.0})
    family, _ = trained(r, training_prompts(r, load_family(r.model)))
    (r.folder / "recipe.yaml").write_text(r.to_yaml(), encoding="utf-8")
    shown = show(r.folder, [], count=2, seeds=[SEED], output=None)
    assert list(map(str, shown.samples[0].prompts)) == ["a cat runs", "a cat runs"]
    one, other = shown.samples[0].clips
    assert (one - other).abs().max() > 1e-3, "two pictures, one clip"
    export(r, family, load_student(r, family, final(r)), r.folder)
    pipe = stock(family, r.folder / "pipeline")
    torch.manual_seed(SEED)
    frames = pipe(**first(folder), output_type="pt", **family.sampling(steps=4)).frames[0]
    assert (frames - one).abs().max() < 1e-4
    undistilled = stock(family, folder)
    undistilled.scheduler = pipe.scheduler
    torch.manual_seed(SEED)
    frames = undistilled(**first(folder), output_type="pt", **family.sampling(steps=4)).frames[0]
    assert (frames - one).abs().max() > 1e-3, "the test would not see an untrained export"
    assert 'load_image("first.png")' in (r.folder / "pipeline" / "README.md").read_text()
    with pytest.raises(InputError, match="leave prompts out"):
        show(r.folder, ["a cat"], count=1, seeds=[0], output=None)


def test_a_changed_picture_is_encoded_anew(folder, tmp_path):
    family = load_family(Model(path=str(folder), **SIZE))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    prompts = [Pictured("a cat", tmp_path / "a.png")]
    before = family.encode(prompts, tmp_path / "cache")
    assert family.encode(prompts, tmp_path / "cache") == before
    Image.new("RGB", (32, 32), "green").save(tmp_path / "a.png")
    assert family.encode(prompts, tmp_path / "cache") != before


def test_what_is_missing_or_unknown_is_refused(folder, tmp_path):
    family = load_family(Model(path=str(folder), **SIZE))
    with pytest.raises(InputError, match="prompt 'a cat' has no picture"):
        family.encode(["a cat"], tmp_path / "cache")
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(InputError, match=r"picture .*no.png of prompt 'a cat'"):
        family.encode([Pictured("a cat", tmp_path / "no.png")], tmp_path / "cache")
    pairs = derive(Recipe(), {"method": {"name": "dmd", "regression": {"loss": "l2"}}}).method
    with pytest.raises(InputError, match=r"Set method\.regression=null"):
        family.check(pairs)
    whole = write(KIND, tmp_path / "5b", WORDS)
    index = whole / "model_index.json"
    index.write_text(index.read_text().replace('"expand_timesteps": false', '"expand_timesteps": true'))
    with pytest.raises(InputError, match="of a kind that raydmd does not know"):
        load_family(Model(path=str(whole), **SIZE))
