"""What the rest of the house knows of a model: denoisers by expert, conditions by id.

Latents everywhere are normalised as the denoiser sees them, shape ``(B, *latent_shape)``, fp32 outside
the network. This module knows no diffusers class and no Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from raydmd.guidance import Guidance
    from raydmd.models.tokens import TokenGroup
    from raydmd.process import Prediction, Process


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Encoded prompts: a run's whole table, whose row 0 is the negative prompt, or the rows of one batch.

    Attributes:
        embeds: ``(N, L, D)``, zero where padded if the family has no mask.
        pooled: ``(N, P)``, for families that have a vector per prompt beside its tokens'.
        mask: ``(N, L)``, bool, for families that tell tokens from padding.
        picture: ``(N, *latent)``, for families that start from a picture.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    picture: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        wanted = {
            "embeds": ("N, L, D", 3),
            "pooled": ("N, P", 2),
            "mask": ("N, L", 2),
            "picture": ("N, C, T, H, W", 5),
        }
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

    @classmethod
    def read(cls, file: Path) -> Self:
        """As :meth:`save` wrote them; mapped, so that processes of a node share the pages.

        Raises:
            InputError: if the file is missing or holds no conditions.
        """
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not iterable
            if "embeds" not in found or found.keys() - {"embeds", "pooled", "mask", "picture"}:
                raise InputError(f"holds {', '.join(found) or 'nothing'} instead of embeds, pooled, mask and picture")
            return cls(**found)
        except (OSError, SafetensorError, InputError) as error:
            raise InputError(f"conditions {file}: {error}") from None

    @classmethod
    def table(cls, parts: Sequence[Self]) -> Self:
        """One table of several with the same row 0, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        longest, rows = max(part.embeds.shape[1] for part in parts), 1 + sum(len(part) - 1 for part in parts)
        found = {}
        for name, first in parts[0].tensors().items():
            length = (longest, *first.shape[2:]) if name in ("embeds", "mask") else first.shape[1:]
            whole, end = first.new_zeros(rows, *length), 1
            for part in parts:  # one after the other into its place: a table may be as large as memory allows
                value = part.tensors()[name]
                place = whole[end : end + len(part) - 1]
                (place[:, : value.shape[1]] if name in ("embeds", "mask") else place).copy_(value[1:])
                end += len(part) - 1
            (whole[0, : first.shape[1]] if name in ("embeds", "mask") else whole[0]).copy_(first[0])
            found[name] = whole
        return cls(**found)

    def padded(self, multiple: int) -> Self:
        """The same with texts of a length that divides by ``multiple``; those without a mask can't be told longer."""
        missing = -self.embeds.shape[1] % multiple
        if self.mask is None or not missing:
            return self
        longer = {n: v if n not in ("embeds", "mask") else _lengthen(v, missing) for n, v in self.tensors().items()}
        return type(self)(**longer)

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


