"""EDM-type networks on pixels: ConsistencyModelPipeline, whose U-Net and scheduler have EDM's preconditioning.

What is peculiar to them stays here: there is no autoencoder, and latents are pixels in units of the data's standard
deviation; the network is given ``250 log sigma`` and a picture of unit variance; a prompt is the number of a class.
OpenAI's ImageNet-64 networks are of this kind; the CIFAR-10 teachers of Karras et al. (arXiv:2206.00364) are other
U-Nets with the same preconditioning (table 1), and have no class in diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.classes import class_rows, labels_of
from raydmd.models.family import Family
from raydmd.process import EDM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd import recipe as recipes
    from raydmd.recipe_method import Method

TIME, LEAST = 250.0, 1e-44
"""As the stock scheduler turns sigmas into times."""


class EdmDenoiser(Denoiser):
    """One UNet2DModel.

    Args:
        network: the U-Net.
        process: in units of the data's standard deviation.
        sigma_data: that.
        autocast: the dtype of the forward pass; parameters keep theirs.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, network: UNet2DModel, process: EDM, *, sigma_data: float, autocast: torch.dtype) -> None:
        width = network.config.block_out_channels[-1]
        super().__init__(network, (network.mid_block,), width=width, autocast=autocast)
        self._process, self._sigma_data = process, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """See :class:`~raydmd.models.base.Denoiser`; the conditions are classes."""
        sigma = self._process.sigma(t.float())
        scaled = x_t / (sigma.square() + 1).sqrt().view(-1, 1, 1, 1)
        labelled = self.network.config.num_class_embeds is not None
        exactly = {"class_labels": labels_of(cond)} if labelled else {}
        return self.call(TIME * torch.log(sigma * self._sigma_data + LEAST), exactly=exactly, sample=scaled)


class Pixels:
    """In the place of an autoencoder: pixels in units of the data's standard deviation.

    Args:
        sigma_data: that, of pixels in [-1, 1].
    """

    scale = 1

    def __init__(self, sigma_data: float) -> None:
        self._sigma_data = sigma_data

    def stock(self) -> nn.Module | None:
        """See :class:`~raydmd.models.autoencoder.Autoencoder`; there is none."""
        return None

    def render(self, latents: Tensor) -> Tensor:
        """See :class:`~raydmd.models.autoencoder.Autoencoder`."""
        return (latents * self._sigma_data / 2 + 0.5)[:, None]

    def encode(self, pixels: Tensor) -> Tensor:
        """See :class:`~raydmd.models.autoencoder.Autoencoder`."""
        return (2 * pixels[:, 0] - 1) / self._sigma_data


class Edm(Family):
    """A ConsistencyModelPipeline in a folder or on the hub.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Raises:
        InputError: if it is incomplete, or the asked size is not its network's.
    """

    pipeline = ConsistencyModelPipeline
    adapters = False
    asked = "class_labels=[0]"
    network = "unet"
    prediction = "edm"
    text_parts = ()
    process: EDM

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        super().__init__(settings, index)
        self._require("unet", "scheduler")
        self._schedule = self._config(CMStochasticIterativeScheduler, "scheduler")
        self._unet = self._config(UNet2DModel, "unet")
        self._sigma_data = float(self._schedule["sigma_data"])
        low, high = (float(self._schedule[key]) / self._sigma_data for key in ("sigma_min", "sigma_max"))
        self.process = EDM(low, high, float(self._schedule["rho"]))
        self.autoencoder = Pixels(self._sigma_data)
        side = self._unet["sample_size"]
        self._shape = self._image(channels=self._unet["in_channels"], cell=1, side=side, only=True)

    def check(self, method: Method) -> None:
        """See :class:`~raydmd.models.family.Family`."""
        wanted = {"shift": 1.0, "guidance": 1.0, "steps": 1}
        for key, value in wanted.items():
            if getattr(method, key) != value:
                raise InputError(
                    f"method.{key}={getattr(method, key)} does not fit {self.path!r}: its pipeline knows no guidance, "
                    f"and its scheduler walks our times in one step only. Set method.{key}={value:g}"
                )

    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> EdmDenoiser:
        """See :class:`~raydmd.models.family.Family`."""
        network = self._load(UNet2DModel, expert, dtype=dtype)
        return EdmDenoiser(network, self.process, sigma_data=self._sigma_data, autocast=autocast)

    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        return class_rows(texts, classes=self._unet.get("num_class_embeds") or 1, none=0, path=self.path)

    def text_length(self) -> int:
        """See :class:`~raydmd.models.family.Family`; a prompt is one number."""
        return 1

    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> CMStochasticIterativeScheduler:
        """See :class:`~raydmd.models.family.Family`."""
        told = {k: self._schedule[k] for k in ("sigma_max", "sigma_data", "rho")}
        # One training step more than steps begins at the largest sigma; without a least one its x0 is EDM's.
        return CMStochasticIterativeScheduler(
            **told, num_train_timesteps=steps + 1, sigma_min=LEAST, s_noise=1.0, clip_denoised=False
        )

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """See :class:`~raydmd.models.family.Family`."""
        return {"num_inference_steps": steps}

    def _text_pipeline(self) -> ConsistencyModelPipeline:
        return ConsistencyModelPipeline(unet=None, scheduler=None)
