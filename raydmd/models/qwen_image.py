"""Qwen-Image: QwenImagePipeline, text to image.

What is peculiar to it stays here: latents are packed in 2x2 cells, time is sigma itself, prompts are as long as they
are and padding is masked; the autoencoder is Wan's kind, for one frame. The text half of the last block goes nowhere,
so its parameters stay as they are. The stock pipeline rescales a guided velocity, token by token, to the norm of the
conditional one.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from raydmd.errors import InputError
from raydmd.models.autoencoder import VideoAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.packing import CELL, drawn_packed, pack, unpack
from raydmd.models.schedulers import given_flow_scheduler
from raydmd.process import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes


class QwenImageDenoiser(Denoiser):
    """One QwenImageTransformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, network: QwenImageTransformer2DModel, *, autocast: torch.dtype) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, network.transformer_blocks, width=width, autocast=autocast)
        last = f"transformer_blocks.{len(self.blocks) - 1}"
        self.idle = (f"{last}.attn.to_add_out", f"{last}.txt_mlp")

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are masked."""
        if cond.mask is None:
            raise InputError("a QwenImagePipeline needs a mask of its prompts; these conditions are another family's")
        cells = (1, x_t.shape[2] // CELL, x_t.shape[3] // CELL)
        exactly = {"encoder_hidden_states_mask": cond.mask, "img_shapes": [[cells]] * len(x_t)}
        out = self.call(t.float(), exactly=exactly, hidden_states=pack(x_t), encoder_hidden_states=cond.embeds)
        return unpack(out, x_t)


class QwenImage(Family):
    """A QwenImagePipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = QwenImagePipeline
    text_width = "joint_attention_dim"
    masked = True
    text_parts = ("text_encoder", "tokenizer")

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", *self.text_parts)
        self.autoencoder = VideoAutoencoder(AutoencoderKLQwenImage, self.path, self.revision, still=True)
        config = self._config(QwenImageTransformer2DModel, "transformer")
        channels = config["in_channels"] // CELL**2
        self._shape = self._image(channels=channels, cell=CELL, side=128 * self.autoencoder.scale)

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> QwenImageDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return QwenImageDenoiser(self._load(QwenImageTransformer2DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline, embeds, masks = self._encoders(), [], []
        for part in chunks(texts):
            found, mask = pipeline.encode_prompt(part, max_sequence_length=length)
            embeds += list(found.float().cpu())
            masks += list(torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu())
        return Conditions(
            embeds=nn.utils.rnn.pad_sequence(embeds, batch_first=True),
            mask=nn.utils.rnn.pad_sequence(masks, batch_first=True),
        )

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """See :class:`~raydmd.models.family.Family`."""
        return (prod(latent[1:]) // CELL**2,)

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; a limit, since prompts are as long as they are."""
        return self._settings.text_length or 512

    def fresh(self, generator: torch.Generator) -> Tensor:
        """See :class:`~raydmd.models.family.Family`."""
        return drawn_packed(self._shape.latent, generator)

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return given_flow_scheduler(shift=shift, stochastic=stochastic)

    def rescale(self, cond: Tensor, guided: Tensor) -> Tensor:
        """See :class:`~raydmd.models.family.Family`."""
        there, here = pack(cond), pack(guided)
        return unpack(here * (there.norm(dim=-1, keepdim=True) / here.norm(dim=-1, keepdim=True)), guided)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        size = {"height": self._shape.height, "width": self._shape.width}
        return {"num_inference_steps": steps, "true_cfg_scale": 1.0, **size, "max_sequence_length": self.text_length()}

    def _text_pipeline(self) -> QwenImagePipeline:
        return QwenImagePipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=self._load(Qwen2_5_VLForConditionalGeneration, "text_encoder"),
            tokenizer=self._tokenizer(),
        )
