"""Handing a run over to MLflow at its end: whatever the follower could not, and what is only known then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.errors import InputError, RunFailed
from raydmd.recipe import Recipe
from raydmd.redact import hidden
from raydmd.tracking.tracker import Tracker
from raydmd.training.events import METRICS, read_lines
from raydmd.training.folder import UNSENT, owe
from raydmd.training.students import EVALUATION, EVALUATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def hand_over(
    recipe: Recipe,
    tracker: Tracker,
    status: str,
    figures: Mapping[str, float] | None = None,
    artifacts: Sequence[Path] = (),
) -> None:
    """Write all of a run's rows that MLflow has not, its results, and how it ended.

    A server that is away does not undo what was computed: then the run is marked, for :func:`send`.

    Args:
        recipe: the run.
        tracker: of it.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        figures: of its last evaluation.
        artifacts: files that belong to it.
    """
    try:
        _write(recipe, tracker, owe(recipe, status, figures or {}, [str(a) for a in artifacts]))
    except Exception as error:  # whatever the client raises
        why = f"{type(error).__name__}: {hidden(str(error))}"
        print(
            f"tracking: not all of run '{recipe.name}' has reached MLflow ({why}); "
            f"raydmd track {recipe.folder} sends it",
            flush=True,
        )


def send(folder: Path) -> bool:
    """Hand over what a run of this folder could not; whether there was anything.

    Raises:
        InputError: if the folder is no run's.
        RunFailed: if the tracking server is still away.
    """
    try:
        recipe = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no run's folder: {str(error).splitlines()[0]}") from None
    if not (folder / UNSENT).is_file():
        return False
    # Its folder may have been moved.
    recipe = recipe.model_copy(update={"output": folder.absolute().parent, "name": folder.absolute().name})
    tracker = Tracker(recipe, {})
    try:
        _write(recipe, tracker, json.loads((folder / UNSENT).read_text(encoding="utf-8")))
    except Exception as error:  # whatever the client raises
        raise RunFailed(
            f"{folder} was not sent to {tracker.uri} ({type(error).__name__}: {hidden(str(error))})"
        ) from error
    return True


def _write(recipe: Recipe, tracker: Tracker, what: Mapping[str, Any]) -> None:
    folder = recipe.folder
    tracker.log(list(read_lines(folder / METRICS)))
    for row in read_lines(folder / EVALUATIONS):
        track_evaluation(tracker, row)
    if what["figures"]:
        tracker.results(what["figures"], [Path(a) for a in what["artifacts"]], step=what["step"], when=what["time"])
    tracker.end(what["status"])
    (folder / UNSENT).unlink(missing_ok=True)


def track_evaluation(tracker: Tracker, row: Mapping[str, Any]) -> None:
    """Write a line of ``evaluations.jsonl``, unless it is there."""
    figures = {k: float(v) for k, v in row.items() if k.startswith(EVALUATION)}
    when = row.get("time", 0.0)  # lines of earlier releases have none
    tracker.figures(figures, step=int(row["cycle"]), when=when)
