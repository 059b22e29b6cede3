"""DMD's paired regression: the student's sample is held to what the teacher makes of the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from raydmd.methods.weighing import Term
from raydmd.recipe_types import Balance, Ramp, value_at

if TYPE_CHECKING:
    from raydmd.draws import Draws
    from raydmd.models.base import Conditions

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of the student's clean latents to the teacher's, both ``(B, *latent)``: ``(B,)``, differentiable in the first."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A batch of noise-image pairs.

    Attributes:
        noise: where the teacher's walks began, ``(B, *latent)``.
        target: the clean latents they came to, ``(B, *latent)``.
        cond: conditions of their prompts.
        draws: for whatever else a rollout draws at random.
        indices: which pairs these are, length B.
    """

    noise: Tensor
    target: Tensor
    cond: Conditions
    draws: Draws
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RegressionTerm:
    """The paired regression (arXiv:2311.18828, section 3.3 and algorithm 1).

    Attributes:
        weight: lambda_reg.
    """

    weight: float | Ramp | Balance

    def active(self, progress: float) -> bool:
        """Whether it has any weight after a share ``progress`` of a phase."""
        return isinstance(self.weight, Balance) or value_at(self.weight, progress) > 0

    def term(self, x: Tensor, errors: Tensor) -> tuple[Term, Tensor]:
        """The term of samples ``(B, *latent)`` with errors ``(B,)``, and the errors again, detached."""
        return Term(loss=errors.mean(), at=x, weight=self.weight), errors.detach()
