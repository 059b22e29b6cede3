"""A discriminator on the features of a denoiser's blocks: DMD2's GAN with a transformer's blocks in the U-Net's place.

Knows blocks and their width (:class:`~raydmd.models.base.Denoiser`), no family and no loss.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from raydmd.models.base import Conditions, Denoiser, Experts


class Head(nn.Module):
    """From the hidden states of a few blocks to one logit per sample, in fp32.

    Per block one learned query attends to all tokens; what they find is joined and projected (as the heads of
    Seaweed-APT, arXiv:2501.08316, section 3.2, but without their further layers).

    Args:
        width: of the hidden states.
        blocks: how many blocks are listened to.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(blocks, width) / math.sqrt(width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.values = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.join = nn.Sequential(nn.LayerNorm(blocks * width), nn.Linear(blocks * width, width), nn.SiLU())
        self.logit = nn.Linear(width, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``(B,)`` from hidden states ``(B, tokens, width)``, one per block."""
        found = []
        for query, norm, value, feature in zip(self.queries, self.norms, self.values, features, strict=True):
            tokens = norm(feature.float())
            attention = (tokens @ query / math.sqrt(len(query))).softmax(1)
            found.append(value((attention[:, None] @ tokens)[:, 0]))
        logits: Tensor = self.logit(self.join(torch.cat(found, 1)))[:, 0]
        return logits


class Discriminator:
    """The fake role as a judge: its networks, and a head for each.

    Args:
        experts: the fake score as it trains, maybe wrapped for several ranks.
        heads: by expert, as they train.
        denoisers: by expert, without any wrapper.
        bare: the heads without any wrapper.
        depths: which blocks are listened to, see :func:`listened`.
    """

    def __init__(
        self,
        experts: Experts,
        heads: Mapping[str, nn.Module],
        *,
        denoisers: Mapping[str, Denoiser],
        bare: Mapping[str, nn.Module],
        depths: Sequence[float],
    ) -> None:
        self.experts = experts
        self._heads, self._denoisers, self._bare = dict(heads), dict(denoisers), dict(bare)
        self._depths = tuple(depths)

    def expert(self, t: Tensor) -> str:
        """The expert that judges at times ``(B,)``, which all route alike."""
        return self.experts.routing.expert(float(t[0]))

    def logits(self, x_t: Tensor, t: Tensor, cond: Conditions, *, twice: bool = False) -> Tensor:
        """Logits ``(B,)`` with gradient to networks and heads; the caller's backward pass must reach both.

        Args:
            x_t: noisy latents ``(B, *latent)``.
            t: their times ``(B,)``, all one expert's.
            cond: B conditions.
            twice: whether the logits are differentiated twice, which fused attention does not know.
        """
        name = self.expert(t)
        exact = sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext()
        with exact, taken(self._denoisers[name], self._depths) as features:
            out = self.experts.raw(x_t, t, cond)
        return _with(self._heads[name](features), out)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Networks and heads without gradient, for the student's update."""
        modules = (*self._denoisers.values(), *self._bare.values())
        found = [p for module in modules for p in module.parameters() if p.requires_grad]
        for p in found:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in found:
                p.requires_grad_(True)

    def frozen_logits(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """Logits ``(B,)`` with gradient to ``x_t`` alone; to be differentiated within :meth:`frozen`."""
        name = self.expert(t)
        with taken(self._denoisers[name], self._depths) as features:
            out = self._denoisers[name](x_t, t, cond)
        return _with(self._bare[name](features), out)


def _with(logits: Tensor, out: Tensor) -> Tensor:
    """The logits, with a gradient of zero to the network's output: FSDP gathers what a backward pass needs there."""
    return logits + 0 * out.flatten(1).sum(1)


def make_head(denoiser: Denoiser, depths: Sequence[float], *, seed: int) -> Head:
    """A head for a network; its start depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Head(denoiser.width, len(listened(len(denoiser.blocks), depths)))


def listened(blocks: int, depths: Sequence[float]) -> list[int]:
    """Indices of the blocks at the given shares of the depth, rising, none twice."""
    return sorted({max(math.ceil(depth * blocks - 1e-9), 1) - 1 for depth in depths})


@contextlib.contextmanager
def taken(denoiser: Denoiser, depths: Sequence[float]) -> Iterator[list[Tensor]]:
    """What the blocks put out during one forward within the context, in the order of the blocks."""
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found = output[-1] if isinstance(output, tuple) else output
        features.append(found.flatten(2).mT if found.ndim == 4 else found)  # a U-Net's block has a map

    handles = [denoiser.blocks[i].register_forward_hook(keep) for i in listened(len(denoiser.blocks), depths)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
