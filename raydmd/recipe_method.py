"""The ``method`` section: the papers' methods as settings of the same few parts.

A preset's name fills in what is not given; every other key may be set beside it, so a mixture of papers
is a preset with a part of another switched on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raydmd.process import step_grid
from raydmd.recipe_gan import Gan
from raydmd.recipe_regression import Regression
from raydmd.recipe_types import (
    Count,
    Finite,
    Fraction,
    NonNegative,
    Positive,
    Section,
    TermWeight,
    Times,
    Weight,
    Word,
    ever_positive,
    rising,
)

FLOOR = 1e-3
CAP = 10.0
LEAST_TIME = 1e-3
Schedule = Literal["coupled", "full", "constrained", "hybrid"]

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2311.18828: one step, held to noise-image pairs of the teacher
    "dmd": {"steps": 1, "regression": {}},
    # arXiv:2405.14867: backward simulation with fresh noise between the steps
    "dmd2": {"solver": "renoise"},
    # arXiv:2510.27684: an expert per phase, matched where the phase ends; its gradient (eq. 10) has no normaliser
    "phased": {"boundaries": (0.875,), "normaliser": "none"},
    # arXiv:2511.22677: guidance taken out of distribution matching, each at noise levels of its own; algorithm 1 adds
    # differences of clean predictions as they are, at uniform times
    "decoupled": {"solver": "renoise", "normaliser": "x0", "times_shift": 1.0, "fake_shift": 1.0, "decouple": {}},
    # arXiv:2602.07345: DMD2 whose two halves are weighed per sample by a reward; its eq. 10 has one level for both
    "amd": {"solver": "renoise", "decouple": {"schedule": "coupled"}, "adapt": {}},
    # arXiv:2602.03139: the first step follows the teacher, the others match distributions
    "dp_dmd": {"rollout": "unroll", "normaliser": "noisy_distance", "times": (0.0, 1.0), "anchor": {}},
}


class Decouple(Section):
    """Decoupled DMD (arXiv:2511.22677): distribution matching (DM) and guidance augmentation (CA) apart."""

    schedule: Schedule = "hybrid"
    """Where each renoises: ``coupled`` at one level with one noise (DMD); ``full`` each anywhere; ``constrained`` each
    cleaner than the student's input; ``hybrid`` CA cleaner than the input, DM anywhere."""
    match: Weight = 1.0
    """Of DM."""
    augment: Weight = 1.0
    """On top of CA's own ``guidance - 1``."""
    augment_times: Times = (0.02, 0.98)
    """CA's window before the shift; DM's is ``method.times``."""
    augment_times_end: Times | None = None
    """Where CA's window has moved to at a phase's end."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        rising("augment_times", self.augment_times)
        if self.augment_times_end is not None:
            rising("augment_times_end", self.augment_times_end)
        if self.schedule == "coupled" and (self.augment_times != (0.02, 0.98) or self.augment_times_end is not None):
            raise ValueError("augment_times do nothing with schedule=coupled, where CA renoises as DM does")
        if not ever_positive(self.match) and not ever_positive(self.augment):
            raise ValueError("match=0 and augment=0 leave the student no score to follow")
        return self


class Anchor(Section):
    """DP-DMD's diversity anchor (arXiv:2602.03139): the first step follows the teacher's own start."""

    steps: Count = 5
    """K, the teacher's steps that are followed."""
    of: Count = 30
    """The teacher's steps from noise to clean."""
    weight: TermWeight = 0.05
    """Lambda."""
    guidance: NonNegative | None = None
    """Of the teacher's walk; default: ``method.guidance``."""
    shift: Positive | None = None
    """Of the teacher's own grid; default: ``method.shift``."""
    detach: bool = True
    """Keep the other terms' gradient out of the first step; ``false`` is the paper's ablation, in full with
    ``rollout: unroll`` alone: a simulated rollout has a gradient at its exit step only."""

    @model_validator(mode="after")
    def _within_the_grid(self) -> Self:
        if self.steps > self.of:
            raise ValueError(f"steps={self.steps} of the teacher's {self.of} steps can't be followed")
        return self


