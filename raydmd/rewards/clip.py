"""Rewards that are a cosine between CLIP's embeddings of pictures and prompt.

Every reward here scores some evenly spaced frames of a clip and takes the mean of their scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from raydmd.rewards.base import Reward
from raydmd.rewards.loading import check_kind, read_model, read_tokenizer
from raydmd.rewards.pictures import Preprocess, pick_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ClipEncoder:
    """A CLIP model with its tokenizer and its picture settings.

    Args:
        model: transformers' CLIPModel; moved to ``device``.
        tokenizer: its own.
        preprocess: its own.
        frames: pictures taken of each clip, evenly spaced; all if there are fewer.
        device: where it runs.
    """

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Preprocess, *, frames: int, device: torch.device | str = "cpu"
    ) -> None:
        self._device = torch.device(device)
        self._model = model.to(self._device)
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._frames = frames

    @classmethod
    def load(
        cls, path: str, *, frames: int, processor: str | None = None, device: torch.device | str = "cpu"
    ) -> ClipEncoder:
        """Read a model in transformers' CLIP format.

        Args:
            path: a folder, or a hub id.
            frames: pictures taken of each clip.
            processor: folder or hub id of tokenizer and picture settings; default: ``path``.
            device: where it runs.

        Raises:
            InputError: if a folder is missing, holds another class of model, or lacks weights, tokenizer
                or picture settings.
        """
        check_kind(path, "clip")
        source = processor or path
        # The small files first: a fault in them shows before gigabytes are read.
        tokenizer, preprocess = read_tokenizer(source), Preprocess.read(source)
        return cls(read_model(CLIPModel, path), tokenizer, preprocess, frames=frames, device=device)

    @property
    def logit_scale(self) -> float:
        """The factor CLIP was trained with: exp of its parameter, 100 at most in OpenAI's training."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def cosines(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine between each picture's and its prompt's embedding.

        Args:
            pixels: ``(B, F, 3, H, W)`` in [0, 1].
            prompts: B of them; cut at the model's text length.

        Returns:
            ``(B, n)`` for n pictures of each clip, fp32.
        """
        frames = pick_frames(pixels.to(self._device), self._frames)
        # Encoders and projections one by one: get_image_features returns another type in each
        # major version of transformers.
        seen = self._model.vision_model(pixel_values=self._preprocess(frames.flatten(0, 1))).pooler_output
        images = F.normalize(self._model.visual_projection(seen), dim=-1).view(*frames.shape[:2], -1)
        tokens = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        read = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        texts = F.normalize(self._model.text_projection(read), dim=-1)
        return (images * texts[:, None]).sum(-1)


class ClipScore(Reward):
    """CLIP score: ``100 * max(cos, 0)`` per frame, as torchmetrics scales it.

    The paper (Hessel et al., arXiv:2104.08718, section 3) has 2.5 in place of 100.

    Args:
        encoder: any CLIP.
    """

    name = "clip"

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate clips; see :meth:`Reward.__call__`. In [0, 100]."""
        return 100 * self._encoder.cosines(pixels, prompts).clamp(min=0).mean(1)


class PickScore(Reward):
    """PickScore (Kirstain et al., arXiv:2305.01569): ``logit_scale * cos``, without a softmax over pictures.

    That is how the card of ``yuvalkirstain/PickScore_v1`` computes its scores, from memory; good
    pictures have 20 to 23. The card takes tokenizer and picture settings from
    ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``: give it as the encoder's ``processor``.

    Args:
        encoder: the fine-tuned CLIP ViT-H.
    """

    name = "pick"

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate clips; see :meth:`Reward.__call__`."""
        return self._encoder.logit_scale * self._encoder.cosines(pixels, prompts).mean(1)
