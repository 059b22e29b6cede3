"""The pages about adding a family and a method, done as they say; and what the gallery trains."""

from __future__ import annotations

import ast
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import raydmd
import raydmd.models
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher, untrained_pipelines
from raydmd.models.base import Conditions
from raydmd.recipe import Model, Recipe, derive
from raydmd.training.prepare import prepare
from tests.pages import ROOT, blocks
from tests.pipelines import WORDS

pytestmark = pytest.mark.local
PROMPT, SCALE, STEPS = "a cat runs", 3.5, 2


def test_the_family_of_the_page_does_what_its_stock_pipeline_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "adding_a_family.md"
    module, line, tiny, _ = (block.text for block in blocks("python") if block.file == page)
    (table,) = ast.literal_eval("{" + line + "}").items()
    monkeypatch.setitem(raydmd.models.FAMILIES, *table)
    name = f"raydmd.models.{table[1][0]}"
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(module, str(page), "exec"), made.__dict__)
    # "import what it names": of diffusers and transformers
    names = {**vars(untrained_pipelines), **{n: getattr(diffusers, n) for n in dir(diffusers) if n.startswith("Aura")}}
    names["UMT5EncoderModel"] = transformers.UMT5EncoderModel
    exec(compile(tiny, str(page), "exec"), names)
    torch.manual_seed(0)
    names["aura_flow"](WORDS).save_pretrained(tmp_path / "aura")

    family = load_family(Model(path=str(tmp_path / "aura")))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    conditions = Conditions.read(family.encode([PROMPT], tmp_path))
    noise = torch.randn(1, *family.shape().latent, generator=torch.Generator().manual_seed(2))
    pipe = getattr(diffusers, table[0]).from_pretrained(tmp_path / "aura")
    pipe.set_progress_bar_config(disable=True)
    words = {"guidance_scale": SCALE, "negative_prompt": "", "output_type": "pt", "latents": noise.clone()}
    shown = pipe(PROMPT, num_inference_steps=STEPS, max_sequence_length=family.text_length(), **words).images
    x, times = noise, [float(s) for s in pipe.scheduler.sigmas]
    for now, then in itertools.pairwise(times):
        t, s = torch.tensor([now]), torch.tensor([then])
        x0 = teacher.guided_x0(x, t, conditions.rows([1]), conditions.rows([0]), Guidance(SCALE), as_stock=True)
        x = family.process.step(x, x0, t, s)
    torch.testing.assert_close(family.decode(x)[:, 0], shown, rtol=0, atol=1e-4)


def test_the_method_of_the_page_is_one_once_its_lines_are_where_it_says(tmp_path: Path) -> None:
    """In a copy of the package: the page's own tests pass there, and its keys and preset are known."""
    page = ROOT / "docs" / "adding_a_method.md"
    code = [block.text for block in blocks("python") if block.file == page]
    formula, section, settings, refusal, term, wiring, builder, preset, tests = code
    field, checks = settings.split("\n    # in _makes_sense\n")
    listed, refused = checks.split("        ...\n")
    attribute, added = (part.split("\n", 1)[1] for part in re.split(r"(?=    # in Method\.gen)", wiring))
    copy = tmp_path / "raydmd"
    shutil.copytree(Path(raydmd.__file__).parent, copy, ignore=shutil.ignore_patterns("data", "__pycache__"))

    def put(file: str, lines: str, *, before: str = "", instead: str = "") -> None:
        text = (copy / file).read_text(encoding="utf-8")
        at = before or instead
        assert text.count(at) == 1, f"{file} has {text.count(at)} times {at!r}"
        (copy / file).write_text(text.replace(at, lines + before), encoding="utf-8")

    auxiliary = copy / "objectives" / "auxiliary.py"
    auxiliary.write_text(auxiliary.read_text(encoding="utf-8") + "\n\n" + formula, encoding="utf-8")
    put("recipe_method.py", section + "\n\n", before="class Reward(Section):")
    put("recipe_method.py", field, before="    regression: Regression | None = None\n")
    # By what stays where other terms were added, too.
    put("recipe_method.py", '("smooth", self.smooth), ', before='("anchor", self.anchor)')
    assert '("smooth", self.smooth)' in listed
    put("recipe_method.py", refused, before="        if self.regression and self.boundaries:\n")
    put("recipe_method.py", preset, before="    # arXiv:2602.03139: the first step follows")
    put("recipe_method.py", '"smooth_dmd", ', before='"dmd", "dmd2", ')
    put("training/prepare.py", refusal, before="    family.check_roles(recipe.training)\n")
    put("methods/method.py", "smoothness_loss, ", before="anchor_loss, ")
    put("methods/method.py", term + "\n\n", before="@dataclass(frozen=True, kw_only=True)\nclass Adaptation:")
    put("methods/method.py", attribute, before="    regression: RegressionTerm | None = None\n")
    put("methods/method.py", added, before="        return total(surrogate(")
    put("methods/presets.py", "SmoothTerm, ", before="Adaptation, ")
    put("methods/presets.py", builder, before="        regression=RegressionTerm(")
    (tmp_path / "test_smooth.py").write_text(tests, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def ran(*words: str) -> str:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "3 passed" in ran("pytest", "-q", "-p", "no:cacheprovider", "test_smooth.py")
    assert "weight: 0.05" in ran("raydmd", "recipe", "method.name=smooth_dmd", "--method.smooth.weight=0.05")


def test_the_recipes_of_the_gallery_are_accepted(tmp_path: Path) -> None:
    """Its scripts are run by `make screenshots` alone, which takes ten minutes."""
    gallery = ROOT / "docs" / "gallery"
    phased = runpy.run_path(str(gallery / "distil_and_sample.py"))["RECIPE"]
    asked = [derive(Recipe(), {**phased, "output": tmp_path})]
    asked += runpy.run_path(str(gallery / "compare_methods.py"))["recipes"](80, tmp_path)
    assert [prepare(recipe).recipe.method.name for recipe in asked] == [
        "phased",
        "dmd2",
        "phased",
        "decoupled",
        "dp_dmd",
    ]
    assert "main" in runpy.run_path(str(gallery / "serve_teacher_and_rewards.py"))
