"""Decoupled DMD's split of the guided gradient, and AMD's weights on its halves.

Decoupled DMD, arXiv:2511.22677, eqs. 5-8: with ``D_w = D_u + w (D_c - D_u)`` the guided difference is
``D_w - D_fake = (D_c - D_fake) + (w - 1)(D_c - D_u)``: distribution matching (DM) and guidance augmentation
(CA). Gradients are per sample, to be descended, as in :mod:`raydmd.objectives.matching`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.process import over

if TYPE_CHECKING:
    from torch import Tensor


def matching_direction(d_cond: Tensor, d_fake: Tensor) -> Tensor:
    """DM: ``D_fake - D_c``, shape of ``d_cond``."""
    return d_fake - d_cond


def augmentation_direction(d_cond: Tensor, d_uncond: Tensor, *, scale: float) -> Tensor:
    """CA: ``-(w - 1)(D_c - D_u)`` for guidance scale ``w``, shape of ``d_cond``."""
    return (scale - 1.0) * (d_uncond - d_cond)


def advantage(rewards: Tensor, *, group: int, clip: float, epsilon: float) -> Tensor:
    """Rewards against their group's mean, in its standard deviations, clipped (AMD, arXiv:2602.07345, eq. 12).

    The group is the samples of one prompt and the bound is a setting: both are this project's reading.

    Args:
        rewards: ``(B,)``, samples of a group side by side; ``B`` a multiple of ``group``.
        group: samples per prompt, at least 2.
        clip: bound on the result.
        epsilon: added to the standard deviation.

    Returns:
        The advantage, ``(B,)``, in [-clip, clip].

    Raises:
        ValueError: if a group has one sample, or the batch is no whole number of groups.
    """
    if group < 2:
        raise ValueError(f"a group of {group} sample(s) has nothing to compare a reward with")
    if len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards are no whole number of groups of {group}")
    rows = rewards.view(-1, group)
    centred = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=0, keepdim=True)
    return (centred / (spread + epsilon)).clamp(-clip, clip).flatten()


def adapted_weights(a: Tensor, *, strength: float, clip: float) -> tuple[Tensor, Tensor]:
    """AMD's per-sample weights on DM and CA (arXiv:2602.07345, eqs. 10, 13).

    A low reward strengthens DM and weakens CA, a high one the reverse, within ``1 - s .. 1 + s``. The linear form
    is this project's reading; the extremes are the paper's.

    Args:
        a: the advantage, ``(B,)``.
        strength: s.
        clip: the advantage's bound.

    Returns:
        Weights of DM (beta) and of CA (alpha), each ``(B,)``.
    """
    moved = strength * a / clip
    return 1.0 - moved, 1.0 + moved


def sharpening_weights(a: Tensor, *, group: int, strength: float, clip: float) -> Tensor:
    """Weights of the fake score's loss per sample, mean 1 in each group: more for samples with a low reward.

    AMD's repulsive landscape sharpening (arXiv:2602.07345, section 3.3); its formula is unknown to us, and
    ``1 - s a`` over its mean is this project's reading; the mean is a group's, so that the weights do not depend
    on how a batch is spread over workers. Strength 0 is the ordinary loss.
    """
    weights = (1.0 - strength * a / clip).view(-1, group)
    return (weights / weights.mean(1, keepdim=True).clamp(min=1e-6)).flatten()


def per_sample(weights: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with each sample's weight on it, shape of ``gradient``."""
    return over(weights, gradient) * gradient
