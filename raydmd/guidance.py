"""Classifier-free guidance with its convention in the type.

One convention everywhere: ``uncond + scale * (cond - uncond)``; scale 1 is conditional, 0 unconditional.
Code bases that write ``cond + w (cond - uncond)`` mean ``scale = w + 1``: use :meth:`Guidance.from_extra`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How strongly a prompt is followed: ``uncond + scale * (cond - uncond)``."""

    scale: float = 1.0

    @classmethod
    def from_extra(cls, w: float) -> Guidance:
        """From the other convention, ``cond + w (cond - uncond)``."""
        return cls(scale=w + 1.0)

    @property
    def active(self) -> bool:
        """Whether the unconditional prediction is needed at all."""
        return self.scale != 1.0

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Guided prediction; linear, so it commutes with every conversion between predictions."""
        return uncond + self.scale * (cond - uncond)
