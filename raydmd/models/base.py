"""What the rest of the house knows of a model: denoisers by expert, conditions by id, a family to make them.

Latents everywhere are normalised as the denoiser sees them, shape ``(B, *latent_shape)``, fp32 outside
the network. This module knows no diffusers class and no Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from raydmd.guidance import Guidance
    from raydmd.process import Prediction, Process


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Encoded prompts, addressed by row; row 0 is the negative prompt.

    Attributes:
        embeds: ``(N, L, D)``, zero where padded.
    """

    embeds: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Conditions of the given ids, ``(len(ids), L, D)``."""
        return self.embeds[torch.as_tensor(list(ids))]


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

    Attributes:
        prediction: what :meth:`forward` returns.
        network: the wrapped diffusers module, whose parameters are trained, sharded and saved.
        blocks: the network's blocks in order, each of which puts out hidden states ``(B, tokens, width)``.
        width: of the hidden states.
    """

    prediction: Prediction
    network: Any
    blocks: Sequence[nn.Module]
    width: int

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The raw prediction.

        Args:
            x_t: noisy latents ``(B, *latent)``, fp32.
            t: times ``(B,)`` in [0, 1], 1 = noise, fp32.
            cond: conditions ``(B, L, D)``.

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

    def raw(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The routed expert's own prediction, shape of ``x_t``.

        Raises:
            ValueError: if the times of the batch belong to different experts.
        """
        names = {self.routing.expert(v) for v in t.tolist()}
        if len(names) != 1:
            raise ValueError(f"one batch, one expert: times {t.tolist()} route to {sorted(names)}")
        output: Tensor = self.modules[names.pop()](x_t, t, cond)
        return output

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The routed expert's prediction of the clean latent, shape of ``x_t``."""
        return self.process.to_x0(self.prediction, x_t, self.raw(x_t, t, cond), t)

    def guided_x0(self, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, guidance: Guidance) -> Tensor:
        """Guided prediction of the clean latent; both halves in one forward, shape of ``x_t``."""
        if not guidance.active:
            return self.x0(x_t, t, cond)
        return guidance.combine(*self.both_x0(x_t, t, cond, uncond))

    def both_x0(self, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction of the clean latent in one forward, each of shape ``x_t``."""
        both = self.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, uncond]))
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
    """One family of pipelines, bound to one folder or hub id. Nothing else knows diffusers."""

    process: Process
    prediction: Prediction
    max_experts: int
    """How many experts the family's pipeline class can hold, and so how many phases can be exported."""

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

    @abstractmethod
    def encode(self, prompts: Sequence[str], cache: Path) -> Path:
        """Encode prompts (with the negative prompt as row 0) once; cached by content.

        Returns:
            The safetensors file with ``embeds`` of shape ``(1 + len(prompts), L, D)``.
        """

    @abstractmethod
    def text_length(self) -> int:
        """Tokens a prompt is padded to."""

    @abstractmethod
    def render(self, latents: Tensor) -> Tensor:
        """Pixels from normalised latents, differentiable and not clamped: ``(B, frames, 3, H, W)``, fp32.

        In [0, 1] but for where the decoder overshoots; there a clamp would end the gradient. The decoder itself
        is frozen.
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

    @abstractmethod
    def export_lora(
        self,
        folder: Path,
        layers: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write adapters, one mapping per expert under peft's names, in diffusers' naming."""
