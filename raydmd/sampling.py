"""Sampling as the stock pipeline does it: steps down a grid, deterministic or with fresh noise, optionally guided."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.guidance import Guidance
    from raydmd.models.base import Conditions, Experts


@torch.no_grad()
def sample(
    experts: Experts,
    noise: Tensor,
    cond: Conditions,
    uncond: Conditions,
    *,
    grid: Sequence[float],
    guidance: Guidance,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Walk from noise to a clean latent, or a part of that way.

    Args:
        experts: the network.
        noise: ``(B, *latent)``; a latent at the first time, if that is below 1.
        cond: B conditions.
        uncond: the negative prompt's condition, B times.
        grid: times, falling; from 1 to 0 for a whole sample.
        guidance: scale 1 runs the conditional half alone.
        fresh: noise to put on the predicted x0 before step ``i``, ``(B, *latent)``; ``None`` walks
            deterministically.

    Returns:
        Latents at the last time, shape of ``noise``.
    """
    x = experts.process.start(noise) if grid[0] == 1 else noise
    for i, (now, after) in enumerate(itertools.pairwise(grid), start=1):
        t, s = (torch.full((len(x),), v, device=x.device) for v in (now, after))
        x0 = experts.guided_x0(x, t, cond, uncond, guidance, as_stock=True)
        if fresh is None or after == 0:
            x = experts.process.step(x, x0, t, s)
        else:
            x = experts.process.add_noise(x0, fresh(i), s)
    return x
