"""The fake score's regression when its samples are known only at a level ``s``, not clean.

Phased DMD, arXiv:2510.27684, eqs. 11-13. A sample ``x_s`` is carried on to ``t`` with fresh noise; the
targets below have the full-interval target as their conditional mean given ``x_t``, so that the fake
score and the teacher stay comparable. All three kinds are one identity: with
``eps = (sigma_t / sigma_{t|s}) noise`` they are what ``x_t`` and that ``eps`` imply. At ``s = 0`` they are
the ordinary targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raydmd.process import Prediction, Process, over


def subinterval_target(process: Process, kind: Prediction, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """What a fake score of the given kind regresses to at ``x_t = alpha_{t|s} x_s + sigma_{t|s} noise``.

    Args:
        process: the noise process.
        kind: what the network predicts.
        x_s: the student's samples ``(B, ...)`` at level ``s``, detached.
        noise: the fresh noise of the kernel, shape of ``x_s``.
        s: level of the samples ``(B,)``.
        t: level of the regression ``(B,)``, above ``s``.

    Returns:
        The target, shape of ``x_s``.
    """
    _, sigma_ts = process.kernel(s, t)
    alpha_s, sigma_s, alpha_t, sigma_t = (
        over(v, x_s) for v in (process.alpha(s), process.sigma(s), process.alpha(t), process.sigma(t))
    )
    sigma_ts = over(sigma_ts, x_s)
    epsilon = sigma_t / sigma_ts * noise
    # eq. 12, which needs no division by alpha_t and so holds at pure noise too
    x0 = x_s / alpha_s - alpha_t * sigma_s.square() / (alpha_s.square() * sigma_ts) * noise
    if kind == "x0":
        return x0
    if kind == "epsilon":
        return epsilon
    if kind == "flow":
        return epsilon - x0
    v = alpha_t * epsilon - sigma_t * x0
    return -v / (alpha_t.square() + sigma_t.square()).sqrt() if kind == "edm" else v


def subinterval_weight(process: Process, s: Tensor, t: Tensor, *, cap: float) -> Tensor:
    """Weight of the squared error to :func:`subinterval_target`: ``min(1, cap sigma_{t|s}^2)``, shape of ``t``.

    Equal to eq. 13's ``clamp(1 / sigma_{t|s}^2, 0, cap)`` on the error scaled by ``sigma_{t|s}``; it tames
    the target's variance near ``t = s``. Where ``s = 0`` the target is the ordinary one, nothing needs
    taming, and the weight is 1, so that the last phase is plain flow matching.
    """
    _, sigma_ts = process.kernel(s, t)
    weight = (cap * sigma_ts.square()).clamp(max=1.0)
    return torch.where(process.sigma(s) > 0, weight, torch.ones_like(weight))


def regression(output: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean square error.

    Args:
        output: the network's prediction ``(B, ...)``.
        target: shape of ``output``.
        weight: per sample, ``(B,)``.

    Returns:
        The loss, and the unweighted error per sample ``(B,)``, detached.
    """
    error = (output - target).square().flatten(1).mean(1)
    return (weight * error).mean(), error.detach()
