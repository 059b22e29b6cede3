"""What the rest of the house knows of a model: denoisers by expert, conditions by id, a family to make them.

Latents everywhere are normalised as the denoiser sees them, shape ``(B, *latent_shape)``, fp32 outside
the network. This module knows no diffusers class and no Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.models.identity import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from raydmd import recipe as recipes
    from raydmd.guidance import Guidance
    from raydmd.process import Prediction, Process


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Encoded prompts: a run's whole table, whose row 0 is the negative prompt, or the rows of one batch.

    Attributes:
        embeds: ``(N, L, D)``, zero where padded if the family has no mask.
        pooled: ``(N, P)``, for families that have a vector per prompt beside its tokens'.
        mask: ``(N, L)``, bool, for families that tell tokens from padding.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        wanted = {"embeds": ("N, L, D", 3), "pooled": ("N, P", 2), "mask": ("N, L", 2)}
        for name, tensor in self.tensors().items():
            shape, axes = wanted[name]
            if tensor.ndim != axes or not len(tensor) or len(tensor) != len(self.embeds):
                raise InputError(f"conditions: {name} must be ({shape}), given {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def rows(self, ids: Sequence[int]) -> Self:
        """Conditions of the given ids, in their order."""
        index = torch.as_tensor(list(ids))
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def where(self, keep: Tensor, other: Self) -> Self:
        """These where ``keep``, ``(N,)``, is true; elsewhere those of a single row."""
        theirs = self._alike(other)
        return type(self)(
            **{
                name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, theirs[name].to(value))
                for name, value in self.tensors().items()
            }
        )

    def join(self, *others: Self) -> Self:
        """These, then others of the same family."""
        theirs = [self._alike(other) for other in others]
        return type(self)(
            **{name: torch.cat([value, *(t[name] for t in theirs)]) for name, value in self.tensors().items()}
        )

    def save(self, file: Path) -> None:
        """Write them as safetensors, one tensor per attribute."""
        save_file({name: value.contiguous() for name, value in self.tensors().items()}, file)

    def _alike(self, other: Self) -> dict[str, Tensor]:
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            raise InputError(f"conditions of two families: one has {', '.join(mine)}, the other {', '.join(theirs)}")
        return theirs

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: change(value) for name, value in self.tensors().items()})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one sample looks like.

    Attributes:
        latent: shape of one latent, without the batch.
        frames: pixel frames; 1 for images.
        height: pixels.
        width: pixels.
    """

    latent: tuple[int, ...]
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Routing:
    """Which expert serves which noise level: experts from noisy to clean, boundaries between them, falling.

    A time equal to a boundary belongs to the noisier expert.
    """

    experts: tuple[str, ...]
    boundaries: tuple[float, ...] = ()

    def expert(self, t: float) -> str:
        """The expert for time ``t``, compared in fp32: times are fp32 tensors wherever they are used."""
        return self.experts[sum(bool(np.float32(t) < np.float32(b)) for b in self.boundaries)]


