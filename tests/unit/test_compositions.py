"""The family's methods as compositions: identities between them, closed forms, and mixtures nobody published."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raydmd.draws import Draws
from raydmd.methods.phases import Window
from raydmd.methods.presets import build_method
from raydmd.methods.regression import Pairs
from raydmd.methods.terms import Answer, Query
from raydmd.methods.weighing import alone
from raydmd.models.base import Conditions, Experts, Routing
from raydmd.objectives.auxiliary import anchor_target, moments_loss, paired_l2
from raydmd.objectives.decoupled import adapted_weights, advantage, augmentation_direction, sharpening_weights
from raydmd.process import RectifiedFlow, VariancePreserving
from raydmd.recipe_method import Method
from raydmd.recipe_types import Ramp, value_at

pytestmark = pytest.mark.unit
WAN22 = Routing(("transformer", "transformer_2"), (0.875,))
LATENT = (2, 3)
F64 = torch.float64


class Flow(nn.Module):
    """A linear flow network that hears its condition."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(3, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x_t, t, cond):
        heard = self.weight[2] * cond.embeds.mean((1, 2)).view(-1, 1, 1)
        return self.weight[0] * x_t + self.weight[1] * t.view(-1, 1, 1) + heard


def cond_of(embeds: torch.Tensor) -> Conditions:
    return Conditions(embeds=embeds)


def none(cond: Conditions) -> Conditions:
    return cond_of(torch.zeros_like(cond.embeds))


def experts(seed: int) -> Experts:
    modules = {name: Flow(seed + i) for i, name in enumerate(WAN22.experts)}
    return Experts(modules, WAN22, RectifiedFlow(), "flow")


def draws(update: str = "0/student", count: int = 4) -> Draws:
    return Draws(7, update, range(count))


def built(**settings):
    return build_method(Method(**settings), WAN22, RectifiedFlow(), "flow")


def reply(teacher: Experts, query: Query, cond: Conditions) -> Answer:
    with torch.no_grad():
        if query.split:
            both = teacher.both_x0(query.x_t, query.t, cond, none(cond))
            return Answer(value=both[0], uncond=both[1])
        return Answer(value=teacher.guided_x0(query.x_t, query.t, cond, none(cond), query.guidance))


def student_gradients(method, phase, update="0/student", rewards=None, progress=0.0):
    """Gradients of the generator's loss by expert; the score term's alone without an anchor's walk."""
    student, fake, teacher, cond = (
        experts(0),
        experts(3),
        experts(5),
        cond_of(torch.randn(4, 1, 2, generator=seeded(1))),
    )
    d = draws(update)
    sample = method.rollout(student, cond, d, phase, LATENT, grad=True)
    queries = method.queries(sample, phase, d, progress)
    answers = [reply(teacher, q, cond) for q in queries]
    loss = method.generator_loss(fake, sample, cond, queries, answers, progress, rewards=rewards)
    loss.backward()
    return {name: m.weight.grad for name, m in student.modules.items()}, sample


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None)
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normaliser", ["distance", "noisy_distance", "x0", "none"])
@pytest.mark.parametrize("base", [{"name": "dmd2"}, {"name": "phased"}])
def test_decoupled_at_one_level_is_the_guided_term(base, normaliser):
    guided = built(**base, normaliser=normaliser)
    coupled = built(**base, normaliser=normaliser, decouple={"schedule": "coupled"})
    for phase, twin in zip(guided.phases, coupled.phases, strict=True):
        for i in range(6):
            ours, _ = student_gradients(guided, phase, f"{i}/student")
            theirs, _ = student_gradients(coupled, twin, f"{i}/student")
            assert any(g is not None and g.abs().sum() > 0 for g in ours.values())
            assert_same(ours, theirs)


