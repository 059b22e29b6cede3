"""Which samples a number that is not finite comes of: found out where it has been met, on all ranks alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from raydmd.errors import NonFiniteError
from raydmd.training.quarantine import SHOWN, Bad, Poisoned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from raydmd.training.stream import Batch

Everyone = Callable[[str], list[str]]
"""What each rank says, in order; called at the same places by all."""


def placed(error: Exception, batch: Batch, cycle: int, slot: str) -> Exception:
    """A frozen model's error that names samples of its request, by their positions in the stream.

    Args:
        error: of this rank's request; returned as it is if it names none.
        batch: that was asked about.
        cycle: in progress.
        slot: of the cycle.
    """
    if not isinstance(error, NonFiniteError) or not error.samples:
        return error
    return Poisoned(str(error), [_bad(batch, i, cycle, slot, str(error)) for i in error.samples])


def blame(
    error: NonFiniteError,
    batch: Batch,
    cycle: int,
    slot: str,
    *,
    loss: float,
    looked: Mapping[str, Tensor | None],
    everyone: Everyone,
) -> NonFiniteError:
    """The error of an update, by the samples that it comes of; all ranks call it, and get the same.

    Args:
        error: of the update, on all ranks.
        batch: this rank's share of it.
        cycle: in progress.
        slot: of the cycle.
        loss: on this rank.
        looked: by what they are, values ``(B, ...)`` that show whose fault it is.
        everyone: see :data:`Everyone`.

    Returns:
        A :class:`Poisoned` if any sample is found on any rank, else one that names the update's samples.
    """
    mine = [
        _bad(batch, i, cycle, slot, f"{name} is not finite")
        for name, values in looked.items()
        if values is not None
        for i in (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    ]
    said = {
        "loss": loss,
        "bad": [asdict(b) for b in mine],
        "samples": list(zip(batch.positions, batch.conditions, strict=True)),
    }
    ranks = [json.loads(text) for text in everyone(json.dumps(said))]
    samples = sorted({(position, row) for rank in ranks for position, row in rank["samples"]})
    found = [Bad(**b) for rank in ranks for b in rank["bad"]]
    for why in {bad.why for bad in found}:
        alike = [bad for bad in found if bad.why == why]
        if 1 < len(samples) == len({bad.position for bad in alike}):  # what all have is of none of them
            found = [bad for bad in found if bad.why != why]
    if found:
        return Poisoned(str(error), found)
    shown = ", ".join(f"{position} (prompt {row})" for position, row in samples[:SHOWN])
    more = f" and {len(samples) - SHOWN} more up to {samples[-1][0]}" if len(samples) > SHOWN else ""
    where = [str(rank) for rank, told in enumerate(ranks) if not math.isfinite(told["loss"])]
    whose = f"the loss is not finite on rank {', '.join(where)}" if where else "the loss is finite on every rank"
    return NonFiniteError(f"{error}. No sample alone is the cause ({whose}). The update's positions: {shown}{more}")


def _bad(batch: Batch, i: int, cycle: int, slot: str, why: str) -> Bad:
    position, seed = batch.positions[i], batch.draws.seed
    return Bad(position=position, seed=seed, prompt=batch.conditions[i], cycle=cycle, slot=slot, why=why)
