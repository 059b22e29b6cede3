"""Rollouts: how the student makes the sample that is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from raydmd.draws import Draws
    from raydmd.methods.phases import Phase
    from raydmd.models.base import Experts
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
    """

    x: Tensor
    x0: Tensor
    s: Tensor
    exit_step: int


@dataclass(frozen=True)
class BackwardSimulation:
    """Unroll the student from noise and leave at a random step of the phase, jumping to the phase's end.

    The steps before the exit carry no gradient. With one phase that ends clean this is DMD2's backward
    simulation (arXiv:2405.14867, section 4.5); within a phase it is Phased DMD's inner random exit
    (arXiv:2510.27684, figure 1d). The exit step is shared by all samples and ranks.

    Attributes:
        process: the noise process.
        grid: the student's times, from 1 down to and with 0.
        solver: ``euler`` walks deterministically; ``renoise`` puts fresh noise on each predicted x0.
    """

    process: Process
    grid: tuple[float, ...]
    solver: Solver

    def __call__(
        self,
        student: Experts,
        cond: Tensor,
        draws: Draws,
        phase: Phase,
        latent: tuple[int, ...],
        *,
        grad: bool,
    ) -> Sample:
        """Make one sample per row of ``cond``; with ``grad``, differentiable in the exit step alone."""
        exit_step = phase.first + int(draws.shared("exit") * (phase.last - phase.first))
        x = draws.normal("noise", latent)
        with torch.no_grad():
            for i in range(exit_step):
                x0 = student.x0(x, self._time(i, x), cond)
                x = self._advance(x, x0, i, draws, latent)
        with torch.set_grad_enabled(grad):
            t, s = self._time(exit_step, x), torch.full((len(x),), phase.end, device=x.device)
            x0 = student.x0(x, t, cond)
            x_s = self.process.step(x, x0, t, s)
        return Sample(x=x_s, x0=x0.detach(), s=s, exit_step=exit_step)

    def _time(self, step: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.grid[step], device=x.device)

    def _advance(self, x: Tensor, x0: Tensor, step: int, draws: Draws, latent: tuple[int, ...]) -> Tensor:
        t, s = self._time(step, x), self._time(step + 1, x)
        if self.solver == "euler":
            return self.process.step(x, x0, t, s)
        return self.process.add_noise(x0, draws.normal(f"noise.{step + 1}", latent), s)
