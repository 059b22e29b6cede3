"""Lumina-Image 2.0: Lumina2Pipeline, text to image.

What is peculiar to it stays here: its time runs from noise at 0 to pictures at 1 and its velocity points the same way,
so both are turned; a prompt stands behind a system prompt, the negative one does not; padding is masked. The stock
pipeline rescales a guided velocity to the norm of the conditional one, along the last axis of the latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from transformers import AutoModel

from raydmd.errors import InputError
from raydmd.models.autoencoder import ImageAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.schedulers import given_flow_scheduler
from raydmd.process import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes

VAE_SCALE = 8
"""The stock pipeline takes it for granted."""


class Lumina2Denoiser(Denoiser):
    """One Lumina2Transformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "linear_3")

    def __init__(self, network: Lumina2Transformer2DModel, *, autocast: torch.dtype) -> None:
        super().__init__(network, network.layers, width=network.config.hidden_size, autocast=autocast)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are masked."""
        if cond.mask is None:
            raise InputError("a Lumina2Pipeline needs a mask of its prompts; these conditions are another family's")
        exactly = {"encoder_attention_mask": cond.mask}
        return -self.call(1 - t.float(), exactly=exactly, hidden_states=x_t, encoder_hidden_states=cond.embeds)


class Lumina2(Family):
    """A Lumina2Pipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = Lumina2Pipeline
    text_width = "cap_feat_dim"
    masked = True
    text_parts = ("text_encoder", "tokenizer")

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", *self.text_parts)
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="shift_factor")
        config = self._config(Lumina2Transformer2DModel, "transformer")
        scale, cell = self.autoencoder.scale, config["patch_size"]
        if scale != VAE_SCALE:
            raise InputError(
                f"model {self.path!r}: its VAE scales by {scale}; a Lumina2Pipeline knows {VAE_SCALE} only"
            )
        most = min(config["axes_lens"][1:]) * cell * scale
        self._shape = self._image(
            channels=config["in_channels"], cell=cell, side=config["sample_size"] * scale, most=most
        )

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> Lumina2Denoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return Lumina2Denoiser(self._load(Lumina2Transformer2DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        _, _, *negative = pipeline.encode_prompt("", True, negative_prompt=texts[0], max_sequence_length=length)
        rows = [pipeline.encode_prompt(part, False, max_sequence_length=length)[:2] for part in chunks(texts[1:])]
        embeds, mask = (torch.cat(column) for column in zip(negative, *rows, strict=True))
        return Conditions(embeds=embeds.float(), mask=mask.bool())

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`."""
        return self._length(256)

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return given_flow_scheduler(shift=shift, stochastic=stochastic)

    def rescale(self, cond: Tensor, guided: Tensor) -> Tensor:
        """See :class:`~raydmd.models.family.Family`."""
        scale: Tensor = cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return guided * scale

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        return super().sampling(steps=steps) | {"max_sequence_length": self.text_length()}

    def _text_pipeline(self) -> Lumina2Pipeline:
        return Lumina2Pipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=self._load(AutoModel, "text_encoder"),
            tokenizer=self._tokenizer(),
        )
