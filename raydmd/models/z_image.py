"""Z-Image: ZImagePipeline, text to image.

What is peculiar to it stays here: pictures and prompts go in and come out as lists, each prompt as long as it is; its
time runs from noise at 0 to pictures at 1 and its velocity points the same way, so both are turned. The stock
pipeline's ``guidance_scale`` is the other convention's: ours less one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
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


class ZImageDenoiser(Denoiser):
    """One ZImageTransformer2DModel.

    Args:
        network: the transformer.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def __init__(self, network: ZImageTransformer2DModel, *, autocast: torch.dtype) -> None:
        super().__init__(network, network.layers, width=network.config.dim, autocast=autocast)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are masked."""
        if cond.mask is None:
            raise InputError("a ZImagePipeline needs a mask of its prompts; these conditions are another family's")
        with self.running(x_t.device) as dtype:
            pictures = list(x_t[:, :, None].to(dtype).unbind())
            prompts = [e[m].to(dtype) for e, m in zip(cond.embeds, cond.mask, strict=True)]
            out = self.network(pictures, 1 - t.float(), prompts, return_dict=False)[0]
        return -torch.stack(out)[:, :, 0].float()


class ZImage(Family):
    """A ZImagePipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size does not fit its networks.
    """

    process = RectifiedFlow()
    prediction = "flow"
    pipeline = ZImagePipeline
    text_width = "cap_feat_dim"
    masked = True
    text_parts = ("text_encoder", "tokenizer")

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", *self.text_parts)
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="shift_factor")
        config = self._config(ZImageTransformer2DModel, "transformer")
        cell, scale = config["all_patch_size"][0], self.autoencoder.scale
        most = min(config["axes_lens"][1:]) * cell * scale
        self._shape = self._image(channels=config["in_channels"], cell=cell, side=128 * scale, most=most)

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> ZImageDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return ZImageDenoiser(self._load(ZImageTransformer2DModel, expert, dtype=dtype), autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        pipeline, found = self._encoders(), []
        for part in chunks(texts):
            rows = pipeline.encode_prompt(part, do_classifier_free_guidance=False, max_sequence_length=length)[0]
            found += [row.cpu() for row in rows]
        pad = nn.utils.rnn.pad_sequence
        masks = [torch.ones(len(e), dtype=torch.bool) for e in found]
        return Conditions(embeds=pad(found, batch_first=True).float(), mask=pad(masks, batch_first=True))

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; a limit, since prompts are as long as they are."""
        return self._length(512)

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        return given_flow_scheduler(shift=shift, stochastic=stochastic)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        more = {"guidance_scale": 0.0, "max_sequence_length": self.text_length()}
        return super().sampling(steps=steps) | more

    def _text_pipeline(self) -> ZImagePipeline:
        return ZImagePipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=self._load(AutoModel, "text_encoder"),
            tokenizer=self._tokenizer(),
        )
