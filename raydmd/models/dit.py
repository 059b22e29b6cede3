"""DiT and SiT: DiTPipeline, class-conditional pictures of ImageNet.

What is peculiar to them stays here: a prompt is the number of a class, and class 1000 stands for none; a network may
put out a variance beside its prediction, which nothing reads. The scheduler tells the two kinds apart: with a table of
betas it is a DiT, which predicts noise; with a FlowMapEulerDiscreteScheduler, the one stock scheduler of flow models
that this pipeline can run, it is a SiT (arXiv:2401.08740), which predicts flow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from raydmd.errors import InputError
from raydmd.models.autoencoder import ImageAutoencoder
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.classes import class_rows, labels_of
from raydmd.models.family import Family
from raydmd.models.schedulers import FLOW_STEPS, check_table, table_process, table_scheduler
from raydmd.process import Prediction, RectifiedFlow, VariancePreserving

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from raydmd import recipe as recipes
    from raydmd.recipe_method import Method

FLOW = "FlowMapEulerDiscreteScheduler"
NONE = 1000
"""The class that the stock pipeline guides away from."""


class DitDenoiser(Denoiser):
    """One DiTTransformer2DModel.

    Args:
        network: the transformer.
        process: whose times the network is told.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(
        self,
        network: DiTTransformer2DModel,
        process: RectifiedFlow | VariancePreserving,
        *,
        autocast: torch.dtype,
    ) -> None:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        super().__init__(network, network.transformer_blocks, width=width, autocast=autocast)
        self._process = process
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # in training it would drop classes, by torch's global generator

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are classes."""
        p = self._process
        time = p.index(t.float()) if isinstance(p, VariancePreserving) else t.float() * FLOW_STEPS
        out = self.call(time, exactly={"class_labels": labels_of(cond)}, hidden_states=x_t)
        return out[:, : x_t.shape[1]]


class Dit(Family):
    """A DiTPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size is not its network's.
    """

    pipeline = DiTPipeline
    adapters = False
    asked = "class_labels=[0]"
    text_parts = ()
    process: RectifiedFlow | VariancePreserving

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("transformer", "vae", "scheduler")
        self.process, self.prediction = self._told()
        self.autoencoder = ImageAutoencoder(self.path, self.revision, centre="none")
        config = self._config(DiTTransformer2DModel, "transformer")
        side = config["sample_size"] * self.autoencoder.scale
        self._shape = self._image(channels=config["in_channels"], cell=config["patch_size"], side=side, only=True)

    def _told(self) -> tuple[RectifiedFlow | VariancePreserving, Prediction]:
        if self._index["scheduler"][1] == FLOW:
            return RectifiedFlow(), "flow"
        return table_process(self.path, self._config(DDIMScheduler, "scheduler"))

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        if method.boundaries:
            raise InputError(
                f"method.boundaries={list(method.boundaries)} does not fit {self.path!r}: in a DiTPipeline the experts "
                "of several phases cannot take turns. Set method.boundaries=[]"
            )
        if isinstance(self.process, VariancePreserving):
            check_table(self.path, self.process, method)
        elif method.solver == "renoise":
            raise InputError(
                f"method.solver=renoise does not fit {self.path!r}: the scheduler of flow models that its pipeline can "
                "run puts no fresh noise in. Set method.solver=euler"
            )

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> DitDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        return DitDenoiser(self._load(DiTTransformer2DModel, expert, dtype=dtype), self.process, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        return class_rows(texts, classes=NONE, none=NONE, path=self.path)

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; a prompt is one number."""
        return 1

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """See :class:`~raydmd.models.family.Family`."""
        if isinstance(self.process, VariancePreserving):
            return table_scheduler(self.process, self.prediction, steps=steps, stochastic=stochastic)
        from diffusers import FlowMapEulerDiscreteScheduler  # which older versions lack, and DiTs do not need

        return FlowMapEulerDiscreteScheduler(num_train_timesteps=FLOW_STEPS, shift=shift)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        return {"num_inference_steps": steps, "guidance_scale": 1.0}

    def _text_pipeline(self) -> DiTPipeline:
        return DiTPipeline(transformer=None, vae=None, scheduler=None)
