"""A run's folder: how far it came, and whether a recipe is the one it was started with."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from raydmd.errors import InputError
from raydmd.files import replace
from raydmd.recipe import Recipe
from raydmd.recipe_io import explain
from raydmd.training.events import read_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

UNSENT = "unsent.json"
"""File of a run that MLflow does not have all of: what was to be handed over beside the files that are there anyway."""
FREE_KEYS = ("monitor", "placement", "tracking", "evaluation", "output")
"""Sections that may differ between a run and its resumption."""
FREE_CHECKPOINTS = ("every", "background", "keep", "keep_every", "best")
FREE_DATA = ("cache", "timeout", "quarantine")
FREE_METHOD = ("regression.verify",)
FREE_TRAINING = (
    *("report_every", "sample_log"),
    *("max_failures", "step_timeout", "stall_timeout", "on_stall", "poison_budget"),
)


def trained(folder: Path) -> str | None:
    """Name of the final checkpoint, if training is done.

    It is written file by file, so that it is there says little; the worker's last event, written once all of it had
    arrived, does.
    """
    ends = [e for e in read_lines(folder / "events.jsonl") if e["event"] in ("finished", "fallback")]
    return str(ends[-1]["checkpoint"]) if ends and ends[-1]["event"] == "finished" else None


def finished(folder: Path) -> bool:
    """Whether a run has left its results."""
    return (folder / "result.json").is_file()


def owe(recipe: Recipe, status: str, figures: Mapping[str, float], artifacts: Sequence[str]) -> dict[str, Any]:
    """Write down what MLflow is to get of a run, before it is sent: whoever dies over it leaves word.

    Args:
        recipe: the run.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        figures: of its last evaluation.
        artifacts: files that belong to it.

    Returns:
        What was written down.
    """
    step, now = recipe.training.cycles, time.time()
    what = {"status": status, "figures": dict(figures), "artifacts": list(artifacts), "step": step, "time": now}
    replace(recipe.folder / UNSENT, json.dumps(what))
    return what


def same_run(recipe: Recipe, folder: Path) -> None:
    """Refuse to resume a run with another recipe.

    Raises:
        InputError: naming the keys that differ.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return
    before = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:  # keys that came after it was started have their defaults
        before = Recipe.model_validate(before).model_dump(mode="json")
    except ValidationError as error:
        raise InputError(
            f"run '{recipe.name}' in {folder} was started by another release: its recipe.yaml is refused by this one "
            f"({explain(error)}). Go on with that release, or give another --name"
        ) from None
    now = recipe.model_dump(mode="json")
    differs = [k for k in _leaves(now) | _leaves(before) if _get(now, k) != _get(before, k) and not _free(k)]
    if differs:
        shown = "; ".join(f"{k}: was {_get(before, k)!r}, now {_get(now, k)!r}" for k in sorted(differs)[:6])
        raise InputError(
            f"run '{recipe.name}' in {folder} was started with another recipe ({shown}). "
            "Give the old settings to resume it, or another --name"
        )


def _free(key: str) -> bool:
    section, _, rest = key.partition(".")
    within = {"checkpoints": FREE_CHECKPOINTS, "method": FREE_METHOD, "training": FREE_TRAINING, "data": FREE_DATA}
    return section in FREE_KEYS or rest in within.get(section, ())


def _leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    return {
        leaf
        for k, v in tree.items()
        for leaf in (_leaves(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}"})
    }


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