class Moments(Section):
    """Decoupled DMD's mean-variance regulariser, a weak stand-in for distribution matching in its ablation."""

    weight: TermWeight = 1.0
    """Of the divergence from these moments."""
    mean: float = 0.0
    """Of a latent; the paper has 0.075 for SDXL."""
    variance: Positive = 1.0
    """Of a latent; the paper has 0.81 for SDXL."""


class Reward(Section):
    """One reward model, and its part in the sum: ``weight * (reward - mean) / scale``."""

    kind: Literal["zoo", "clip", "pick", "hps", "image_reward", "class"] = "zoo"
    path: Word | None = None
    """The judge's file (zoo; default: the model's own), a folder or hub id (clip, pick, hps; clip and pick have a
    default), a folder (image_reward), an image classifier's folder or hub id (class; default: the model's own)."""
    processor: Word | None = None
    """Folder or hub id of tokenizer and picture settings, where they aren't beside the model (clip, pick, hps)."""
    weight: Finite = 1.0
    mean: Finite = 0.0
    scale: Positive = 1.0
    frames: Count | None = None
    """Frames of each clip that are scored, evenly spaced; default 4. The zoo's judge reads whole clips."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        if self.path is None and self.kind in ("hps", "image_reward"):
            raise ValueError(f"a reward of kind {self.kind} needs a path")
        if self.kind == "zoo" and self.frames is not None:
            raise ValueError("frames does nothing with kind zoo, whose judge reads whole clips; leave it out")
        if self.kind in ("zoo", "image_reward", "class") and self.processor is not None:
            raise ValueError(f"processor does nothing with kind {self.kind}; leave it out")
        if self.weight == 0:
            raise ValueError("a reward of weight 0 does nothing; leave it out")
        return self


class Adapt(Section):
    """AMD (arXiv:2602.07345): each sample's DM and CA weights follow its reward within its prompt's group.

    The paper's text was not to be had: group size, strengths, clip and the fake score's weights are this project's
    reading, and settings for that reason.
    """

    group: Annotated[int, Field(ge=2)] = 4
    """Samples per prompt whose rewards are compared."""
    strength: Fraction = 0.5
    """s: weights lie in 1 - s .. 1 + s."""
    fake_strength: Fraction = 0.5
    """How much more the fake score learns from samples with a low reward."""
    clip: Positive = 1.0
    """Bound on the normalised advantage."""
    epsilon: Positive = 1e-4
    """Added to the group's standard deviation."""
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = (Reward(),)
    """Summed. What a student is rewarded by should not be what measures it."""


