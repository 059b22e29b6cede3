"""The ``method.gan`` section: a discriminator on the fake score's features, and the real samples it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raydmd.recipe_types import Positive, Section, TermWeight, Weight, ever_positive

SIGMA = 0.1


class R1(Section):
    """A penalty on the discriminator's gradient at real samples."""

    kind: Literal["approximate", "exact"] = "approximate"
    """``approximate``: a finite difference, one more forward (Seaweed-APT). ``exact``: differentiated twice; for small
    networks."""
    weight: Positive = 1.0
    """Gamma, within the discriminator's loss and so under ``critic_weight`` too."""
    sigma: Positive = SIGMA
    """Step of the finite difference, in units of the latent: small steps drown in a deep bf16 network's rounding."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        if self.kind == "exact" and self.sigma != SIGMA:
            raise ValueError(f"sigma={self.sigma} does nothing with kind=exact; leave it out")
        return self


class Gan(Section):
    """DMD2's GAN (arXiv:2405.14867, section 4.3): heads on the fake network's blocks tell real from generated.

    Both kinds are judged at noise levels of their own, drawn where the fake score trains.
    """

    data: Path
    """A folder (searched through) or a file: images, videos, or latents encoded before (safetensors with ``latents``
    ``(N, *latent)``, normalised as the denoiser sees them)."""
    captions: Path | None = None
    """Captions of images and videos, a line each: file name within ``data``, tab, caption. Default: the ``.txt`` beside
    each file; beside latents it has a line per sample. What has no caption is judged without prompt, as is a generated
    sample for each such real one."""
    weight: TermWeight = 3e-3
    """In the student's loss. The paper: 3e-3 (ImageNet), 1e-3 (SD1.5), 5e-3 (SDXL)."""
    critic_weight: Weight = 1e-2
    """Of the discriminator in the fake score's loss."""
    r1: R1 | None = None
    depths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.5, 0.75, 1.0)
    """Which blocks the head listens to, as shares of the network's depth."""
    rate: Positive | None = None
    """Of the head, which starts from nothing; default: ``training.fake.rate``."""

    @model_validator(mode="after")
    def _both_sides_play(self) -> Self:
        if not ever_positive(self.weight):
            raise ValueError("weight=0 trains a discriminator that the student never hears; leave gan out")
        if not ever_positive(self.critic_weight):
            raise ValueError("critic_weight=0 leaves the discriminator untrained")
        return self
