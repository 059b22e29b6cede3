"""FLUX.1: FluxPipeline, text to image.

What is peculiar to it stays here: latents are packed in 2x2 cells and told their places, time is sigma itself; CLIP
gives a pooled vector, T5 the tokens, padded without a mask; the `dev` weights take a guidance scale as an input,
which stands in for classifier-free guidance and is held at the model's own value.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from raydmd.errors import InputError
from raydmd.models.autoencoder import ImageAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.packing import CELL, drawn_packed, pack, unpack
from raydmd.models.schedulers import given_flow_scheduler
from raydmd.process import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes
    from raydmd.recipe_method import Method

EMBEDDED_GUIDANCE = 3.5
"""What the stock pipeline gives a guidance-distilled network."""


class FluxDenoiser(Denoiser):
    """One FluxTransformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, network: FluxTransformer2DModel, *, autocast: torch.dtype) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
        super().__init__(network, blocks, width=width, autocast=autocast)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are ``pooled`` too."""
        if cond.pooled is None:
            raise InputError("a FluxPipeline needs pooled embeddings; these conditions are another family's")
        height, width = x_t.shape[2] // CELL, x_t.shape[3] // CELL
        places = torch.zeros(height, width, 3, device=x_t.device)
        places[..., 1] = torch.arange(height, device=x_t.device)[:, None]
        places[..., 2] = torch.arange(width, device=x_t.device)
        exactly: dict[str, Any] = {
            "img_ids": places.reshape(-1, 3),
            "txt_ids": torch.zeros(cond.embeds.shape[1], 3, device=x_t.device),
        }
        if self.network.config.guidance_embeds:
            exactly["guidance"] = torch.full((len(x_t),), EMBEDDED_GUIDANCE, device=x_t.device)
        out = self.call(
            t.float(),
            exactly=exactly,
            hidden_states=pack(x_t),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
        )
        return unpack(out, x_t)


class Flux(Family):
    """A FluxPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = FluxPipeline
    text_width = "joint_attention_dim"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", *self.text_parts)
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="shift_factor")
        config = self._config(FluxTransformer2DModel, "transformer")
        self._embedded = bool(config["guidance_embeds"])
        channels = config["in_channels"] // CELL**2
        self._shape = self._image(channels=channels, cell=CELL, side=128 * self.autoencoder.scale)

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        if self._embedded and method.guidance != 1:
            raise InputError(
                f"method.guidance={method.guidance:g} does not fit {self.path!r}: its guidance is distilled into the "
                "network, and is on without a second forward. Set method.guidance=1"
            )

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> FluxDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return FluxDenoiser(self._load(FluxTransformer2DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        rows = [pipeline.encode_prompt(part, None, max_sequence_length=length) for part in chunks(texts)]
        return Conditions(
            embeds=torch.cat([row[0].float().cpu() for row in rows]),
            pooled=torch.cat([row[1].float().cpu() for row in rows]),
        )

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """See :class:`~raydmd.models.family.Family`."""
        return (prod(latent[1:]) // CELL**2, self.text_length())

    def attention(self) -> tuple[int, int]:
        """See :class:`~raydmd.models.family.Family`; blocks of one stream follow those of two."""
        blocks, width = super().attention()
        return blocks + self._config(self._kind(), "transformer")["num_single_layers"], width

    def text_length(self) -> int:
        """Tokens T5's prompt is padded to; CLIP's own are as many as its tokenizer has."""
        return self._length(512, "tokenizer_2")

    def fresh(self, generator: torch.Generator) -> Tensor:
        """See :class:`~raydmd.models.family.Family`."""
        return drawn_packed(self._shape.latent, generator)

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return given_flow_scheduler(shift=shift, stochastic=stochastic)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        guidance = {"guidance_scale": EMBEDDED_GUIDANCE} if self._embedded else {}
        return super().sampling(steps=steps) | guidance | {"max_sequence_length": self.text_length()}

    def _text_pipeline(self) -> FluxPipeline:
        return FluxPipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=self._load(CLIPTextModel, "text_encoder"),
            tokenizer=self._tokenizer(),
            text_encoder_2=self._load(T5EncoderModel, "text_encoder_2"),
            tokenizer_2=self._tokenizer("tokenizer_2"),
        )
