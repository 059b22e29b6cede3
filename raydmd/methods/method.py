"""A method: a rollout, score terms and a fake-score loss. What the training step calls, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from raydmd.objectives.fake import regression, subinterval_target, subinterval_weight
from raydmd.objectives.matching import normalised_gradient, raw_gradient, surrogate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.draws import Draws
    from raydmd.guidance import Guidance
    from raydmd.methods.phases import Phase
    from raydmd.methods.rollout import BackwardSimulation, Sample
    from raydmd.models.base import Experts
    from raydmd.process import Prediction, Process


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question of a score term to the teacher.

    Attributes:
        x_t: the renoised sample, detached, ``(B, *latent)``.
        t: its level, ``(B,)``.
        expert: the teacher's expert that serves it.
        guidance: how the teacher follows the prompt.
    """

    x_t: Tensor
    t: Tensor
    expert: str
    guidance: Guidance


@dataclass(frozen=True)
class DistributionMatching:
    """The DM term: guided teacher against fake score at one renoised copy of the sample.

    Attributes:
        process: the noise process.
        guidance: of the teacher.
        normaliser: ``distance`` or ``none``, see :mod:`raydmd.objectives.matching`.
        floor: of the normaliser.
    """

    process: Process
    guidance: Guidance
    normaliser: Literal["distance", "none"]
    floor: float

    def query(self, sample: Sample, phase: Phase, draws: Draws) -> Query:
        """Renoise the sample and say whom to ask."""
        t, expert = phase.match.draw(draws, "match.time")
        noise = draws.normal("match.noise", sample.x.shape[1:])
        x_t = self.process.renoise(sample.x.detach(), noise, sample.s, t)
        return Query(x_t=x_t, t=t, expert=expert, guidance=self.guidance)

    def gradient(self, sample: Sample, query: Query, d_real: Tensor, d_fake: Tensor) -> Tensor:
        """The gradient that ``sample.x`` descends; shape of ``sample.x``.

        ``none`` is the paper's gradient with respect to ``sample.x``. ``distance`` is DMD2's, made for a
        clean sample; where the sample lies at ``s > 0`` its use is this project's reading, since the
        paper names no normaliser. It points the same way as on the clean prediction, both being affine
        in the network's output, and weighs exit steps by how far they jump.
        """
        if self.normaliser == "none":
            return raw_gradient(self.process, query.x_t, d_real, d_fake, sample.s, query.t)
        return normalised_gradient(sample.x0, d_real, d_fake, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A composition; the presets are in :mod:`raydmd.methods.presets`.

    Attributes:
        process: the noise process.
        prediction: what the networks predict, hence what the fake score regresses to.
        phases: in training order.
        rollout: makes the samples.
        terms: score terms; their gradients add up.
        fake_weight_cap: see :func:`raydmd.objectives.fake.subinterval_weight`.
    """

    process: Process
    prediction: Prediction
    phases: tuple[Phase, ...]
    rollout: BackwardSimulation
    terms: tuple[DistributionMatching, ...]
    fake_weight_cap: float

    def queries(self, sample: Sample, phase: Phase, draws: Draws) -> tuple[Query, ...]:
        """What the teacher is asked about a sample, one query per score term."""
        return tuple(term.query(sample, phase, draws) for term in self.terms)

    def fake_loss(
        self, fake: Experts, sample: Sample, cond: Tensor, draws: Draws, phase: Phase
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fake score's regression on a sample of the current student.

        Returns:
            The loss, the unweighted error per sample ``(B,)``, and the times ``(B,)`` it was taken at.
        """
        t, _ = phase.fake.draw(draws, "fake.time")
        noise = draws.normal("fake.noise", sample.x.shape[1:])
        x_s = sample.x.detach()
        x_t = self.process.renoise(x_s, noise, sample.s, t)
        target = subinterval_target(self.process, self.prediction, x_s, noise, sample.s, t)
        weight = subinterval_weight(self.process, sample.s, t, cap=self.fake_weight_cap)
        loss, error = regression(fake.raw(x_t, t, cond), target, weight)
        return loss, error, t

    def generator_loss(
        self,
        fake: Experts,
        sample: Sample,
        cond: Tensor,
        queries: Sequence[Query],
        answers: Sequence[Tensor],
    ) -> Tensor:
        """The student's loss, from the teacher's answers to its own sample's queries."""
        gradient = torch.zeros_like(sample.x0)
        with torch.no_grad():
            for term, query, d_real in zip(self.terms, queries, answers, strict=True):
                d_fake = fake.x0(query.x_t, query.t, cond)
                gradient = gradient + term.gradient(sample, query, d_real, d_fake)
        return surrogate(sample.x, gradient)
