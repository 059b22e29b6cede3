"""Noise processes and grids against closed forms, in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from raydmd.process import (
    EDM,
    Process,
    RectifiedFlow,
    VariancePreserving,
    euler_scheduler_for,
    shift,
    step_grid,
    unshift,
)

pytestmark = pytest.mark.unit
PROCESSES: list[Process] = [RectifiedFlow(), VariancePreserving(), EDM()]
T = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 2, generator=g, dtype=torch.float64), torch.randn(
        4, 3, 2, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["flow", "epsilon", "x0", "v", "edm"])
def test_conversions_are_inverse_and_give_the_clean_sample(process, kind):
    x0, eps = _data()
    x_t = process.add_noise(x0, eps, T)
    output = process.from_x0(kind, x_t, x0, T)
    torch.testing.assert_close(process.to_x0(kind, x_t, output, T), x0, rtol=1e-10, atol=1e-10)
    if kind == "flow":
        torch.testing.assert_close(output, eps - x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_kernel_composes_to_the_marginal(process):
    s, t = T[:3], T[1:]
    alpha, sigma = process.kernel(s, t)
    torch.testing.assert_close(alpha * process.alpha(s), process.alpha(t))
    torch.testing.assert_close((alpha * process.sigma(s)).square() + sigma.square(), process.sigma(t).square())


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_step_with_the_true_clean_sample_stays_on_the_path(process):
    x0, eps = _data()
    s = T / 2
    stepped = process.step(process.add_noise(x0, eps, T), x0, T, s)
    torch.testing.assert_close(stepped, process.add_noise(x0, eps, s), rtol=1e-9, atol=1e-9)


def test_a_step_of_rectified_flow_is_euler():
    x_t, v = _data()
    p, s = RectifiedFlow(), T / 3
    euler = x_t + (s - T).view(-1, 1, 1) * v
    torch.testing.assert_close(p.step(x_t, p.to_x0("flow", x_t, v, T), T, s), euler)


def test_score_of_a_gaussian():
    """For x0 ~ N(0, 1), x_t has variance alpha^2 + sigma^2 and E[x0 | x_t] = alpha x_t / (alpha^2 + sigma^2)."""
    for p in PROCESSES:
        # EDM's sigma of 1e-7 at the first time leaves a difference of two numbers that are the same in 16 digits.
        t, x_t = (T[1:], _data()[0][1:]) if isinstance(p, EDM) else (T, _data()[0])
        variance = (p.alpha(t).square() + p.sigma(t).square()).view(-1, 1, 1)
        x0 = p.alpha(t).view(-1, 1, 1) * x_t / variance
        torch.testing.assert_close(p.score(x_t, x0, t), -x_t / variance, rtol=1e-9, atol=1e-9)


def test_a_table_is_the_stock_schedulers():
    """At its entries, and as stable diffusion and DiT have it."""
    for process, schedule in (
        (VariancePreserving(), "scaled_linear"),
        (VariancePreserving(0.0001, 0.02, "linear"), "linear"),
    ):
        stock = DDIMScheduler(beta_start=process.beta_start, beta_end=process.beta_end, beta_schedule=schedule)
        entries = torch.tensor([0, 1, 249, 500, 998, 999])
        t = (entries + 1) / 1000
        torch.testing.assert_close(process.index(t), entries.float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(process.alpha(t), stock.alphas_cumprod[entries].sqrt(), rtol=1e-4, atol=0)
        torch.testing.assert_close(process.sigma(t), (1 - stock.alphas_cumprod[entries]).sqrt(), rtol=1e-4, atol=0)
        between = process.alpha(torch.tensor([0.0, 0.0005, 0.0035], dtype=torch.float64))
        assert float(between[0]) == 1.0
        assert between[0] > between[1] > between[2] > stock.alphas_cumprod[3].sqrt()


def test_shift_and_its_inverse():
    torch.testing.assert_close(unshift(shift(T, 5.0), 5.0), T)


def test_the_papers_grids():
    """Phased DMD: 1000, 938, 833, 625 at shift 5 and 1000, 900, 750, 500 at shift 3."""
    assert [round(1000 * t) for t in step_grid(4, 5.0)] == [1000, 938, 833, 625, 0]
    assert [round(1000 * t) for t in step_grid(4, 3.0)] == [1000, 900, 750, 500, 0]


@pytest.mark.parametrize(
    ("steps", "mu"),
    [(1, 1.0), (1, 5.0), (2, 5.0), (3, 2.5), (4, 1.0), (4, 3.0), (4, 5.0), (8, 7.0)],
)
def test_the_stock_scheduler_walks_the_students_grid(steps, mu):
    stretch, terminal = euler_scheduler_for(steps, mu)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=stretch, shift_terminal=terminal)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(step_grid(steps, mu)), rtol=0, atol=1e-6)


def test_a_shift_leaves_both_ends_where_they_are():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for mu in (*torch.rand(200, dtype=torch.float64).mul(12).add(0.01).tolist(), 0.1, 0.9, 3.0, 7.0):
        assert shift(ends, mu).tolist() == [0.0, 1.0], mu
        assert unshift(ends, mu).tolist() == [0.0, 1.0], mu
        assert all(0.0 <= t <= 1.0 for t in step_grid(7, mu)), mu
