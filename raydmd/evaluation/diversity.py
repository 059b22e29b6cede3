"""How samples of one prompt differ across seeds, as the papers define it; pure functions.

DP-DMD (arXiv:2602.03139) reports ``1 - mean pairwise cosine`` over 9 seeds, higher is more diverse;
Phased DMD (arXiv:2510.27684) the mean pairwise cosine over 8 seeds of 21 prompts, lower is more
diverse, and the mean pairwise LPIPS. All are averaged within a prompt, then over prompts. Values
depend on network, resolution and residual noise: compare teacher and students in one stack only, and
read them beside accuracy and mode coverage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from raydmd.errors import InputError
from raydmd.evaluation.samples import groups

if TYPE_CHECKING:
    from collections.abc import Sequence

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images ``(B, 3, H, W)`` in [0, 1] to distances ``(B,)``."""


def cosine_by_prompt(features: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean pairwise cosine of each prompt's samples.

    Args:
        features: ``(N, D)``; rows are normalised here.
        prompts: ``N`` prompts.

    Returns:
        Prompts that occur at least twice, each with a figure in [-1, 1]; 1 is a collapse.

    Raises:
        InputError: if features and prompts differ in number.
    """
    if features.ndim != 2 or len(features) != len(prompts):
        raise InputError(f"features must be (N, D) for N prompts, given {tuple(features.shape)} and {len(prompts)}")
    unit = F.normalize(features.double(), dim=1)
    found = {}
    for group in groups(prompts, least=2):
        count = len(group)
        cosines = unit[group] @ unit[group].T
        off_diagonal = float(cosines.sum()) - float(cosines.trace())
        found[prompts[group[0]]] = off_diagonal / (count * (count - 1))
    return found


def pairwise_cosine(features: Tensor, prompts: Sequence[str]) -> float | None:
    """How alike samples of one prompt are: the mean of :func:`cosine_by_prompt` (Phased DMD).

    Args:
        features: ``(N, D)``.
        prompts: ``N`` prompts.

    Returns:
        A figure in [-1, 1], lower is more diverse; ``None`` if no prompt occurs twice.

    Raises:
        InputError: if features and prompts differ in number.
    """
    found = cosine_by_prompt(features, prompts)
    return fmean(found.values()) if found else None


def pairwise_diversity(features: Tensor, prompts: Sequence[str]) -> float | None:
    """How samples of one prompt differ: 1 - :func:`pairwise_cosine` (DP-DMD).

    Args:
        features: ``(N, D)``.
        prompts: ``N`` prompts.

    Returns:
        A figure in [0, 2], 0 for identical samples; ``None`` if no prompt occurs twice.

    Raises:
        InputError: if features and prompts differ in number.
    """
    found = cosine_by_prompt(features, prompts)
    # Rounding leaves identical samples a hair below 0.
    return fmean(max(0.0, 1 - cosine) for cosine in found.values()) if found else None


def distance_diversity(
    clips: Tensor, prompts: Sequence[str], distance: Distance, *, pairs_at_once: int = 8
) -> float | None:
    """Mean pairwise distance of samples within a prompt; with LPIPS it is Phased DMD's and DMD2's diversity.

    Videos are compared frame by frame at equal times; that is this project's reading, the papers
    report images.

    Args:
        clips: ``(N, F, 3, H, W)`` in [0, 1].
        prompts: ``N`` prompts.
        distance: between images, such as :class:`~raydmd.evaluation.perceptual.Lpips`.
        pairs_at_once: pairs of clips per call of ``distance``.

    Returns:
        Higher is more diverse, 0 for identical samples; ``None`` if no prompt occurs twice.

    Raises:
        InputError: if clips and prompts differ in number.
    """
    if clips.ndim != 5 or len(clips) != len(prompts):
        raise InputError(f"clips must be (N, F, 3, H, W) for N prompts, given {tuple(clips.shape)} and {len(prompts)}")
    means = []
    for group in groups(prompts, least=2):
        pairs = torch.tensor(list(itertools.combinations(group, 2)))
        with torch.no_grad():
            found = [
                distance(clips[part[:, 0]].flatten(0, 1), clips[part[:, 1]].flatten(0, 1)).double().cpu()
                for part in torch.split(pairs, pairs_at_once)
            ]
        means.append(float(torch.cat(found).mean()))
    return fmean(means) if means else None