@pytest.mark.parametrize("normaliser", ["distance", "noisy_distance", "x0"])
def test_apart_both_halves_have_one_divisor_and_keep_the_papers_proportion(normaliser):
    """Algorithm 1 adds differences of clean predictions as they are: ``DM + (w - 1) CA``."""
    method = built(name="decoupled", normaliser=normaliser, guidance=3.0)
    phase, student, teacher, fake = method.phases[0], experts(0), experts(5), experts(3)
    cond, d = cond_of(torch.randn(4, 1, 2, generator=seeded(1))), draws()
    sample = method.rollout(student, cond, d, phase, LATENT, grad=False)
    dm, ca = method.queries(sample, phase, d, 0.0)
    answers = [reply(teacher, q, cond) for q in (dm, ca)]
    got = method.score.gradient(sample, (dm, ca), answers, lambda q: fake.x0(q.x_t, q.t, cond), None, 0.0)
    match = fake.x0(dm.x_t, dm.t, cond) - answers[0].value
    augment = 2.0 * (answers[1].uncond - answers[1].value)
    base = sample.x0 if normaliser == "distance" else dm.x_t
    divisor = (base - answers[0].value).abs().flatten(1).mean(1).view(-1, 1, 1) if normaliser != "x0" else 1.0
    torch.testing.assert_close(got, (match + augment) / divisor)
    # Each half alone asks for itself alone, and the two add up.
    for kept, part in (("augment", match), ("match", augment)):
        alone = built(name="decoupled", normaliser="x0", guidance=3.0, decouple={kept: 0.0})
        (query,) = alone.queries(sample, phase, d, 0.0)
        answer = reply(teacher, query, cond)
        half = alone.score.gradient(sample, (query,), (answer,), lambda q: fake.x0(q.x_t, q.t, cond), None, 0.0)
        torch.testing.assert_close(half, part)


def test_a_phases_gradient_in_closed_form():
    """At a level above clean, on the student's own prediction: the normalised difference times ``1 - s / t``."""
    method = built(name="phased", normaliser="distance")
    phase, student, teacher, fake = method.phases[0], experts(0), experts(5), experts(3)
    cond, d = cond_of(torch.randn(4, 1, 2, generator=seeded(1))), draws()
    predictions = []

    class Watched(Experts):
        def x0(self, x_t, t, cond):
            out = super().x0(x_t, t, cond)
            if out.requires_grad:
                out.retain_grad()
                predictions.append(out)
            return out

    watched = Watched(student.modules, WAN22, RectifiedFlow(), "flow")
    sample = method.rollout(watched, cond, d, phase, LATENT, grad=True)
    (query,) = method.queries(sample, phase, d, 0.0)
    answer = reply(teacher, query, cond)
    method.generator_loss(fake, sample, cond, [query], [answer], 0.0).backward()
    s, t = phase.end, sample.entered
    assert 0 < s < t
    assert sample.reach == pytest.approx(1 - s / t)
    divisor = (sample.x0 - answer.value).abs().flatten(1).mean(1).view(-1, 1, 1)
    direction = (fake.x0(query.x_t, query.t, cond) - answer.value).detach() / divisor
    torch.testing.assert_close(predictions[-1].grad, (1 - s / t) * direction / sample.x.numel())


def test_amd_without_strength_is_dmd2_and_with_it_is_not():
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.2])
    plain, weak, strong = (
        built(name="dmd2"),
        built(name="amd", adapt={"strength": 0.0, "fake_strength": 0.0}),
        built(name="amd", adapt={"strength": 1.0}),
    )
    phase = plain.phases[0]
    expected, sample = student_gradients(plain, phase)
    assert_same(expected, student_gradients(weak, phase, rewards=rewards)[0])
    moved, _ = student_gradients(strong, phase, rewards=rewards)
    assert any(not torch.allclose(moved[n], expected[n], rtol=1e-3) for n in expected if expected[n] is not None)
    fake, cond = experts(3), cond_of(torch.ones(4, 1, 2))
    losses = [m.fake_loss(fake, sample, cond, draws(), phase, rewards=rewards)[0] for m in (plain, weak, strong)]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.isclose(losses[0], losses[2], rtol=1e-3)


