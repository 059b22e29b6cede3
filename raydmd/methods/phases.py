"""Phases: which steps they cover, where they end, who trains in them; windows: where a term renoises.

Known before the run from grid, boundaries and the teacher's routing; no tensors of a run, no networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.models.base import Routing
from raydmd.process import shift, unshift

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.draws import Draws


@dataclass(frozen=True)
class TimeRange:
    """Times drawn uniformly before the shift, one expert a batch.

    All samples of a batch, on all ranks, draw from the same expert's part, chosen with the probability
    that the part has: under FSDP every rank must run the same module.

    Attributes:
        parts: ``(expert, low, high)`` in unshifted time.
        mu: the shift.
    """

    parts: tuple[tuple[str, float, float], ...]
    mu: float

    @classmethod
    def between(
        cls, low: float, high: float, routing: Routing, *, mu: float, clip: tuple[float, float] = (0.0, 1.0)
    ) -> TimeRange:
        """All times from level ``low`` to ``high``, within ``clip`` before the shift, cut at the routing's boundaries.

        Raises:
            ValueError: if nothing is left.
        """
        a0, b0 = max(clip[0], _unshift(low, mu)), min(clip[1], _unshift(high, mu))
        edges = [1.0, *(_unshift(b, mu) for b in routing.boundaries), 0.0]
        parts = []
        for expert, upper, lower in zip(routing.experts, edges, edges[1:], strict=False):
            a, b = max(a0, lower), min(b0, upper)
            if b > a:
                parts.append((expert, a, b))
        if not parts:
            raise ValueError(f"no time lies between levels {low:g} and {high:g} within {clip} at shift {mu:g}")
        return cls(tuple(parts), mu)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts whose times can be drawn."""
        return tuple(expert for expert, _, _ in self.parts)

    def only(self, expert: str) -> TimeRange:
        """The part that one expert serves.

        Raises:
            ValueError: if it has none.
        """
        parts = tuple(part for part in self.parts if part[0] == expert)
        if not parts:
            raise ValueError(f"no time of {self.experts} is {expert}'s")
        return TimeRange(parts, self.mu)

    def draw(self, draws: Draws, purpose: str) -> tuple[Tensor, str]:
        """Times ``(B,)`` and the expert they belong to."""
        left = draws.shared(f"{purpose}.expert") * sum(high - low for _, low, high in self.parts)
        chosen = self.parts[-1]
        for part in self.parts:
            left -= part[2] - part[1]
            if left < 0:
                chosen = part
                break
        expert, low, high = chosen
        # Off the edges by more than rounding, so that the batch routes to the expert it was drawn for.
        margin = 1e-4 * (high - low)
        u = low + margin + (high - low - 2 * margin) * draws.uniform(purpose)
        return shift(u, self.mu), expert


@dataclass(frozen=True)
class Window:
    """Where a term renoises: bounds before the shift that may move, within a phase and below the student's input.

    Attributes:
        routing: the teacher's.
        mu: the shift.
        start: bounds at a phase's start.
        end: bounds at its end.
        cleaner: stay cleaner than the input of the student's exit step.
    """

    routing: Routing
    mu: float
    start: tuple[float, float]
    end: tuple[float, float]
    cleaner: bool = False

    def at(self, floor: float, entered: float, progress: float) -> TimeRange:
        """The times for a sample of a phase that may renoise above ``floor`` and whose exit step began at ``entered``.

        Raises:
            ValueError: if there are none.
        """
        low, high = (a + (b - a) * progress for a, b in zip(self.start, self.end, strict=True))
        ceiling = entered if self.cleaner else 1.0
        return TimeRange.between(floor, ceiling, self.routing, mu=self.mu, clip=(low, high))

    def experts(self, floor: float) -> tuple[str, ...]:
        """Experts that it can meet at any progress."""
        widest = (min(self.start[0], self.end[0]), max(self.start[1], self.end[1]))
        return TimeRange.between(floor, 1.0, self.routing, mu=self.mu, clip=widest).experts


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Attributes:
        index: 0 for the noisiest.
        first: index of its first step on the grid.
        last: one past its last step.
        end: the level its samples have, the grid's time after its last step.
        floor: the level above which scores are taken, ``end`` or a little higher.
        student: experts of the student that train in it.
        fake: where the fake score trains.
        fake_experts: experts of the fake score that are needed in it.
    """

    index: int
    first: int
    last: int
    end: float
    floor: float
    student: tuple[str, ...]
    fake: TimeRange
    fake_experts: tuple[str, ...]


def split_grid(grid: Sequence[float], boundaries: Sequence[float]) -> list[range]:
    """Indices of the steps of each phase; a step at a boundary belongs to the noisier phase."""
    routing = Routing(tuple(str(k) for k in range(len(boundaries) + 1)), tuple(boundaries))
    phase_of = [int(routing.expert(t)) for t in grid[:-1]]
    return [range(phase_of.index(k), len(phase_of) - phase_of[::-1].index(k)) for k in range(len(boundaries) + 1)]


def _unshift(level: float, mu: float) -> float:
    return float(unshift(torch.tensor(level, dtype=torch.float64), mu))
