"""Runs' folders as training leaves them, without training: for tests of what reads them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from raydmd.evaluation.evaluate import COLUMNS, Evaluation
from raydmd.evaluation.report import write_report
from raydmd.evaluation.samples import Samples
from raydmd.recipe import Recipe, derive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CYCLES = 40
PROMPTS = ("a red bag", "a blue bag <on> a 'shelf' & more")


def figures(frechet: float) -> dict[str, float]:
    """Of a student: quality, and coverage that is the better the worse the quality is."""
    return {"frechet": frechet, "coverage_entropy": frechet / 100, "joint": 0.5, "seconds": 0.01}


def metrics_rows(frechet: float, cycles: int = CYCLES) -> list[dict[str, Any]]:
    """Of the training."""
    return [
        {"cycle": float(c), "fake/loss": 1 / c, "student/gradient": frechet / c, "time/fake": 0.1, "cycles": 40.0}
        for c in range(5, cycles + 1, 5)
    ]


def evaluation_rows(frechet: float, cycles: int = CYCLES) -> list[dict[str, Any]]:
    """Of the evaluations on the way, every ten cycles."""
    on_the_way = range(10, min(cycles, CYCLES - 1) + 1, 10)
    return [
        {"cycle": float(c), **{f"evaluation/{k}": v for k, v in figures(frechet + 40 * math.exp(-c / 20)).items()}}
        for c in on_the_way
    ]


def recipe_of(output: Path, name: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of a run that differs from the others by ``changes``."""
    return derive(Recipe(), {"training.cycles": CYCLES, **changes, "output": output, "name": name})


def make_run(
    output: Path,
    name: str,
    changes: Mapping[str, Any],
    frechet: float,
    *,
    cycles: int = CYCLES,
    error: str = "",
    prompts: Sequence[str] = PROMPTS,
    frames: int = 1,
) -> Path:
    """A run's folder; finished if it has all its cycles and no error."""
    recipe = recipe_of(output, name, changes)
    folder = recipe.folder
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "lock").touch()
    lines(folder / "metrics.jsonl", metrics_rows(frechet, cycles))
    on_the_way = evaluation_rows(frechet, cycles)
    lines(folder / "evaluations.jsonl", [{"student": f"cycle-{i}", **row} for i, row in enumerate(on_the_way)])
    events = [{"event": "start", "world": 1}]
    if error:
        events.append({"event": "failed", "error": "ValueError", "message": f"{error}\nmore", "trace": "..."})
    elif cycles < CYCLES:
        events.append({"event": "stopped", "cycle": cycles, "alarm": None})
    else:
        events.append({"event": "finished", "cycle": cycles})
        report(folder, recipe, frechet, prompts, frames)
    lines(folder / "events.jsonl", events)
    return folder


def report(folder: Path, recipe: Recipe, frechet: float, prompts: Sequence[str], frames: int) -> None:
    """The report of a finished run, written as training writes it."""
    every = {c.key: None for c in COLUMNS}

    def row(name: str, value: float) -> dict[str, Any]:
        return {"name": name, "title": name, "clips": len(prompts), **every, "evaluations": 4, **figures(value)}

    rows = [row("teacher", 1.0), row("undistilled", 90.0), row("student", frechet)]
    levels = {"teacher": 0.9, "undistilled": 0.5, "student": min(frechet / 100, 1.0)}
    contact = [
        Samples(
            name=name,
            title=f"the {name}",
            clips=torch.full((len(prompts), frames, 3, 8, 8), level),
            prompts=list(prompts),
            evaluations=4,
            seconds=0.01,
        )
        for name, level in levels.items()
    ]
    write_report(folder, recipe.name, Evaluation(rows), contact, recipe.to_yaml(), {}, {})


def lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a file of JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
