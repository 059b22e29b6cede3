"""Stable Diffusion with a U-Net: StableDiffusionPipeline (1.x, 2.x) and StableDiffusionXLPipeline.

What is peculiar to them stays here: the process is variance preserving with a table of betas, and the network is
given the table's index; it predicts the noise, or v in some 2.x; SDXL also takes the picture's size and crop, and the
pooled vector of its second text encoder, and reads zeros for a negative prompt that is not given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from raydmd.errors import InputError
from raydmd.models.autoencoder import ImageAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.encoding import chunks
from raydmd.models.family import Family
from raydmd.models.schedulers import check_table, table_process, table_scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes
    from raydmd.process import VariancePreserving
    from raydmd.recipe_method import Method


class UNetDenoiser(Denoiser):
    """One UNet2DConditionModel.

    Args:
        network: the U-Net.
        process: whose table's index it is given.
        scale: pixels to a latent, along a side: SDXL's is told the picture's size in pixels. Others are not.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")

    def __init__(
        self,
        network: UNet2DConditionModel,
        process: VariancePreserving,
        *,
        scale: int | None,
        autocast: torch.dtype,
    ) -> None:
        # DMD2 judges by the features of the bottleneck.
        width = network.config.block_out_channels[-1]
        super().__init__(network, (network.mid_block,), width=width, autocast=autocast)
        self._process, self._scale = process, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; SDXL's conditions are ``pooled`` too."""
        exactly: dict[str, Any] = {}
        if self._scale is not None:
            if cond.pooled is None:
                raise InputError(
                    "a StableDiffusionXLPipeline needs pooled embeddings; these conditions are another family's"
                )
            size = (x_t.shape[2] * self._scale, x_t.shape[3] * self._scale)
            # Height and width before the crop, its corner, height and width.
            ids = torch.tensor([(*size, 0, 0, *size)], device=x_t.device, dtype=torch.float32).expand(len(x_t), -1)
            exactly = {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": ids}}
        time = self._process.index(t.float())
        return self.call(time, exactly=exactly, sample=x_t, encoder_hidden_states=cond.embeds)


class StableDiffusion(Family):
    """A StableDiffusionPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    pipeline = StableDiffusionPipeline
    text_width = "cross_attention_dim"
    network = "unet"
    text_parts = ("text_encoder", "tokenizer")
    process: VariancePreserving

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("unet", "vae", "scheduler", *self.text_parts)
        self.process, self.prediction = table_process(self.path, self._config(DDIMScheduler, "scheduler"))
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="none")
        config = self._config(UNet2DConditionModel, "unet")
        side = config["sample_size"] * self.autoencoder.scale
        self._shape = self._image(channels=config["in_channels"], cell=_cell(config), side=side)

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        check_table(self.path, self.process, method)

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> UNetDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        network = self._load(UNet2DConditionModel, expert, dtype=dtype)
        return UNetDenoiser(network, self.process, scale=None, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        found = [pipeline.encode_prompt(part, pipeline.device, 1, False)[0].float() for part in chunks(texts)]
        return Conditions(embeds=torch.cat(found))

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; the tokenizer's own."""
        return _length(self, self._settings, self._tokenizer())

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return table_scheduler(self.process, self.prediction, steps=steps, stochastic=stochastic)

    def absent(self) -> tuple[str, ...]:
        """See :class:`~raydmd.models.family.Family`; a student is exported without a safety checker."""
        return ("safety_checker", "feature_extractor")

    def _text_pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            text_encoder=self._load(CLIPTextModel, "text_encoder"),
            tokenizer=self._tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class StableDiffusionXL(Family):
    """A StableDiffusionXLPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    pipeline = StableDiffusionXLPipeline
    text_width = "cross_attention_dim"
    network = "unet"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    process: VariancePreserving

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("unet", "vae", "scheduler", *self.text_parts)
        self.process, self.prediction = table_process(self.path, self._config(DDIMScheduler, "scheduler"))
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="statistics")
        config = self._config(UNet2DConditionModel, "unet")
        side = config["sample_size"] * self.autoencoder.scale
        self._shape = self._image(channels=config["in_channels"], cell=_cell(config), side=side)

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        check_table(self.path, self.process, method)

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> UNetDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        network = self._load(UNet2DConditionModel, expert, dtype=dtype)
        return UNetDenoiser(network, self.process, scale=self.autoencoder.scale, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline = self._encoders()
        # Without a negative prompt the stock pipeline reads zeros, if its model_index.json says so.
        negative = pipeline.encode_prompt(
            "", device=pipeline.device, do_classifier_free_guidance=True, negative_prompt=texts[0] or None
        )
        rows = [
            pipeline.encode_prompt(part, device=pipeline.device, do_classifier_free_guidance=False)
            for part in chunks(texts[1:])
        ]
        return Conditions(
            embeds=torch.cat([negative[1], *(row[0] for row in rows)]).float(),
            pooled=torch.cat([negative[3], *(row[2] for row in rows)]).float(),
        )

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; the tokenizer's own."""
        return _length(self, self._settings, self._tokenizer())

    def pooled_width(self) -> int:
        """See :class:`~raydmd.models.family.Family`; the six numbers of the picture's size and crop stand beside it."""
        config = self._config(UNet2DConditionModel, "unet")
        return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return table_scheduler(self.process, self.prediction, steps=steps, stochastic=stochastic)

    def _text_pipeline(self) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            text_encoder=self._load(CLIPTextModel, "text_encoder"),
            tokenizer=self._tokenizer(),
            text_encoder_2=self._load(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer_2=self._tokenizer("tokenizer_2"),
            force_zeros_for_empty_prompt=bool(self._index.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
        )


def _cell(config: Mapping[str, Any]) -> int:
    """Latents along a side that a U-Net takes as one: it halves them once less often than it has levels."""
    cell: int = 2 ** (len(config["block_out_channels"]) - 1)
    return cell


def _length(family: Family, settings: recipes.Model, tokenizer: Any) -> int:
    """The stock pipelines pad to the tokenizer's own length and can't be told another."""
    own = int(tokenizer.model_max_length)
    if settings.text_length not in (None, own):
        raise InputError(
            f"model.text_length={settings.text_length} does not fit {family.path!r}: its pipeline always pads to {own}"
        )
    return own
