"""Which pairs an update gets: by seed, cycle and global position, like everything else that is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from raydmd.draws import Draws, shuffled
from raydmd.methods.regression import Pairs

if TYPE_CHECKING:
    from raydmd.models.base import Conditions
    from raydmd.pairs.store import PairStore

UNSEEN = -1.0
SALT = 2
"""On the run's seed, so that pairs are not in the prompts' order."""
KEPT = 0.5
"""What a pair's running error keeps of itself at each new one; this project's choice."""


def no_errors(count: int) -> Tensor:
    """Running errors before any was seen, ``(count,)``; part of a run's resumable state where pairs are resampled."""
    return torch.full((count,), UNSEEN)


class PairStream:
    """An endless stream of pairs, all in turn, or a share of them by their errors.

    Args:
        store: the pairs.
        conditions: of their prompts.
        seed: of the run.
        batch: pairs per update, over all ranks.
        rank: this process.
        world: how many there are; divides ``batch``.
        resample: share of the pairs drawn in proportion to their running errors; the same on all ranks.
        errors: running errors ``(len(store),)``, see :func:`no_errors`; :meth:`learn` changes them in place.
        device: where latents and conditions go.
    """

    def __init__(
        self,
        store: PairStore,
        conditions: Conditions,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        resample: float = 0.0,
        errors: Tensor,
        device: torch.device,
    ) -> None:
        self._store, self._conditions = store, conditions
        self._seed, self._batch = seed + SALT, batch
        self._rank, self._world = rank, world
        self._resample, self._errors = resample, errors
        self._device = device
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, cycle: int) -> Pairs:
        """This rank's pairs of one update."""
        share = self._batch // self._world
        mine = slice(self._rank * share, (self._rank + 1) * share)
        positions = tuple(range(cycle * self._batch, (cycle + 1) * self._batch))[mine]
        indices = self._indices(cycle)[mine]
        target, rows = self._store.targets(indices)
        return Pairs(
            noise=self._store.noise(indices).to(self._device),
            target=target.to(self._device),
            cond=self._conditions.rows(rows).to(self._device),
            draws=Draws(self._seed, f"{cycle}/pairs", positions, self._device),
            indices=indices,
        )

    def learn(self, cycle: int, errors: Tensor) -> None:
        """Remember how well the student did; all ranks call it, each with the errors ``(B,)`` of its share.

        Does nothing where pairs are not resampled.
        """
        if not self._resample:
            return
        if self._world > 1:
            everyone = errors.new_empty(self._world * len(errors))
            dist.all_gather_into_tensor(everyone, errors.contiguous())
            errors = everyone
        # One by one: a pair may be in the batch twice. The errors are the same until the last index is drawn.
        for index, error in zip(self._indices(cycle), errors.tolist(), strict=True):
            old = float(self._errors[index])
            self._errors[index] = error if old == UNSEEN else KEPT * old + (1 - KEPT) * error

    def _indices(self, cycle: int) -> tuple[int, ...]:
        """All ranks' pairs of one update."""
        positions = range(cycle * self._batch, (cycle + 1) * self._batch)
        inturn = [self._in_turn(p) for p in positions]
        if not self._resample:
            return tuple(inturn)
        draws = Draws(self._seed, f"{cycle}/pairs", tuple(positions))
        chosen = draws.uniform("pair.resample") < self._resample
        seen = self._errors != UNSEEN
        typical = self._errors[seen].mean() if seen.any() else torch.ones(())
        edges = torch.where(seen, self._errors, typical).double().clamp(min=1e-12).cumsum(0)
        drawn = torch.searchsorted(edges, draws.uniform("pair.index").double() * edges[-1], right=True)
        drawn = drawn.clamp(max=len(self._store) - 1)
        return tuple(int(d) if c else i for i, d, c in zip(inturn, drawn.tolist(), chosen.tolist(), strict=True))

    def _in_turn(self, position: int) -> int:
        epoch, place = divmod(position, len(self._store))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self._seed, epoch, len(self._store)))
        return self._order[1][place]
