"""Terms beside the score term: diversity anchor, mean-variance regulariser, paired regression."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def anchor_target(noise: Tensor, walked: Tensor, level: float) -> Tensor:
    """Where the straight line from the noise through the teacher's walked latent meets the clean end.

    DP-DMD, arXiv:2602.03139, eq. 6, for rectified flow: the target velocity is
    ``(noise - walked) / (1 - level)``, and at ``t = 1`` a velocity ``v`` is the clean prediction ``noise - v``.

    Args:
        noise: the start, ``(B, ...)``.
        walked: the teacher's latent at ``level``, shape of ``noise``.
        level: t after the teacher's K steps, below 1.

    Returns:
        The clean prediction that the student's first step should make, shape of ``noise``.
    """
    return noise - (noise - walked) / (1.0 - level)


def anchor_loss(first_x0: Tensor, target: Tensor) -> Tensor:
    """Mean square error of the first step, a scalar (DP-DMD, arXiv:2602.03139, eq. 7).

    At ``t = 1`` velocity and clean prediction differ by the noise and the sign alone, so the error is the same.
    """
    return F.mse_loss(first_x0, target.detach())


def moments_loss(x0: Tensor, *, mean: float, variance: float) -> Tensor:
    """KL of each sample's Gaussian fit to a given one: Decoupled DMD's mean-variance regulariser.

    arXiv:2511.22677, section 4.3: ``mean_i [(var_i + (mu_i - mu)^2) / var - 1 - log(var_i / var)] / 2``.

    Args:
        x0: clean samples ``(B, ...)``.
        mean: target mean over all of a sample's values.
        variance: target variance.

    Returns:
        A scalar, 0 where every sample has these moments.
    """
    flat = x0.flatten(1)
    mu, var = flat.mean(1), flat.var(1, correction=0).clamp(min=1e-12)
    return 0.5 * ((var + (mu - mean).square()) / variance - 1.0 - (var / variance).log()).mean()


def paired_l2(x: Tensor, target: Tensor) -> Tensor:
    """Mean square error of each sample to its pair, ``(B,)``: DMD's regression with L2 for LPIPS.

    arXiv:2311.18828, section 3.3, whose ablation has this loss; here it compares latents.

    Args:
        x: the student's clean samples, ``(B, ...)``.
        target: what the teacher walks to from the same noise, shape of ``x``.
    """
    return (x - target.detach()).square().flatten(1).mean(1)
