"""The ``evaluation`` section: what is measured after training, and by which networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydmd.recipe_method import Reward
from raydmd.recipe_types import Count, NonNegative, Positive, Section, Word


class Network(Section):
    """An image network whose features clips are compared by, beside the zoo's judges."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")]
    """In tables: ``frechet_NAME``, ``diversity_NAME`` and so on."""
    path: Word
    """A folder in transformers' format, or a hub id, e.g. ``facebook/dinov2-base``."""
    pooling: Literal["pooled", "tokens", "cls", "projection"] = "pooled"
    """Its pooled output, the mean of its tokens, the first of them, or CLIP's image embedding."""


class Lpips(Section):
    """LPIPS distances between samples of a prompt."""

    weights: Word | None = None
    """The VGG's own weights, a file; default: torchvision's download."""


class Evaluation(Section):
    """What is measured after training, of teacher, undistilled teacher and student on the same seeds."""

    samples: Count = 256
    """Clips per method. Without a judge and networks there are pictures, motion and timings only."""
    teacher_steps: Count = 40
    """Of the teacher whose clips a student is compared with, guided."""
    guidance: NonNegative | None = None
    """Of the teacher's clips that a student is compared with; default: ``method.guidance``."""
    shift: Positive | None = None
    """Of the teacher's steps; default: ``method.shift``."""
    per_prompt: Count = 1
    """Samples of each prompt, where no judge brings prompts of its own; diversity needs two."""
    networks: tuple[Network, ...] = ()
    """For Fréchet distance, diversity per prompt, precision, recall and Vendi score."""
    lpips: Lpips | None = None
    rewards: tuple[Reward, ...] = ()
    """Held out from training, each with a column of its own; kind ``clip`` is the CLIP score."""
    every: Annotated[int, Field(ge=0)] = 0
    """Cycles between evaluations of the student while it trains, each as it is then; 0: at the end alone."""
    grid: Count = 8
    """Rows of the contact sheet."""
    batch: Count = 64
    """Samples that are drawn and measured at once."""
    seed: int = 1_000_000
    """Of prompts and noise, which are the same for all that is measured."""
    timeout: Positive = 6 * 3600.0
    """Seconds that export and evaluation may take."""

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluation:
        names = [network.name for network in self.networks]
        if len(set(names)) < len(names):
            raise ValueError(f"networks must differ in name, given {', '.join(names)}")
        return self
