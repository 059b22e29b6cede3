"""Terms beside the score term, and how each is weighed: by a number, a schedule, or against the score's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.recipe_types import Balance, Ramp, value_at

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST = 1e4
"""Largest factor of a balanced term: what has all but vanished is noise, and not to be blown up to its full share."""

Mean = Callable[[Tensor], Tensor]
"""The mean of a scalar over all ranks; all call it at the same places."""


def alone(value: Tensor) -> Tensor:
    """The mean over a single rank."""
    return value


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss of the student beside the score term.

    Attributes:
        loss: unweighted, a scalar.
        at: the output of the student through which alone the loss reaches it, ``(B, ...)``.
        weight: a number, a schedule or a balance.
        reach: of the score's gradient where ``at`` is a clean prediction and the sample is not, see
            :class:`~raydmd.methods.rollout.Sample`: a balance compares the two on the prediction.
    """

    loss: Tensor
    at: Tensor
    weight: float | Ramp | Balance
    reach: float = 1.0

    def weighed(self, progress: float, score: Tensor, mean: Mean) -> Tensor:
        """The term as it enters the student's loss, a scalar.

        A balanced term is scaled in every update anew, from the gradients of that update over all ranks, as the
        adaptive weight of VQGAN is (Esser et al., arXiv:2012.09841, eq. 7), but at the student's output instead of in
        its last layer: no backward pass through the student is needed. Nothing is remembered, so a resumed run or
        another world size weighs alike. Where a term's gradient vanishes it stays zero, and one that has nearly
        vanished is raised by :data:`MOST` at most; where the score's vanishes, the term does too.

        Args:
            progress: share of the phase that is done.
            score: the score term's gradient as :func:`~raydmd.objectives.matching.surrogate` takes it, per sample.
            mean: over ranks.
        """
        if not isinstance(self.weight, Balance):
            return value_at(self.weight, progress) * self.loss
        (gradient,) = torch.autograd.grad(self.loss, self.at)
        wanted = value_at(self.weight.balance, progress) * self.reach * _strength(score, mean)
        found = _strength(gradient * gradient.numel(), mean)
        factor = torch.where(found > 0, (wanted / found).clamp(max=MOST), torch.zeros_like(found))
        linear = (factor * gradient * self.at).sum()
        return linear + (factor * self.loss - linear).detach()


def total(loss: Tensor, terms: Iterable[Term], progress: float, score: Tensor, mean: Mean) -> Tensor:
    """The score term's loss and all others; see :meth:`Term.weighed`."""
    for term in terms:
        loss = loss + term.weighed(progress, score, mean)
    return loss


def _strength(gradient: Tensor, mean: Mean) -> Tensor:
    """Root mean square over all values of all ranks, a scalar; per-sample gradients, so batches may differ in size."""
    return mean(gradient.detach().square().mean()).sqrt()