class Method(Section):
    """How the student is taught: rollout, score term, auxiliary terms."""

    name: Literal["dmd", "dmd2", "phased", "decoupled", "amd", "dp_dmd"] = "phased"
    """The preset whose settings hold where none is given."""
    steps: Count = 4
    """The student's, in training and as it is exported."""
    shift: Positive = 5.0
    """Of the student's grid of times: ``shift u / (1 + (shift - 1) u)`` of ``u = 1, 1 - 1/steps, ...``. Each model has
    its own."""
    boundaries: tuple[float, ...] = ()
    """Noise levels that end each phase but the last, falling. Phase k renoises above its own."""
    guidance: NonNegative = 4.0
    """Of the teacher; ``uncond + scale * (cond - uncond)``."""
    times: Times = (0.02, 0.98)
    """Where distribution matching renoises, before the shift."""
    times_end: Times | None = None
    """Where that window has moved to at a phase's end."""
    times_shift: Positive | None = None
    """Shift of the times at which the sample is renoised for the scores; default: ``shift``."""
    rollout: Literal["simulate", "unroll"] = "simulate"
    """``simulate`` leaves at a random step, which alone is differentiated (DMD2, Phased DMD); ``unroll``
    differentiates all steps of the phase (DP-DMD)."""
    solver: Literal["renoise", "euler"] = "euler"
    """Between steps, in training, in evaluation and in the exported scheduler: fresh noise on the predicted
    x0 (DMD2), or deterministic Euler."""
    normaliser: Literal["distance", "noisy_distance", "x0", "none"] = "distance"
    """``distance``: the difference of clean predictions over the sample's mean ``|x - D_real|`` (DMD2).
    ``noisy_distance``: over ``|x_t - D_real|`` (DP-DMD's code). ``x0``: that difference as it is (Decoupled DMD's
    algorithm 1). ``none``: the difference of scores (Phased DMD's equations), which weighs low noise more."""
    normaliser_floor: NonNegative = FLOOR
    """Smallest divisor, where ``normaliser`` is a distance."""
    fake_weight_cap: Positive = CAP
    """Cap on ``1 / sigma_{t|s}^2`` in the fake score's loss (Phased DMD, eq. 13)."""
    fake_shift: Positive | None = None
    """Shift of the fake score's times; default: ``shift``."""
    decouple: Decouple | None = None
    anchor: Anchor | None = None
    moments: Moments | None = None
    regression: Regression | None = None
    adapt: Adapt | None = None
    gan: Gan | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return _merged(PRESETS.get(str(given.get("name", "phased")), {}), given)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        rising("times", self.times)
        if self.times_end is not None:
            rising("times_end", self.times_end)
        if self.normaliser == "none" and self.normaliser_floor != FLOOR:
            raise ValueError(f"normaliser_floor={self.normaliser_floor} does nothing with normaliser=none")
        if not self.boundaries and self.fake_weight_cap != CAP:
            raise ValueError(f"fake_weight_cap={self.fake_weight_cap} does nothing without boundaries; leave it out")
        first = self._steps_of_phases()[0]
        if self.boundaries and self.solver == "renoise":
            raise ValueError("solver=renoise has no place in a phase that ends at a noise level; use solver=euler")
        if self.anchor and self.anchor.detach and first == 1:
            where = "phase 1 has" if self.boundaries else "the student has"
            raise ValueError(
                f"anchor trains the first step alone and {where} a single one, so nothing is left for matching; "
                "use more steps or anchor.detach=false"
            )
        for name, term in (("anchor", self.anchor), ("moments", self.moments)):
            if term and not ever_positive(term.weight):
                raise ValueError(f"{name}.weight=0 does nothing; leave {name} out")
        if self.normaliser == "none" and min(self.times[0], (self.times_end or self.times)[0]) < LEAST_TIME:
            raise ValueError(
                f"normaliser=none weighs by 1/t^2 towards low noise: times must start at {LEAST_TIME} or above"
            )
        if self.decouple and self.guidance == 1 and ever_positive(self.decouple.augment):
            raise ValueError("decouple.augment does nothing at guidance=1, where there is no guidance to augment with")
        if self.adapt and not self.decouple:
            raise ValueError(
                "adapt weighs matching and augmentation apart: give decouple too (schedule: coupled keeps DMD's levels)"
            )
        if self.moments and self.boundaries:
            raise ValueError("moments regularises clean samples; those of a phase that ends at a noise level are not")
        if self.regression and self.boundaries:
            raise ValueError("regression compares clean samples; those of a phase that ends at a noise level are not")
        if self.regression and self.solver == "renoise" and self.steps > 1:
            raise ValueError(
                "regression holds a noise to one image, solver=renoise leads it to many; use solver=euler or steps=1"
            )
        return self

    def _steps_of_phases(self) -> list[int]:
        if any(not 0 < b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries must lie strictly between 0 and 1, given {list(self.boundaries)}")
        if list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"boundaries must fall, given {list(self.boundaries)}")
        grid = step_grid(self.steps, self.shift)[:-1]
        edges = (float("inf"), *self.boundaries, 0.0)
        counts = [sum(lower <= t < upper for t in grid) for upper, lower in pairwise(edges)]
        if 0 in counts:
            times = ", ".join(f"{t:.4f}" for t in grid)
            raise ValueError(
                f"steps={self.steps} at shift={self.shift} gives no step to phase {counts.index(0) + 1} of "
                f"{len(counts)}: its times are {times}, boundaries are {list(self.boundaries)}. "
                "Use more steps, another shift or fewer boundaries"
            )
        return counts


def _merged(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given`` over ``base``; sections that both have are merged too."""
    merged = dict(base)
    for key, value in given.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
