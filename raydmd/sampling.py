"""Sampling as the stock pipeline does it: deterministic steps down a grid, optionally guided."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.guidance import Guidance
    from raydmd.models.base import Experts


@torch.no_grad()
def sample(
    experts: Experts,
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor,
    *,
    grid: Sequence[float],
    guidance: Guidance,
) -> Tensor:
    """Walk from noise to a clean latent.

    Args:
        experts: the network.
        noise: ``(B, *latent)``.
        cond: conditions ``(B, L, D)``.
        uncond: the negative prompt's condition, ``(B, L, D)``.
        grid: times from 1 down to and with 0.
        guidance: scale 1 runs the conditional half alone.

    Returns:
        Clean latents, shape of ``noise``.
    """
    x = noise
    for now, after in itertools.pairwise(grid):
        t, s = (torch.full((len(x),), v, device=x.device) for v in (now, after))
        x = experts.process.step(x, experts.guided_x0(x, t, cond, uncond, guidance), t, s)
    return x
