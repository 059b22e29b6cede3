"""Noise processes: marginals, kernels, conversions, time shift and step grids.

Conventions, stated once for the whole project: ``t`` in [0, 1] and ``t = 1`` is pure noise.
``x_t = alpha_t * x0 + sigma_t * epsilon``. ``flow`` is the velocity of rectified
flow, ``epsilon - x0``; ``v`` is the VP velocity ``alpha * epsilon - sigma * x0``; ``edm`` is what EDM's
network puts out, ``-v`` over ``sqrt(alpha^2 + sigma^2)``, of unit variance where the data is. Times are tensors of
shape ``(B,)`` and are broadcast over latents of shape ``(B, ...)``. Conversions run in the dtype they
are given; callers pass fp32 or fp64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["flow", "epsilon", "x0", "v", "edm"]


def over(t: Tensor, x: Tensor) -> Tensor:
    """View ``t`` of shape ``(B,)`` so that it broadcasts over ``x`` of shape ``(B, ...)``."""
    return t.view(-1, *[1] * (x.ndim - 1))


class Process(ABC):
    """A Gaussian noise process, known by its marginals."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at ``t``, shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at ``t``, shape of ``t``."""

    def add_noise(self, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """``alpha_t x0 + sigma_t epsilon``, shape of ``x0``."""
        return over(self.alpha(t), x0) * x0 + over(self.sigma(t), x0) * epsilon

    def kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of ``q(x_t | x_s)`` for ``s <= t`` (Phased DMD, arXiv:2510.27684, eq. 2).

        Returns:
            ``alpha_{t|s}`` and ``sigma_{t|s}``, shapes of ``t``.
        """
        alpha = self.alpha(t) / self.alpha(s)
        variance = self.sigma(t).square() - alpha.square() * self.sigma(s).square()
        return alpha, variance.clamp(min=0).sqrt()

    def renoise(self, x_s: Tensor, epsilon: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Carry ``x_s`` on to the noisier ``t`` with fresh noise, shape of ``x_s``."""
        alpha, sigma = self.kernel(s, t)
        return over(alpha, x_s) * x_s + over(sigma, x_s) * epsilon

    def to_x0(self, kind: Prediction, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Turn a network's output into its prediction of the clean latent, shape of ``x_t``."""
        alpha, sigma = over(self.alpha(t), x_t), over(self.sigma(t), x_t)
        if kind == "x0":
            return output
        if kind == "epsilon":
            return (x_t - sigma * output) / alpha
        if kind == "flow":
            # x_t = alpha x0 + sigma eps and output = eps - x0 give x_t - sigma output = (alpha + sigma) x0.
            return (x_t - sigma * output) / (alpha + sigma)
        # v = alpha eps - sigma x0 gives alpha x_t - sigma v = (alpha^2 + sigma^2) x0.
        variance = alpha.square() + sigma.square()
        v = -variance.sqrt() * output if kind == "edm" else output
        return (alpha * x_t - sigma * v) / variance

    def from_x0(self, kind: Prediction, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The inverse of :meth:`to_x0`; ``t`` must not be clean where the kind needs the noise."""
        if kind == "x0":
            return x0
        alpha, sigma = over(self.alpha(t), x_t), over(self.sigma(t), x_t)
        epsilon = (x_t - alpha * x0) / sigma
        if kind == "epsilon":
            return epsilon
        if kind == "flow":
            return epsilon - x0
        v = alpha * epsilon - sigma * x0
        return -v / (alpha.square() + sigma.square()).sqrt() if kind == "edm" else v

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling begins, at ``t = 1``, given standard normal noise; shape of ``noise``."""
        return noise

    def score(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """``grad log p(x_t) = (alpha_t x0 - x_t) / sigma_t^2`` from a prediction of x0, shape of ``x_t``."""
        return (over(self.alpha(t), x_t) * x0 - x_t) / over(self.sigma(t), x_t).square()

    def step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One deterministic step from ``t`` to ``s`` along the predicted x0 (DDIM; Euler for rectified flow)."""
        ratio = over(self.sigma(s) / self.sigma(t), x_t)
        return ratio * x_t + (over(self.alpha(s), x_t) - ratio * over(self.alpha(t), x_t)) * x0


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """``alpha = 1 - t``, ``sigma = t``."""

    def alpha(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        return t


@dataclass(frozen=True)
class VariancePreserving(Process):
    """``alpha^2 + sigma^2 = 1`` with a table of betas (DDPM, arXiv:2006.11239); defaults are Stable Diffusion's.

    ``t`` is ``(k + 1) / N`` for the table's k-th entry, so that 1 is its last one and 0 is clean; between entries
    ``log alpha`` is linear. At ``t = 1`` a little signal is left, which sampling from pure noise ignores, as the
    stock schedulers do.

    Attributes:
        beta_start: first beta.
        beta_end: last beta.
        schedule: ``linear`` in beta or in its root.
        entries: N.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    entries: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def index(self, t: Tensor) -> Tensor:
        """Where in the table ``t`` lies, which is the time that a network is given; shape of ``t``."""
        return t * self.entries - 1

    def _log_alpha(self, t: Tensor) -> Tensor:
        table = _log_alphas(self).to(t.device)
        place = (t.double() * self.entries).clamp(0, self.entries)
        below = place.floor().clamp(max=self.entries - 1).long()
        return torch.lerp(table[below], table[below + 1], place - below).to(t.dtype)


@cache
def _log_alphas(process: VariancePreserving) -> Tensor:
    """``log alpha`` at 0, 1/N, ..., 1, float64."""
    power = 0.5 if process.schedule == "scaled_linear" else 1.0
    ends = process.beta_start**power, process.beta_end**power
    betas = torch.linspace(*ends, process.entries, dtype=torch.float64) ** (1 / power)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-betas).cumsum(0)])


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding (Karras et al., arXiv:2206.00364, eq. 5): ``sigma^(1 / rho)`` is linear in ``t``.

    Latents are in units of the data's standard deviation, and so is sigma. ``t = 0`` is clean, with a jump from
    ``sigma_min``, below which no network was trained.
    """

    sigma_min: float = 0.004
    sigma_max: float = 160.0
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """See :class:`Process`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.where(t > 0, (low + t * (high - low)) ** self.rho, 0.0)

    def start(self, noise: Tensor) -> Tensor:
        """See :class:`Process`."""
        return self.sigma_max * noise


def shift(u: Tensor, mu: float) -> Tensor:
    """Timestep shift ``mu u / (1 + (mu - 1) u)``; ``mu > 1`` moves times towards noise.

    Written so that rounding keeps 1 at 1 and everything else below.
    """
    return mu * u / (mu * u + (1 - u))


def unshift(t: Tensor, mu: float) -> Tensor:
    """The inverse of :func:`shift`."""
    return t / (t + mu * (1 - t))


def step_grid(steps: int, mu: float) -> list[float]:
    """The student's times, from 1 down to and with 0: ``shift([1, 1 - 1/N, ...])`` (Phased DMD, section 3)."""
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return [float(t) for t in shift(u, mu)]


def euler_scheduler_for(steps: int, mu: float, *, train_steps: int = 1000) -> tuple[float, float | None]:
    """Settings with which a stock FlowMatchEulerDiscreteScheduler walks :func:`step_grid` exactly.

    That scheduler spaces its unshifted times between 1 and its own smallest sigma, not 1/N, shifts them
    by ``shift`` and then stretches them so that the last one is ``shift_terminal``. All three maps send
    the k-th step to ``k / (A - B k)``; equal ``A / B`` means equal grids.

    Returns:
        ``shift`` and ``shift_terminal`` for its constructor.

    Raises:
        ValueError: where no such settings exist.
    """
    if steps == 1:
        return 1.0, None
    last = float(shift(torch.tensor(1 / steps, dtype=torch.float64), mu))
    if math.isclose(mu, 1.0):
        # Without a shift 1 - sigma is linear in k, and stretching alone gives the grid.
        return 1.0, last
    wanted = mu * steps / (mu - 1)
    nu = mu
    for _ in range(200):  # a contraction: the smallest sigma depends only weakly on nu
        smallest = nu / train_steps / (1 + (nu - 1) / train_steps)
        per_step = (1 - smallest) / (steps - 1)
        nu = wanted * per_step / (wanted * per_step - 1)
    if not nu > 0:
        raise ValueError(f"no stock Euler schedule has {steps} steps at shift {mu}")
    return nu, last
