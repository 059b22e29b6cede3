"""The stream of samples: which prompts and which random numbers an update gets, by global position."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from raydmd.draws import Draws, shuffled
from raydmd.training.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from raydmd.models.base import Conditions
    from raydmd.models.sizes import Latent
    from raydmd.training.sample_log import SampleLog


APART = 1 << 40
"""Positions between those of updates that only some runs have: more than any run comes to."""
ANEW = 1 << 56
"""Positions between a sample's noise and that of the same sample drawn anew: more than all updates of all runs have."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of an update's samples.

    Attributes:
        positions: of the samples in the stream.
        draws: their random numbers.
        conditions: row in the condition table per sample.
        cond: those rows on the worker's device.
        latent: shape of one latent of this update's, the same on all ranks.
    """

    positions: tuple[int, ...]
    draws: Draws
    conditions: tuple[int, ...]
    cond: Conditions
    latent: Latent


class Stream:
    """Every update of a run has a fixed place in one endless stream of samples.

    A cycle takes ``regular`` times the batch: one slot for the student, one per fake update. Positions depend on
    cycle, slot and batch alone, so any world size sees the same samples; fake updates that a monitor adds have places
    of their own, so that they move nobody else's.

    Args:
        conditions: the table; row 0 is the negative prompt and is never drawn.
        latents: shapes of one latent that updates are drawn from, with their weights.
        seed: of the run.
        batch: samples per update, over all ranks.
        slots: names of the updates of a cycle, in their order.
        regular: how many of them every cycle has; default: all.
        rank: this process.
        world: how many there are; divides ``batch``.
        group: samples in a row that share a prompt.
        device: where conditions and noise go.
        log: of what each update gets, if that is kept.
        quarantine: prompts that are never drawn, and samples that are drawn anew.
    """

    def __init__(
        self,
        conditions: Conditions,
        *,
        latents: Mapping[Latent, float],
        seed: int,
        batch: int,
        slots: Sequence[str],
        regular: int | None = None,
        rank: int,
        world: int,
        group: int = 1,
        device: torch.device,
        log: SampleLog | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._conditions = conditions
        self._latents = dict(latents)
        self._seed = seed
        self._batch, self._group = batch, group
        self._slots = {name: place for place, name in enumerate(slots)}
        self._regular = len(slots) if regular is None else regular
        self._share = range(rank * (batch // world), (rank + 1) * (batch // world))
        self._device = device
        self._log = log
        self._quarantine = quarantine or Quarantine()
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, cycle: int, slot: str) -> Batch:
        """This rank's samples of one update."""
        place = self._slots[slot]
        if place < self._regular:
            start = (cycle * self._regular + place) * self._batch
        else:
            start = (place - self._regular + 1) * APART + cycle * self._batch
        positions = tuple(start + i for i in self._share)
        rows = tuple(self._prompt(p) for p in positions)
        numbers = tuple(p + self._level(p) * ANEW for p in positions)
        witness = self._log.update(cycle, slot, numbers, rows) if self._log else None
        draws = Draws(self._seed, f"{cycle}/{slot}", numbers, self._device, witness)
        cond = self._conditions.rows(rows).to(self._device)
        return Batch(positions=positions, draws=draws, conditions=rows, cond=cond, latent=self._latent(draws))

    def _latent(self, draws: Draws) -> Latent:
        """The shape of an update's latents: of its cycle and slot alone, so of no rank, world or past."""
        shapes, ends = tuple(self._latents), tuple(accumulate(self._latents.values()))
        place = bisect_right(ends, draws.shared("size") * ends[-1])
        return shapes[min(place, len(shapes) - 1)]  # where a product is rounded up to the end

    def _level(self, position: int) -> int:
        return self._quarantine.level(self._seed, position)

    def _prompt(self, position: int) -> int:
        """The row of a sample's prompt; of a group whose samples were drawn anew, and of one left out, a later one."""
        prompts, group = len(self._conditions) - 1, position // self._group
        epoch, place = divmod(group, prompts)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self._seed, epoch, prompts))
        order, without = self._order[1], self._quarantine.prompts
        on = max(self._level(group * self._group + i) for i in range(self._group))
        if not on and 1 + order[place] not in without:
            return 1 + order[place]
        allowed = [1 + row for row in (*order[place:], *order[:place]) if 1 + row not in without]
        return allowed[on % len(allowed)]
