"""After training: export the student, sample it beside its teacher, measure, report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from raydmd.evaluation.evaluate import Evaluation, evaluate
from raydmd.evaluation.instruments import Instruments, load_instruments
from raydmd.evaluation.report import write_report
from raydmd.evaluation.samples import evaluation_prompts
from raydmd.guidance import Guidance
from raydmd.models import load_family
from raydmd.models.places import locate
from raydmd.process import step_grid
from raydmd.training.checkpoint import STUDENT
from raydmd.training.clips import ALL, Asked, Sampler, ask, decoded, draw_here, evaluation_draws, teacher_samples
from raydmd.training.events import EventLog, read_lines
from raydmd.training.export import PIPELINE, add_results, export, load_student, lower, readable, solver, student_experts
from raydmd.training.folder import owe
from raydmd.training.plan import CyclePlan
from raydmd.training.store import Store
from raydmd.training.students import EVALUATION
from raydmd.zoo.judge import AttributeJudge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.evaluation.samples import Samples
    from raydmd.models.base import Experts
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.serving.order import ClientSpec

CONTACT = "contact.safetensors"
"""Noise and frames of the contact sheet's student rows, so that anyone can make them again."""


def finish_run(
    recipe: Recipe,
    checkpoint: str,
    prompts: list[str],
    facts: dict[str, str],
    pool: ClientSpec | None,
) -> tuple[dict[str, float], list[str], str]:
    """Export and evaluate a finished run.

    Args:
        recipe: the run.
        checkpoint: name of its final checkpoint.
        prompts: the training prompts, used for evaluation where there is no judge.
        facts: versions and the like, for the report.
        pool: of the teacher, as far as the evaluation asks it; see :func:`raydmd.training.clips.at_pool`.

    Returns:
        Figures for tracking, files for tracking, and the table for the terminal.
    """
    torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    folder, family = recipe.folder, load_family(recipe.model)
    EventLog(folder / "events.jsonl").write("export", checkpoint=Path(checkpoint).name)
    with Store.of(folder, recipe.checkpoints.storage).at(checkpoint, only=STUDENT) as trained:
        student = load_student(recipe, family, trained)
    written = export(recipe, family, student, folder)
    evaluation, contact = measure(recipe, family, student_experts(recipe, family, student), prompts, pool)
    add_results(folder / PIPELINE, evaluation.text())
    facts = facts | {"cycles": f"{recipe.training.cycles}"}
    weights = written if recipe.tracking.weights in (None, "all") else []
    files = [str(f) for f in (*weights, folder / "report.html", folder / "result.json", folder / "contact.png")]
    owe(recipe, "FINISHED", figures_of(evaluation), files)
    write_report(
        folder,
        title=recipe.name,
        evaluation=evaluation,
        contact=contact,
        recipe_yaml=recipe.to_yaml(),
        curves=read_curves(folder / "metrics.jsonl"),
        facts=facts,
        phases=CyclePlan.of(recipe.training, len(recipe.method.boundaries) + 1).ends[:-1],
    )
    return figures_of(evaluation), files, evaluation.text()


def measure(
    recipe: Recipe, family: Family, student: Experts, prompts: Sequence[str], pool: ClientSpec | None = None
) -> tuple[Evaluation, list[Samples]]:
    """Sample teacher, undistilled teacher and student on the same noise and compare them.

    Args:
        recipe: the run.
        family: its pipeline.
        student: its network.
        prompts: for the clips, where the model brings no judge.
        pool: of the teacher; default: it is loaded here.

    Returns:
        The figures, and the samples that the contact sheet shows.
    """
    asked, judge = what_is_asked(recipe, family, prompts)
    compared = judge is not None or bool(recipe.evaluation.networks)
    own = student_samples(asked, student, threads=recipe.placement.threads if pool else None)
    teachers = teacher_samples(asked, pool, ALL if compared else [n for n in ALL if n != "reference"])
    made = {s.name: s for s in (own, *teachers)}
    others = [made[n] for n in ("undistilled", "undistilled_guided", "student")]
    tools = instruments(asked)
    if compared:
        evaluation = evaluate(made["reference"], made["teacher"], others, judge, tools)
    else:
        evaluation = evaluate(made["teacher"], None, others, None, tools)
    best = evaluation.best_undistilled()
    grid_rows = contact_rows(asked.texts, recipe.evaluation.grid)
    save_contact(recipe, family, made["student"], grid_rows)
    return evaluation, [made[n].take(grid_rows) for n in ("teacher", best, "student")]


