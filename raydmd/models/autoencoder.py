"""Pixels to normalised latents and back: the autoencoders that families share.

Latents are normalised as the denoiser sees them; pixels are ``(B, frames, 3, H, W)`` in [0, 1], an image one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from raydmd.models.reading import understood

if TYPE_CHECKING:
    from collections.abc import Mapping


class Autoencoder(Protocol):
    """What a family needs of one. It is frozen, in fp32, and loaded where it is first used."""

    scale: int
    """Pixels to a latent, along height and width."""

    def stock(self) -> nn.Module | None:
        """The diffusers module as it was saved, for export; ``None`` where the pipeline has none."""

    def render(self, latents: Tensor) -> Tensor:
        """Pixels ``(B, frames, 3, H, W)`` of normalised latents, differentiable and not clamped."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents ``(B, *latent)`` of pixels, without noise and without gradient."""


class ImageAutoencoder:
    """An AutoencoderKL: latents are ``(z - centre) * scaling_factor / spread``.

    Args:
        path: the pipeline's folder or hub id.
        revision: keywords of ``from_pretrained`` that name it.
        centre: what its pipeline goes by: the VAE's ``shift_factor``, its ``statistics`` per channel where it has
            some (SDXL), or ``none``. Centre is 0 and spread 1 but for that.
    """

    def __init__(
        self, path: str, revision: Mapping[str, str], *, centre: Literal["shift_factor", "statistics", "none"]
    ) -> None:
        self._path, self._revision, self._centre = path, dict(revision), centre
        self.config: dict[str, Any] = AutoencoderKL.load_config(path, subfolder="vae", **self._revision)
        self.scale = 2 ** (len(self.config["block_out_channels"]) - 1)
        self._loaded: AutoencoderKL | None = None

    def stock(self) -> AutoencoderKL:
        """See :class:`Autoencoder`."""
        return AutoencoderKL.from_pretrained(self._path, subfolder="vae", use_safetensors=True, **self._revision)

    def render(self, latents: Tensor) -> Tensor:
        """See :class:`Autoencoder`."""
        vae, centre, spread = self._on(latents.device)
        image = vae.decode(latents * spread / vae.config.scaling_factor + centre, return_dict=False)[0]
        pixels: Tensor = (image / 2 + 0.5)[:, None]
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See :class:`Autoencoder`."""
        vae, centre, spread = self._on(pixels.device)
        mode = vae.encode(2 * pixels[:, 0] - 1).latent_dist.mode()
        latents: Tensor = (mode - centre) * vae.config.scaling_factor / spread
        return latents

    def _on(self, device: torch.device) -> tuple[AutoencoderKL, Tensor | float, Tensor | float]:
        """The module, its latents' centre and their spread."""
        if self._loaded is None:
            with understood(f"model {self._path!r}, vae"):
                loaded = AutoencoderKL.from_pretrained(
                    self._path, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32, **self._revision
                )
            self._loaded = loaded.to(device)
            self._loaded.requires_grad_(False)
        config = self._loaded.config
        if self._centre == "shift_factor":
            return self._loaded, config.shift_factor or 0.0, 1.0
        if self._centre == "statistics" and config.latents_mean is not None and config.latents_std is not None:
            mean, std = (
                torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
            )
            return self._loaded, mean, std
        return self._loaded, 0.0, 1.0


class VideoAutoencoder:
    """Wan's autoencoder or one built like it: latents are normalised by statistics per channel.

    Args:
        kind: the diffusers class.
        path: the pipeline's folder or hub id.
        revision: keywords of ``from_pretrained`` that name it.
        still: latents have no axis of frames: the family makes images.
    """

    def __init__(self, kind: Any, path: str, revision: Mapping[str, str], *, still: bool = False) -> None:
        self._kind, self._path, self._revision, self._still = kind, path, dict(revision), still
        self.config: dict[str, Any] = kind.load_config(path, subfolder="vae", **self._revision)
        downs = self.config.get("temperal_downsample", [False, True, True])
        self.frames: int = self.config.get("scale_factor_temporal") or 2 ** sum(downs)
        self.scale: int = self.config.get("scale_factor_spatial") or 2 ** len(downs)
        self._loaded: Any = None

    def stock(self) -> nn.Module:
        """See :class:`Autoencoder`."""
        module: nn.Module = self._kind.from_pretrained(
            self._path, subfolder="vae", use_safetensors=True, **self._revision
        )
        return module

    def render(self, latents: Tensor) -> Tensor:
        """See :class:`Autoencoder`."""
        vae, mean, inverse_std = self._on(latents.device)
        z = latents[:, :, None] if self._still else latents
        # A division by 1/std and not a product with std: the stock pipelines' rounding, so their pixels.
        video = vae.decode(z / inverse_std + mean, return_dict=False)[0]
        pixels: Tensor = (video / 2 + 0.5).permute(0, 2, 1, 3, 4)
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See :class:`Autoencoder`."""
        vae, mean, inverse_std = self._on(pixels.device)
        video = 2 * pixels.permute(0, 2, 1, 3, 4) - 1
        latents: Tensor = (vae.encode(video).latent_dist.mode() - mean) * inverse_std
        return latents[:, :, 0] if self._still else latents

    def _on(self, device: torch.device) -> tuple[Any, Tensor, Tensor]:
        """The module, and its latents' mean and inverse standard deviation, ``(1, C, 1, 1, 1)``."""
        if self._loaded is None:
            with understood(f"model {self._path!r}, vae"):
                loaded = self._kind.from_pretrained(
                    self._path, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32, **self._revision
                )
            self._loaded = loaded.to(device)
            self._loaded.requires_grad_(False)
        view = (1, -1, 1, 1, 1)
        mean = torch.tensor(self._loaded.config.latents_mean, device=device).view(view)
        inverse_std = 1.0 / torch.tensor(self._loaded.config.latents_std, device=device).view(view)
        return self._loaded, mean, inverse_std
