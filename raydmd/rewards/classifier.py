"""The zoo's reward: does the clip or picture show what its prompt states?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError
from raydmd.rewards.base import Reward
from raydmd.zoo.judge import AttributeJudge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from raydmd.zoo.world import Caption


class ClassifierReward(Reward):
    """Mean log-probability that a judge gives to the attributes the prompt states.

    Attributes the prompt leaves open do not count, so the reward asks nothing of diversity. A fully
    open prompt scores 0. In nats; 0 is the highest value there is.

    Args:
        judge: knows the zoo's world; moved to ``device``.
        device: where it runs.
    """

    name = "zoo"

    def __init__(self, judge: AttributeJudge, *, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._judge = judge.to(self._device).eval()

    @classmethod
    def load(cls, path: Path, *, device: torch.device | str = "cpu") -> ClassifierReward:
        """Read the judge from its file.

        Raises:
            InputError: if the file is missing or holds no judge.
        """
        return cls(AttributeJudge.load(path), device=device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate clips of the zoo's world; see :meth:`Reward.__call__`.

        Raises:
            InputError: if a prompt is none of the zoo's captions, or the clips are not ``(B, F, 3, 32, 32)`` with
                the world's number of frames.
        """
        stated = [_stated(prompt, self._judge.language) for prompt in prompts]
        logits = self._judge(pixels.to(self._device, torch.float32))
        logs = {name: values.log_softmax(1) for name, values in logits.items()}
        zero = torch.zeros((), device=self._device)
        return torch.stack(
            [
                torch.stack([logs[name][row, value] for name, value in indices.items()]).mean() if indices else zero
                for row, indices in enumerate(stated)
            ]
        )


def _stated(prompt: str, language: type[Caption]) -> dict[str, int]:
    try:
        caption = language.parse(prompt)
    except ValueError as error:
        raise InputError(f"the zoo's reward reads the zoo's captions only: {error}") from None
    return {name: language.attributes[name].index(value) for name, value in caption.stated.items()}
