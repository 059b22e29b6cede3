"""The Stable Diffusion 3 family (3 and 3.5, medium and large): StableDiffusion3Pipeline, text to image.

What is peculiar to it stays here: time is given as 1000 t, the network predicts flow; a prompt is both
CLIPs' tokens side by side, then T5's, with both CLIPs' pooled vectors beside them, and no mask, so the
length to which T5 pads is part of the model's input; latents are ``(z - shift_factor) * scaling_factor``.
A pipeline without its T5 (``text_encoder_3``) reads zeros in its place, as the stock pipeline does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from raydmd.errors import InputError
from raydmd.models.autoencoder import ImageAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.schedulers import FLOW_STEPS, own_flow_scheduler
from raydmd.process import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes

T5_LENGTH = 256
"""Tokens that the stock pipeline pads T5's prompt to."""


class StableDiffusion3Denoiser(Denoiser):
    """One SD3Transformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    # Both streams: the text's projections are the ones that were added.
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, network: SD3Transformer2DModel, *, autocast: torch.dtype) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, network.transformer_blocks, width=width, autocast=autocast)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are ``pooled`` too."""
        if cond.pooled is None:
            raise InputError(
                "a StableDiffusion3Pipeline needs pooled embeddings; these conditions are another family's"
            )
        return self.call(
            t.float() * FLOW_STEPS,
            hidden_states=x_t,
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
        )


class StableDiffusion3(Family):
    """A StableDiffusion3Pipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = StableDiffusion3Pipeline
    text_width = "joint_attention_dim"
    text_parts = tuple(f"{part}{n}" for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="shift_factor")
        config = self._config(SD3Transformer2DModel, "transformer")
        cell, scale = config["patch_size"], self.autoencoder.scale
        most = config["pos_embed_max_size"] * cell * scale
        self._shape = self._image(
            channels=config["in_channels"], cell=cell, side=config["sample_size"] * scale, most=most
        )

    def denoiser(
        self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32
    ) -> StableDiffusion3Denoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return StableDiffusion3Denoiser(self._load(SD3Transformer2DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        device = pipeline.device
        if not self._has("text_encoder_3"):  # the stock pipeline asks the transformer how wide T5's zeros are
            config = self._config(SD3Transformer2DModel, "transformer")
            with torch.device("meta"):
                pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
        parts = [
            pipeline.encode_prompt(
                prompt=part,
                prompt_2=None,
                prompt_3=None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
            for part in chunks(texts)
        ]
        return Conditions(
            embeds=torch.cat([p[0].float().cpu() for p in parts]), pooled=torch.cat([p[2].float().cpu() for p in parts])
        )

    def text_length(self) -> int:
        """Tokens T5's prompt is padded to; CLIP's own are as many as its tokenizer has."""
        return self._length(T5_LENGTH, "tokenizer_3")

    def prompt_tokens(self, lengths: Mapping[str, int]) -> int:
        """See :class:`~raydmd.models.family.Family`; CLIP's stand before T5's."""
        return super().prompt_tokens(lengths) + (lengths.get("clip") or int(self._tokenizer().model_max_length))

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return own_flow_scheduler(steps=steps, shift=shift, stochastic=stochastic)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        return super().sampling(steps=steps) | {"max_sequence_length": self.text_length()}

    def _text_pipeline(self) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=self._load(CLIPTextModelWithProjection, "text_encoder"),
            tokenizer=self._tokenizer(),
            text_encoder_2=self._load(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer_2=self._tokenizer("tokenizer_2"),
            text_encoder_3=self._load(T5EncoderModel, "text_encoder_3"),
            tokenizer_3=self._tokenizer("tokenizer_3"),
        )
