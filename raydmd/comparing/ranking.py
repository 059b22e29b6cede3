"""Which figure counts, which way is better, who is best. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydmd.comparing.runs import EVALUATION, FINISHED, STATES
from raydmd.errors import InputError
from raydmd.evaluation.table import COLUMNS, column
from raydmd.recipe_io import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.comparing.runs import Run

FIRST = ("frechet", "joint")
SECOND = ("coverage_entropy", "joint", "diversity_lpips", "frechet", "recall", "reward")
"""Figures that go well as the second objective, or the beginnings of their names."""
GOALS = {"low": "min", "high": "max", "teacher": "teacher"}
ARROWS = {"min": "↓", "max": "↑", "teacher": "≈"}


@dataclass(frozen=True)
class Figure:
    """A figure and its goal.

    Attributes:
        key: its name.
        goal: ``min``, ``max``, ``teacher`` for the nearest to the teacher's, or empty where none is better.
        digits: after the point; ``None`` for four that count.
        help: what it is.
    """

    key: str
    goal: str
    digits: int | None = None
    help: str = ""

    @property
    def title(self) -> str:
        """Name and arrow."""
        return f"{self.key} {ARROWS[self.goal]}" if self.goal else self.key

    def cost(self, run: Run) -> float:
        """The smaller the better, of repeats their mean; infinite where the run has no such figure."""
        value = run.value(self.key)
        if value is not None and run.repeats:
            value = run.repeats.means.get(self.key, value)
        return self.cost_of(value, run)

    def cost_of(self, value: float | None, run: Run) -> float:
        """What a value of a run's figure costs."""
        if value is None or (self.goal == "teacher" and self.key not in run.teacher):
            return math.inf
        return {"max": -value, "teacher": abs(value - run.teacher.get(self.key, 0.0))}.get(self.goal, value)


def figure(key: str, goal: str = "") -> Figure:
    """A figure by its name, with the goal given, or that of the evaluation's table."""
    known = column(key)
    if known is None:
        return Figure(key, goal)
    return Figure(key, goal or GOALS.get(known.better or "", ""), known.digits, known.help)


def figures_in(runs: Sequence[Run]) -> list[Figure]:
    """All figures of evaluations that any run has, those of the evaluation's table first."""
    found = dict.fromkeys(k for run in runs for k in run.figures)
    order = {c.key: i for i, c in enumerate(COLUMNS)}
    return [figure(k) for k in sorted(found, key=lambda k: (order.get(k, len(order)), k))]


def chosen(runs: Sequence[Run], by: str | None, goal: str | None, objectives: Mapping[str, str]) -> Figure | None:
    """The figure that runs are sorted by.

    Args:
        runs: that are compared.
        by: its name, if it was given.
        goal: ``min``, ``max`` or ``teacher``, if it was given.
        objectives: of the sweep, or as given.

    Returns:
        The figure; ``None`` where no run has any.

    Raises:
        InputError: if no run has it, or it is not known which way is better.
    """
    if by is None and goal:
        raise InputError(f"--goal {goal} says which way --by is better: give both")
    if by is None:
        here = [k for k in (*objectives, *FIRST) if _runs_with(runs, k)]
        plain = [f.key for f in figures_in(runs) if f.goal in ("min", "max")]
        everywhere = [key for key in plain if _runs_with(runs, key) == len(runs)]
        name = next(iter([*here, *everywhere, *plain]), None)
        if name is None:
            return None
    else:
        name = existing(runs, by, "--by")
    if goal and objectives.get(name, goal) != goal:
        raise InputError(f"--goal {goal}: {name} is an objective with the goal {objectives[name]}")
    found = figure(name, goal or objectives.get(name, ""))
    if not _usable(found, runs):
        near = f"no run here has its teacher's {name} to be near to; " if found.goal else ""
        raise InputError(f"--by {name}: {near}say which way is better, --goal min or --goal max")
    return found


def objectives_of(
    runs: Sequence[Run], given: Mapping[str, str], sweep: Mapping[str, str], by: Figure | None
) -> list[Figure]:
    """The objectives of the front: as given, else the sweep's, else two that go together; none without figures.

    Raises:
        InputError: if no run has one that was given, or it is not known which way it is better.
    """
    if given:
        found = [figure(existing(runs, k, "--objectives"), goal) for k, goal in given.items()]
        if unclear := [f.key for f in found if not _usable(f, runs)]:
            raise InputError(f"--objectives: say which way is better, as in {unclear[0]}:min")
        return found
    if here := [figure(k, goal) for k, goal in sweep.items() if _runs_with(runs, k)]:
        return here if len(here) > 1 or by is None or by.key == here[0].key else [here[0], by]
    if by is None:
        return []
    others = [f for f in figures_in(runs) if f.goal in ("min", "max") and f.key != by.key]
    second = [f for k in SECOND for f in others if f.key == k or f.key.startswith(f"{k}_")]
    return [by, *(second or others)[:1]]


def existing(runs: Sequence[Run], name: str, flag: str) -> str:
    """A figure's or metric's name as the runs have it.

    Raises:
        InputError: if they have none of it; names the nearest.
    """
    name = name.removeprefix(EVALUATION)
    keys = {k for run in runs for k in run.figures} | {k for run in runs for k in run.curves}
    if name in keys:
        return name
    plain = {k.removeprefix(EVALUATION) for k in keys}
    near = nearest(name, plain)
    known = ", ".join(sorted({k for run in runs for k in run.figures})) or "none"
    hint = f"did you mean '{near}'?" if near else f"their evaluations have: {known}"
    raise InputError(f"{flag}: no run has a figure or metric '{name}'; {hint}")


def order(runs: Sequence[Run], by: Figure | None) -> list[int]:
    """Places of the runs, the best first: finished ones by the figure, then the others, farthest first."""

    def key(i: int) -> tuple[Any, ...]:
        run = runs[i]
        cost = by.cost(run) if by else 0.0
        if run.state == FINISHED:
            return 0, cost, 0, run.name
        return 1, -run.measured, cost, STATES.index(run.state), run.name

    return sorted(range(len(runs)), key=key)


def front(runs: Sequence[Run], objectives: Sequence[Figure]) -> set[int]:
    """Places of the finished runs that no other is as good as in every objective, and better in one."""
    if not objectives:
        return set()
    done = [i for i, run in enumerate(runs) if run.state == FINISHED]
    costs = {i: tuple(f.cost(runs[i]) for f in objectives) for i in done}
    costs = {i: cost for i, cost in costs.items() if float("inf") not in cost}

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return {i for i, cost in costs.items() if not any(beats(other, cost) for other in costs.values())}


def read_objectives(text: str) -> dict[str, str]:
    """``a:min,b:max`` by name; a goal may be left out where it is known.

    Raises:
        InputError: for other goals, or no name.
    """
    found = {}
    for part in text.split(","):
        name, _, goal = part.strip().partition(":")
        if not name or "=" in name or goal not in ("", "min", "max", "teacher"):
            raise InputError(f"--objectives {text!r}: give names with goals, as in frechet:min,coverage_entropy:max")
        found[name.removeprefix(EVALUATION)] = goal
    return found


def _usable(figure: Figure, runs: Sequence[Run]) -> bool:
    """Whether it is known which way is better."""
    return bool(figure.goal) and (figure.goal != "teacher" or any(figure.key in run.teacher for run in runs))


def _runs_with(runs: Sequence[Run], key: str) -> int:
    return sum(run.value(key) is not None for run in runs)