def test_the_score_term_of_dp_dmd_leaves_the_first_step_alone_and_the_anchor_trains_it_alone():
    """At shift 2 the first step (t = 1) alone is the noisy expert's, so its gradient shows by itself."""
    settings = {"name": "dp_dmd", "shift": 2.0}
    method = built(**settings)
    (phase,) = method.phases
    assert [WAN22.expert(t) for t in method.rollout.grid[:-1]] == ["transformer", *["transformer_2"] * 3]
    score, _ = student_gradients(method, phase)
    assert score["transformer"] is None or not score["transformer"].any()
    assert score["transformer_2"].abs().sum() > 0
    loose, _ = student_gradients(built(**settings, anchor={"detach": False}), phase)
    assert loose["transformer"].abs().sum() > 0

    student, cond = experts(0), cond_of(torch.randn(4, 1, 2, generator=seeded(1)))
    sample = method.rollout(student, cond, draws(), phase, LATENT, grad=True)
    walk = method.walk(sample)
    assert len(walk.grid) == 6
    method.anchor.term(sample, torch.randn(4, *LATENT, generator=seeded(2))).loss.backward()
    assert student.modules["transformer"].weight.grad.abs().sum() > 0
    assert student.modules["transformer_2"].weight.grad is None


def test_unrolling_differentiates_every_step_of_the_phase():
    """The gradient is autograd's through the whole walk; simulation's is the exit step's alone."""
    method = built(name="phased", rollout="unroll", shift=2.0, boundaries=(0.7,), guidance=2.0)
    student, cond = experts(0), cond_of(torch.randn(4, 1, 2, generator=seeded(1)))
    process, grid = RectifiedFlow(), method.rollout.grid
    for phase in method.phases:
        sample = method.rollout(student, cond, draws(), phase, LATENT, grad=True)
        assert sample.exit_step == phase.last - 1
        got = torch.autograd.grad(
            sample.x.square().sum(), [m.weight for m in student.modules.values()], allow_unused=True
        )
        x = draws().normal("noise", LATENT)
        for i in range(phase.last):
            with torch.set_grad_enabled(i >= phase.first):
                t, s = torch.full((4,), grid[i]), torch.full((4,), grid[i + 1])
                x = process.step(x, student.x0(x, t, cond), t, s)
        torch.testing.assert_close(x, sample.x)
        expected = torch.autograd.grad(
            x.square().sum(), [m.weight for m in student.modules.values()], allow_unused=True
        )
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_the_whole_walk_as_an_anchor_is_the_teachers_sample():
    noise, clean = torch.randn(2, 3, 4, generator=seeded(0), dtype=F64)
    torch.testing.assert_close(anchor_target(noise, clean, 0.0), clean)
    # Eq. 6 in velocities: at t = 1 the target velocity is (noise - walked) / (1 - level).
    walked = 0.3 * noise + 0.7 * clean
    torch.testing.assert_close(noise - anchor_target(noise, walked, 0.3), (noise - walked) / 0.7)
    torch.testing.assert_close(anchor_target(noise, walked, 0.3), clean)


def test_other_processes_anchor_at_the_teachers_own_clean_prediction():
    method = build_method(Method(name="dp_dmd"), Routing(("unet",)), VariancePreserving(), "epsilon")
    assert method.anchor.grid[-1] == 0.0
    assert len(method.anchor.grid) == 7
    assert not method.anchor.straight


def test_augmentation_pulls_a_gaussian_away_from_the_unconditional_mean():
    """With equal spreads E[x0|x_t] differs between two Gaussians by (1 - k a_t) (m_c - m_u), k its gain."""
    p, t, std, scale = RectifiedFlow(), torch.tensor([0.4, 0.8], dtype=F64), 0.5, 3.0
    a, sig = p.alpha(t), p.sigma(t)
    gain = a * std**2 / (a**2 * std**2 + sig**2)
    x_t = torch.randn(2, 5, generator=seeded(0), dtype=F64)
    cond, uncond = (m + gain[:, None] * (x_t - a[:, None] * m) for m in (1.2, -0.3))
    expected = -(scale - 1) * (1 - gain * a)[:, None] * (1.2 + 0.3)
    got = augmentation_direction(cond, uncond, scale=scale)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["coupled", "full", "constrained", "hybrid"])