def interim_figures(recipe: Recipe, folder: str, prompts: list[str], pool: ClientSpec | None) -> dict[str, float]:
    """What a student that still trains measures, against the teacher alone.

    Args:
        recipe: the run.
        folder: with its weights, see :func:`raydmd.training.students.write_student`.
        prompts: the training prompts, used where there is no judge.
        pool: of the teacher, as far as the evaluation asks it.

    Returns:
        Figures, named as in a run's last evaluation.
    """
    return _figures_from(recipe, Path(folder), prompts, pool, unfinished=True)


def final_figures(recipe: Recipe, checkpoint: str, prompts: list[str], pool: ClientSpec | None) -> dict[str, float]:
    """The same of a student that is trained, from its final checkpoint, by its name."""
    with Store.of(recipe.folder, recipe.checkpoints.storage).at(checkpoint, only=STUDENT) as folder:
        return _figures_from(recipe, folder, prompts, pool, unfinished=False)


def _figures_from(
    recipe: Recipe, folder: Path, prompts: list[str], pool: ClientSpec | None, *, unfinished: bool
) -> dict[str, float]:
    torch.set_num_threads(recipe.placement.threads)
    family = load_family(recipe.model)
    student = student_experts(recipe, family, load_student(recipe, family, folder, unfinished=unfinished))
    asked, judge = what_is_asked(recipe, family, prompts)
    compared = judge is not None or bool(recipe.evaluation.networks)
    [teacher] = teacher_samples(asked, pool, ["reference" if compared else "teacher"])
    found = evaluate(teacher, None, [student_samples(asked, student)], judge, instruments(asked))
    return figures_of(found)


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """The student's figures, by the names that they are tracked under."""
    row = evaluation.row("student")
    return {f"{EVALUATION}{k}": float(v) for k, v in row.items() if isinstance(v, int | float)}


def what_is_asked(recipe: Recipe, family: Family, prompts: Sequence[str]) -> tuple[Asked, AttributeJudge | None]:
    """The evaluation's prompts, on the device of this process, and the judge that a zoo model brings."""
    e, place = recipe.evaluation, locate(recipe.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = AttributeJudge.load(place.judge) if place.judge else None
    if judge is not None:
        texts = evaluation_prompts(e.samples, seed=e.seed, language=judge.language)
    else:
        texts = [prompts[i // e.per_prompt % len(prompts)] for i in range(e.samples)]
    return ask(recipe, family, texts, device), judge


def student_samples(asked: Asked, student: Experts, *, threads: int | None = None) -> Samples:
    """The student's clips, timed on so many CPU threads; a pool's replica has as many for the teacher's."""
    m = asked.recipe.method
    grid, renoise = step_grid(m.steps, m.shift), solver(asked.recipe) == "renoise"
    sampler = Sampler("student", f"student, {m.steps} steps", grid, Guidance(), renoise=renoise)
    lower(asked.recipe, student.modules, asked.device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found = draw_here(asked, sampler, student)
    finally:
        torch.set_num_threads(before)
    return decoded(asked, sampler, found)


def instruments(asked: Asked) -> Instruments:
    """What measures beside a judge."""
    return load_instruments(asked.recipe.evaluation, judge=locate(asked.recipe.model).reward, device=asked.device)


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
