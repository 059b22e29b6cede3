"""After training: export the student, sample it beside its teacher, measure, report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from raydmd.draws import Draws
from raydmd.evaluation.evaluate import Evaluation, evaluate
from raydmd.evaluation.instruments import load_instruments
from raydmd.evaluation.report import write_report
from raydmd.evaluation.samples import Samples, evaluation_prompts
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.places import locate
from raydmd.models.placing import place, take_back
from raydmd.process import step_grid
from raydmd.sampling import sample
from raydmd.training.events import read_lines
from raydmd.training.export import PIPELINE, add_results, export, load_student, lower, readable, solver, student_experts
from raydmd.training.plan import CyclePlan
from raydmd.zoo.judge import AttributeJudge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.models.base import Experts
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe

CONTACT = "contact.safetensors"
"""Noise and frames of the contact sheet's student rows, so that anyone can make them again."""


def finish_run(
    recipe: Recipe,
    checkpoint: str,
    prompts: list[str],
    facts: dict[str, str],
    trained_seconds: float,
) -> tuple[dict[str, float], list[str], str]:
    """Export and evaluate a finished run.

    Args:
        recipe: the run.
        checkpoint: its final checkpoint.
        prompts: the training prompts, used for evaluation where there is no judge.
        facts: versions and the like, for the report.
        trained_seconds: wall time so far.

    Returns:
        Figures for tracking, files for tracking, and the table for the terminal.
    """
    torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    folder, family = recipe.folder, load_family(recipe.model)
    student = load_student(recipe, family, Path(checkpoint))
    written = export(recipe, family, student, folder)
    evaluation, contact = measure(recipe, family, student_experts(recipe, family, student), prompts)
    add_results(folder / PIPELINE, evaluation.text())
    facts = facts | {
        "training": f"{trained_seconds:.0f} s wall time, start included",
        "cycles": f"{recipe.training.cycles}",
    }
    report = write_report(
        folder,
        title=recipe.name,
        evaluation=evaluation,
        contact=contact,
        recipe_yaml=recipe.to_yaml(),
        curves=read_curves(folder / "metrics.jsonl"),
        facts=facts,
        phases=CyclePlan.of(recipe.training, len(recipe.method.boundaries) + 1).ends[:-1],
    )
    student_row = next(r for r in evaluation.to_json()["rows"] if r["name"] == "student")
    figures = {f"evaluation/{k}": float(v) for k, v in student_row.items() if isinstance(v, int | float)}
    files = [*written, report, folder / "result.json", folder / "contact.png"]
    return figures, [str(f) for f in files], evaluation.text()


