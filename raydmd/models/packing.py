"""Latents as tokens: 2x2 cells of a picture side by side, as Qwen-Image and FLUX read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

CELL = 2
"""Latents along a side of a token."""


def pack(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, H W / 4, 4 C)``."""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // CELL, CELL, w // CELL, CELL).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // CELL) * (w // CELL), c * CELL * CELL)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`pack`, with the shape of ``like``."""
    b, c, h, w = like.shape
    cells = tokens.reshape(b, h // CELL, w // CELL, c, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, c, h, w)


def drawn_packed(latent: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise ``(1, *latent)`` as a scheduler draws it that sees tokens: its numbers lie in their order."""
    like = torch.empty(1, *latent)
    return unpack(torch.randn(pack(like).shape, generator=generator), like)
