"""A reward for class-conditional models: does a picture show its class?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageClassification

from raydmd.errors import InputError
from raydmd.rewards.base import Reward
from raydmd.rewards.loading import read_model
from raydmd.rewards.pictures import Preprocess, pick_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ClassReward(Reward):
    """Log-probability that an image classifier gives to the class that is the prompt, in nats; 0 is the highest.

    Args:
        model: of transformers' image classifiers, whose classes are numbered as the prompts are; moved to ``device``.
        preprocess: its picture settings.
        frames: pictures taken of each clip, evenly spaced; the reward is their mean.
        device: where it runs.
    """

    name = "class"

    def __init__(self, model: Any, preprocess: Preprocess, *, frames: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._model = model.to(self._device)
        self._preprocess, self._frames = preprocess, frames

    @classmethod
    def load(cls, path: str, *, frames: int, device: torch.device | str = "cpu") -> ClassReward:
        """Read a folder or hub id.

        Raises:
            InputError: if it is missing, holds no image classifier, or lacks weights or picture settings.
        """
        model = read_model(AutoModelForImageClassification, path)
        return cls(model, Preprocess.read(path), frames=frames, device=device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pictures; see :meth:`Reward.__call__`.

        Raises:
            InputError: if a prompt is no number of a class.
        """
        count = self._model.config.num_labels
        wrong = [text for text in prompts if not text.strip().isdecimal() or int(text) >= count]
        if wrong:
            raise InputError(f"the reward {self.name!r} reads numbers of classes, 0 to {count - 1}, given {wrong[0]!r}")
        frames = pick_frames(pixels.to(self._device), self._frames)
        logs = self._model(pixel_values=self._preprocess(frames.flatten(0, 1))).logits.float().log_softmax(1)
        wanted = torch.tensor([int(text) for text in prompts], device=self._device)
        logs = logs.view(*frames.shape[:2], -1).mean(1)
        values: Tensor = logs.gather(1, wanted[:, None])[:, 0]
        return values
