"""Clips that are judged together, and the prompts the zoo's pipelines are judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError
from raydmd.zoo.world import Caption, MovingCaption

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one sampler made of a list of prompts.

    Attributes:
        name: a short key, unique in an evaluation. Names that start with ``undistilled`` are the
            teacher at few steps, which students are compared with.
        title: what a reader sees.
        clips: ``(N, F, 3, H, W)``, float in [0, 1]; ``F`` is 1 for images.
        prompts: ``N`` prompts, one per clip.
        evaluations: network evaluations per clip; a guided step counts two.
        seconds: wall time per clip, in seconds.

    Raises:
        InputError: if shapes, lengths or ranges do not fit.
        NonFiniteError: if a clip holds NaN or infinity; names the first.
    """

    name: str
    title: str
    clips: Tensor
    prompts: list[str]
    evaluations: int
    seconds: float

    def __post_init__(self) -> None:
        """Refuse what no metric can read."""
        what, clips = f"samples '{self.name}'", self.clips
        if clips.ndim != 5 or clips.shape[2] != 3 or not clips.is_floating_point():
            raise InputError(
                f"{what}: clips must be float of shape (N, F, 3, H, W), given {clips.dtype} {tuple(clips.shape)}"
            )
        if clips.numel() == 0:
            raise InputError(f"{what}: there are no clips")
        if len(self.prompts) != clips.shape[0]:
            raise InputError(f"{what}: {clips.shape[0]} clips but {len(self.prompts)} prompts")
        finite = torch.isfinite(clips.flatten(1)).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise NonFiniteError(f"{what}: clip {first} ({self.prompts[first]!r}) is not finite")
        low, high = float(clips.min()), float(clips.max())
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise InputError(f"{what}: clips must lie in [0, 1], given [{low:.4g}, {high:.4g}]")

    def __len__(self) -> int:
        """The number of clips."""
        return self.clips.shape[0]

    def take(self, rows: Sequence[int]) -> Samples:
        """The same sampler's clips and prompts at the given rows."""
        chosen = list(rows)
        return replace(self, clips=self.clips[chosen], prompts=[self.prompts[row] for row in chosen])


def groups(prompts: Sequence[str], *, least: int) -> list[list[int]]:
    """Indices of clips that share a prompt, for prompts with at least ``least`` clips.

    Args:
        prompts: one per clip.
        least: the smallest group that counts, in clips.
    """
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(index)
    return [members for members in found.values() if len(members) >= least]


def evaluation_prompts(count: int, seed: int, group: int = 8, *, language: type[Caption] = MovingCaption) -> list[str]:
    """Prompts for the zoo's world: single captions first, then repeats of open captions.

    Half of ``count`` are drawn as the training data has them. The other half are groups of
    ``group`` equal captions that leave at least one attribute open and differ from each other while
    there are new ones; the samplers' seeds come from the index. What does not fill a group is drawn
    singly.

    Args:
        count: number of prompts.
        seed: decides all of them.
        group: clips per repeated caption.
        language: the world's captions.

    Raises:
        InputError: if ``count`` is negative or ``group`` is less than 2.
    """
    if count < 0 or group < 2:
        raise InputError(f"count must be >= 0 and group >= 2, given count={count}, group={group}")
    repeated = count // 2 // group
    singles = language.draw(count - repeated * group, seed=seed)
    prompts = [caption.text for caption in singles]
    fresh = _open_captions(seed, language)
    for _ in range(repeated):
        prompts += [next(fresh)] * group
    return prompts


def _open_captions(seed: int, language: type[Caption]) -> Iterator[str]:
    # A stream of its own, so that the groups do not depend on how many singles there are.
    seen: set[str] = set()
    block = 0
    while True:
        drawn = language.draw(256, seed=seed + 7_919 * (block + 1))
        fresh = [c.text for c in dict.fromkeys(drawn) if c.open and c.text not in seen]
        if not fresh:  # the world has a few hundred open captions; start over when they run out
            seen.clear()
        for text in fresh:
            seen.add(text)
            yield text
        block += 1
