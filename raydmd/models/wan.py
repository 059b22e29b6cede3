"""The Wan family: WanPipeline with one expert (2.1) or two (2.2), text to video.

What is peculiar to Wan stays here: time is given as 1000 t, the network predicts flow, UMT5 embeddings
are zero past the prompt's end and no mask is passed, so the padded length is part of the model's input;
latents are normalised by the VAE's per-channel statistics; ``t >= boundary_ratio`` is the first expert's.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from raydmd.errors import InputError
from raydmd.models.autoencoder import VideoAutoencoder
from raydmd.models.base import Conditions, Denoiser, Routing, Shape
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.schedulers import FLOW_STEPS, own_flow_scheduler
from raydmd.process import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes
    from raydmd.recipe_method import Method

EXPERTS = ("transformer", "transformer_2")


class WanDenoiser(Denoiser):
    """One WanTransformer3DModel.

    Args:
        network: the transformer.
        per_token_time: Wan2.2-5B's ``expand_timesteps``: one time per latent token.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, network: WanTransformer3DModel, *, per_token_time: bool, autocast: torch.dtype) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, network.blocks, width=width, autocast=autocast)
        self._per_token_time = per_token_time

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`."""
        time = t.float() * FLOW_STEPS
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
    text_width = "text_dim"
    text_parts = ("text_encoder", "tokenizer")
    autoencoder: VideoAutoencoder

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", "text_encoder", "tokenizer")
        if self._has("transformer_2") and self._index.get("boundary_ratio") is None:
            raise InputError(f"model {self.path!r} has two experts but no boundary_ratio in its model_index.json")
        self.autoencoder = VideoAutoencoder(AutoencoderKLWan, self.path, self.revision)
        self._transformer = self._config(WanTransformer3DModel, "transformer")
        self._shape = self.sized(settings.height, settings.width, settings.frames)

    def sized(self, height: int | None, width: int | None, frames: int | None, *, key: str = "model") -> Shape:
        """See :class:`~raydmd.models.family.Family`."""
        frames, height, width = frames or 81, height or 480, width or 832
        config, temporal, spatial = self._transformer, self.autoencoder.frames, self.autoencoder.scale
        pt, ph, pw = config["patch_size"]
        given = f"{key}.frames={frames}, {key}.height={height}, {key}.width={width} do not fit {self.path!r}"
        if (frames - 1) % temporal or height % (spatial * ph) or width % (spatial * pw):
            raise InputError(
                f"{given}: frames must be 1 + a multiple of {temporal}, height of {spatial * ph}, width of "
                f"{spatial * pw}"
            )
        latent = (config["out_channels"], (frames - 1) // temporal + 1, height // spatial, width // spatial)
        most = config["rope_max_seq_len"]
        if latent[1] > most * pt or latent[2] > most * ph or latent[3] > most * pw:
            raise InputError(
                f"{given}: its transformer can place {most} tokens along an axis, so frames are at most "
                f"{(most * pt - 1) * temporal + 1}, height {most * ph * spatial}, width {most * pw * spatial}"
            )
        return Shape(latent=latent, frames=frames, height=height, width=width)

    def experts_held(self) -> tuple[str, ...]:
        """See :class:`~raydmd.models.family.Family`."""
        return EXPERTS

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        if len(method.boundaries) + 1 > len(EXPERTS):
            raise InputError(
                f"method.boundaries makes {len(method.boundaries) + 1} phases with an expert each, but a WanPipeline "
                f"holds at most {len(EXPERTS)}"
            )

    def routing(self) -> Routing:
        """See :class:`~raydmd.models.family.Family`."""
        if self._has("transformer_2"):
            return Routing(EXPERTS, (float(self._index["boundary_ratio"]),))
        return Routing(EXPERTS[:1])

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> WanDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        network = self._load(WanTransformer3DModel, expert, dtype=dtype)
        per_token = bool(self._index.get("expand_timesteps", False))
        return WanDenoiser(network, per_token_time=per_token, autocast=autocast)

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """See :class:`~raydmd.models.family.Family`."""
        return (prod(latent[1:]) // prod(self._transformer["patch_size"]),)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        rows = [
            pipeline.encode_prompt(part, do_classifier_free_guidance=False, max_sequence_length=length)[0].float().cpu()
            for part in chunks(texts)
        ]
        return Conditions(embeds=torch.cat(rows))

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`."""
        return self._length(512)

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return own_flow_scheduler(steps=steps, shift=shift, stochastic=stochastic)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        more = {"num_frames": self._shape.frames, "max_sequence_length": self.text_length()}
        return super().sampling(steps=steps) | more

    def _configure(self, pipeline: WanPipeline, boundaries: tuple[float, ...]) -> None:
        pipeline.register_to_config(
            boundary_ratio=boundaries[0] if boundaries else None,
            expand_timesteps=bool(self._index.get("expand_timesteps", False)),
        )

    def _text_pipeline(self) -> WanPipeline:
        return WanPipeline(
            tokenizer=self._tokenizer(),
            text_encoder=self._load(UMT5EncoderModel, "text_encoder"),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=None,
            transformer_2=None,
        )
