"""The adversarial term: a discriminator on the fake network's features, at noise levels of its own.

DMD2, arXiv:2405.14867, section 4.3. What is judged are noised samples, real and generated at levels drawn apart, all
within the range in which the fake score trains. Where a phase's samples lie at a level ``s > 0`` (Phased DMD), real
ones are brought to ``s`` first and carried on by the same kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.methods.weighing import Term
from raydmd.objectives.gan import approximate_r1, discriminator_loss, exact_r1, generator_loss
from raydmd.recipe_types import Balance, value_at

if TYPE_CHECKING:
    from raydmd.data.real import RealData
    from raydmd.draws import Draws
    from raydmd.methods.phases import Phase, TimeRange
    from raydmd.methods.rollout import Sample
    from raydmd.models.base import Conditions
    from raydmd.models.discriminator import Discriminator
    from raydmd.process import Process
    from raydmd.recipe_gan import Gan


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The two losses of a discriminator and a student.

    Attributes:
        settings: of the recipe.
        process: the noise process.
        judge: the discriminator.
        real: what it takes for real.
    """

    settings: Gan
    process: Process
    judge: Discriminator
    real: RealData

    def student_term(
        self, sample: Sample, cond: Conditions, draws: Draws, phase: Phase, progress: float
    ) -> tuple[Term | None, dict[str, float]]:
        """The student's part; networks and heads get no gradient from it.

        The discriminator is differentiated here and now, so that its activations are gone before the student's
        backward pass; the term is linear in the sample, with that gradient.

        Args:
            sample: of the student, with its gradient.
            cond: its conditions.
            draws: its random numbers.
            phase: the phase in progress.
            progress: share of the phase that is done.

        Returns:
            The term, or ``None`` while its weight is 0, and metrics.
        """
        weight = self.settings.weight
        if not isinstance(weight, Balance) and not value_at(weight, progress):
            return None, {}
        t, _ = phase.fake.draw(draws, "gan.time")
        noise = draws.normal("gan.noise", sample.x.shape[1:])
        x = sample.x.detach().requires_grad_()
        with self.judge.frozen():
            x_t = self.process.renoise(x, noise, sample.s, t)
            loss = generator_loss(self.judge.frozen_logits(x_t, t, self.real.heard(draws, cond)))
            (gradient,) = torch.autograd.grad(loss, x)
        linear = (gradient * sample.x).sum()
        value = linear + (loss - linear).detach()
        return Term(loss=value, at=sample.x, weight=weight), {"gan/student": float(loss.detach())}

    def critic_loss(
        self, sample: Sample, cond: Conditions, draws: Draws, phase: Phase, t: Tensor, progress: float
    ) -> tuple[Tensor | None, dict[str, float]]:
        """The discriminator's part, to be added to the fake score's loss on the same sample.

        Args:
            sample: of the student.
            cond: its conditions.
            draws: its random numbers.
            phase: the phase in progress.
            t: times ``(B,)`` of the fake score's loss; the discriminator's go to the same expert, so that one network
                takes part in the backward pass.
            progress: share of the phase that is done.

        Returns:
            The weighted loss, or ``None`` while its weight is 0, and metrics.
        """
        weight, r1 = value_at(self.settings.critic_weight, progress), self.settings.r1
        if not weight:
            return None, {}
        times, latent = phase.fake.only(self.judge.expert(t)), sample.x.shape[1:]
        real = self.real.batch(draws)
        x_fake, t_fake = self._noised(sample.x.detach(), sample.s, times, draws, "gan.fake")
        x_s = self.process.add_noise(real.x0, draws.normal("gan.real.level", latent), sample.s)
        x_real, t_real = self._noised(x_s, sample.s, times, draws, "gan.real")
        exact = r1 is not None and r1.kind == "exact"
        x_real.requires_grad_(exact)
        x, when, heard = [x_fake, x_real], [t_fake, t_real], [self.real.heard(draws, cond), real.cond]
        if r1 and r1.kind == "approximate":
            x.append(x_real + r1.sigma * draws.normal("gan.r1", latent))
            when.append(t_real)
            heard.append(real.cond)
        logits = self.judge.logits(torch.cat(x), torch.cat(when), heard[0].join(*heard[1:]), twice=exact)
        on_fake, on_real, *on_moved = logits.chunk(len(x))
        loss = discriminator_loss(on_real, on_fake)
        metrics = {
            "gan/critic": float(loss.detach()),
            "gan/logit_real": float(on_real.detach().mean()),
            "gan/logit_fake": float(on_fake.detach().mean()),
        }
        if r1:
            penalty = exact_r1(on_real, x_real) if exact else approximate_r1(on_real, on_moved[0], sigma=r1.sigma)
            metrics["gan/r1"] = float(penalty.detach())
            loss = loss + r1.weight * penalty
        return weight * loss, metrics

    def _noised(self, x: Tensor, s: Tensor, times: TimeRange, draws: Draws, purpose: str) -> tuple[Tensor, Tensor]:
        """Samples at level ``s`` carried on to times of their own."""
        t, _ = times.draw(draws, f"{purpose}.time")
        return self.process.renoise(x, draws.normal(f"{purpose}.noise", x.shape[1:]), s, t), t
