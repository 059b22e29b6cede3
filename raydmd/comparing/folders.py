"""Runs as their folders tell them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.comparing.curves import COUNTERS
from raydmd.comparing.runs import (
    EARLY,
    EVALUATION,
    FAILED,
    FINISHED,
    RUNNING,
    STATES,
    STOPPED,
    WAITING,
    Run,
    curves_of,
    leaves,
)
from raydmd.errors import InputError
from raydmd.tracking import RUN_ID
from raydmd.training.events import read_lines
from raydmd.training.lock import held
from raydmd.training.students import EVALUATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from raydmd.comparing.runs import Curve
    from raydmd.recipe import Recipe

RECIPE, RESULT, REPORT = "recipe.yaml", "result.json", "report.html"
STUDENT, REFERENCE = "student", "reference"
"""Rows of an evaluation: what is measured, and the teacher that it is to be near."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / RECIPE).is_file()


def read_run(folder: Path, *, sweep: str = "", name: str = "") -> Run:
    """A run, whatever state it is in.

    Args:
        folder: of the run.
        sweep: that it is a trial of.
        name: to show; default: the folder's.

    Raises:
        InputError: if its recipe can't be read.
    """
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{folder / RECIPE} can't be read: {_first(error)}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{folder / RECIPE} holds no recipe")
    flat = leaves(recipe)
    planned = int(flat.get("training.cycles") or 0)
    curves = curves_of(read_lines(folder / "metrics.jsonl"), skip=COUNTERS)
    curves |= curves_of(read_lines(folder / EVALUATIONS))
    cycles = max((curve[-1][0] for curve in curves.values() if curve), default=0)
    state, why = _state(folder)
    results = _results(folder)
    figures, measured = _figures(results.get(STUDENT), curves, planned)
    for key, value in figures.items():
        curve = curves.setdefault(f"{EVALUATION}{key}", [])
        if not curve or curve[-1][0] < measured:
            curve.append((measured, value))
    report = folder / REPORT
    return Run(
        name=name or folder.name,
        place=str(folder.absolute()),
        link=str(report.absolute()) if report.is_file() else "",
        sweep=sweep,
        state=state,
        error=why,
        recipe=flat,
        cycles=max(cycles, measured),
        planned=planned,
        measured=measured,
        figures=figures,
        baselines=beside(results),
        teacher=numbers(results.get(REFERENCE, {})),
        tracked=_text(folder / RUN_ID),
        curves=curves,
        report=lambda: report.read_text(encoding="utf-8") if report.is_file() else None,
    )


def read_sweep(folder: Path, name: str, base: Recipe, rows: Iterable[Any], searched: Iterable[str]) -> list[Run]:
    """A sweep's trials: from their folders, and from the study what these do not know.

    Args:
        folder: of the sweep.
        name: of the sweep.
        base: the recipe that its trials differ from.
        rows: of its study, see :class:`raydmd.tuning.study.Row`.
        searched: keys of its space.
    """
    found = []
    for row in rows:
        if row.state == "lost":  # its successor is there
            continue
        own = f"{row.root:04d}"
        place = folder / "trials" / own
        here = read_run(place, sweep=name, name=own) if is_run(place) else None
        state = row.state if row.state in STATES else STOPPED
        at: dict[int, dict[str, float]] = dict(sorted(row.at.items()))
        if here is None:  # of another cluster, or not begun
            curves: dict[str, Curve] = {}
            for cycle, values in at.items():
                for key, value in values.items():
                    curves.setdefault(f"{EVALUATION}{key}", []).append((cycle, float(value)))
            recipe = leaves(base.model_dump(mode="json")) | dict(row.changes) if row.changes else {}
            measured = max(at, default=0)
            here = Run(
                name=own,
                place=str(place.absolute()),
                sweep=name,
                recipe=recipe,
                cycles=measured,
                planned=base.training.cycles,
                measured=measured,
                figures=row.values or at.get(measured, {}),
                curves=curves,
            )
        # A key that this trial's other choices leave without a meaning has none, whatever the recipe's default is.
        idle = set(searched) - set(row.changes) if row.changes else set()
        here = replace(here, recipe={k: v for k, v in here.recipe.items() if k not in idle})
        found.append(_told(here, state, row.error))
    return found


def _told(run: Run, state: str, error: str) -> Run:
    """A run as its study sees it; the study knows best, save that a trial may have come farther than was told."""
    settled = state in (FINISHED, EARLY, FAILED, RUNNING, WAITING)
    return replace(run, state=state if settled else run.state, error=error or run.error)


def _state(folder: Path) -> tuple[str, str]:
    """A run's state, and why it failed."""
    if (folder / RESULT).is_file():
        return FINISHED, ""
    if held(folder):
        return RUNNING, ""
    last = None
    for event in read_lines(folder / "events.jsonl"):
        if event.get("event") in ("failed", "stopped", "finished", "start", "resume"):
            last = event
    if last and last["event"] == "failed":
        return FAILED, str(last.get("message", "")).strip().partition("\n")[0]
    return STOPPED, str(last.get("alarm") or "") if last else ""


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run's last evaluation, by name; none if it has not come so far."""
    try:
        return results_in((folder / RESULT).read_text(encoding="utf-8"))
    except OSError:
        return {}


def results_in(text: str) -> dict[str, dict[str, Any]]:
    """The rows of a ``result.json`` by name; none if it holds none."""
    try:
        return {row["name"]: {"title": row["name"], **row} for row in json.loads(text)["rows"]}
    except (ValueError, KeyError, TypeError):
        return {}


def beside(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The rows that a student's is compared with, by title."""
    return {row["title"]: numbers(row) for name, row in results.items() if name not in (STUDENT, REFERENCE)}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation's row."""
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "clips"}


def _figures(row: Mapping[str, Any] | None, curves: Mapping[str, Curve], planned: int) -> tuple[dict[str, float], int]:
    """The student's figures, and after how many cycles they were taken: the last ones, else those on the way."""
    if row is not None:
        return numbers(row), planned
    of_evaluations = {k.removeprefix(EVALUATION): c for k, c in curves.items() if k.startswith(EVALUATION) and c}
    measured = max((curve[-1][0] for curve in of_evaluations.values()), default=0)
    return {k: c[-1][1] for k, c in of_evaluations.items() if c[-1][0] == measured and k != "clips"}, measured


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
