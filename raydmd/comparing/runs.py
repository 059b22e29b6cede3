"""What is known of a run that is compared with others, wherever it comes from. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

EVALUATION = "evaluation/"
"""Before the names of a student's figures, among metrics."""
FINISHED, EARLY, RUNNING, WAITING = "finished", "stopped early", "running", "waiting"
STOPPED, FAILED, UNKNOWN = "stopped", "failed", "unknown"
STATES = (FINISHED, EARLY, RUNNING, WAITING, STOPPED, FAILED, UNKNOWN)
"""In the order of a table, where nothing else decides."""

OWN = ("name", "output", "data.cache")
OWN_SECTIONS = ("tracking.",)
"""Keys that say where a run is, and not what it is."""
SEED = "seed"
"""The key that repeats differ in."""

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Repeats:
    """Finished runs that differ in their training seed alone.

    Attributes:
        first: name of the first one.
        runs: how many.
        means: of their figures.
        spread: standard deviations of their figures.
    """

    first: str
    runs: int
    means: Mapping[str, float]
    spread: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        name: that a reader sees; unique among those compared.
        place: its folder, or ``mlflow:`` and its id.
        link: to its own report or page, if there is one.
        sweep: that it is a trial of.
        state: one of :data:`STATES`.
        error: why it failed.
        recipe: values by dotted key.
        cycles: that it has trained.
        planned: cycles of its recipe.
        measured: cycles after which ``figures`` were taken.
        figures: of its last evaluation, by name.
        baselines: figures of the teacher, and of the undistilled model, by title.
        teacher: figures of the teacher that the student is to be near.
        repeats: what it and the runs that differ from it in the seed alone have in common.
        tracked: MLflow's id of it, if it is known.
        curves: values by cycle, of training metrics by name and of figures with :data:`EVALUATION` before it.
        report: reads its report's page; ``None`` if it has none.
    """

    name: str
    place: str
    link: str = ""
    sweep: str = ""
    state: str = UNKNOWN
    error: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    cycles: int = 0
    planned: int = 0
    measured: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    teacher: Mapping[str, float] = field(default_factory=dict)
    repeats: Repeats | None = None
    tracked: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    report: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)

    def value(self, key: str) -> float | None:
        """A figure, or the last value of a metric; ``None`` where there is none that is finite."""
        if (found := self.figures.get(key)) is None:
            curve = self.curves.get(key) or []
            found = curve[-1][1] if curve else None
        return None if found is None or not math.isfinite(found) else found


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as values by dotted key; empty ones have no keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def curves_of(rows: Iterable[Mapping[str, Any]], skip: Sequence[str] = ()) -> dict[str, Curve]:
    """Numbers by cycle; of cycles that came again after a rollback the later ones.

    Args:
        rows: as they were written, each with its ``cycle``.
        skip: names that are no metrics.
    """
    found: dict[str, Curve] = {}
    for row in rows:
        cycle = row.get("cycle")
        if not isinstance(cycle, int | float):
            continue
        for key, value in row.items():
            if key == "cycle" or key in skip or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            curve = found.setdefault(key, [])
            while curve and curve[-1][0] >= cycle:
                curve.pop()
            curve.append((int(cycle), float(value)))
    return found


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, each with a name of its own: with its sweep's where there are several, then with a number."""
    names = [run.name for run in runs]
    several = len({run.sweep for run in runs if run.sweep}) > 1
    clashing = several or len(set(names)) < len(names)
    if clashing:
        names = [f"{run.sweep}/{run.name}" if run.sweep else run.name for run in runs]
    return [replace(run, name=name) for run, name in zip(runs, numbered(names), strict=True)]


def numbered(names: Sequence[str]) -> list[str]:
    """The names, later ones with a number where they come again."""
    found: list[str] = []
    for name in names:
        count, own = 1, name
        while own in found:
            count += 1
            own = f"{name} ({count})"
        found.append(own)
    return found


def once(runs: Iterable[Run]) -> list[Run]:
    """Each run once: by its place, or MLflow's id; a sweep knows more of its trial than a folder by itself."""
    kept: list[Run] = []
    for run in runs:
        same = [k for k in kept if k.place == run.place or (run.tracked and k.tracked == run.tracked)]
        if not same:
            kept.append(run)
        elif run.sweep and not same[0].sweep:
            kept[kept.index(same[0])] = run
    return kept


def with_repeats(runs: Sequence[Run]) -> list[Run]:
    """The runs, each with what its repeats have in common, if it has some."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.recipe and run.state == FINISHED:
            groups.setdefault(
                repr(sorted((k, v) for k, v in run.recipe.items() if not own(k) and k != SEED)), []
            ).append(run)
    found: dict[str, Repeats] = {}
    for group in groups.values():
        if len({run.recipe.get(SEED) for run in group}) < 2:
            continue
        names = sorted(run.name for run in group)
        keys = [k for k in group[0].figures if all(math.isfinite(run.figures.get(k, math.nan)) for run in group)]
        means = {k: statistics.mean(run.figures[k] for run in group) for k in keys}
        spread = {k: statistics.stdev(run.figures[k] for run in group) for k in keys}
        found |= dict.fromkeys(names, Repeats(names[0], len(group), means, spread))
    return [replace(run, repeats=found.get(run.name)) for run in runs]


def own(key: str) -> bool:
    """Whether a recipe's key says where a run is, and not what it is."""
    return key in OWN or key.startswith(OWN_SECTIONS)
