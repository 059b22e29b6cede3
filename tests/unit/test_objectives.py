"""Objectives against closed forms on Gaussian and mixture data, where both scores are known."""

from __future__ import annotations

import math

import pytest
import torch

from raydmd.objectives.fake import regression, subinterval_target, subinterval_weight
from raydmd.objectives.matching import normalised_gradient, raw_gradient, surrogate
from raydmd.process import Process, RectifiedFlow, VariancePreserving

pytestmark = pytest.mark.unit
F64 = torch.float64


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def gaussian_x0(p: Process, x_t: torch.Tensor, t: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""
    a, s = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in (p.alpha(t), p.sigma(t)))
    return mean + a * std**2 / (a**2 * std**2 + s**2) * (x_t - a * mean)


@pytest.mark.parametrize("p", [RectifiedFlow(), VariancePreserving()])
@pytest.mark.parametrize("s", [0.0, 0.3])
def test_raw_gradient_is_the_gradient_of_the_kl_between_the_noised_gaussians(p, s):
    """Student x_s = alpha_s m + sigma(m-free); d KL(fake_t || real_t) / d mean of x_s in closed form.

    With equal spreads the KL of the two noised Gaussians is (a_t (m - m*))^2 / (2 v_t), and x_s's mean
    is a_s m, so the expected gradient with respect to x_s is a_ts a_t (m - m*) / v_t.
    """
    m, m_star, std = 0.7, -0.4, 0.5
    g = torch.Generator().manual_seed(0)
    t = times(0.45, 0.6, 0.9)
    s_ = torch.full_like(t, s)
    a_t, sig_t = p.alpha(t), p.sigma(t)
    x_t = a_t[:, None] * m + torch.randn(3, 8, generator=g, dtype=F64)
    grad = raw_gradient(p, x_t, gaussian_x0(p, x_t, t, m_star, std), gaussian_x0(p, x_t, t, m, std), s_, t)
    variance = (a_t * std).square() + sig_t.square()
    expected = p.kernel(s_, t)[0] * a_t * (m - m_star) / variance
    torch.testing.assert_close(grad, expected[:, None].expand_as(grad), rtol=1e-10, atol=1e-12)


def test_raw_gradient_is_the_papers_flow_form():
    """Eq. 10: w (T - F) on flow predictions, w = alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2)."""
    p, t, s = RectifiedFlow(), times(0.9, 0.95), times(0.8, 0.8)
    g = torch.Generator().manual_seed(1)
    x_t, v_real, v_fake = (torch.randn(2, 5, generator=g, dtype=F64) for _ in range(3))
    d_real, d_fake = (p.to_x0("flow", x_t, v, t) for v in (v_real, v_fake))
    weight = p.alpha(t) * p.kernel(s, t)[0] / (p.alpha(t) * p.sigma(t) + p.sigma(t).square())
    torch.testing.assert_close(raw_gradient(p, x_t, d_real, d_fake, s, t), weight[:, None] * (v_real - v_fake))


def test_the_gradient_vanishes_where_the_scores_agree_and_points_to_the_teacher_elsewhere():
    g = torch.Generator().manual_seed(2)
    x, d_real, d_fake = (torch.randn(3, 4, generator=g, dtype=F64) for _ in range(3))
    assert normalised_gradient(x, d_real, d_real, floor=1e-6).abs().max() == 0
    moved = x - 1e-3 * normalised_gradient(x, d_real, d_fake, floor=1e-6)
    assert ((moved - x) * (d_real - d_fake)).sum() > 0


def test_the_normaliser_is_per_sample_and_floored():
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=F64)
    d_real = torch.tensor([[2.0, -4.0], [0.0, 0.0]], dtype=F64)
    d_fake = torch.tensor([[3.0, -4.0], [0.5, 0.0]], dtype=F64)
    grad = normalised_gradient(x, d_real, d_fake, floor=0.1)
    torch.testing.assert_close(grad, torch.tensor([[1 / 3, 0.0], [5.0, 0.0]], dtype=F64))


def test_the_surrogates_gradient_is_the_gradient():
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    grad = torch.randn(2, 3, dtype=F64)
    surrogate(x, grad).backward()
    torch.testing.assert_close(x.grad, grad / 6)


