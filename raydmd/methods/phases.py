"""Phases: which steps they cover, where they end, where they renoise, who trains in them.

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
    def above(cls, level: float, routing: Routing, *, mu: float, clip: tuple[float, float] = (0.0, 1.0)) -> TimeRange:
        """All times above ``level``, within ``clip`` before the shift, cut at the routing's boundaries.

        Raises:
            ValueError: if nothing is left.
        """
        low = max(clip[0], _unshift(level, mu))
        edges = [1.0, *(_unshift(b, mu) for b in routing.boundaries), 0.0]
        parts = []
        for expert, upper, lower in zip(routing.experts, edges, edges[1:], strict=False):
            a, b = max(low, lower), min(clip[1], upper)
            if b > a:
                parts.append((expert, a, b))
        if not parts:
            raise ValueError(f"no time lies above level {level} within {clip} at shift {mu}")
        return cls(tuple(parts), mu)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts whose times can be drawn."""
        return tuple(expert for expert, _, _ in self.parts)

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
class Phase:
    """One phase of training.

    Attributes:
        index: 0 for the noisiest.
        first: index of its first step on the grid.
        last: one past its last step.
        end: the level its samples have, the grid's time after its last step.
        student: experts of the student that train in it.
        match: where distribution matching renoises.
        fake: where the fake score trains.
    """

    index: int
    first: int
    last: int
    end: float
    student: tuple[str, ...]
    match: TimeRange
    fake: TimeRange

    @property
    def fake_experts(self) -> tuple[str, ...]:
        """Experts of the fake score that are needed in this phase."""
        return tuple(dict.fromkeys((*self.match.experts, *self.fake.experts)))


def split_grid(grid: Sequence[float], boundaries: Sequence[float]) -> list[range]:
    """Indices of the steps of each phase; a step at a boundary belongs to the noisier phase."""
    routing = Routing(tuple(str(k) for k in range(len(boundaries) + 1)), tuple(boundaries))
    phase_of = [int(routing.expert(t)) for t in grid[:-1]]
    return [range(phase_of.index(k), len(phase_of) - phase_of[::-1].index(k)) for k in range(len(boundaries) + 1)]


def _unshift(level: float, mu: float) -> float:
    return float(unshift(torch.tensor(level, dtype=torch.float64), mu))
