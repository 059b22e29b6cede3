"""Several rewards as one."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.rewards.base import Reward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """One term of a sum: ``weight * (reward - mean) / scale``.

    Mean and scale are fixed settings, not measured as it runs: a reward must not depend on its batch.

    Attributes:
        reward: what is summed.
        weight: not 0; negative punishes.
        mean: of the reward, in its own units.
        scale: in its own units, above 0.
    """

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that would do nothing or make no number."""
        if not (isfinite(self.weight) and isfinite(self.mean) and isfinite(self.scale)):
            raise InputError(f"weight, mean and scale must be finite, given {self.name}")
        if self.weight == 0:
            raise InputError(f"reward {self.reward.name!r} has weight 0: leave it out")
        if self.scale <= 0:
            raise InputError(f"the scale of reward {self.reward.name!r} must be positive, given {self.scale}")

    @property
    def name(self) -> str:
        """E.g. ``zoo``, ``0.5*pick`` or ``0.5*(pick-21)/2``."""
        inner = self.reward.name
        if self.mean:
            inner = f"({inner}{-self.mean:+g})"
        if self.scale != 1:
            inner = f"{inner}/{self.scale:g}"
        return inner if self.weight == 1 else f"{self.weight:g}*{inner}"


class WeightedSum(Reward):
    """Sum of standardised rewards.

    Args:
        parts: at least one; all on one device.

    Raises:
        InputError: if there is no part.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise InputError("a sum of rewards needs at least one")
        self._parts = tuple(parts)
        self.name = " + ".join(part.name for part in parts)

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate a batch; see :meth:`Reward.__call__`. Messages count samples from 0.

        Raises:
            RewardError: if a part answers with the wrong shape.
            NonFiniteError: if a part's value is not finite.
        """
        return self.score(pixels, prompts, range(len(prompts)))

    def score(self, pixels: Tensor, prompts: Sequence[str], ids: Sequence[int | str]) -> Tensor:
        """Rate a batch part by part; see :meth:`Reward.score`. Messages name the part at fault.

        Raises:
            InputError: if pixels, prompts and ids do not belong together.
            RewardError: if a part answers with the wrong shape.
            NonFiniteError: if a part's value, or their sum, is not finite.
        """
        terms = [
            part.weight * (part.reward.score(pixels, prompts, ids) - part.mean) / part.scale for part in self._parts
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        self._refuse_non_finite(total, pixels, prompts, ids)
        return total