def _lengthen(value: Tensor, by: int) -> Tensor:
    return torch.cat([value, value.new_zeros(value.shape[0], by, *value.shape[2:])], dim=1)


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
        blocks: the network's blocks in order, each of which puts out hidden states ``(B, tokens, width)`` or a map
            ``(B, width, H, W)`` of them, alone or last in a tuple.
        width: of the hidden states.
        autocast: the dtype of the forward pass; parameters keep theirs.

    Attributes:
        lora_targets: ends of the names of modules that adapters go to unless a recipe says otherwise: all attention
            and feed-forward projections.
    """

    lora_targets: tuple[str, ...]
    adapter: str | None = None
    """Which of the network's adapters is this one's."""
    switch: Callable[[str | None], None] | None = None
    """Of a network that several share, each with an adapter of its own: turns one on and the others off."""
    tokens: TokenGroup | None = None
    """Ranks that share each sample's tokens with this one, where there are such."""
    keeping: Callable[[], AbstractContextManager[None]] | None = None
    """The context of forward passes with gradient: where what they keep for the backward pass goes."""
    idle: tuple[str, ...] = ()
    """Modules whose output nothing reads, so that their parameters never get a gradient; they stay as they are."""

    def __init__(self, network: Any, blocks: Iterable[nn.Module], *, width: int, autocast: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.blocks = tuple(blocks)
        self.width = width
        self._autocast = autocast
        self._typical: list[nn.Parameter] = []  # in a list, or it would be registered as the denoiser's own

    def call(self, timestep: Tensor, *, exactly: Mapping[str, Any] | None = None, **inputs: Tensor) -> Tensor:
        """The network's output in fp32.

        Args:
            timestep: in the network's own units; as it is, since bf16 would round it (some round it themselves).
            exactly: what else goes in as it is.
            **inputs: what goes in in the dtype of the forward pass.
        """
        group = self.tokens
        with self.running(timestep.device) as dtype:
            cast = {name: (group.enter(value) if group else value).to(dtype) for name, value in inputs.items()}
            output: Tensor = self.network(timestep=timestep, return_dict=False, **cast, **(exactly or {}))[0]
        return group.leave(output.float()) if group else output.float()

    def beside(self, adapter: str | None, *, autocast: torch.dtype) -> Self:
        """Another one on the same network, with an adapter (``None``: with none) and a dtype of its own."""
        other = copy(self)
        other.adapter, other._autocast = adapter, autocast
        return other

    @contextmanager
    def running(self, device: torch.device) -> Iterator[torch.dtype]:
        """The context of a forward pass, and the dtype that its inputs have."""
        if self.switch is not None:
            self.switch(self.adapter)
        plain = self._autocast == torch.float32
        keeping = self.keeping() if self.keeping and torch.is_grad_enabled() else nullcontext()
        with keeping, torch.autocast(device.type, self._autocast, enabled=not plain):
            yield self._own_dtype() if plain else self._autocast

    def _own_dtype(self) -> torch.dtype:
        """The network's dtype. diffusers goes through all of its parameters for that, which is 5% of a small step."""
        if not self._typical:
            dtype = self.network.dtype
            self._typical.append(next(p for p in self.network.parameters() if p.dtype == dtype))
        return self._typical[0].dtype

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


Rescale = Callable[[Tensor, Tensor], Tensor]
"""From the conditional and the guided raw prediction to the one that a stock pipeline goes on with."""


class Experts:
    """The experts of one role, called through one door.

    A batch goes to one expert: all its times must route alike, so that every rank runs the same module.

    Args:
        modules: by name.
        routing: which expert serves which time.
        process: the noise process.
        prediction: what the networks predict.
        rescale: what the stock pipeline does to a guided prediction, if anything.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        routing: Routing,
        process: Process,
        prediction: Prediction,
        rescale: Rescale | None = None,
    ):
        self._rescale = rescale
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

    def guided_x0(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditions,
        uncond: Conditions,
        guidance: Guidance,
        *,
        as_stock: bool = False,
    ) -> Tensor:
        """Guided prediction of the clean latent; both halves in one forward, shape of ``x_t``.

        ``as_stock`` does what the stock pipeline does beside it, to sample as it does; scores stay linear in the scale.
        """
        if not guidance.active:
            return self.x0(x_t, t, cond)
        if as_stock and self._rescale:
            first, second = self.raw(*_twice(x_t, t, cond, uncond)).chunk(2)
            output = self._rescale(first, guidance.combine(first, second))
            return self.process.to_x0(self.prediction, x_t, output, t)
        return guidance.combine(*self.both_x0(x_t, t, cond, uncond))

    def both_x0(self, x_t: Tensor, t: Tensor, cond: Conditions, uncond: Conditions) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction of the clean latent in one forward, each of shape ``x_t``."""
        first, second = self.x0(*_twice(x_t, t, cond, uncond)).chunk(2)
        return first, second


def _twice(x_t: Tensor, t: Tensor, cond: Conditions, uncond: Conditions) -> tuple[Tensor, Tensor, Conditions]:
    return torch.cat([x_t, x_t]), torch.cat([t, t]), cond.join(replace(uncond, picture=cond.picture))


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen pipeline, as much of it as a role needs.

    Attributes:
        experts: its denoisers.
        shape: of one sample.
    """

    experts: Experts
    shape: Shape