def measure(
    recipe: Recipe, family: Family, student: Experts, prompts: Sequence[str]
) -> tuple[Evaluation, list[Samples]]:
    """Sample teacher, undistilled teacher and student on the same noise and compare them.

    Returns:
        The figures, and the samples that the contact sheet shows.
    """
    e, m = recipe.evaluation, recipe.method
    place = locate(recipe.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = AttributeJudge.load(place.judge) if place.judge else None
    if judge is not None:
        texts = evaluation_prompts(e.samples, seed=e.seed, language=judge.language)
    else:
        texts = [prompts[i // e.per_prompt % len(prompts)] for i in range(e.samples)]
    unique = list(dict.fromkeys(texts))
    conditions = Conditions.read(family.encode(unique, (recipe.data.cache or recipe.folder / "conditions").absolute()))
    rows = [1 + unique.index(t) for t in texts]
    teacher = load_teacher(family, recipe.training.precision, device=torch.device("cpu"))
    lower(recipe, student.modules, device)
    full = step_grid(e.teacher_steps, m.shift)
    guided = Guidance(m.guidance if e.guidance is None else e.guidance)
    few, half = step_grid(m.steps, m.shift), step_grid(max(m.steps // 2, 1), m.shift)
    plain = Guidance()
    samplers = [
        Sampler("teacher", f"teacher, {e.teacher_steps} guided steps", teacher, full, guided),
        Sampler("undistilled", f"undistilled, {m.steps} steps, unguided", teacher, few, plain),
        Sampler("undistilled_guided", f"undistilled, {len(half) - 1} guided steps", teacher, half, guided),
        Sampler("student", f"student, {m.steps} steps", student, few, plain, renoise=solver(recipe) == "renoise"),
    ]
    compared = judge is not None or bool(e.networks)
    if compared:
        # Distances are taken to clips from other noise: clips from the same noise are paired and seem nearer.
        samplers.insert(1, Sampler("reference", "teacher, other seeds", teacher, full, guided, salt=1))
    made = {s.name: s.run(recipe, family, conditions, rows, texts, device) for s in samplers}
    others = [made[n] for n in ("undistilled", "undistilled_guided", "student")]
    tools = load_instruments(e, judge=place.reward, device=device)
    if compared:
        evaluation = evaluate(made["reference"], made["teacher"], others, judge, tools)
    else:
        evaluation = evaluate(made["teacher"], None, others, None, tools)
    best = evaluation.best_undistilled()
    grid_rows = contact_rows(texts, e.grid)
    save_contact(recipe, family, made["student"], grid_rows)
    return evaluation, [made[n].take(grid_rows) for n in ("teacher", best, "student")]


@dataclass(frozen=True)
class Sampler:
    """One way to make the evaluation's clips.

    Attributes:
        name: key of its row.
        title: what a reader sees.
        experts: the network.
        grid: its times.
        guidance: its guidance.
        salt: other noise for another number.
        renoise: fresh noise between steps.
    """

    name: str
    title: str
    experts: Experts
    grid: list[float]
    guidance: Guidance
    salt: int = 0
    renoise: bool = False

    def run(
        self,
        recipe: Recipe,
        family: Family,
        conditions: Conditions,
        rows: Sequence[int],
        texts: list[str],
        device: torch.device,
    ) -> Samples:
        """Make a clip per row of the condition table; the network is on the device only meanwhile."""
        for module in self.experts.modules.values():
            place(module, device, spread=recipe.placement.teacher_gpus > 1)
        clips, start = [], time.perf_counter()
        for i in range(0, len(rows), recipe.evaluation.batch):
            part = rows[i : i + recipe.evaluation.batch]
            draws = evaluation_draws(recipe, range(i, i + len(part)), salt=self.salt)
            latent = family.shape().latent

            def noise(name: str, draws: Draws = draws, latent: tuple[int, ...] = latent) -> Tensor:
                return draws.normal(name, latent).to(device)

            def fresh(step: int, noise: Callable[[str], Tensor] = noise) -> Tensor:
                return noise(f"noise.{step}")

            cond, uncond = (conditions.rows(r).to(device) for r in (part, [0] * len(part)))
            latents = sample(
                self.experts,
                noise("noise"),
                cond,
                uncond,
                grid=self.grid,
                guidance=self.guidance,
                fresh=fresh if self.renoise else None,
            )
            clips.append(family.decode(latents).cpu())
        seconds = (time.perf_counter() - start) / len(rows)
        for module in self.experts.modules.values():
            take_back(module)
        return Samples(
            name=self.name,
            title=self.title,
            clips=torch.cat(clips),
            prompts=texts,
            evaluations=(len(self.grid) - 1) * (2 if self.guidance.active else 1),
            seconds=seconds,
        )


def evaluation_draws(recipe: Recipe, positions: Sequence[int], *, salt: int = 0) -> Draws:
    """The random numbers of evaluation samples, the same for every method."""
    return Draws(recipe.evaluation.seed + salt, "evaluation", list(positions))


def contact_rows(texts: Sequence[str], count: int) -> list[int]:
    """Rows for the contact sheet: the first of each distinct prompt."""
    first = [i for i, t in enumerate(texts) if t not in texts[:i]]
    return (first or list(range(len(texts))))[:count]


def save_contact(recipe: Recipe, family: Family, student: Samples, rows: list[int]) -> None:
    """Write noise and frames of the student's rows beside the report."""
    tensors = {
        "noise": evaluation_draws(recipe, rows).normal("noise", family.shape().latent),
        "frames": student.clips[rows].contiguous(),
    }
    prompts = json.dumps([student.prompts[i] for i in rows])
    save_file(
        tensors,
        recipe.folder / CONTACT,
        metadata={"prompts": prompts, "text_length": str(family.text_length())},
    )
    readable(recipe.folder / CONTACT)


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves worth a look, by cycle."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_lines(path):
        for key in ("fake/loss", "student/gradient", "student/x0_std", "teacher/x0_std"):
            if key in row:
                curve = curves.setdefault(key, [])
                while curve and curve[-1][0] >= row["cycle"]:  # of an attempt that was rolled back
                    curve.pop()
                curve.append((int(row["cycle"]), float(row[key])))
    return curves