@pytest.mark.parametrize("p", [RectifiedFlow(), VariancePreserving()])
@pytest.mark.parametrize("kind", ["flow", "epsilon", "x0", "v", "edm"])
def test_at_s_zero_the_target_is_the_ordinary_one(p, kind):
    g = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(3, 4, generator=g, dtype=F64) for _ in range(2))
    t, s = times(0.2, 0.5, 0.9), times(0, 0, 0)
    ordinary = p.from_x0(kind, p.add_noise(x0, noise, t), x0, t)
    torch.testing.assert_close(subinterval_target(p, kind, x0, noise, s, t), ordinary, rtol=1e-9, atol=1e-9)
    assert subinterval_weight(p, s, t, cap=10.0).tolist() == [1.0, 1.0, 1.0]


def test_the_weight_is_equation_13s():
    """clamp(1 / sigma_{t|s}^2, 0, 10) times the error scaled by sigma_{t|s}."""
    p, t = RectifiedFlow(), times(0.51, 0.55, 0.7, 1.0)
    s = torch.full_like(t, 0.5)
    variance = p.kernel(s, t)[1].square()
    torch.testing.assert_close(subinterval_weight(p, s, t, cap=10.0), (1 / variance).clamp(max=10) * variance)


@pytest.mark.parametrize(("p", "low", "high"), [(RectifiedFlow(), 0.5, 0.7), (VariancePreserving(), 0.2, 0.3)])
@pytest.mark.parametrize("kind", ["flow", "epsilon", "x0"])
def test_the_regression_from_a_subinterval_finds_the_full_score(p, low, high, kind):
    """On x0 ~ N(m, d^2) the best linear predictor from the target equals the analytic full-interval one.

    The posterior mean of a Gaussian is linear in x_t, so least squares on samples must find its two
    coefficients; the naive target (noise - x_s, and its like) must not.
    """
    m, d, n = 0.5, 0.8, 400_000
    g = torch.Generator().manual_seed(4)
    t, s = torch.full((n,), high, dtype=F64), torch.full((n,), low, dtype=F64)
    x0 = m + d * torch.randn(n, 1, generator=g, dtype=F64)
    x_s = p.add_noise(x0, torch.randn(n, 1, generator=g, dtype=F64), s)
    noise = torch.randn(n, 1, generator=g, dtype=F64)
    x_t = p.renoise(x_s, noise, s, t)
    design = torch.cat([x_t, torch.ones_like(x_t)], 1)
    truth = p.from_x0(kind, x_t, gaussian_x0(p, x_t, t, m, d), t)
    exact = torch.linalg.lstsq(design, truth).solution

    def fit(target: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lstsq(design, target).solution

    assert (fit(subinterval_target(p, kind, x_s, noise, s, t)) - exact).abs().max() < 0.02
    naive = {"flow": noise - x_s, "epsilon": noise, "x0": x_s}[kind]
    assert (fit(naive) - exact).abs().max() > 0.1


def test_the_targets_of_a_mixture_average_to_the_analytic_velocity():
    """The paper's own toy, x0 in {-1, 0, 1, 2}: binned means of the target against the exact velocity."""
    p, n = RectifiedFlow(), 1_000_000
    g = torch.Generator().manual_seed(5)
    points = times(-1, 0, 1, 2)
    t, s = torch.full((n,), 0.7, dtype=F64), torch.full((n,), 0.5, dtype=F64)
    x_s = p.add_noise(points[torch.randint(4, (n,), generator=g)], torch.randn(n, generator=g, dtype=F64), s)
    noise = torch.randn(n, generator=g, dtype=F64)
    x_t = p.renoise(x_s, noise, s, t)
    log = -(x_t[:, None] - 0.3 * points).square() / (2 * 0.49)
    truth = p.from_x0("flow", x_t, log.softmax(1) @ points, t)
    bins = torch.bucketize(x_t, torch.quantile(x_t[:100_000], torch.linspace(0.05, 0.95, 10, dtype=F64)))

    def worst(target: torch.Tensor) -> float:
        gaps = [(target[bins == b].mean() - truth[bins == b].mean()).abs() for b in range(11)]
        return max(float(gap) for gap in gaps)

    assert worst(subinterval_target(p, "flow", x_s, noise, s, t)) < 0.03
    assert worst(noise - x_s) > 0.25


def test_regression_weights_samples_and_reports_them_unweighted():
    output, target = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [2.0, 2, 2]])
    loss, error = regression(output, target, torch.tensor([1.0, 0.5]))
    assert math.isclose(float(loss), (1 + 0.5 * 4) / 2)
    assert error.tolist() == [1.0, 4.0]
