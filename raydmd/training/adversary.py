"""A worker's discriminator: heads made for a fake score, and both put together with the real samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.errors import RunFailed
from raydmd.methods.gan import Adversary
from raydmd.models.discriminator import Discriminator, Head, make_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from raydmd.data.real import RealData
    from raydmd.models.base import Denoiser
    from raydmd.process import Process
    from raydmd.recipe_gan import Gan
    from raydmd.training.roles import TrainedRole


def make_heads(gan: Gan | None, fake: Mapping[str, Denoiser], *, seed: int, device: torch.device) -> dict[str, Head]:
    """A head per expert of the fake score; none without a GAN."""
    return {e: make_head(d, gan.depths, seed=seed).to(device) for e, d in fake.items()} if gan else {}


def build_adversary(gan: Gan | None, fake: TrainedRole, process: Process, real: RealData | None) -> Adversary | None:
    """The GAN on a fake score, if there is one.

    Raises:
        RunFailed: if there is one but no real samples.
    """
    if gan is None:
        return None
    if real is None:
        raise RunFailed("method.gan is set, but the worker was given no real samples")
    judge = Discriminator(fake.experts, fake.heads, denoisers=fake.denoisers, bare=fake.bare_heads, depths=gan.depths)
    return Adversary(settings=gan, process=process, judge=judge, real=real)
