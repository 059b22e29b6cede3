"""A method: a rollout, a score term, auxiliary terms and a fake-score loss. What the step calls, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.methods.terms import Answer, Query, ScoreTerm, Weights
from raydmd.methods.weighing import Mean, Term, alone, total
from raydmd.objectives.auxiliary import anchor_loss, anchor_target, moments_loss
from raydmd.objectives.decoupled import adapted_weights, advantage, sharpening_weights
from raydmd.objectives.fake import regression, subinterval_target, subinterval_weight
from raydmd.objectives.matching import surrogate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.draws import Draws
    from raydmd.guidance import Guidance
    from raydmd.methods.phases import Phase
    from raydmd.methods.regression import Distance, Pairs, RegressionTerm
    from raydmd.methods.rollout import Rollout, Sample
    from raydmd.models.base import Conditions, Experts, Routing
    from raydmd.process import Prediction, Process
    from raydmd.recipe_types import Balance, Ramp


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A question to the teacher that takes it several steps.

    Attributes:
        noise: where it starts, ``(B, *latent)``.
        grid: times from 1 down; the answer is the latent at the last one.
        guidance: how the teacher follows the prompt.
    """

    noise: Tensor
    grid: tuple[float, ...]
    guidance: Guidance


@dataclass(frozen=True, kw_only=True)
class AnchorTerm:
    """DP-DMD's diversity anchor (arXiv:2602.03139): the first step follows the teacher's first K.

    Attributes:
        grid: the teacher's first K + 1 times; for other processes than rectified flow a last 0 follows, and the
            target is the teacher's own clean prediction there (appendix C).
        level: the time after K steps.
        straight: whether the target lies on the line from the noise (rectified flow).
        guidance: of the walk.
        weight: lambda.
    """

    grid: tuple[float, ...]
    level: float
    straight: bool
    guidance: Guidance
    weight: float | Ramp | Balance

    def walk(self, sample: Sample) -> Walk:
        """What the teacher is asked."""
        return Walk(noise=sample.noise, grid=self.grid, guidance=self.guidance)

    def term(self, sample: Sample, walked: Tensor) -> Term:
        """The loss of the first step."""
        if sample.first is None:
            raise ValueError("the rollout has not kept its first step for the anchor")
        target = anchor_target(sample.noise, walked, self.level) if self.straight else walked
        return Term(loss=anchor_loss(sample.first, target), at=sample.first, weight=self.weight, reach=sample.reach)


