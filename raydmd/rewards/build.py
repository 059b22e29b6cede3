"""From settings to a reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from raydmd.recipe import Count, Positive, Section, Word
from raydmd.rewards.compose import Part, WeightedSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from raydmd.rewards.base import Reward

Finite = Annotated[float, Field(allow_inf_nan=False)]

FRAMES = 4
PATHS = {"clip": "openai/clip-vit-large-patch14", "pick": "yuvalkirstain/PickScore_v1"}
"""Hub ids where the kind has one in transformers' format."""
PROCESSORS = {"pick": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Where PickScore's card takes tokenizer and picture settings."""


class RewardSpec(Section):
    """One reward, and its part in the sum: ``weight * (reward - mean) / scale``."""

    kind: Literal["zoo", "clip", "pick", "hps", "image_reward"]
    path: Word | None = None
    """The judge's file (zoo), a folder or hub id (clip, pick, hps), a folder (image_reward); clip and pick
    have a default."""
    processor: Word | None = None
    """Folder or hub id of tokenizer and picture settings, where they aren't beside the model (clip, pick, hps)."""
    weight: Finite = 1.0
    mean: Finite = 0.0
    scale: Positive = 1.0
    frames: Count | None = None
    """Frames of each clip that are scored, evenly spaced; default 4. The zoo's judge reads whole clips."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        if self.path is None and self.kind not in PATHS:
            raise ValueError(f"a reward of kind {self.kind} needs a path")
        if self.kind == "zoo" and self.frames is not None:
            raise ValueError("frames does nothing with kind zoo, whose judge reads whole clips; leave it out")
        if self.kind in ("zoo", "image_reward") and self.processor is not None:
            raise ValueError(f"processor does nothing with kind {self.kind}; leave it out")
        if self.weight == 0:
            raise ValueError("a reward of weight 0 does nothing; leave it out")
        return self


def build(specs: Sequence[RewardSpec], *, device: torch.device | str = "cpu") -> WeightedSum:
    """Load what the settings name.

    Args:
        specs: at least one.
        device: where all of them run.

    Returns:
        Their sum; that of a single one with the default weight, mean and scale has its name and its values.

    Raises:
        InputError: if there is no spec, or a file or folder is missing or of the wrong class.
    """
    return WeightedSum(
        [Part(reward=load(spec, device=device), weight=spec.weight, mean=spec.mean, scale=spec.scale) for spec in specs]
    )


def load(spec: RewardSpec, *, device: torch.device | str = "cpu") -> Reward:
    """Load one reward, without its weight.

    Args:
        spec: which.
        device: where it runs.

    Returns:
        The reward.

    Raises:
        InputError: if a file or folder is missing or of the wrong class.
    """
    # Heavy imports, each where it is used: clip and heads bring in transformers.
    path = spec.path or PATHS[spec.kind]
    frames = FRAMES if spec.frames is None else spec.frames
    if spec.kind == "zoo":
        from raydmd.rewards.classifier import ClassifierReward

        return ClassifierReward.load(Path(path), device=device)
    from raydmd.rewards.clip import ClipEncoder, ClipScore, PickScore
    from raydmd.rewards.heads import HpsScore, ImageReward

    if spec.kind == "image_reward":
        return ImageReward.load(path, frames=frames, device=device)
    processor = spec.processor or (PROCESSORS.get(spec.kind) if spec.path is None else None)
    encoder = ClipEncoder.load(path, processor=processor, frames=frames, device=device)
    match spec.kind:
        case "clip":
            return ClipScore(encoder)
        case "pick":
            return PickScore(encoder)
        case "hps":
            return HpsScore(encoder)
