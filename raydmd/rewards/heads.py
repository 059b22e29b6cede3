"""Rewards with a checkpoint format of their own, converted once: HPSv2 and ImageReward.

How a checkpoint is converted is told in :mod:`raydmd.rewards.convert`. Neither the checkpoints nor
their code could be had here; what is marked "from memory" was not compared with them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel

from raydmd.errors import InputError
from raydmd.rewards.base import Reward
from raydmd.rewards.loading import BROKEN, check_kind, read_tokenizer
from raydmd.rewards.pictures import Preprocess, pick_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from raydmd.rewards.clip import ClipEncoder

WIDTHS = (1024, 128, 64, 16, 1)
"""ImageReward's MLP, from the text encoder's 768 on."""
MEAN, STD = 0.16717, 1.03383
"""Of ImageReward's raw values on its training data, from memory; the last two digits of STD are in
doubt (1.03334 is remembered too). An error here rescales all values alike by 0.05 %."""
TEXT_LENGTH = 35
"""Tokens ImageReward reads of a prompt, from memory."""


class HpsScore(Reward):
    """HPSv2 (Wu et al., arXiv:2306.09341): ``logit_scale * cos`` of a fine-tuned CLIP ViT-H.

    Tables print ``100 * cos``. From memory, the published script gives the plain cosine; as CLIP-H's
    logit_scale is 100 or close to it, values here are on the tables' scale (about 20 to 33).
    Pictures that aren't square: the folder's picture settings decide between cropping and padding, and
    only cropping is supported; which of them the published script does could not be confirmed.

    Args:
        encoder: read from a folder that :func:`raydmd.rewards.convert.clip_from_open_clip` filled.
    """

    name = "hps"

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate clips; see :meth:`Reward.__call__`."""
        return self._encoder.logit_scale * self._encoder.cosines(pixels, prompts).mean(1)


class ImageRewardNet(nn.Module):
    """BLIP's image encoder, its text encoder that attends to the image, and an MLP on the first token.

    The MLP has no activation between its layers, from memory of the published code, where they are
    commented out; its dropouts do nothing at evaluation and are left out.

    Args:
        config: sizes of both encoders.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        widths = (config.text_config.hidden_size, *WIDTHS)
        self.head = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])

    def forward(self, pictures: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raw values.

        Args:
            pictures: ``(N, 3, h, w)``, normalised.
            tokens: ids ``(N, L)``.
            mask: ``(N, L)``, 1 where a token counts.

        Returns:
            ``(N,)``.
        """
        seen = self.vision_model(pixel_values=pictures).last_hidden_state
        read = self.text_encoder(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        values: Tensor = self.head(read.last_hidden_state[:, 0])
        return values.squeeze(1)


class ImageReward(Reward):
    """ImageReward (Xu et al., arXiv:2304.05977): standardised values, good pictures are above 0.

    Args:
        net: moved to ``device``.
        tokenizer: of bert-base-uncased.
        preprocess: picture settings; ImageReward's own are a shorter edge and crop of 224, from memory.
        frames: pictures taken of each clip, evenly spaced; the reward is their mean.
        device: where it runs.
    """

    name = "image_reward"

    def __init__(
        self,
        net: ImageRewardNet,
        tokenizer: Any,
        preprocess: Preprocess,
        *,
        frames: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._net = net.to(self._device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._frames = frames

    @classmethod
    def load(cls, path: str, *, frames: int, device: torch.device | str = "cpu") -> ImageReward:
        """Read a folder as :func:`raydmd.rewards.convert.image_reward_from_original` describes it.

        Raises:
            InputError: if the folder is missing, holds another class of model, or lacks a weight, the
                tokenizer or the picture settings.
        """
        if not Path(path).is_dir():
            raise InputError(f"there is no folder {path!r}; ImageReward's checkpoint must be converted into one")
        check_kind(path, "blip")
        tokenizer, preprocess = read_tokenizer(path), Preprocess.read(path)
        try:
            net = ImageRewardNet(BlipConfig.from_pretrained(path))
            net.load_state_dict(load_file(Path(path) / "model.safetensors"))
        except BROKEN as error:
            raise InputError(f"no ImageReward can be read from {path!r}: {error}") from None
        return cls(net.float(), tokenizer, preprocess, frames=frames, device=device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate clips; see :meth:`Reward.__call__`."""
        frames = pick_frames(pixels.to(self._device), self._frames)
        batch, count = frames.shape[:2]
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(self._device)
        ids, mask = (v.repeat_interleave(count, 0) for v in (tokens.input_ids, tokens.attention_mask))
        raw: Tensor = self._net(self._preprocess(frames.flatten(0, 1)), ids, mask)
        return ((raw - MEAN) / STD).view(batch, count).mean(1)
