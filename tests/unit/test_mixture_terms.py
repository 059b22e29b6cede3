"""Score terms on mixtures of Gaussians, end to end and in float64: their gradients against autograd of log densities.

Teacher and fake answer with posterior means in closed form; what is expected comes from ``grad log p_t`` alone.
"""

from __future__ import annotations

import math

import pytest
import torch

from raydmd.draws import Draws
from raydmd.methods.presets import build_method
from raydmd.methods.rollout import Sample
from raydmd.methods.terms import Answer
from raydmd.models.base import Routing
from raydmd.process import Process, RectifiedFlow, VariancePreserving, over
from raydmd.recipe_method import Method

pytestmark = pytest.mark.unit
F64, LATENT, SCALE = torch.float64, (2, 3), 3.5
WAN22 = Routing(("transformer", "transformer_2"), (0.875,))


class Mixture:
    """Two Gaussians of any width, noised by a process."""

    def __init__(self, seed: int, process: Process) -> None:
        g = torch.Generator().manual_seed(seed)
        self.process = process
        self.means = torch.randn(2, *LATENT, generator=g, dtype=F64)
        self.stds = 0.3 + torch.rand(2, generator=g, dtype=F64)
        self.logs = torch.rand(2, generator=g, dtype=F64).softmax(0).log()

    def _parts(self, x, t):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = (alpha[:, None] * self.stds).square() + sigma[:, None].square()  # (B, 2)
        off = x[:, None] - alpha.view(-1, 1, 1, 1) * self.means
        size = math.prod(LATENT)
        return off, variance, self.logs - off.square().sum((2, 3)) / (2 * variance) - 0.5 * size * variance.log()

    def score(self, x, t):
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self._parts(x, t)[2].logsumexp(1).sum(), x)[0]

    def x0(self, x, t):
        off, variance, logs = self._parts(x, t)
        gain = (self.process.alpha(t)[:, None] * self.stds.square() / variance).view(-1, 2, 1, 1)
        return (logs.softmax(1).view(-1, 2, 1, 1) * (self.means + gain * off)).sum(1)


def gradient_of(process: Process, routing: Routing, index: int, settings: dict):
    """A term's own gradient, what it asked, and the mixtures: real with and without the prompt, fake."""
    method = build_method(Method(guidance=SCALE, **settings), routing, process, "epsilon")
    phase, d = method.phases[index], Draws(3, "0/student", range(5))
    real, plain, fake = (Mixture(seed, process) for seed in (1, 2, 3))
    x = torch.randn(5, *LATENT, generator=torch.Generator().manual_seed(4), dtype=F64)
    s = torch.full((5,), phase.end, dtype=F64)
    entered = method.rollout.grid[phase.last - 1]
    sample = Sample(x=x, x0=x, s=s, exit_step=phase.last - 1, entered=entered, noise=x)
    queries = method.queries(sample, phase, d, 0.0)
    answers = []
    for q in queries:
        t = q.t.to(F64)
        cond, uncond = real.x0(q.x_t, t), plain.x0(q.x_t, t)
        answers.append(Answer(value=cond, uncond=uncond) if q.split else Answer(value=q.guidance.combine(cond, uncond)))
    found = method.score.gradient(
        sample, queries, answers, lambda q: fake.x0(q.x_t, q.t.to(F64)), weights=None, progress=0.0
    )
    return found, queries, s, (real, plain, fake)


def direction(process, query, s, mixtures, *, match: float, guided: float, by_scores: bool):
    """``match (fake - real) - guided (real - plain)`` at a query, of scores or of their clean predictions."""
    t, x = query.t.to(F64), query.x_t
    real, plain, fake = (m.score(x, t) for m in mixtures)
    down = match * (fake - real) - guided * (real - plain)
    if by_scores:  # d x_t / d x is alpha_{t|s}: the gradient of the KL between what both have become at t
        return over(process.alpha(t) / process.alpha(s), down) * down
    return over(process.sigma(t).square() / process.alpha(t), down) * down  # Tweedie


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()], ids=["flow", "vp"])
@pytest.mark.parametrize("normaliser", ["none", "x0"])
@pytest.mark.parametrize(("name", "index"), [("dmd2", 0), ("phased", 0), ("phased", 1)])
def test_guided_matching(process, normaliser, name, index):
    settings = {"name": name, "normaliser": normaliser, "shift": 1.0}
    if name == "phased":
        settings["boundaries"] = (0.5,)
    found, (query,), s, mixtures = gradient_of(process, Routing(("only",)), index, settings)
    assert (float(s[0]) > 0) == (name == "phased" and index == 0)
    expected = direction(process, query, s, mixtures, match=1.0, guided=SCALE - 1, by_scores=normaliser == "none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("normaliser", ["none", "x0"])
@pytest.mark.parametrize("schedule", ["coupled", "full", "constrained", "hybrid"])
@pytest.mark.parametrize(("match", "augment"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_matching_and_augmentation_apart(normaliser, schedule, match, augment):
    process = RectifiedFlow()
    decouple = {"schedule": schedule, "match": match, "augment": augment}
    settings = {"name": "decoupled", "normaliser": normaliser, "shift": 5.0, "decouple": decouple}
    found, queries, s, mixtures = gradient_of(process, WAN22, 0, settings)
    by_scores, expected = normaliser == "none", torch.zeros_like(found)
    if match:
        expected += direction(process, queries[0], s, mixtures, match=match, guided=0.0, by_scores=by_scores)
    if augment:
        # On top of conditional matching stands the rest of the guidance, scale - 1 of it.
        expected += direction(
            process, queries[-1], s, mixtures, match=0.0, guided=augment * (SCALE - 1), by_scores=by_scores
        )
    if schedule != "coupled" and match and augment:
        assert len(queries) == 2
        assert not torch.equal(queries[0].t, queries[1].t)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
