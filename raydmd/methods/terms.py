"""Score terms: where the sample is renoised, what the teacher is asked, and the gradient made of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from raydmd.objectives.decoupled import augmentation_direction, matching_direction, per_sample
from raydmd.objectives.matching import distance, normalised_gradient, raw_gradient, raw_scale
from raydmd.recipe_types import Ramp, ever_positive, value_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.draws import Draws
    from raydmd.guidance import Guidance
    from raydmd.methods.phases import Phase, Window
    from raydmd.methods.rollout import Sample
    from raydmd.process import Process

Normaliser = Literal["distance", "noisy_distance", "x0", "none"]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question of a score term to the teacher.

    Attributes:
        x_t: the renoised sample, detached, ``(B, *latent)``.
        t: its level, ``(B,)``.
        expert: the teacher's expert that serves it.
        guidance: how the teacher follows the prompt.
        split: whether the answer is wanted in its halves, conditional and unconditional.
    """

    x_t: Tensor
    t: Tensor
    expert: str
    guidance: Guidance
    split: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a frozen model says, without gradient.

    Attributes:
        value: to a query the guided prediction of the clean latents ``(B, *latent)``, or the conditional one if it is
            split; to a walk the latents at its last time; for a reward the rewards ``(B,)``. fp32.
        uncond: the unconditional prediction, where the query is split.
    """

    value: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Per-sample weights of the halves of a decoupled term, each ``(B,)``.

    Attributes:
        match: of distribution matching.
        augment: of guidance augmentation.
    """

    match: Tensor
    augment: Tensor


class ScoreTerm(ABC):
    """A gradient on the sample from real and fake score."""

    @abstractmethod
    def queries(self, sample: Sample, phase: Phase, draws: Draws, progress: float) -> tuple[Query, ...]:
        """Renoise the sample and say what to ask."""

    @abstractmethod
    def experts(self, phase: Phase) -> tuple[str, ...]:
        """The teacher's experts that a phase's queries can go to."""

    @abstractmethod
    def gradient(
        self,
        sample: Sample,
        queries: Sequence[Query],
        answers: Sequence[Answer],
        fake_x0: Callable[[Query], Tensor],
        weights: Weights | None,
        progress: float,
    ) -> Tensor:
        """What ``sample.x`` descends, shape of ``sample.x``.

        Args:
            sample: of the student.
            queries: made by :meth:`queries`.
            answers: the teacher's, one per query.
            fake_x0: the fake score's clean prediction at a query.
            weights: of the samples; ``None`` weighs all alike.
            progress: share of the phase that is done.
        """


