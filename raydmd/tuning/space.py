"""What a sweep searches: a value, or a structure that cannot come out invalid, for any key of a recipe. Pure.

A dimension asks a *chooser* for its numbers: an Optuna trial when a sweep runs, :class:`Explorer` when all corners, or
all points of a grid, are to be seen beforehand.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import Field, model_validator

from raydmd.process import step_grid
from raydmd.recipe_types import Count, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

INSIDE = (0.05, 0.95)
"""How near a boundary may come to the student's own times, as a share of the way between two of them."""


class Chooser(Protocol):
    """Picks numbers by name, as :class:`optuna.Trial` does."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """A number from ``low`` to ``high``."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A whole number from ``low`` to ``high``."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of a few."""


class Dimension(Section):
    """One key's values."""

    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Only where other keys of the space, named before, have one of these values."""

    def pick(self, name: str, chooser: Chooser, recipe: Mapping[str, Any]) -> Any:
        """A value.

        Args:
            name: the key.
            chooser: picks numbers.
            recipe: ``steps`` and ``shift`` of the student as they are then.
        """
        raise NotImplementedError


class Range(Dimension):
    """Numbers from ``low`` to ``high``; whole ones if both are, and the step."""

    low: int | float
    high: int | float
    step: float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must lie below high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step={self.step} must lie above 0 and fit between low and high")
        return self

    def pick(self, name: str, chooser: Chooser, recipe: Mapping[str, Any]) -> Any:
        """See :class:`Dimension`."""
        if isinstance(self.low, int) and isinstance(self.high, int) and float(self.step or 1).is_integer():
            return chooser.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return chooser.suggest_float(name, float(self.low), float(self.high), step=self.step, log=self.log)


class Choice(Dimension):
    """One of a few values, which may be lists or whole sections; null switches a section off."""

    of: Annotated[tuple[Any, ...], Field(min_length=1)]

    def pick(self, name: str, chooser: Chooser, recipe: Mapping[str, Any]) -> Any:
        """See :class:`Dimension`."""
        labels = [json.dumps(value, sort_keys=True) for value in self.of]
        return self.of[labels.index(chooser.suggest_categorical(name, labels))]


class Ordered(Dimension):
    """Several numbers in order, spread evenly over all such, e.g. the ends of a window of times."""

    ordered: Count | tuple[Count, Count] = 2
    """How many, or from how many to how many."""
    low: float = 0.0
    high: float = 1.0
    gap: Annotated[float, Field(ge=0)] = 0.0
    """That neighbours keep at least."""
    falling: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        least, most = self.counts
        if least > most:
            raise ValueError(f"ordered={list(self.counts)} must rise")
        if self.high - self.low <= self.gap * (most - 1):
            raise ValueError(f"{most} numbers with gap={self.gap} do not fit between {self.low} and {self.high}")
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """The fewest and the most."""
        return self.ordered if isinstance(self.ordered, tuple) else (self.ordered, self.ordered)

    def pick(self, name: str, chooser: Chooser, recipe: Mapping[str, Any]) -> Any:
        """See :class:`Dimension`."""
        least, most = self.counts
        count = chooser.suggest_int(f"{name}.count", least, most, step=1, log=False) if most > least else least
        # The smallest of n uniform numbers, then the smallest of the rest above it: every order is as likely.
        values, at = list[float](), 0.0
        for i in range(count):
            u = chooser.suggest_float(f"{name}[{i}]", 0.0, 1.0, step=None, log=False)
            at += (1 - at) * (1 - (1 - u) ** (1 / (count - i)))
            values.append(self.low + at * (self.high - self.low - self.gap * (count - 1)) + self.gap * i)
        values = [round(v, 6) for v in values]
        return values[::-1] if self.falling else values


class Phases(Dimension):
    """Boundaries that give each phase so many of the student's steps, for ``method.boundaries``: never one none."""

    phases: Count | tuple[Count, Count] = 2
    """How many, or from how many to how many."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.counts[0] > self.counts[1]:
            raise ValueError(f"phases={list(self.counts)} must rise")
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """The fewest and the most."""
        return self.phases if isinstance(self.phases, tuple) else (self.phases, self.phases)

    def pick(self, name: str, chooser: Chooser, recipe: Mapping[str, Any]) -> Any:
        """See :class:`Dimension`."""
        steps, grid = int(recipe["steps"]), step_grid(int(recipe["steps"]), float(recipe["shift"]))
        least, most = self.counts
        if least > steps:
            raise ValueError(f"{least} phases can't share {steps} step(s)")
        splits = {
            "+".join(str(b - a) for a, b in itertools.pairwise((0, *cuts, steps))): cuts
            for count in range(least, min(most, steps) + 1)
            for cuts in itertools.combinations(range(1, steps), count - 1)
        }
        cuts = splits[chooser.suggest_categorical(f"{name}.steps of {steps}", list(splits))]
        found = []
        for i, cut in enumerate(cuts):
            share = chooser.suggest_float(f"{name}[{i}]", *INSIDE, step=None, log=False)
            found.append(round(grid[cut] + share * (grid[cut - 1] - grid[cut]), 6))
        return found


class Explorer:
    """A chooser that goes through every combination, one after the other.

    Args:
        options: what to try of a range, given low, high, step and log.
    """

    def __init__(self, options: Callable[[float, float, float | None, bool], list[Any]]) -> None:
        self._options = options
        self._path: list[tuple[int, int]] = []
        self._depth = 0
        self.chosen: dict[str, Any] = {}

    def rounds(self) -> Iterator[None]:
        """One round for each combination; everything is asked anew in each."""
        while True:
            self._depth, self.chosen = 0, {}
            yield
            self._path = self._path[: self._depth]
            while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
                self._path.pop()
            if not self._path:
                return
            at, of = self._path[-1]
            self._path[-1] = at + 1, of

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """See :class:`Chooser`."""
        return float(self._next(name, self._options(low, high, step, log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """See :class:`Chooser`."""
        return int(self._next(name, self._options(low, high, step, log)))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """See :class:`Chooser`."""
        return str(self._next(name, list(choices)))

    def _next(self, name: str, options: list[Any]) -> Any:
        if self._depth == len(self._path):
            self._path.append((0, len(options)))
        value = options[self._path[self._depth][0]]
        self._depth += 1
        self.chosen[name] = value
        return value


class Tumbler:
    """A chooser that goes to a random end of every range, and to a random one of every few.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """See :class:`Chooser`."""
        del name, step, log
        return self._rng.choice((low, high))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """See :class:`Chooser`."""
        del name, step, log
        return self._rng.choice((low, high))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """See :class:`Chooser`."""
        del name
        return self._rng.choice(choices)


def ends(low: float, high: float, step: float | None, log: bool) -> list[float]:
    """The corners of a range."""
    del step, log
    return [low, high]


def points(low: float, high: float, step: float | None, log: bool) -> list[float]:
    """A grid's points of a range.

    Raises:
        ValueError: if it has no step.
    """
    del log
    if step is None:
        raise ValueError(f"a grid needs a step from {low:g} to {high:g}, or a list of values")
    return [low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1)]