class Denoiser(ABC, nn.Module):
    """One expert: a network with its family's calling convention hidden.

    Args:
        network: the wrapped diffusers module, whose parameters are trained, sharded and saved.
        blocks: the network's blocks in order, each of which puts out hidden states ``(B, tokens, width)``, alone or
            last in a tuple.
        width: of the hidden states.
        autocast: the dtype of the forward pass; parameters keep theirs.

    Attributes:
        prediction: what :meth:`forward` returns.
        lora_targets: ends of the names of modules that adapters go to unless a recipe says otherwise: all attention
            and feed-forward projections.
    """

    prediction: Prediction
    lora_targets: tuple[str, ...]

    def __init__(self, network: Any, blocks: Iterable[nn.Module], *, width: int, autocast: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.blocks = tuple(blocks)
        self.width = width
        self._autocast = autocast

    def call(self, timestep: Tensor, **inputs: Tensor) -> Tensor:
        """The network's output in fp32; inputs go in its dtype, but times as they are: bf16 would round them."""
        plain = self._autocast == torch.float32
        dtype = self.network.dtype if plain else self._autocast
        with torch.autocast(timestep.device.type, self._autocast, enabled=not plain):
            cast = {name: value.to(dtype) for name, value in inputs.items()}
            output: Tensor = self.network(timestep=timestep, return_dict=False, **cast)[0]
        return output.float()

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The raw prediction.

        Args:
            x_t: noisy latents ``(B, *latent)``, fp32.
            t: times ``(B,)`` in [0, 1], 1 = noise, fp32.
            cond: B conditions.

        Returns:
            The prediction in fp32, shape of ``x_t``.
        """


class Experts:
    """The experts of one role, called through one door.

    A batch goes to one expert: all its times must route alike, so that every rank runs the same module.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        routing: Routing,
        process: Process,
        prediction: Prediction,
    ):
        self.modules = dict(modules)
        self.routing = routing
        self.process = process
        self.prediction: Prediction = prediction

    def raw(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The routed expert's own prediction, shape of ``x_t``.

        Raises:
            ValueError: if the times of the batch belong to different experts.
        """
        names = {self.routing.expert(v) for v in t.tolist()}
        if len(names) != 1:
            raise ValueError(f"one batch, one expert: times {t.tolist()} route to {sorted(names)}")
        output: Tensor = self.modules[names.pop()](x_t, t, cond)
        return output

    def x0(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """The routed expert's prediction of the clean latent, shape of ``x_t``."""
        return self.process.to_x0(self.prediction, x_t, self.raw(x_t, t, cond), t)

    def guided_x0(self, x_t: Tensor, t: Tensor, cond: Conditions, uncond: Conditions, guidance: Guidance) -> Tensor:
        """Guided prediction of the clean latent; both halves in one forward, shape of ``x_t``."""
        if not guidance.active:
            return self.x0(x_t, t, cond)
        return guidance.combine(*self.both_x0(x_t, t, cond, uncond))

    def both_x0(self, x_t: Tensor, t: Tensor, cond: Conditions, uncond: Conditions) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction of the clean latent in one forward, each of shape ``x_t``."""
        both = self.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.join(uncond))
        first, second = both.chunk(2)
        return first, second


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen pipeline, as much of it as a role needs.

    Attributes:
        experts: its denoisers.
        shape: of one sample.
    """

    experts: Experts
    shape: Shape


class Family(ABC):
    """One family of pipelines, bound to one folder or hub id. Nothing else knows diffusers.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.
    """

    process: Process
    prediction: Prediction
    pipeline: Any
    """Its diffusers pipeline class."""
    max_experts: int
    """How many experts the family's pipeline class can hold, and so how many phases can be exported."""
    text_parts: tuple[str, ...]
    """The pipeline's parts that make conditions of prompts, where it has them."""

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        self.path = settings.path
        self._settings = settings
        self._index = index

    @abstractmethod
    def routing(self) -> Routing:
        """The teacher's experts."""

    @abstractmethod
    def shape(self) -> Shape:
        """Shape of one sample."""

    @abstractmethod
    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> Denoiser:
        """Load one expert's weights.

        Args:
            expert: one of the routing's.
            dtype: of the parameters.
            autocast: of the forward pass; fp32 runs in the parameters' own dtype.

        Raises:
            InputError: if the weights are missing or unreadable.
        """

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], cache: Path) -> Path:
        """Encode prompts (with the negative prompt as row 0) once; cached by content.

        Returns:
            The file, of ``1 + len(prompts)`` rows, for :func:`raydmd.models.load_conditions`.
        """
        length = self.text_length()
        texts = [self._settings.negative_prompt, *prompts]
        key = json.dumps([fingerprint(self._settings, self.conditioning()), length, texts]).encode()
        file = cache / f"{hashlib.sha256(key).hexdigest()[:24]}.safetensors"
        if not file.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            self._encode(texts, length).save(partial)
            partial.replace(file)
        return file

    def conditioning(self) -> tuple[str, ...]:
        """Those :attr:`text_parts` that this pipeline has."""
        return tuple(part for part in self.text_parts if self._has(part))

    @abstractmethod
    def _encode(self, texts: Sequence[str], length: int) -> Conditions:
        """Run the text encoders, fp32; called under ``no_grad``."""

    @abstractmethod
    def text_length(self) -> int:
        """Tokens a prompt is padded to."""

    @abstractmethod
    def render(self, latents: Tensor) -> Tensor:
        """Pixels from normalised latents, differentiable and not clamped: ``(B, frames, 3, H, W)``, fp32.

        An image is one frame. In [0, 1] but for where the decoder overshoots; there a clamp would end the gradient.
        The decoder itself is frozen.
        """

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] from normalised latents: ``(B, frames, 3, H, W)``, fp32, without gradient."""
        return self.render(latents).clamp(0, 1)

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised latents ``(B, *latent)`` of pixels in [0, 1], ``(B, frames, 3, H, W)``; fp32, without noise."""

    @abstractmethod
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
        """Write the student as a stock diffusers pipeline with its few-step scheduler set.

        ``stochastic`` sets a scheduler that puts fresh noise on each predicted x0.
        """

    @abstractmethod
    def usage(self, *, steps: int) -> str:
        """Python that samples an exported student with stock diffusers, for its model card."""

    def export_lora(
        self,
        folder: Path,
        layers: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write adapters, one mapping per expert under peft's names, in diffusers' naming.

        A file for each expert: the stock loaders take one expert a file.
        """
        for expert, weights in layers.items():
            self.pipeline.save_lora_weights(
                folder,
                transformer_lora_layers=dict(weights),
                transformer_lora_adapter_metadata=dict(metadata[expert]),
                weight_name=f"{expert}.safetensors",
            )

    @property
    def _revision(self) -> dict[str, str]:
        return {"revision": self._settings.revision} if self._settings.revision else {}

    def _has(self, part: str) -> bool:
        entry = self._index.get(part)
        return bool(entry and entry[0])

    def _require(self, *parts: str) -> None:
        missing = [part for part in parts if not self._has(part)]
        if missing:
            raise InputError(f"model {self.path!r} has no {', '.join(missing)}; a whole pipeline is needed")
