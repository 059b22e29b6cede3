"""What ranks say to each other in the middle of a cycle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raydmd.errors import NonFiniteError, RunFailed

if TYPE_CHECKING:
    from torch import Tensor

    from raydmd.training.session import Session


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
        """Raise on every rank if any rank has an error: one that raised alone would leave the others waiting."""
        if self._world == 1:
            if error is not None:
                raise error
            return
        flag = torch.tensor(int(error is not None), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            return
        mine = None if error is None else (isinstance(error, NonFiniteError), type(error).__name__, str(error))
        everyone: list[tuple[bool, str, str] | None] = [None] * self._world
        dist.all_gather_object(everyone, mine)
        text = "; ".join(f"rank {r}: {e[1]}: {e[2]}" for r, e in enumerate(everyone) if e)
        if all(e[0] for e in everyone if e):
            raise error or RunFailed(text)
        # Somebody's error may pass: every rank leaves the same way, and Ray Train restarts them all.
        raise RuntimeError(text) from error
