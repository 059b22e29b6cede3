"""The Stable Diffusion 3 family (3 and 3.5, medium and large): StableDiffusion3Pipeline, text to image.

What is peculiar to it stays here: time is given as 1000 t, the network predicts flow; a prompt is both
CLIPs' tokens side by side, then T5's, with both CLIPs' pooled vectors beside them, and no mask, so the
length to which T5 pads is part of the model's input; latents are ``(z - shift_factor) * scaling_factor``.
A pipeline without its T5 (``text_encoder_3``) reads zeros in its place, as the stock pipeline does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from raydmd.errors import InputError
from raydmd.models.base import Conditions, Denoiser, Family, Routing, Shape
from raydmd.process import RectifiedFlow, euler_scheduler_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from raydmd import recipe as recipes

TRAIN_STEPS = 1000
EXPERT = "transformer"
T5_LENGTH = 256
"""Tokens that the stock pipeline pads T5's prompt to."""
CHUNK = 64
"""Prompts in one forward of the text encoders."""


class StableDiffusion3Denoiser(Denoiser):
    """One SD3Transformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    prediction = "flow"
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
            t.float() * TRAIN_STEPS,
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
    max_experts = 1
    text_parts = tuple(f"{part}{n}" for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        self._vae_config: dict[str, Any] = AutoencoderKL.load_config(self.path, subfolder="vae", **self._revision)
        self._config: dict[str, Any] = SD3Transformer2DModel.load_config(self.path, subfolder=EXPERT, **self._revision)
        self._shape = self._find_shape()
        self._vae: AutoencoderKL | None = None

    def _find_shape(self) -> Shape:
        m = self._settings
        scale = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        side = self._config["sample_size"] * scale
        height, width = m.height or side, m.width or side
        multiple, most = scale * self._config["patch_size"], self._config["pos_embed_max_size"]
        if (m.frames or 1) != 1:
            raise InputError(f"model.frames={m.frames} does not fit {self.path!r}: it makes images, of one frame")
        if height % multiple or width % multiple or max(height, width) > most * multiple:
            raise InputError(
                f"model.height={height}, model.width={width} do not fit {self.path!r}: both must be multiples "
                f"of {multiple}, at most {most * multiple}"
            )
        latent = (self._config["in_channels"], height // scale, width // scale)
        return Shape(latent=latent, frames=1, height=height, width=width)

    def routing(self) -> Routing:
        """See :class:`~raydmd.models.base.Family`."""
        return Routing((EXPERT,))

    def shape(self) -> Shape:
        """See :class:`~raydmd.models.base.Family`."""
        return self._shape

    def denoiser(
        self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32
    ) -> StableDiffusion3Denoiser:
        """See :class:`~raydmd.models.base.Family`."""
        network = SD3Transformer2DModel.from_pretrained(
            self.path, subfolder=expert, torch_dtype=dtype, **self._revision
        )
        return StableDiffusion3Denoiser(network, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._text_pipeline()
        if not self._has("text_encoder_3"):  # the stock pipeline asks the transformer how wide T5's zeros are
            with torch.device("meta"):
                pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(self._config))
        parts = [
            pipeline.encode_prompt(
                prompt=list(texts[i : i + CHUNK]),
                prompt_2=None,
                prompt_3=None,
                device=torch.device("cpu"),
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
            for i in range(0, len(texts), CHUNK)
        ]
        return Conditions(
            embeds=torch.cat([p[0].float() for p in parts]), pooled=torch.cat([p[2].float() for p in parts])
        )

    def text_length(self) -> int:
        """Tokens T5's prompt is padded to; CLIP's own are as many as its tokenizer has."""
        if self._settings.text_length:
            return self._settings.text_length
        if not self._has("tokenizer_3"):
            return T5_LENGTH
        tokenizer = AutoTokenizer.from_pretrained(self.path, subfolder="tokenizer_3", **self._revision)
        return min(T5_LENGTH, int(tokenizer.model_max_length))

    def render(self, latents: Tensor) -> Tensor:
        """See :class:`~raydmd.models.base.Family`."""
        vae = self._autoencoder(latents.device)
        image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        pixels: Tensor = (image / 2 + 0.5)[:, None]
        return pixels

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """See :class:`~raydmd.models.base.Family`."""
        vae = self._autoencoder(pixels.device)
        mode = vae.encode(2 * pixels[:, 0] - 1).latent_dist.mode()
        latents: Tensor = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def _autoencoder(self, device: torch.device) -> AutoencoderKL:
        if self._vae is None:
            self._vae = AutoencoderKL.from_pretrained(
                self.path, subfolder="vae", torch_dtype=torch.float32, **self._revision
            ).to(device)
            self._vae.requires_grad_(False)
        return self._vae

    def export(
        self,
        folder: Path,
        experts: Mapping[str, nn.Module],
        *,
        steps: int,
        shift: float,
        boundary: float | None,
        stochastic: bool,
    ) -> None:
        """See :class:`~raydmd.models.base.Family`; there is one expert, and so no boundary."""
        if boundary is not None:
            raise InputError("a StableDiffusion3Pipeline holds one expert; a student of several phases does not fit")
        stretch, terminal = euler_scheduler_for(steps, shift, train_steps=TRAIN_STEPS)
        pipeline = self._text_pipeline()
        pipeline.register_modules(
            transformer=experts[EXPERT],
            vae=AutoencoderKL.from_pretrained(self.path, subfolder="vae", **self._revision),
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=TRAIN_STEPS, shift=stretch, shift_terminal=terminal, stochastic_sampling=stochastic
            ),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)

    def usage(self, *, steps: int) -> str:
        """See :class:`~raydmd.models.base.Family`."""
        dropped = "" if self._has("text_encoder_3") else ", text_encoder_3=None, tokenizer_3=None"
        return f"""from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("this/folder"{dropped})
image = pipe(
    "your prompt",
    num_inference_steps={steps},
    guidance_scale=1.0,
    height={self._shape.height},
    width={self._shape.width},
    max_sequence_length={self.text_length()},
).images[0]"""

    def _text_pipeline(self) -> StableDiffusion3Pipeline:
        """The stock pipeline with its text parts alone, so that prompts are cut and joined as it does."""

        def encoder(kind: Any, part: str) -> Any:
            if not self._has(part):
                return None
            return kind.from_pretrained(self.path, subfolder=part, torch_dtype=torch.float32, **self._revision)

        def tokenizer(part: str) -> Any:
            if not self._has(part):
                return None
            return AutoTokenizer.from_pretrained(self.path, subfolder=part, **self._revision)

        return StableDiffusion3Pipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=encoder(CLIPTextModelWithProjection, "text_encoder"),
            tokenizer=tokenizer("tokenizer"),
            text_encoder_2=encoder(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer_2=tokenizer("tokenizer_2"),
            text_encoder_3=encoder(T5EncoderModel, "text_encoder_3"),
            tokenizer_3=tokenizer("tokenizer_3"),
        )
