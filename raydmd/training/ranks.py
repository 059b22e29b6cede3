"""What ranks say to each other in the middle of a cycle."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raydmd.errors import NonFiniteError, RunFailed
from raydmd.training.quarantine import Poisoned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from raydmd.training.quarantine import Bad
    from raydmd.training.session import Session


COLLECTIVE = 180
"""Seconds that a collective waits longer than a step, so that a late teacher is told before a late rank."""


def patience(step_timeout: float) -> timedelta:
    """How long ranks wait for each other."""
    return timedelta(seconds=int(step_timeout) + COLLECTIVE)


def over_ranks(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One row of all ranks' metrics: the mean of those that have a number; counters add up."""
    found = {}
    for key in dict.fromkeys(k for row in rows for k in row):
        values = [float(row[key]) for row in rows if key in row]
        found[key] = sum(values) if key == "teacher/retries" else sum(values) / len(values)
    return found


class Ranks:
    """All ranks of a run; every method is called by all of them at the same places.

    Args:
        session: how many, and where this one is.
    """

    def __init__(self, session: Session) -> None:
        self._world, self._device = session.world, session.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar."""
        if self._world == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed / self._world

    def asked(self, mine: bool) -> bool:
        """What rank 0 has decided."""
        if self._world == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        dist.broadcast(flag, src=0)
        return bool(flag)

    def everyone(self, mine: str) -> list[str]:
        """What each rank says, in order."""
        if self._world == 1:
            return [mine]
        said: list[str] = [""] * self._world
        dist.all_gather_object(said, mine)
        return said

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error: one that raised alone would leave the others waiting.

        What no restart cures, on whichever ranks, is raised as such by all of them.
        """
        if self._world == 1:
            if error is not None:
                raise error
            return
        flag = torch.tensor(int(error is not None), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            return
        everyone: list[tuple[bool, bool, str, tuple[Bad, ...]] | None] = [None] * self._world
        found = error.found if isinstance(error, Poisoned) else ()
        final = isinstance(error, RunFailed), isinstance(error, NonFiniteError)
        said = (*final, f"{type(error).__name__}: {error}", found)
        dist.all_gather_object(everyone, None if error is None else said)
        raised = [e for e in everyone if e]
        text = "; ".join(f"rank {r}: {e[2]}" for r, e in enumerate(everyone) if e)
        if all(bad for *_, bad in raised):
            raise Poisoned(text, [b for *_, bad in raised for b in bad]) from error
        if all(not_finite for _, not_finite, *_ in raised):
            raise NonFiniteError(text) from error
        if all(failed for failed, *_ in raised):
            raise RunFailed(text) from error
        # Somebody's error may pass: every rank leaves the same way, and Ray Train restarts them all.
        raise RuntimeError(text) from error
