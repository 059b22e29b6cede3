"""A run's noise-image pairs: checked before the start, opened by every worker, compared as the recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from raydmd.errors import InputError
from raydmd.models.base import Conditions
from raydmd.objectives.auxiliary import paired_l2
from raydmd.pairs.manifest import read_prompts
from raydmd.pairs.origin import batch_of, check, folder_of
from raydmd.pairs.store import PairStore
from raydmd.pairs.stream import PairStream, no_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from raydmd.methods.regression import Distance
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.recipe_regression import Regression
    from raydmd.training.session import Session

LEAST_SIDE = {"lpips": 16, "ssim": 11}
"""Pixels below which a picture distance is not defined."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What a worker needs for the regression.

    Attributes:
        store: the pairs.
        conditions: of their prompts.
        distance: of the student's samples to them.
        resample: share of them that is drawn by error.
        errors: running errors ``(pairs,)``, the same on all ranks.
    """

    store: PairStore
    conditions: Conditions
    distance: Distance
    resample: float
    errors: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of them; loaded in place."""
        return {"pairs.errors": self.errors} if self.resample else {}

    def stream(self, recipe: Recipe, session: Session, attempt: int) -> PairStream:
        """The pairs of each update of a run, after ``attempt`` rollbacks."""
        return PairStream(
            self.store,
            self.conditions,
            seed=recipe.seed + (attempt << 32),
            batch=batch_of(recipe),
            rank=session.rank,
            world=session.world,
            resample=self.resample,
            errors=self.errors,
            device=session.device,
        )


def check_pairs(recipe: Recipe, family: Family) -> list[str] | None:
    """See that a run's pairs are there, whole and its teacher's, and that they can be compared.

    Returns:
        The pairs' prompts; ``None`` if the method has no regression.

    Raises:
        InputError: if not; says what to do.
    """
    settings = recipe.method.regression
    if settings is None:
        return None
    store = PairStore.open(folder_of(recipe), verify=settings.verify)
    check(store, recipe, family)
    prompts = read_prompts(store.folder, store.manifest.origin)
    shape = family.shape()
    side = _enlarged(shape.height, shape.width, settings.side if settings.loss == "lpips" else None)
    if min(side) < LEAST_SIDE.get(settings.loss, 0):
        raise InputError(
            f"method.regression.loss={settings.loss} needs frames of at least {LEAST_SIDE[settings.loss]} pixels a "
            f"side, the model's have {shape.height} x {shape.width}; use loss=l2"
        )
    if settings.loss == "lpips":
        from raydmd.evaluation.perceptual import load_lpips

        try:
            load_lpips("vgg", weights=settings.weights)
        except InputError as error:
            raise InputError(
                f"method.regression.loss=lpips: {error} as method.regression.weights. "
                "loss=l2 and loss=ssim need no weights"
            ) from None
    return prompts


def open_pairs(recipe: Recipe, family: Family, conditions: Path, device: torch.device) -> Pairing | None:
    """Open a run's pairs in a worker.

    Args:
        recipe: the run.
        family: decodes where pictures are compared.
        conditions: the file of the pairs' encoded prompts.
        device: where the comparison runs.

    Returns:
        ``None`` if the method has no regression.

    Raises:
        InputError: if this node does not see the pairs, or LPIPS' weights.
    """
    settings = recipe.method.regression
    if settings is None:
        return None
    store = PairStore.open(folder_of(recipe))
    return Pairing(
        store=store,
        conditions=Conditions.read(conditions),
        distance=distance_of(settings, family.render, device),
        resample=settings.resample,
        errors=no_errors(len(store)),
    )


def distance_of(settings: Regression, render: Callable[[Tensor], Tensor], device: torch.device) -> Distance:
    """How far the student's latents are from the teacher's.

    Pictures are not clamped before they are compared, so that a pixel which overshoots is drawn back.

    Args:
        settings: the recipe's ``method.regression`` section.
        render: pixels ``(B, frames, 3, H, W)`` from latents, differentiable.
        device: where the comparison runs.

    Returns:
        A function of two batches of latents; means over a clip's frames.

    Raises:
        InputError: if LPIPS' weights are absent.
    """
    if settings.loss == "l2":
        return paired_l2
    from raydmd.evaluation.perceptual import load_lpips, ssim  # l2 does without torchmetrics

    lpips = load_lpips("vgg", weights=settings.weights).to(device) if settings.loss == "lpips" else None

    def pictures(latents: Tensor) -> Tensor:
        clips = render(latents)
        if settings.frames is not None:
            last = clips.shape[1] - 1
            kept = torch.linspace(0, last, min(settings.frames, last + 1)).round().long()
            clips = clips[:, kept.to(clips.device)]
        frames = clips.flatten(0, 1)
        height, width = frames.shape[-2:]
        size = _enlarged(height, width, settings.side if lpips else None)
        if size == (height, width):
            return frames
        return F.interpolate(frames, size=size, mode="bilinear", align_corners=False)

    def distance(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = pictures(target)
        ours = pictures(x)
        each = lpips(ours, theirs) if lpips else 1 - ssim(ours, theirs)
        return each.view(len(x), -1).mean(1)

    return distance


def _enlarged(height: int, width: int, side: int | None) -> tuple[int, int]:
    """The size of frames whose shorter side has at least ``side`` pixels, in the same proportion."""
    factor = max(1.0, side / min(height, width)) if side else 1.0
    return round(height * factor), round(width * factor)
