"""Which recipe keys differ between runs, and of which kind they are. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raydmd.comparing.runs import own

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.comparing.runs import Run

DECADES = 100.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""
SPREAD = 6
"""Lists of numbers with more different values than this are shown number by number."""
TAKEN = ("run", "state", "cycles")
"""Heads of a table's other columns."""
ABSENT = object()


@dataclass(frozen=True)
class Parameter:
    """A key that differs.

    Attributes:
        key: in the recipe; ``key[i]`` is one number of a list.
        label: as short as tells it from the others.
        numeric: whether all values are numbers, those apart where it is off.
        log: whether they span more than two decades.
        values: of each run, in order; :data:`ABSENT` where it has none.
    """

    key: str
    label: str
    numeric: bool
    log: bool
    values: tuple[Any, ...]

    def of(self, run: int) -> Any:
        """A run's value; ``None`` where it has none."""
        value = self.values[run]
        return None if value is ABSENT else value

    def has(self, run: int) -> bool:
        """Whether a run has the key."""
        return self.values[run] is not ABSENT


@dataclass(frozen=True)
class Differences:
    """What a comparison found among the recipes.

    Attributes:
        parameters: keys that differ, in the order of the recipe.
        same: keys that all runs have in common, with their values.
    """

    parameters: tuple[Parameter, ...] = ()
    same: dict[str, Any] = field(default_factory=dict)


def differences(runs: Sequence[Run]) -> Differences:
    """Sort the keys of all recipes into those that differ and those that do not."""
    known = [run.recipe for run in runs if run.recipe]
    keys = [k for k in dict.fromkeys(k for recipe in known for k in recipe) if not own(k)]
    same: dict[str, Any] = {}
    found: dict[str, list[Any]] = {}
    for key in keys:
        # A run of which no recipe is known does not make every key differ.
        values = [run.recipe.get(key, ABSENT) if run.recipe else ABSENT for run in runs]
        shown = {label_of(v) for v, run in zip(values, runs, strict=True) if run.recipe}
        if len(shown) == 1:
            same[key] = next(v for v, run in zip(values, runs, strict=True) if run.recipe)
        else:
            found[key] = values
    found = _spread(_sections(found, same))
    labels = short_labels(list(found), TAKEN)
    return Differences(tuple(_parameter(key, labels[key], values) for key, values in found.items()), same)


def label_of(value: Any) -> str:
    """A value as text, the same for equal ones."""
    if value is ABSENT:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    return json.dumps(value, sort_keys=True, default=str)


def short(value: Any) -> str:
    """A value as a table shows it."""
    if value is ABSENT:
        return "-"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "off"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return ", ".join(f"{v:.4g}" for v in value) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def short_labels(keys: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """The shortest endings of dotted keys that tell them apart.

    Args:
        keys: of a recipe.
        taken: labels that mean something else.
    """
    found: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        own = [e for e in ends if e not in taken and sum(k == e or k.endswith(f".{e}") for k in keys) == 1]
        found[key] = own[0] if own else key
    return found


def _sections(found: dict[str, list[Any]], same: dict[str, Any]) -> dict[str, list[Any]]:
    """A section that some runs have switched off is one column, or, where the others differ in it, its keys."""
    for key in [k for k, values in found.items() if any(v is None for v in values)]:
        inside = [k for k in found if k.startswith(f"{key}.")]
        if not inside:
            continue
        on = [k for k in inside if len({label_of(v) for v in found[k] if v is not ABSENT}) > 1]
        for name in set(inside) - set(on):
            same[name] = next(v for v in found[name] if v is not ABSENT)
            del found[name]
        if on:
            del found[key]
        else:
            found[key] = [None if v is None else "on" for v in found[key]]
    return found


def _spread(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Lists of so many numbers, of which hardly two are equal, as one key for each number."""
    made: dict[str, list[Any]] = {}
    for key, values in found.items():
        here = [v for v in values if v is not ABSENT and v is not None]
        lists = all(isinstance(v, list) and v and all(_number(x) for x in v) for v in here)
        lengths = {len(v) for v in here} if lists else set()
        different = len({label_of(v) for v in here})
        if len(lengths) == 1 and different > SPREAD and 2 * different > len(here):
            for i in range(lengths.pop()):
                made[f"{key}[{i}]"] = [v[i] if isinstance(v, list) else ABSENT for v in values]
        else:
            made[key] = values
    return made


def _parameter(key: str, label: str, values: list[Any]) -> Parameter:
    here = [v for v in values if v is not ABSENT and v is not None]  # what is off in some runs has no number there
    numeric = bool(here) and all(_number(v) and math.isfinite(v) for v in here)
    log = numeric and min(here) > 0 and max(here) / min(here) > DECADES
    return Parameter(key, label, numeric, log, tuple(values))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
