"""Wan2.2 image-to-video: WanImageToVideoPipeline with two experts or one, and no image encoder.

What is peculiar to it stays here: beside its text a prompt has a picture. Its latents, as the first frame of a clip
that is grey otherwise, and a mask of what is given go into the network as further channels, with guidance's negative
prompt too.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import UMT5EncoderModel

from raydmd.errors import InputError
from raydmd.models.base import Conditions
from raydmd.models.identity import digest, fingerprint
from raydmd.models.pictured import Pictured
from raydmd.models.wan import Wan, WanDenoiser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes
    from raydmd.recipe_method import Method


class WanImageDenoiser(WanDenoiser):
    """One WanTransformer3DModel that reads a clip's mask and first frame beside its latents.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    def __init__(self, network: WanTransformer3DModel, *, autocast: torch.dtype) -> None:
        super().__init__(network, per_token_time=False, autocast=autocast)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions have pictures."""
        if cond.picture is None:
            raise InputError("a WanImageToVideoPipeline needs pictures; these conditions are another family's")
        channels = self.network.config.in_channels - 2 * x_t.shape[1]
        mask = x_t.new_zeros(len(x_t), channels, *x_t.shape[2:])
        mask[:, :, 0] = 1
        return super().forward(torch.cat([x_t, mask, cond.picture.to(x_t)], 1), t, cond)


class WanImage(Wan):
    """A WanImageToVideoPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, of a kind with an image encoder, or the asked size does not fit its VAE.
    """

    pipeline = WanImageToVideoPipeline
    pictures = True
    part = 32
    asked = 'load_image("first.png"),\n    "your prompt"'

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        if self._has("image_encoder") or index.get("expand_timesteps"):
            raise InputError(
                f"model {self.path!r} is a WanImageToVideoPipeline of a kind that raydmd does not know: with an image "
                "encoder (Wan2.1), or with a time per token (Wan2.2 5B); known is Wan2.2 14B's"
            )

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        super().check(method)
        for key in ("gan", "regression"):
            if getattr(method, key):
                raise InputError(
                    f"method.{key} does not fit {self.path!r}: its samples need pictures, which neither real samples "
                    f"nor noise-image pairs keep. Set method.{key}=null"
                )

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> WanImageDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return WanImageDenoiser(self._load(WanTransformer3DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        found = [self._first_frame(text).cpu() for text in texts[1:]]
        none = torch.zeros(1, *self._shape.latent)  # guidance goes on with its sample's own picture
        return Conditions(
            embeds=super()._encode([str(text) for text in texts], length).embeds, picture=torch.cat([none, *found])
        )

    @cached_property
    def _read_by(self) -> list[Any]:
        by: list[Any] = super()._read_by
        return [*by, self._shape.latent, fingerprint(self._settings, ("vae",))]

    def _seen(self, prompts: Sequence[str]) -> list[str]:
        return [digest(text.picture) for text in prompts if isinstance(text, Pictured)]

    def _first_frame(self, text: str) -> Tensor:
        """Latents ``(1, *latent)`` of a prompt's picture and grey frames, scaled as the stock pipeline does."""
        if not isinstance(text, Pictured):
            raise InputError(f"prompt {text!r} has no picture, which {self.path!r} starts from")
        try:
            with Image.open(text.picture) as image:
                whole = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"picture {text.picture} of prompt {str(text)!r}: {error}") from None
        shape = self._shape
        first = VideoProcessor(vae_scale_factor=self.autoencoder.scale).preprocess(
            whole, height=shape.height, width=shape.width
        )
        frames = torch.full((1, shape.frames, 3, shape.height, shape.width), 0.5)
        frames[:, 0] = first / 2 + 0.5
        return self.encode_pixels(frames.to("cuda" if torch.cuda.is_available() else "cpu"))

    def usage(self, *, steps: int, beside: Mapping[str, int] | None = None, kind: str = "") -> str:
        """See :class:`~raydmd.models.family.Family`; with a picture."""
        return f"from diffusers.utils import load_image\n{super().usage(steps=steps, beside=beside, kind=kind)}"

    def _text_pipeline(self) -> WanImageToVideoPipeline:
        return WanImageToVideoPipeline(
            tokenizer=self._tokenizer(),
            text_encoder=self._load(UMT5EncoderModel, "text_encoder"),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=None,
            transformer_2=None,
        )