def test_where_each_schedule_renoises(schedule):
    method = built(name="decoupled", decouple={"schedule": schedule}, solver="euler")
    (phase,), student, cond = method.phases, experts(0), cond_of(torch.ones(64, 1, 2))
    above = {"match": 0, "augment": 0}
    for i in range(60):
        d = draws(f"{i}/student", 64)
        sample = method.rollout(student, cond, d, phase, LATENT, grad=False)
        queries = method.queries(sample, phase, d, 0.0)
        if schedule == "coupled":
            assert len(queries) == 1
            continue
        match, augment = queries
        assert not match.split
        assert match.guidance.scale == 1.0
        assert augment.split
        assert not torch.equal(match.x_t, augment.x_t)
        above["match"] += int((match.t > sample.entered).any())
        above["augment"] += int((augment.t > sample.entered).any())
    assert (above["match"] > 0) == (schedule in ("full", "hybrid"))
    assert (above["augment"] > 0) == (schedule == "full")


def test_windows_and_weights_move_over_a_phase():
    window = Window(Routing(("unet",)), 1.0, (0.02, 0.98), (0.02, 0.5))
    assert window.at(0.0, 1.0, 0.0).parts == (("unet", 0.02, 0.98),)
    assert window.at(0.0, 1.0, 0.5).parts == (("unet", 0.02, pytest.approx(0.74)),)
    assert window.at(0.1, 1.0, 1.0).parts == (("unet", pytest.approx(0.1), 0.5),)
    ramp = Ramp(start=1.0, end=0.0, until=0.5)
    assert [value_at(ramp, p) for p in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    assert value_at(0.3, 0.7) == 0.3


def test_augmentation_annealed_to_zero_leaves_matching_alone():
    ramp = {"start": 1.0, "end": 0.0}
    annealed = built(name="decoupled", decouple={"augment": ramp})
    alone = built(name="decoupled", decouple={"augment": 0.0})
    phase = annealed.phases[0]
    assert_same(student_gradients(annealed, phase, progress=1.0)[0], student_gradients(alone, phase, progress=1.0)[0])
    first, _ = student_gradients(annealed, phase, progress=0.0)
    assert any(
        not torch.allclose(first[n], g, rtol=1e-3)
        for n, g in student_gradients(alone, phase)[0].items()
        if g is not None
    )


def test_an_advantage_compares_samples_of_one_prompt():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0], dtype=F64)
    a = advantage(rewards, group=2, clip=2.0, epsilon=1e-9)
    torch.testing.assert_close(a, torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=F64))
    match, augment = adapted_weights(a, strength=0.5, clip=2.0)
    torch.testing.assert_close(match, torch.tensor([1.25, 0.75, 1.0, 1.0], dtype=F64))
    torch.testing.assert_close(augment, 2 - match)
    assert adapted_weights(torch.tensor([-2.0, 2.0]), strength=0.5, clip=2.0)[0].tolist() == [1.5, 0.5]
    weights = sharpening_weights(a, group=2, strength=1.0, clip=2.0)
    assert weights[0] > weights[2] > weights[1]
    torch.testing.assert_close(weights.view(-1, 2).mean(1), torch.ones(2, dtype=F64))


def test_what_amd_weighs_does_not_depend_on_how_a_batch_is_spread_over_workers():
    rewards = torch.tensor([0.0, 9.0, 9.1, 9.2, 5.0, 1.0, 2.0, 3.0], dtype=F64)
    weigh = built(name="amd", adapt={"group": 4, "clip": 0.5}).adaptation.fake_weights
    torch.testing.assert_close(weigh(rewards), torch.cat([weigh(half) for half in rewards.chunk(2)]))


