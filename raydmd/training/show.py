"""A quick look at a finished run's student: what ``raydmd sample`` does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError
from raydmd.evaluation.pictures import contact_sheet, picture, png
from raydmd.evaluation.samples import Samples
from raydmd.guidance import Guidance
from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.process import step_grid
from raydmd.recipe import Recipe, load
from raydmd.sampling import sample
from raydmd.training.checkpoint import STUDENT
from raydmd.training.encoding import training_prompts
from raydmd.training.export import load_student, lower, solver, student_experts
from raydmd.training.folder import trained
from raydmd.training.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from raydmd.models.base import Experts
    from raydmd.models.family import Family


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What was made.

    Attributes:
        samples: one for each seed, all of the same prompts.
        sheet: their picture.
        files: each sample by itself, seed by seed.
    """

    samples: list[Samples]
    sheet: Path
    files: list[Path]


def show(folder: Path, prompts: Sequence[str], *, count: int, seeds: Sequence[int], output: Path | None) -> Shown:
    """Sample a run's student and write a sheet, and each sample by itself.

    Args:
        folder: of the run, or its ``pipeline``.
        prompts: what to show; none stands for the first of the run's own.
        count: of the run's own prompts.
        seeds: a column each. The numbers drawn are those of the stock pipeline on a CPU after
            ``torch.manual_seed(seed)``, a sample at a time.
        output: where to; default: ``samples`` in the run's folder.

    Raises:
        InputError: if the folder holds no run that is trained to its end.
    """
    run, recipe = _run(folder)
    checkpoint = trained(run)
    if checkpoint is None:
        raise InputError(f"run '{run.name}' in {run} is not trained to its end; its own command resumes it")
    family = load_family(recipe.model)
    if prompts and family.pictures:
        raise InputError("this student's prompts need pictures: leave prompts out, and the run's own are shown")
    texts = list(prompts) or training_prompts(recipe, family)[:count]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = Conditions.read(family.encode(texts, run / "conditions")).to(device)
    with Store.of(run, recipe.checkpoints.storage).at(checkpoint, only=STUDENT) as files:
        denoisers = load_student(recipe, family, files)
    student = student_experts(recipe, family, denoisers)
    lower(recipe, denoisers, device)
    for denoiser in denoisers.values():
        denoiser.to(device)
    made = []
    for seed in seeds:
        start = time.perf_counter()
        clips = [clip(recipe, family, student, conditions, 1 + i, seed=seed, device=device) for i in range(len(texts))]
        seconds = (time.perf_counter() - start) / len(texts)
        made.append(
            Samples(
                name=f"seed-{seed}",
                title=f"seed {seed}",
                clips=torch.stack(clips),
                prompts=texts,
                evaluations=recipe.method.steps,
                seconds=seconds,
            )
        )
    return _write(output or run / "samples", made)


def clip(
    recipe: Recipe,
    family: Family,
    student: Experts,
    conditions: Conditions,
    row: int,
    *,
    seed: int,
    device: torch.device,
) -> Tensor:
    """One sample ``(frames, 3, H, W)`` in [0, 1]: the stock pipeline's after ``torch.manual_seed(seed)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *family.shape().latent), generator=generator).to(device)

    def fresh(_: int) -> Tensor:
        return family.fresh(generator).to(device)

    cond = conditions.rows([row])
    latents = sample(
        student,
        noise,
        cond,
        cond,
        grid=step_grid(recipe.method.steps, recipe.method.shift),
        guidance=Guidance(),
        fresh=fresh if solver(recipe) == "renoise" else None,
    )
    return family.decode(latents)[0].cpu()


def _run(folder: Path) -> tuple[Path, Recipe]:
    """A run's folder and its recipe."""
    for run in (folder, folder.parent):
        file = run / "recipe.yaml"
        if file.is_file() and (run == folder or folder.name == "pipeline"):
            return run, load(file, Recipe())
    raise InputError(f"{folder} is no run: it has no recipe.yaml; name a run's folder, as in 'raydmd sample runs/NAME'")


def _write(output: Path, made: Sequence[Samples]) -> Shown:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for old in output.glob("seed-*-[0-9][0-9].*"):  # of an earlier look, at other prompts
            old.unlink()
        lines = [f"{i:02d}\t{prompt}" for i, prompt in enumerate(made[0].prompts)]
        (output / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        files = []
        for samples in made:
            for i, one in enumerate(samples.clips):
                suffix, content = picture(one)
                files.append(output / f"{samples.name}-{i:02d}{suffix}")
                files[-1].write_bytes(content)
        sheet = output / "sheet.png"
        sheet.write_bytes(png(contact_sheet(made)))
    except OSError as error:
        raise InputError(f"samples cannot be written to {output}: {error}") from None
    return Shown(samples=list(made), sheet=sheet, files=files)
