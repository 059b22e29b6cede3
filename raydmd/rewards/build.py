"""From settings to a reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.rewards.compose import Part, WeightedSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from raydmd import recipe_method as recipes
    from raydmd.rewards.base import Reward

FRAMES = 4
PATHS = {"clip": "openai/clip-vit-large-patch14", "pick": "yuvalkirstain/PickScore_v1"}
"""Hub ids where the kind has one in transformers' format."""
PROCESSORS = {"pick": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Where PickScore's card takes tokenizer and picture settings."""


def build(
    specs: Sequence[recipes.Reward], *, judge: Path | None = None, device: torch.device | str = "cpu"
) -> WeightedSum:
    """Load what the settings name.

    Args:
        specs: at least one.
        judge: the model's own judge for rewards, for a zoo reward without a path.
        device: where all of them run.

    Returns:
        Their sum; that of a single one with the default weight, mean and scale has its name and its values.

    Raises:
        InputError: if there is no spec, or a file or folder is missing or of the wrong class.
    """
    return WeightedSum(
        [
            Part(reward=load(spec, judge=judge, device=device), weight=spec.weight, mean=spec.mean, scale=spec.scale)
            for spec in specs
        ]
    )


def load(spec: recipes.Reward, *, judge: Path | None = None, device: torch.device | str = "cpu") -> Reward:
    """Load one reward, without its weight.

    Args:
        spec: which.
        judge: see :func:`build`.
        device: where it runs.

    Returns:
        The reward.

    Raises:
        InputError: if a file or folder is missing or of the wrong class.
    """
    # Heavy imports, each where it is used: clip and heads bring in transformers.
    frames = FRAMES if spec.frames is None else spec.frames
    if spec.kind == "zoo":
        from raydmd.rewards.classifier import ClassifierReward

        file = Path(spec.path) if spec.path else judge
        if file is None:
            raise InputError("a reward of kind zoo needs a judge: the model has none, so give its file as path")
        return ClassifierReward.load(file, device=device)
    if spec.kind == "class":
        from raydmd.rewards.classes import ClassReward

        if not spec.path and judge is None:
            raise InputError("a reward of kind class needs an image classifier: the model has none, so give its path")
        return ClassReward.load(spec.path or str(judge), frames=frames, device=device)
    path = spec.path or PATHS[spec.kind]
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
