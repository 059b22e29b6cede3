"""The Wan family: WanPipeline with one expert (2.1) or two (2.2), text to video.

What is peculiar to Wan stays here: time is given as 1000 t, the network predicts flow, UMT5 embeddings
are zero past the prompt's end and no mask is passed, so the padded length is part of the model's input;
latents are normalised by the VAE's per-channel statistics; ``t >= boundary_ratio`` is the first expert's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from raydmd.errors import InputError
from raydmd.models.base import Conditions, Denoiser, Family, Routing, Shape
from raydmd.process import RectifiedFlow, euler_scheduler_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from raydmd import recipe as recipes

TRAIN_STEPS = 1000
EXPERTS = ("transformer", "transformer_2")


class WanDenoiser(Denoiser):
    """One WanTransformer3DModel.

    Args:
        network: the transformer.
        per_token_time: Wan2.2-5B's ``expand_timesteps``: one time per latent token.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    prediction = "flow"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, network: WanTransformer3DModel, *, per_token_time: bool, autocast: torch.dtype) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, network.blocks, width=width, autocast=autocast)
        self._per_token_time = per_token_time

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`."""
        time = t.float() * TRAIN_STEPS
        if self._per_token_time:
            _, ph, pw = self.network.config.patch_size
            tokens = x_t.shape[2] * (x_t.shape[3] // ph) * (x_t.shape[4] // pw)
            time = time[:, None].expand(-1, tokens)
        return self.call(time, hidden_states=x_t, encoder_hidden_states=cond.embeds)


class Wan(Family):
    """A WanPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its VAE.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = WanPipeline
    max_experts = 2
    text_parts = ("text_encoder", "tokenizer")

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", "text_encoder", "tokenizer")
        self._vae_config: dict[str, Any] = AutoencoderKLWan.load_config(self.path, subfolder="vae", **self._revision)
        self._config: dict[str, Any] = WanTransformer3DModel.load_config(
            self.path, subfolder="transformer", **self._revision
        )
        boundary = self._index.get("boundary_ratio")
        if self._has("transformer_2") and boundary is None:
            raise InputError(f"model {self.path!r} has two experts but no boundary_ratio in its model_index.json")
        self._shape = self._find_shape()
        self._vae: AutoencoderKLWan | None = None

    def _find_shape(self) -> Shape:
        m = self._settings
        frames, height, width = m.frames or 81, m.height or 480, m.width or 832
        downs = self._vae_config.get("temperal_downsample", [False, True, True])
        temporal = self._vae_config.get("scale_factor_temporal") or 2 ** sum(downs)
        spatial = self._vae_config.get("scale_factor_spatial") or 2 ** len(downs)
        _, ph, pw = self._config["patch_size"]
        if (frames - 1) % temporal or height % (spatial * ph) or width % (spatial * pw):
            raise InputError(
                f"model.frames={frames}, model.height={height}, model.width={width} do not fit {self.path!r}: frames "
                f"must be 1 + a multiple of {temporal}, height of {spatial * ph}, width of {spatial * pw}"
            )
        latent = (
            self._config["in_channels"],
            (frames - 1) // temporal + 1,
            height // spatial,
            width // spatial,
        )
        return Shape(latent=latent, frames=frames, height=height, width=width)

    def routing(self) -> Routing:
        """See :class:`~raydmd.models.base.Family`."""
        if self._has("transformer_2"):
            return Routing(EXPERTS, (float(self._index["boundary_ratio"]),))
        return Routing(EXPERTS[:1])

    def shape(self) -> Shape:
        """See :class:`~raydmd.models.base.Family`."""
        return self._shape

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> WanDenoiser:
        """See :class:`~raydmd.models.base.Family`."""
        network = WanTransformer3DModel.from_pretrained(
            self.path, subfolder=expert, torch_dtype=dtype, **self._revision
        )
        per_token = bool(self._index.get("expand_timesteps", False))
        return WanDenoiser(network, per_token_time=per_token, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._text_pipeline()
        rows = [
            pipeline.encode_prompt(texts[i : i + 64], do_classifier_free_guidance=False, max_sequence_length=length)[
                0
            ].float()
            for i in range(0, len(texts), 64)
        ]
        return Conditions(embeds=torch.cat(rows))

    def text_length(self) -> int:
        """See :class:`~raydmd.models.base.Family`."""
        if self._settings.text_length:
            return self._settings.text_length
        tokenizer = AutoTokenizer.from_pretrained(self.path, subfolder="tokenizer", **self._revision)
        return min(512, int(tokenizer.model_max_length))

    def render(self, latents: Tensor) -> Tensor:
        """See :class:`~raydmd.models.base.Family`."""
        vae, mean, inverse_std = self._autoencoder(latents.device)
        # A division by 1/std and not a product with std: the stock pipeline's rounding, so its pixels.
        video = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
        pixels: Tensor = (video / 2 + 0.5).permute(0, 2, 1, 3, 4)
        return pixels

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """See :class:`~raydmd.models.base.Family`."""
        vae, mean, inverse_std = self._autoencoder(pixels.device)
        video = 2 * pixels.permute(0, 2, 1, 3, 4) - 1
        latents: Tensor = (vae.encode(video).latent_dist.mode() - mean) * inverse_std
        return latents

    def _autoencoder(self, device: torch.device) -> tuple[AutoencoderKLWan, Tensor, Tensor]:
        """The VAE, and its latents' mean and inverse standard deviation, ``(1, C, 1, 1, 1)``."""
        if self._vae is None:
            self._vae = AutoencoderKLWan.from_pretrained(
                self.path, subfolder="vae", torch_dtype=torch.float32, **self._revision
            ).to(device)
            self._vae.requires_grad_(False)
        view = (1, -1, 1, 1, 1)
        mean = torch.tensor(self._vae.config.latents_mean, device=device).view(view)
        inverse_std = 1.0 / torch.tensor(self._vae.config.latents_std, device=device).view(view)
        return self._vae, mean, inverse_std

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
        """See :class:`~raydmd.models.base.Family`."""
        stretch, terminal = euler_scheduler_for(steps, shift, train_steps=TRAIN_STEPS)
        pipeline = self._text_pipeline()
        pipeline.register_modules(
            transformer=experts["transformer"],
            transformer_2=experts.get("transformer_2"),
            vae=AutoencoderKLWan.from_pretrained(self.path, subfolder="vae", **self._revision),
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=TRAIN_STEPS, shift=stretch, shift_terminal=terminal, stochastic_sampling=stochastic
            ),
        )
        pipeline.register_to_config(
            boundary_ratio=boundary,
            expand_timesteps=bool(self._index.get("expand_timesteps", False)),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)

    def usage(self, *, steps: int) -> str:
        """See :class:`~raydmd.models.base.Family`."""
        return f"""from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("this/folder")
frames = pipe(
    "your prompt",
    num_inference_steps={steps},
    guidance_scale=1.0,
    num_frames={self._shape.frames},
    height={self._shape.height},
    width={self._shape.width},
    max_sequence_length={self.text_length()},
).frames"""

    def _text_pipeline(self) -> WanPipeline:
        """The stock pipeline with its text parts alone, so that prompts are cleaned and padded as it does."""
        encoder = UMT5EncoderModel.from_pretrained(
            self.path, subfolder="text_encoder", torch_dtype=torch.float32, **self._revision
        )
        return WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(self.path, subfolder="tokenizer", **self._revision),
            text_encoder=encoder,
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=None,
            transformer_2=None,
        )
