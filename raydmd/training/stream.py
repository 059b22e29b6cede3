"""The stream of samples: which prompts and which random numbers an update gets, by global position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydmd.draws import Draws, shuffled

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from raydmd.models.base import Conditions


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of an update's samples.

    Attributes:
        draws: their random numbers.
        conditions: row in the condition table per sample.
        cond: those rows on the worker's device.
    """

    draws: Draws
    conditions: tuple[int, ...]
    cond: Conditions


class Stream:
    """Every update of a run has a fixed place in one endless stream of samples.

    A cycle takes ``slots`` times the batch: one slot for the student, one per fake update. Positions
    depend on cycle, slot and batch alone, so any world size sees the same samples.

    Args:
        conditions: the table; row 0 is the negative prompt and is never drawn.
        seed: of the run.
        batch: samples per update, over all ranks.
        slots: name of each update of a cycle, to its place.
        rank: this process.
        world: how many there are; divides ``batch``.
        group: samples in a row that share a prompt.
        device: where conditions and noise go.
    """

    def __init__(
        self,
        conditions: Conditions,
        *,
        seed: int,
        batch: int,
        slots: Mapping[str, int],
        rank: int,
        world: int,
        group: int = 1,
        device: torch.device,
    ) -> None:
        self._conditions = conditions
        self._seed = seed
        self._batch, self._group = batch, group
        self._slots = dict(slots)
        self._share = range(rank * (batch // world), (rank + 1) * (batch // world))
        self._device = device
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, cycle: int, slot: str) -> Batch:
        """This rank's samples of one update."""
        start = (cycle * len(self._slots) + self._slots[slot]) * self._batch
        positions = tuple(start + i for i in self._share)
        rows = tuple(self._prompt(p) for p in positions)
        draws = Draws(self._seed, f"{cycle}/{slot}", positions, self._device)
        return Batch(draws=draws, conditions=rows, cond=self._conditions.rows(rows).to(self._device))

    def _prompt(self, position: int) -> int:
        prompts = len(self._conditions) - 1
        epoch, place = divmod(position // self._group, prompts)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self._seed, epoch, prompts))
        return 1 + self._order[1][place]
