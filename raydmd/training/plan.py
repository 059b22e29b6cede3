"""Which phase a cycle belongs to, and how fast to learn there. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydmd.recipe_training import Training


@dataclass(frozen=True)
class CyclePlan:
    """Cycles of a run, cut into phases.

    Attributes:
        ends: one past the last cycle of each phase, rising.
        warmup: cycles of a phase over which the rate rises.
        decay: last fraction of a phase over which it falls to zero.
    """

    ends: tuple[int, ...]
    warmup: int
    decay: float

    @classmethod
    def of(cls, training: Training, phases: int) -> CyclePlan:
        """Cut ``training.cycles`` by ``training.phase_split``; every phase gets at least one cycle."""
        split = training.phase_split or (1.0,) * phases
        ends: list[int] = []
        done = 0.0
        for k, part in enumerate(split):
            done += part
            end = round(training.cycles * done / sum(split))
            end = max(end, (ends[-1] if ends else 0) + 1)
            ends.append(min(end, training.cycles - (phases - 1 - k)))
        return cls(tuple(ends), training.warmup, training.decay)

    @property
    def cycles(self) -> int:
        """Cycles of the whole run."""
        return self.ends[-1]

    def phase(self, cycle: int) -> int:
        """Index of the phase that a cycle belongs to."""
        return sum(cycle >= end for end in self.ends[:-1])

    def start(self, phase: int) -> int:
        """First cycle of a phase."""
        return self.ends[phase - 1] if phase else 0

    def progress(self, cycle: int) -> float:
        """Share of a cycle's phase that is done when it starts, in [0, 1); what settings that move go by."""
        phase = self.phase(cycle)
        start = self.start(phase)
        return (cycle - start) / (self.ends[phase] - start)

    def rate(self, cycle: int) -> float:
        """Factor on the rates in a cycle: a ramp up, a plateau, a linear fall."""
        phase = self.phase(cycle)
        start, end = self.start(phase), self.ends[phase]
        up = min(1.0, (cycle - start + 1) / self.warmup) if self.warmup else 1.0
        fall = self.decay * (end - start)
        down = min(1.0, (end - cycle) / fall) if fall else 1.0
        return up * down
