"""Distribution matching: the gradient a student's sample gets from the real and the fake score.

All scores come as predictions of the clean latent, ``D``. Gradients are per sample, to be *descended*.
Nothing here is differentiated through: callers pass detached tensors and get a gradient, which
:func:`surrogate` turns into a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raydmd.process import Process, over


def raw_gradient(process: Process, x_t: Tensor, d_real: Tensor, d_fake: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """``alpha_{t|s} (score_fake(x_t) - score_real(x_t))``: descending it lowers ``KL(fake_t || real_t)``.

    Phased DMD, arXiv:2510.27684, eq. 10; for flow networks it is ``w_{t|s} (T - F)`` with
    ``w_{t|s} = alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2)``. At ``s = 0`` it is DMD's eq. 7
    (arXiv:2311.18828) without a weight. The kernel's ``alpha_{t|s}`` is ``dx_t/dx_s``, so the gradient is
    with respect to ``x_s``.

    Args:
        process: the noise process.
        x_t: where the scores were taken, ``(B, ...)``; shapes the broadcast only.
        d_real: the teacher's guided prediction at ``x_t``.
        d_fake: the fake score's prediction at ``x_t``.
        s: level of the student's sample, ``(B,)``.
        t: level of ``x_t``, ``(B,)``, above ``s``.

    Returns:
        The gradient with respect to ``x_s``, shape of ``x_t``.
    """
    return over(raw_scale(process, s, t), x_t) * (d_fake - d_real)


def raw_scale(process: Process, s: Tensor, t: Tensor) -> Tensor:
    """``alpha_{t|s} alpha_t / sigma_t^2``: from a difference of clean predictions to :func:`raw_gradient`, ``(B,)``."""
    alpha_ts, _ = process.kernel(s, t)
    return alpha_ts * process.alpha(t) / process.sigma(t).square()


def normalised_gradient(x0: Tensor, d_real: Tensor, d_fake: Tensor, *, floor: float) -> Tensor:
    """``(D_fake - D_real) / mean |x0 - D_real|``, the mean per sample over all but the batch.

    DMD, arXiv:2311.18828, eq. 8 and algorithm 2 (the authors' code leaves out ``alpha_t`` too); DMD2 uses
    the same. ``d_real`` is the guided prediction.

    Args:
        x0: the student's clean prediction, ``(B, ...)``.
        d_real: the teacher's guided prediction.
        d_fake: the fake score's prediction.
        floor: smallest divisor; at low noise the distance tends to zero.

    Returns:
        The gradient, shape of ``x0``.
    """
    return (d_fake - d_real) / over(distance(x0, d_real, floor=floor), x0)


def distance(x: Tensor, d_real: Tensor, *, floor: float) -> Tensor:
    """Mean absolute difference per sample, at least ``floor``, ``(B,)``."""
    return (x - d_real).abs().flatten(1).mean(1).clamp(min=floor)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``.

    Its value is half the gradient's mean square and says nothing about quality.
    """
    target = (x - gradient).detach()
    return 0.5 * torch.nn.functional.mse_loss(x, target)
