"""A donor's settings, moved a little: within the same dimensions, so that what comes out is valid. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.recipe import derive

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Collection, Mapping, Sequence

    from raydmd.recipe import Recipe
    from raydmd.tuning.spec import Sweep

TRIES = 50
"""Explorations that may come to a recipe that is refused before the donor's own settings are taken."""
EPSILON = 1e-9


class Explored:
    """A chooser that moves the numbers that a donor's settings were made of, or draws them anew.

    Dimensions make windows, boundaries and choices of such numbers, see :mod:`raydmd.tuning.space`: any numbers within
    their ranges come to something valid.

    Args:
        numbers: the donor's, by name.
        rng: draws.
        resample: probability that a number is drawn anew.
        factor: that a number is multiplied with or divided by; one whose range begins at 0 or below moves by as much of
            its range. A choice goes to its neighbour.
        kept: keys of the recipe whose numbers stay.

    Attributes:
        chosen: what came out, by name.
    """

    def __init__(
        self,
        numbers: Mapping[str, Any],
        rng: random.Random,
        *,
        resample: float,
        factor: float,
        kept: Collection[str] = (),
    ) -> None:
        self._numbers, self._rng, self._resample, self._factor = numbers, rng, resample, factor
        self._kept = tuple(kept)
        self.chosen: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """See :class:`~raydmd.tuning.space.Chooser`."""
        value = float(self._number(name, low, high, step, log))
        self.chosen[name] = value
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """See :class:`~raydmd.tuning.space.Chooser`."""
        value = round(self._number(name, low, high, step, log))
        self.chosen[name] = value
        return value

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """See :class:`~raydmd.tuning.space.Chooser`."""
        before = self._numbers.get(name)
        if before not in choices:
            value = self._rng.choice(choices)
        elif self._stays(name):
            value = str(before)
        elif self._rng.random() < self._resample:
            value = self._rng.choice(choices)
        else:
            place = choices.index(str(before)) + self._rng.choice((-1, 1))
            value = choices[min(max(place, 0), len(choices) - 1)]
        self.chosen[name] = value
        return value

    def _number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        before = self._numbers.get(name)
        if not isinstance(before, int | float) or not low <= before <= high:
            return self._drawn(low, high, step, log)
        if self._stays(name):
            return before
        if self._rng.random() < self._resample:
            return self._drawn(low, high, step, log)
        up = self._rng.random() < 0.5
        for way in (up, not up):  # at an end of the range there is one way alone
            value = self._moved(before, low, high, step, up=way)
            if value != before:
                return value
        return before

    def _drawn(self, low: float, high: float, step: float | None, log: bool) -> float:
        if log:
            return _on_grid(math.exp(self._rng.uniform(math.log(low), math.log(high))), low, high, step)
        if step:
            return low + step * self._rng.randint(0, math.floor((high - low) / step + EPSILON))
        return self._rng.uniform(low, high)

    def _moved(self, value: float, low: float, high: float, step: float | None, *, up: bool) -> float:
        if low > 0:
            new = value * self._factor if up else value / self._factor
        else:
            new = value + (1 if up else -1) * (self._factor - 1) * (high - low)
        new = _on_grid(new, low, high, step)
        if step and abs(new - value) < step / 2:  # too little for the grid: the next point
            new = _on_grid(value + (step if up else -step), low, high, step)
        return new

    def _stays(self, name: str) -> bool:
        return any(name == key or name.startswith((f"{key}[", f"{key}.steps of", f"{key}.count")) for key in self._kept)


def explore(
    spec: Sweep,
    base: Recipe,
    numbers: Mapping[str, Any],
    rng: random.Random,
    *,
    fits: Callable[[Recipe], None],
    kept: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings near a donor's.

    Args:
        spec: a sweep with a population.
        base: the recipe that its trials differ from.
        numbers: that the donor's settings were made of.
        rng: draws.
        fits: raises an InputError for a recipe that can't be run.
        kept: keys that may not change now.

    Returns:
        The changes of the recipe and the numbers that they were made of; ``None`` if none was found that fits.
    """
    assert spec.population is not None
    how = spec.population
    for _ in range(TRIES):
        chooser = Explored(numbers, rng, resample=how.resample, factor=how.factor, kept=kept)
        try:
            changes = spec.changes(base, chooser)
            fits(derive(base, changes))
        except InputError:  # the corners were seen before; what lies between them may yet be refused
            continue
        return changes, chooser.chosen
    return None


def _on_grid(value: float, low: float, high: float, step: float | None) -> float:
    value = min(max(value, low), high)
    if not step:
        return value
    places = math.floor((high - low) / step + EPSILON)
    return low + step * min(round((value - low) / step), places)
