"""Rollouts: how the student makes the sample that is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from raydmd.draws import Draws
    from raydmd.methods.phases import Phase
    from raydmd.models.base import Conditions, Experts
    from raydmd.process import Process

Solver = Literal["euler", "renoise"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a rollout ends in.

    Attributes:
        x: the sample at level ``s``, ``(B, *latent)``; carries the student's gradient if it was asked for.
        x0: the student's clean prediction at its exit step, detached, shape of ``x``.
        s: the level, ``(B,)``.
        exit_step: the grid step whose prediction made the sample.
        entered: the time at which that step began.
        noise: what the rollout started from, shape of ``x``.
        reach: how far ``x`` moves with the clean prediction; 1 where ``s`` is clean.
        first: the first step's clean prediction with the student's gradient, where an anchor wants it.
    """

    x: Tensor
    x0: Tensor
    s: Tensor
    exit_step: int
    entered: float
    noise: Tensor
    reach: float = 1.0
    first: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Unroll the student from noise and leave at a step of the phase, jumping to the phase's end.

    ``simulate`` leaves at a random step, and the steps before it carry no gradient: with one phase that ends
    clean this is DMD2's backward simulation (arXiv:2405.14867, section 4.5), within a phase it is Phased DMD's
    inner random exit (arXiv:2510.27684, figure 1d), and with one step it is DMD's generator. ``unroll`` leaves at
    the last step and differentiates all of the phase's (DP-DMD, arXiv:2602.03139, eq. 8). The exit step is shared
    by all samples and ranks.

    Attributes:
        process: the noise process.
        grid: the student's times, from 1 down to and with 0.
        solver: ``euler`` walks deterministically; ``renoise`` puts fresh noise on each predicted x0.
        unroll: differentiate all steps of the phase.
        anchored: hand out the first step's prediction with its gradient.
        detach: cut the gradient after an anchored first step; its own term alone trains it then, so no
            rollout of that phase leaves there.
    """

    process: Process
    grid: tuple[float, ...]
    solver: Solver
    unroll: bool = False
    anchored: bool = False
    detach: bool = True

    def exits(self, phase: Phase) -> range:
        """The steps at which a rollout of the phase may leave."""
        if self.unroll:
            return range(phase.last - 1, phase.last)
        return range(phase.first + (self.cut and phase.first == 0), phase.last)

    @property
    def cut(self) -> bool:
        """Whether the score term's gradient stops short of the first step."""
        return self.anchored and self.detach

    def __call__(
        self,
        student: Experts,
        cond: Conditions,
        draws: Draws,
        phase: Phase,
        latent: tuple[int, ...],
        *,
        grad: bool,
        noise: Tensor | None = None,
    ) -> Sample:
        """Make one sample per row of ``cond``, from ``noise`` or fresh noise.

        With ``grad``, it is differentiable as the kind of rollout has it.
        """
        exit_step = self._leaves(draws, phase)
        noise = draws.normal("noise", latent) if noise is None else noise
        x = self.process.start(noise)
        first: Tensor | None = None
        for i in range(exit_step):
            anchor = self.anchored and i == 0 and phase.first == 0
            with torch.set_grad_enabled(grad and (anchor or (self.unroll and i >= phase.first))):
                x0 = student.x0(x, self._time(i, x), cond)
                if anchor:
                    first, x0 = x0, x0.detach() if self.detach else x0
                x = self._advance(x, x0, i, draws, latent)
        with torch.set_grad_enabled(grad):
            t, s = self._time(exit_step, x), torch.full((len(x),), phase.end, device=x.device)
            x0 = student.x0(x, t, cond)
            if self.anchored and exit_step == 0:
                first = x0
            x_s = self.process.step(x, x0, t, s)
        return self._sample(x_s, x0.detach(), noise, exit_step, phase, first)

    def restored(self, x: Tensor, x0: Tensor, noise: Tensor, draws: Draws, phase: Phase) -> Sample:
        """The sample that a rollout elsewhere has made from the same draws, of what came over the wire."""
        return self._sample(x, x0, noise, self._leaves(draws, phase), phase, None)

    def _leaves(self, draws: Draws, phase: Phase) -> int:
        exits = self.exits(phase)
        return exits[int(draws.shared("exit") * len(exits))]

    def _sample(
        self, x: Tensor, x0: Tensor, noise: Tensor, exit_step: int, phase: Phase, first: Tensor | None
    ) -> Sample:
        t, s = self._time(exit_step, x), torch.full((len(x),), phase.end, device=x.device)
        return Sample(
            x=x,
            x0=x0,
            s=s,
            exit_step=exit_step,
            entered=self.grid[exit_step],
            noise=noise,
            reach=float(self.process.step(torch.zeros_like(t[:1]), torch.ones_like(t[:1]), t[:1], s[:1])),
            first=first,
        )

    def _time(self, step: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.grid[step], device=x.device)

    def _advance(self, x: Tensor, x0: Tensor, step: int, draws: Draws, latent: tuple[int, ...]) -> Tensor:
        t, s = self._time(step, x), self._time(step + 1, x)
        if self.solver == "euler":
            return self.process.step(x, x0, t, s)
        return self.process.add_noise(x0, draws.normal(f"noise.{step + 1}", latent), s)
