"""Adversarial losses on a discriminator's logits, and the R1 penalty on its gradient.

Non-saturating losses (Goodfellow et al., arXiv:1406.2661) as DMD2 has them (arXiv:2405.14867, section 4.3): a high
logit says real. Callers pass fp32 or fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``mean softplus(-real) + mean softplus(fake)``, a scalar; ``2 log 2`` where the logits say nothing.

    Args:
        real: logits of real samples, ``(B,)``.
        fake: logits of the student's samples, ``(B,)``.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``mean softplus(-fake)``, a scalar, of the logits ``(B,)`` of the student's samples."""
    return F.softplus(-fake).mean()


def exact_r1(logits: Tensor, x: Tensor) -> Tensor:
    """Half the mean squared norm of the logits' gradient at real samples (Mescheder et al., arXiv:1801.04406, eq. 9).

    Made by a backward pass that is itself differentiable, so every operation between ``x`` and the logits must know
    its second derivative.

    Args:
        logits: ``(B,)``; each depends on its own sample alone.
        x: the discriminator's input ``(B, ...)``, which asks for a gradient.

    Returns:
        A scalar with gradient to the discriminator's parameters.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def approximate_r1(logits: Tensor, moved: Tensor, *, sigma: float) -> Tensor:
    """:func:`exact_r1` from a finite difference along random noise, for large networks.

    Seaweed-APT's approximated R1 (Lin et al., arXiv:2501.08316): ``|D(x) - D(x + sigma n)|^2``, here over
    ``2 sigma^2``, so that its mean tends to the exact penalty as sigma tends to 0 and one weight means the same for
    both. That paper's weight ``lambda`` on the plain difference is a weight of ``2 lambda sigma^2`` here.

    Args:
        logits: of real samples ``x``, ``(B,)``.
        moved: of ``x + sigma n``, ``n`` standard normal, ``(B,)``.
        sigma: size of the step, in units of the latent.

    Returns:
        A scalar.
    """
    return 0.5 * ((moved - logits) / sigma).square().mean()
