"""Sizes of samples: what a network can make, and what a run is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.models.base import Shape

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.recipe_data import Data

Latent = tuple[int, ...]
"""Shape of one latent, without the batch."""


def training_latents(family: Family, data: Data) -> dict[Latent, float]:
    """The latents that a run's updates are made of, with their weights.

    Args:
        family: the teacher's pipeline.
        data: the recipe's section; without sizes there is one, the family's own.

    Raises:
        InputError: naming the size that the family can't make, or why it can make no other than its own.
    """
    own = family.shape()
    if not data.sizes:
        return {own.latent: 1.0}
    if family.pictures:
        raise InputError(
            f"data.sizes does not fit {family.path!r}: the pictures of its prompts are encoded once, at the model's "
            "own size. Set data.sizes=[]"
        )
    found: dict[Latent, float] = {}
    for i, size in enumerate(data.sizes):
        key = f"data.sizes[{i}]"
        latent = family.sized(size.height, size.width, size.frames or own.frames, key=key).latent
        if latent in found:
            raise InputError(f"{key}: this size is there already; add its weight to that one's")
        found[latent] = size.weight
    if list(found) == [own.latent]:
        raise InputError("data.sizes has the model's own size alone, which is the default. Set data.sizes=[]")
    return found


def size_notes(family: Family, recipe: Recipe) -> list[str]:
    """That a run is not trained at the size it is evaluated at, if so."""
    own = family.shape()
    if own.latent in training_latents(family, recipe.data):
        return []
    clip = f"{own.frames} frames of " if own.frames > 1 else ""
    return [
        f"data.sizes does not have the model's own size, {clip}{own.width}x{own.height}: training is at the sizes of "
        "data.sizes alone, evaluation and 'raydmd sample' at the model's (model.width, model.height, model.frames)"
    ]


def image_shape(
    *,
    height: int | None,
    width: int | None,
    frames: int | None,
    key: str,
    path: str,
    scale: int,
    channels: int,
    cell: int,
    side: int,
    most: int | None = None,
    only: bool = False,
) -> Shape:
    """The shape of an image family's samples of one size.

    Args:
        height: pixels; default: ``side``.
        width: as ``height``.
        frames: one, if at all.
        key: of the recipe, which the size comes from; for messages.
        path: of the pipeline, for messages.
        scale: pixels to a latent, along a side.
        channels: of a latent.
        cell: latents along a side that the network takes as one.
        side: pixels along a side unless the recipe says otherwise.
        most: pixels along a side that the network can place, where that is limited.
        only: the network makes pictures of no other side.

    Raises:
        InputError: if the size does not fit.
    """
    if only and {height or side, width or side} != {side}:
        raise InputError(
            f"{key}.height={height}, {key}.width={width} do not fit {path!r}: its network makes pictures of "
            f"{side}x{side}"
        )
    if (frames or 1) != 1:
        raise InputError(f"{key}.frames={frames} does not fit {path!r}: it makes images, of one frame")
    height, width, multiple = height or side, width or side, scale * cell
    if height % multiple or width % multiple or (most and max(height, width) > most):
        raise InputError(
            f"{key}.height={height}, {key}.width={width} do not fit {path!r}: both must be multiples of "
            f"{multiple}" + (f", at most {most}" if most else "")
        )
    return Shape(latent=(channels, height // scale, width // scale), frames=1, height=height, width=width)