def test_a_group_needs_company():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0], dtype=F64)
    with pytest.raises(ValueError, match=r"a group of 1 sample"):
        advantage(rewards, group=1, clip=1.0, epsilon=1e-4)
    with pytest.raises(ValueError, match="no whole number of groups of 3"):
        advantage(rewards, group=3, clip=1.0, epsilon=1e-4)


def test_moments_loss_is_the_kl_of_gaussians():
    x = torch.randn(3, 400, generator=seeded(0), dtype=F64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    assert float(moments_loss(0.9 * x + 0.075, mean=0.075, variance=0.81)) == pytest.approx(0.0, abs=1e-12)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(0.5, 2.0), torch.distributions.Normal(0.1, 0.9))
    assert float(moments_loss(2 * x + 0.5, mean=0.1, variance=0.81)) == pytest.approx(float(kl), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "phased", "decouple": {"schedule": "hybrid"}},
        {"name": "phased", "anchor": {"steps": 3, "of": 10}},
        {"name": "decoupled", "anchor": {}, "solver": "euler"},
        {"name": "amd", "anchor": {}, "rollout": "unroll", "solver": "euler"},
        {"name": "phased", "boundaries": (0.95, 0.7), "decouple": {}, "anchor": {"detach": False}, "adapt": {}},
    ],
)
def test_mixtures_nobody_published_give_every_phase_a_finite_gradient(settings):
    method = built(**settings)
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.2]) if method.adaptation else None
    for phase in method.phases:
        for i in range(4):
            student, fake, teacher, cond = experts(0), experts(3), experts(5), cond_of(torch.ones(4, 1, 2))
            d = draws(f"{i}/student")
            sample = method.rollout(student, cond, d, phase, LATENT, grad=True)
            queries = method.queries(sample, phase, d, 0.3)
            walk = method.walk(sample)
            assert (walk is None) == (method.anchor is None or phase.index > 0)
            walked = None if walk is None else torch.zeros(4, *LATENT)
            loss = method.generator_loss(
                fake,
                sample,
                cond,
                queries,
                [reply(teacher, q, cond) for q in queries],
                0.3,
                walked=walked,
                rewards=rewards,
            )
            loss.backward()
            found = [m.weight.grad for m in student.modules.values() if m.weight.grad is not None]
            assert found
            assert all(g.isfinite().all() for g in found)
            assert any(g.abs().sum() > 0 for g in found)
            for query in queries:
                assert query.t.min() > phase.floor


def test_presets_hold_the_papers_settings():
    assert Method(name="dp_dmd").anchor.steps == 5
    assert Method(name="dp_dmd").anchor.weight == 0.05
    assert Method(name="dp_dmd", anchor={"steps": 3}).anchor.weight == 0.05
    assert Method(name="dp_dmd", anchor=None).anchor is None
    decoupled, amd = Method(name="decoupled"), Method(name="amd")
    assert (decoupled.decouple.schedule, decoupled.normaliser) == ("hybrid", "x0")
    assert (decoupled.times_shift, decoupled.fake_shift) == (1.0, 1.0)
    assert (amd.decouple.schedule, amd.normaliser, amd.times_shift) == ("coupled", "distance", None)
    assert Method(name="dmd2").solver == "renoise"
    assert Method(name="phased").boundaries == (0.875,)
    dmd = Method(name="dmd")
    assert (dmd.steps, dmd.normaliser, dmd.times, dmd.regression.loss) == (1, "distance", (0.02, 0.98), "lpips")
    assert dmd.regression.weight == Method(name="dmd", regression={"loss": "l2"}).regression.weight == 0.25
    assert Method(name="dmd", regression=None).regression is None


def pairs(noise, target, cond, update="0/pairs"):
    return Pairs(
        noise=noise, target=target, cond=cond_of(cond), draws=draws(update, len(noise)), indices=(0,) * len(noise)
    )