@dataclass(frozen=True, kw_only=True)
class Matching(ScoreTerm):
    """Distribution matching with a guided teacher: DMD, DMD2, Phased DMD, DP-DMD.

    Attributes:
        process: the noise process.
        guidance: of the teacher.
        window: where it renoises.
        normaliser: see :class:`~raydmd.recipe_method.Method`.
        floor: of the normaliser.
    """

    process: Process
    guidance: Guidance
    window: Window
    normaliser: Normaliser
    floor: float

    def queries(self, sample: Sample, phase: Phase, draws: Draws, progress: float) -> tuple[Query, ...]:
        """See :class:`ScoreTerm`."""
        return (renoised(self.process, self.window, self.guidance, sample, phase, draws, progress, "match"),)

    def experts(self, phase: Phase) -> tuple[str, ...]:
        """See :class:`ScoreTerm`."""
        return self.window.experts(phase.floor)

    def gradient(
        self,
        sample: Sample,
        queries: Sequence[Query],
        answers: Sequence[Answer],
        fake_x0: Callable[[Query], Tensor],
        weights: Weights | None,
        progress: float,
    ) -> Tensor:
        """See :class:`ScoreTerm`.

        ``none`` is Phased DMD's gradient with respect to ``sample.x``. The distances are made for a clean sample;
        where the sample lies at ``s > 0`` their use is this project's reading, since the paper names no
        normaliser. It points the same way as on the clean prediction, both being affine in the network's
        output, and weighs exit steps by how far they jump.
        """
        (query,), (answer,) = queries, answers
        d_fake = fake_x0(query)
        if self.normaliser == "none":
            return raw_gradient(self.process, query.x_t, answer.value, d_fake, sample.s, query.t)
        if self.normaliser == "x0":
            return d_fake - answer.value
        reference = sample.x0 if self.normaliser == "distance" else query.x_t
        return normalised_gradient(reference, answer.value, d_fake, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class Decoupled(ScoreTerm):
    """Distribution matching and guidance augmentation apart: Decoupled DMD, AMD.

    The paper's algorithm 1 adds the two differences of clean predictions as they are: ``x0``. A distance is this
    project's reading: one divisor for both, taken where matching renoises, which scales that sum and turns it nowhere.
    ``none`` weighs each half as the score difference at its own level (eq. 8), which favours the half that renoises
    less: CA, where it must stay cleaner than the input. At one level (``coupled``) with weights of 1 the gradient is
    :class:`Matching`'s. A half whose weight is never above zero is not asked for.

    Attributes:
        process: the noise process.
        guidance: of the teacher.
        match_window: where matching renoises.
        augment_window: where augmentation does; ``None`` is ``coupled``.
        match: weight of matching.
        augment: weight of augmentation, on top of ``guidance - 1``.
        normaliser: see :class:`~raydmd.recipe_method.Method`.
        floor: of the normaliser.
    """

    process: Process
    guidance: Guidance
    match_window: Window
    augment_window: Window | None
    match: float | Ramp
    augment: float | Ramp
    normaliser: Normaliser
    floor: float

    def queries(self, sample: Sample, phase: Phase, draws: Draws, progress: float) -> tuple[Query, ...]:
        """See :class:`ScoreTerm`."""

        def ask(window: Window, purpose: str, guidance: Guidance, *, split: bool) -> Query:
            return renoised(self.process, window, guidance, sample, phase, draws, progress, purpose, split=split)

        if self.augment_window is None:
            return (ask(self.match_window, "match", self.guidance, split=True),)
        asked = []
        if ever_positive(self.match):
            asked.append(ask(self.match_window, "match", type(self.guidance)(1.0), split=False))
        if ever_positive(self.augment):
            asked.append(ask(self.augment_window, "augment", self.guidance, split=True))
        return tuple(asked)

    def experts(self, phase: Phase) -> tuple[str, ...]:
        """See :class:`ScoreTerm`."""
        windows = [w for w in (self.match_window, self.augment_window) if w is not None]
        return tuple(dict.fromkeys(e for w in windows for e in w.experts(phase.floor)))

    def gradient(
        self,
        sample: Sample,
        queries: Sequence[Query],
        answers: Sequence[Answer],
        fake_x0: Callable[[Query], Tensor],
        weights: Weights | None,
        progress: float,
    ) -> Tensor:
        """See :class:`ScoreTerm`."""
        match, augment = (torch.full_like(sample.s, value_at(w, progress)) for w in (self.match, self.augment))
        if weights is not None:
            match, augment = match * weights.match, augment * weights.augment
        gradient = torch.zeros_like(sample.x)
        if ever_positive(self.match):
            direction = matching_direction(answers[0].value, fake_x0(queries[0]))
            gradient = gradient + per_sample(match * self._scale(sample, queries, answers, 0), direction)
        if ever_positive(self.augment):
            ca = answers[-1]
            if ca.uncond is None:
                raise ValueError("guidance augmentation needs the teacher's answer in its halves")
            direction = augmentation_direction(ca.value, ca.uncond, scale=self.guidance.scale)
            gradient = gradient + per_sample(augment * self._scale(sample, queries, answers, -1), direction)
        return gradient

    def _scale(self, sample: Sample, queries: Sequence[Query], answers: Sequence[Answer], half: int) -> Tensor:
        """What a half's direction is multiplied with, ``(B,)``; 0 is the first query's, -1 the last one's."""
        if self.normaliser == "x0":
            return torch.ones_like(sample.s)
        if self.normaliser == "none":
            return raw_scale(self.process, sample.s, queries[half].t)
        reference, real = sample.x0 if self.normaliser == "distance" else queries[0].x_t, answers[0]
        d_real = real.value if real.uncond is None else self.guidance.combine(real.value, real.uncond)
        return 1.0 / distance(reference, d_real, floor=self.floor)


def renoised(
    process: Process,
    window: Window,
    guidance: Guidance,
    sample: Sample,
    phase: Phase,
    draws: Draws,
    progress: float,
    purpose: str,
    *,
    split: bool = False,
) -> Query:
    """The sample carried on to a level of the window with fresh noise, as a question to the teacher."""
    t, expert = window.at(phase.floor, sample.entered, progress).draw(draws, f"{purpose}.time")
    noise = draws.normal(f"{purpose}.noise", sample.x.shape[1:])
    x_t = process.renoise(sample.x.detach(), noise, sample.s, t)
    return Query(x_t=x_t, t=t, expert=expert, guidance=guidance, split=split)
