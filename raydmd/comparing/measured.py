"""Whether the figures of runs were measured alike, and what the teachers among them have. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydmd.comparing.differ import label_of, short

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.comparing.runs import Run

KEYS = (
    "model.path",
    "model.revision",
    "model.frames",
    "model.height",
    "model.width",
    "model.negative_prompt",
    "data.prompts",
    "data.column",
    "data.split",
    *(f"evaluation.{k}" for k in ("samples", "per_prompt", "teacher_steps", "seed", "networks", "rewards", "lpips")),
)
"""Keys that decide what figures are taken of, and against."""
LIKE_TRAINING = {"evaluation.guidance": "method.guidance", "evaluation.shift": "method.shift"}
"""Those that are as in training unless they are given."""
SHOWN = 4
"""Values of a key that are named."""
SLOW = ("seconds",)
"""Figures that no two measurements have alike."""


def unlike(runs: Sequence[Run]) -> list[str]:
    """What a reader should know of figures that were not taken alike; empty where all were."""
    here = [run for run in runs if run.figures and run.recipe]
    found = []
    for key in (*KEYS, *LIKE_TRAINING):
        values = {label_of(v): short(v) for run in here for v in [_value(run.recipe, key)]}
        if len(values) > 1:
            told = sorted(values.values())
            found.append(f"{key} ({', '.join(told[:SHOWN])}{', ...' if told[SHOWN:] else ''})")
    if not found:
        return []
    return [f"figures were not measured alike, by {'; '.join(found)}: what is best by them may not be better"]


def baselines(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, float], int]]:
    """Title, figures and number of runs of each baseline: the teacher, and the undistilled model.

    Runs that were measured alike have the same ones. Where they differ each title is there once for each, with how many
    runs have it.
    """
    counted: dict[str, tuple[str, Mapping[str, float], int]] = {}
    for run in runs:
        for title, figures in run.baselines.items():
            key = repr((title, sorted((k, f"{v:.6g}") for k, v in figures.items() if k not in SLOW)))
            count = counted[key][2] if key in counted else 0
            counted[key] = (title, counted[key][1] if count else figures, count + 1)
    return sorted(counted.values(), key=lambda found: -found[2])


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    if (found := recipe.get(key)) is None and key in LIKE_TRAINING:
        return recipe.get(LIKE_TRAINING[key])
    return found