def test_dmd_without_its_regression_s_weight_is_one_step_dmd2():
    dmd, dmd2 = built(name="dmd", regression={"weight": 0.0}), built(name="dmd2", steps=1)
    (phase,) = dmd.phases
    for i in range(3):
        ours, sample = student_gradients(dmd, phase, f"{i}/student")
        theirs, _ = student_gradients(dmd2, dmd2.phases[0], f"{i}/student")
        assert sample.entered == 1.0
        assert ours["transformer"].abs().sum() > 0
        for name, gradient in theirs.items():
            assert gradient is None if ours[name] is None else torch.equal(ours[name], gradient)
    assert not dmd.regresses(0.0)
    assert not dmd2.regresses(0.0)
    ramp = built(name="dmd", regression={"weight": {"start": 1.0, "end": 0.0, "until": 0.5}})
    assert [ramp.regresses(p) for p in (0.0, 0.4, 0.5)] == [True, True, False]


def test_the_regression_s_gradient_in_closed_form():
    """One step from noise z: x = z - v with v = a z + b + c h, so d(w mean (x - y)^2)/da = w mean(-2 (x - y) z)."""
    method, student = built(name="dmd", regression={"loss": "l2", "weight": 0.25}), experts(0)
    noise, target, cond = torch.randn(4, *LATENT), torch.randn(4, *LATENT), torch.randn(4, 1, 2)
    (phase,) = method.phases
    term, errors = method.paired_term(student, pairs(noise, target, cond), paired_l2, phase, LATENT)
    loss = term.weighed(0.0, torch.zeros(()), alone)
    loss.backward()
    heard = cond.mean((1, 2)).view(-1, 1, 1)
    weight = student.modules["transformer"].weight
    with torch.no_grad():
        off = noise - (weight[0] * noise + weight[1] + weight[2] * heard) - target
    torch.testing.assert_close(errors, off.square().mean((1, 2)))
    torch.testing.assert_close(loss, 0.25 * off.square().mean())
    expected = torch.stack([(0.25 * -2 * off * v).mean() for v in (noise, torch.ones_like(noise), heard)])
    torch.testing.assert_close(weight.grad, expected)
    assert student.modules["transformer_2"].weight.grad is None

    x = torch.randn(4, *LATENT, dtype=F64, requires_grad=True)
    y = torch.randn(4, *LATENT, dtype=F64)
    (gradient,) = torch.autograd.grad(0.25 * paired_l2(x, y).mean(), x)
    torch.testing.assert_close(gradient, 0.25 * 2 * (x - y).detach() / x.numel())


def test_a_student_of_more_steps_regresses_from_its_exit_step():
    method, student = built(name="dmd", steps=3, regression={"loss": "l2"}), experts(0)
    noise, cond = torch.randn(4, *LATENT), torch.ones(4, 1, 2)
    (phase,) = method.phases
    for i in range(5):
        batch = pairs(noise, torch.zeros_like(noise), cond, f"{i}/pairs")
        term, _ = method.paired_term(student, batch, paired_l2, phase, LATENT)
        loss = term.weighed(0.0, torch.zeros(()), alone)
        sample = method.rollout(student, batch.cond, batch.draws, phase, LATENT, grad=False, noise=noise)
        assert torch.equal(sample.noise, noise)
        torch.testing.assert_close(loss.detach(), 0.25 * sample.x.square().mean())
    with pytest.raises(ValueError, match="has no regression"):
        built(name="dmd2").paired_term(student, batch, paired_l2, phase, LATENT)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "phased", "regression": {}}, "regression compares clean samples"),
        ({"name": "dmd2", "regression": {}}, "solver=renoise leads it to many"),
        ({"name": "dmd", "regression": {"loss": "l2", "frames": 2}}, "frames does nothing with loss=l2"),
        ({"name": "dmd", "regression": {"loss": "ssim", "weights": "x"}}, "weights does nothing with loss=ssim"),
        ({"name": "dmd", "regression": {"loss": "l2", "side": 8}}, "side does nothing with loss=l2"),
        ({"name": "dmd", "regression": {"resample": 1.5}}, "less than or equal to 1"),
        ({"name": "dmd", "regression": {"weigth": 1.0}}, "weigth"),
    ],
)
def test_regressions_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Method(**settings)
