"""The ``method.regression`` section: DMD's paired regression, and how its noise-image pairs are made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from raydmd.recipe_types import Count, Fraction, NonNegative, Positive, Section, TermWeight, Word

SIDE = 224


class Regression(Section):
    """DMD's regression (arXiv:2311.18828, section 3.3): from a noise to the image that the teacher walks to from it.

    ``raydmd pairs`` makes the pairs and training reads them; both go by this section.
    """

    pairs: Path | None = None
    """Their folder; default: ``pairs-MODEL`` beside the runs."""
    loss: Literal["lpips", "l2", "ssim"] = "lpips"
    """``lpips`` (with VGG16) and ``ssim`` compare decoded frames one by one, ``l2`` compares latents."""
    weight: TermWeight = 0.25
    """Lambda."""
    batch: Count | None = None
    """Pairs per student update, over all workers; default: ``training.batch``."""
    steps: Count = 50
    """The teacher's, from noise to clean."""
    guidance: NonNegative | None = None
    """Of the teacher's walk; default: ``method.guidance``."""
    shift: Positive | None = None
    """Of the teacher's own grid; default: ``method.shift``."""
    frames: Count | None = None
    """Frames of each clip that are compared, evenly spaced (lpips, ssim); default: all."""
    side: Count | None = SIDE
    """Smaller frames are enlarged until their shorter side has so many pixels (lpips); ``null`` leaves them."""
    weights: Word | None = None
    """VGG16's ImageNet weights as torchvision publishes them, a file or a URL (lpips); default: torch hub's cache."""
    resample: Fraction = 0.0
    """Share of the pairs that is drawn in proportion to each pair's running error; the others come in turn."""
    verify: bool = True
    """Compare every shard with its checksum before the start; ``false`` looks at sizes alone."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        if self.loss == "l2" and self.frames is not None:
            raise ValueError("frames does nothing with loss=l2, which compares latents; leave it out")
        if self.loss != "lpips" and self.weights is not None:
            raise ValueError(f"weights does nothing with loss={self.loss}; leave it out")
        if self.loss != "lpips" and self.side != SIDE:
            raise ValueError(f"side does nothing with loss={self.loss}; leave it out")
        return self