@dataclass(frozen=True, kw_only=True)
class MomentsTerm:
    """The mean-variance regulariser, see :func:`raydmd.objectives.auxiliary.moments_loss`."""

    weight: float | Ramp | Balance
    mean: float
    variance: float

    def term(self, sample: Sample) -> Term:
        """The loss of a clean sample."""
        loss = moments_loss(sample.x, mean=self.mean, variance=self.variance)
        return Term(loss=loss, at=sample.x, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """AMD's per-sample weights from rewards, see :class:`raydmd.recipe_method.Adapt`."""

    group: int
    strength: float
    fake_strength: float
    clip: float
    epsilon: float

    def advantage(self, rewards: Tensor) -> Tensor:
        """See :func:`raydmd.objectives.decoupled.advantage`."""
        return advantage(rewards, group=self.group, clip=self.clip, epsilon=self.epsilon)

    def score_weights(self, rewards: Tensor) -> Weights:
        """Weights of the score term's halves."""
        match, augment = adapted_weights(self.advantage(rewards), strength=self.strength, clip=self.clip)
        return Weights(match=match, augment=augment)

    def fake_weights(self, rewards: Tensor) -> Tensor:
        """Weights of the fake score's loss, ``(B,)``, mean 1."""
        a = self.advantage(rewards)
        return sharpening_weights(a, group=self.group, strength=self.fake_strength, clip=self.clip)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A composition; :mod:`raydmd.methods.presets` builds it from a recipe.

    Attributes:
        process: the noise process.
        prediction: what the networks predict, hence what the fake score regresses to.
        phases: in training order.
        rollout: makes the samples.
        score: the score term.
        anchor: diversity anchor of the first phase.
        moments: regulariser of the sample's moments.
        regression: to noise-image pairs.
        adaptation: weights from rewards.
        fake_weight_cap: see :func:`raydmd.objectives.fake.subinterval_weight`.
    """

    process: Process
    prediction: Prediction
    phases: tuple[Phase, ...]
    rollout: Rollout
    score: ScoreTerm
    anchor: AnchorTerm | None = None
    moments: MomentsTerm | None = None
    regression: RegressionTerm | None = None
    adaptation: Adaptation | None = None
    fake_weight_cap: float

    @property
    def adapts_fake(self) -> bool:
        """Whether the fake score's loss is weighed by rewards."""
        return self.adaptation is not None and self.adaptation.fake_strength > 0

    def queries(self, sample: Sample, phase: Phase, draws: Draws, progress: float) -> tuple[Query, ...]:
        """What the teacher is asked about a sample."""
        return self.score.queries(sample, phase, draws, progress)

    def asks(self, phase: Phase, teacher: Routing) -> tuple[str, ...]:
        """The teacher's experts that a phase can ask."""
        walked = self.anchor.grid[:-1] if self.anchor and phase.index == 0 else ()
        return tuple(dict.fromkeys((*self.score.experts(phase), *(teacher.expert(t) for t in walked))))

    def walk(self, sample: Sample) -> Walk | None:
        """What the teacher is to walk for this sample's anchor, if it has one."""
        return self.anchor.walk(sample) if self.anchor and sample.first is not None else None

    def fake_loss(
        self, fake: Experts, sample: Sample, cond: Conditions, draws: Draws, phase: Phase, rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fake score's regression on a sample of the current student.

        Returns:
            The loss, the error per sample ``(B,)`` before rewards weigh it, and the times ``(B,)`` it was taken at.
        """
        t, _ = phase.fake.draw(draws, "fake.time")
        noise = draws.normal("fake.noise", sample.x.shape[1:])
        x_s = sample.x.detach()
        x_t = self.process.renoise(x_s, noise, sample.s, t)
        target = subinterval_target(self.process, self.prediction, x_s, noise, sample.s, t)
        weight = subinterval_weight(self.process, sample.s, t, cap=self.fake_weight_cap)
        seen = weight
        if self.adaptation and rewards is not None:
            weight = weight * self.adaptation.fake_weights(rewards)
        loss, error = regression(fake.raw(x_t, t, cond), target, weight)
        # Without its weight the error near a phase's end is mostly the target's own variance.
        return loss, seen * error, t

    def generator_loss(
        self,
        fake: Experts,
        sample: Sample,
        cond: Conditions,
        queries: Sequence[Query],
        answers: Sequence[Answer],
        progress: float,
        *,
        walked: Tensor | None = None,
        rewards: Tensor | None = None,
        others: Sequence[Term] = (),
        mean: Mean = alone,
    ) -> Tensor:
        """The student's loss, from the answers to its own sample's questions.

        Args:
            fake: the fake score.
            sample: with the student's gradient.
            cond: B conditions.
            queries: asked about the sample.
            answers: the teacher's, one per query.
            progress: share of the phase that is done.
            walked: the answer to :meth:`walk`.
            rewards: of the samples, ``(B,)``, where the method adapts to them.
            others: terms that need more than a sample, e.g. a discriminator's.
            mean: of a scalar over all ranks, for terms that are balanced.
        """
        weights = self.adaptation.score_weights(rewards) if self.adaptation and rewards is not None else None
        with torch.no_grad():
            gradient = self.score.gradient(
                sample, queries, answers, lambda q: fake.x0(q.x_t, q.t, cond), weights, progress
            )
        terms = [self.anchor.term(sample, walked)] if self.anchor and walked is not None else []
        terms += [self.moments.term(sample)] if self.moments else []
        return total(surrogate(sample.x, gradient), (*terms, *others), progress, gradient, mean)

    def regresses(self, progress: float) -> bool:
        """Whether the regression to pairs has any weight after a share ``progress`` of a phase."""
        return self.regression is not None and self.regression.active(progress)

    def paired_term(
        self, student: Experts, pairs: Pairs, distance: Distance, phase: Phase, latent: tuple[int, ...]
    ) -> tuple[Term, Tensor]:
        """The student's regression to noise-image pairs.

        Args:
            student: walks from the pairs' noise as its rollout does.
            pairs: a batch of them.
            distance: of samples to their pairs.
            phase: the phase in progress; ends clean.
            latent: shape of one latent.

        Returns:
            The term, with the student's gradient, and the errors ``(B,)``, detached.

        Raises:
            ValueError: if the method has no such term.
        """
        if self.regression is None:
            raise ValueError("the method has no regression to pairs")
        sample = self.rollout(student, pairs.cond, pairs.draws, phase, latent, grad=True, noise=pairs.noise)
        return self.regression.term(sample.x, distance(sample.x, pairs.target))
