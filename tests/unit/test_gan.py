"""The adversarial parts in closed form: losses, R1, the discriminator's place in a phase, balanced weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from raydmd.data.real import EMPTY, RealData
from raydmd.draws import Draws
from raydmd.errors import InputError
from raydmd.methods.gan import Adversary
from raydmd.methods.presets import build_method
from raydmd.methods.terms import Answer
from raydmd.methods.weighing import Term, total
from raydmd.models.base import Conditions, Denoiser, Experts, Routing
from raydmd.models.discriminator import Discriminator, Head, listened, make_head
from raydmd.objectives.gan import approximate_r1, discriminator_loss, exact_r1, generator_loss
from raydmd.objectives.matching import surrogate
from raydmd.process import RectifiedFlow
from raydmd.recipe import Recipe, derive
from raydmd.recipe_gan import Gan
from raydmd.recipe_method import Method
from raydmd.recipe_types import Balance, Ramp

pytestmark = pytest.mark.unit
F64 = torch.float64
WAN22 = Routing(("transformer", "transformer_2"), (0.875,))
LATENT = (2, 3)
WIDTH = 8


class Net(Denoiser):
    """A flow network of two blocks whose one token hears sample, time and condition."""

    prediction = "flow"

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            into = nn.Linear(math.prod(LATENT) + 2, WIDTH)
            blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(2)]
            network = nn.ModuleList([into, *blocks, nn.Linear(WIDTH, math.prod(LATENT))])
        super().__init__(network, blocks, width=WIDTH, autocast=torch.float32)

    def forward(self, x_t, t, cond):
        into, *blocks, out = self.network
        hidden = into(torch.cat([x_t.flatten(1), t[:, None], cond.embeds.mean((1, 2))[:, None]], 1))[:, None]
        for block in blocks:
            hidden = block(hidden)
        return out(hidden).view_as(x_t)


def experts(seed: int) -> Experts:
    modules = {name: Net(seed + i) for i, name in enumerate(WAN22.experts)}
    return Experts(modules, WAN22, RectifiedFlow(), "flow")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(update: str = "0/student", count: int = 4, first: int = 0) -> Draws:
    return Draws(7, update, range(first, first + count))


def data(x: torch.Tensor, rows: list[int] | None = None) -> RealData:
    table = torch.stack([torch.full((1, 2), float(i)) for i in range(4)])
    return RealData([x[:3], x[3:]], rows or [EMPTY + 1] * len(x), Conditions(embeds=table))


def adversary(fake: Experts, real: RealData, **settings) -> Adversary:
    gan = Gan(data="nowhere", **settings)
    heads = {e: make_head(d, gan.depths, seed=1) for e, d in fake.modules.items()}
    judge = Discriminator(fake, heads, denoisers=fake.modules, bare=heads, depths=gan.depths)
    return Adversary(settings=gan, process=RectifiedFlow(), judge=judge, real=real)


def parameters(a: Adversary) -> list[nn.Parameter]:
    return [p for m in (*a.judge.experts.modules.values(), *a.judge._bare.values()) for p in m.parameters()]


def rolled(method, phase, student, cond, update="0/student"):
    return method.rollout(student, cond, draws(update), phase, LATENT, grad=True)


def test_losses_in_closed_form():
    zero = torch.zeros(5, dtype=F64)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(zero)) == pytest.approx(math.log(2))
    real, fake = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([2.0, 0.1], dtype=F64)
    # -log sigmoid(real) - log(1 - sigmoid(fake)), and -log sigmoid(fake): it does not saturate where fake is low.
    expected = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -torch.sigmoid(fake).log().mean())
    low = torch.tensor([-30.0], dtype=F64, requires_grad=True)
    generator_loss(low).backward()
    assert float(low.grad) == pytest.approx(-1.0)


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    w = torch.randn(6, generator=seeded(0), dtype=F64, requires_grad=True)
    x = torch.randn(4, 2, 3, generator=seeded(1), dtype=F64, requires_grad=True)
    penalty = exact_r1(x.flatten(1) @ w, x)
    torch.testing.assert_close(penalty, 0.5 * w.square().sum())
    penalty.backward()
    torch.testing.assert_close(w.grad, w.detach())  # d/dw of |w|^2 / 2
    noise, sigma = torch.randn(4, 2, 3, generator=seeded(2), dtype=F64), 0.01
    got = approximate_r1(x.flatten(1) @ w, (x + sigma * noise).flatten(1) @ w, sigma=sigma)
    torch.testing.assert_close(got, 0.5 * (noise.flatten(1) @ w).square().mean())
    many = torch.randn(200_000, 6, generator=seeded(3), dtype=F64)
    mean = approximate_r1(torch.zeros(len(many), dtype=F64), sigma * many @ w, sigma=sigma)
    assert float(mean.detach()) == pytest.approx(float(penalty.detach()), rel=0.02)


def test_which_blocks_are_listened_to():
    assert listened(40, (0.5, 0.75, 1.0)) == [19, 29, 39]
    assert listened(2, (0.5, 0.75, 1.0)) == [0, 1]
    assert listened(1, (0.01,)) == [0]


@pytest.mark.parametrize("name", ["dmd2", "phased"])
def test_both_kinds_of_samples_are_judged_at_the_same_levels(name):
    """Of real samples from the student's own distribution, the discriminator sees what it sees of the student's."""
    method = build_method(Method(name=name), WAN22, RectifiedFlow(), "flow")
    process, seen = RectifiedFlow(), {}
    for phase in method.phases:
        s = torch.full((4,), phase.end)
        fake = experts(3)
        a = adversary(fake, data(torch.full((5, *LATENT), 2.0)))
        sums = {"fake": [], "real": []}

        def keep(x_t, t, cond, *, twice=False, sums=sums):
            for kind, x, when in zip(("fake", "real"), x_t.chunk(2), t.chunk(2), strict=True):
                sums[kind].append((x, when))
            assert len({WAN22.expert(v) for v in t.tolist()}) == 1
            return torch.zeros(len(x_t), requires_grad=True)

        a.judge.logits = keep
        for i in range(300):
            d = draws(f"{i}/fake.0", first=4 * i)
            x0 = torch.full((4, *LATENT), 2.0)
            x_s = process.add_noise(x0, d.normal("s", LATENT), s)
            sample = rolled(method, phase, experts(0), Conditions(embeds=torch.ones(4, 1, 2)))
            sample = type(sample)(**{**vars(sample), "x": x_s, "s": s})
            t, _ = phase.fake.draw(d, "fake.time")
            a.critic_loss(sample, Conditions(embeds=torch.ones(4, 1, 2)), d, phase, t, 0.0)
        for kind, pairs in sums.items():
            x, t = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
            assert float(t.min()) > phase.end
            # x_t - (1 - t) x0 must be t times standard noise, whatever s is.
            z = (x - (1 - t.view(-1, 1, 1)) * 2.0) / t.view(-1, 1, 1)
            assert abs(float(z.mean())) < 0.05, kind
            assert float(z.std()) == pytest.approx(1.0, abs=0.03), kind
            seen[phase.index, kind] = t
        assert not torch.equal(seen[phase.index, "fake"], seen[phase.index, "real"])


def test_weights_of_zero_are_no_gan_at_all():
    method = build_method(Method(name="phased"), WAN22, RectifiedFlow(), "flow")
    off = Ramp(start=0.0, end=1.0)
    for phase in method.phases:
        found = []
        for settings in (None, {"weight": off, "critic_weight": off}):
            student, fake, cond = experts(0), experts(3), Conditions(embeds=torch.ones(4, 1, 2))
            sample = rolled(method, phase, student, cond)
            others, more = [], None
            loss, _, t = method.fake_loss(fake, sample, cond, draws(), phase)
            if settings:
                a = adversary(fake, data(torch.zeros(5, *LATENT)), **settings)
                term, _ = a.student_term(sample, cond, draws(), phase, 0.0)
                more, _ = a.critic_loss(sample, cond, draws(), phase, t, 0.0)
                assert term is None
                assert more is None
                late, _ = a.student_term(sample, cond, draws(), phase, 0.5)
                others = [Term(loss=late.loss, at=late.at, weight=off)]  # and a weight of 0 on it is exact too
            loss.backward()
            queries = method.queries(sample, phase, draws(), 0.0)
            answers = [Answer(value=torch.zeros_like(q.x_t)) for q in queries]
            method.generator_loss(fake, sample, cond, queries, answers, 0.0, others=others).backward()
            found.append([p.grad for e in (student, fake) for m in e.modules.values() for p in m.parameters()])
        plain, with_gan = found
        assert any(g is not None and g.any() for g in plain)
        for ours, theirs in zip(with_gan, plain, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def test_the_student_descends_its_loss_and_the_judge_gets_no_gradient():
    method = build_method(Method(name="phased"), WAN22, RectifiedFlow(), "flow")
    for phase in method.phases:
        student, fake, cond = experts(0), experts(3), Conditions(embeds=torch.ones(4, 1, 2))
        a = adversary(fake, data(torch.zeros(5, *LATENT)))
        sample = rolled(method, phase, student, cond)
        term, metrics = a.student_term(sample, cond, draws(), phase, 0.0)
        assert metrics["gan/student"] == pytest.approx(float(term.loss.detach()), rel=1e-5)
        (got,) = torch.autograd.grad(term.loss, sample.x, retain_graph=True)
        t, _ = phase.fake.draw(draws(), "gan.time")
        x = sample.x.detach().requires_grad_()
        x_t = a.process.renoise(x, draws().normal("gan.noise", LATENT), sample.s, t)
        (expected,) = torch.autograd.grad(generator_loss(a.judge.logits(x_t, t, cond)), x)
        torch.testing.assert_close(got, expected)
        term.loss.backward()
        assert any(p.grad is not None for m in student.modules.values() for p in m.parameters())
        assert all(p.grad is None and p.requires_grad for p in parameters(a))


@pytest.mark.parametrize("r1", [None, {"kind": "exact"}, {"sigma": 0.1}], ids=str)
def test_a_discriminator_learns_to_tell_two_gaussians(r1):
    method = build_method(Method(name="dmd2"), WAN22, RectifiedFlow(), "flow")
    (phase,) = method.phases
    fake, cond = experts(3), Conditions(embeds=torch.ones(16, 1, 2))
    a = adversary(fake, data(1.5 + 0.1 * torch.randn(64, *LATENT, generator=seeded(0))), critic_weight=1.0, r1=r1)
    optimizer = torch.optim.Adam(parameters(a), lr=1e-2)
    student = experts(0)
    for i in range(120):
        d = draws(f"{i}/fake.0", 16, 16 * i)
        sample = method.rollout(student, cond, d, phase, LATENT, grad=False)
        x = -1.5 + 0.1 * d.normal("x", LATENT)
        sample = type(sample)(**{**vars(sample), "x": x})
        t, _ = phase.fake.draw(d, "fake.time")
        loss, metrics = a.critic_loss(sample, cond, d, phase, t, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i == 0:
            first = metrics["gan/critic"]
    assert first == pytest.approx(2 * math.log(2), rel=0.3)
    assert metrics["gan/critic"] < (0.6 if r1 is None else 1.0) * first
    t = torch.full((16,), 0.5)
    real, generated = (
        a.judge.logits((1 - 0.5) * x + 0.5 * torch.randn(16, *LATENT, generator=seeded(4)), t, cond)
        for x in (1.5, -1.5)
    )
    assert float((real > generated).float().mean()) > 0.9


def test_a_sample_without_caption_is_judged_without_prompt_and_so_is_its_partner():
    rows = [EMPTY, EMPTY + 1, EMPTY + 2, EMPTY, EMPTY + 1]
    x = torch.arange(5.0).view(5, 1, 1).expand(5, *LATENT)
    real, cond = data(x, rows), Conditions(embeds=torch.full((64, 1, 2), 9.0))
    d = draws(count=64)
    batch = real.batch(d)
    which = batch.x0[:, 0, 0].long()
    assert set(which.tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(batch.cond.embeds[:, 0, 0], torch.tensor([float(r) for r in rows])[which])
    without = torch.tensor(rows)[which] == EMPTY
    heard = real.heard(d, cond).embeds
    assert bool((heard[without] == EMPTY).all())
    assert bool((heard[~without] == 9.0).all())
    assert len(real.heard(draws(), Conditions(embeds=torch.full((4, 1, 2), 9.0)))) == 4
    # Two halves are the whole: positions decide, not the rank.
    halves = [real.batch(draws(count=32, first=k)).x0 for k in (0, 32)]
    assert torch.equal(torch.cat(halves), batch.x0)


def test_a_head_starts_from_its_seed_and_reads_blocks_of_any_length():
    net = Net(0)
    one, two, other = (make_head(net, (0.5, 1.0), seed=s) for s in (1, 1, 2))
    assert isinstance(one, Head)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.queries, other.queries)
    features = [torch.randn(3, n, WIDTH, generator=seeded(n)) for n in (4, 7)]
    assert one([f.bfloat16() for f in features]).dtype == torch.float32
    shuffled = [f[:, torch.randperm(f.shape[1], generator=seeded(0))] for f in features]
    torch.testing.assert_close(one(features), one(shuffled))


@pytest.mark.parametrize("ratio", [0.25, 3.0, 8.0])
def test_a_balanced_term_has_the_asked_share_of_the_score_terms_gradient(ratio):
    x = torch.randn(4, *LATENT, generator=seeded(0), requires_grad=True)
    other = torch.randn(2, *LATENT, generator=seeded(3), requires_grad=True)
    score = torch.randn(4, *LATENT, generator=seeded(1))
    base = surrogate(x, score)
    (of_score,) = torch.autograd.grad(base, x, retain_graph=True)
    cubed = Term(loss=1e3 * x.pow(3).mean(), at=x, weight=Balance(balance=ratio))
    weighed = cubed.weighed(0.0, score, lambda v: v)
    (of_term,) = torch.autograd.grad(weighed, x)
    torch.testing.assert_close(of_term.norm(), ratio * of_score.norm())
    torch.testing.assert_close(of_term / of_term.norm(), (x.square() / x.square().norm()).detach())
    # At an output of another batch size the shares of the mean losses are what is compared.
    smaller = Term(loss=other.pow(3).mean(), at=other, weight=Balance(balance=ratio))
    (of_other,) = torch.autograd.grad(smaller.weighed(0.0, score, lambda v: v), other)
    rms = [float(g.square().mean().sqrt()) for g in (of_other * other.numel(), score)]
    assert rms[0] == pytest.approx(ratio * rms[1], rel=1e-5)
    # Where the sample is not clean, the score reaches a prediction only so far.
    (of_clean,) = torch.autograd.grad(
        Term(loss=x.pow(3).mean(), at=x, weight=Balance(balance=ratio), reach=0.25).weighed(0.0, score, lambda v: v), x
    )
    torch.testing.assert_close(of_clean.norm(), 0.25 * ratio * of_score.norm())
    # What has all but vanished is not blown up.
    faint = Term(loss=1e-12 * x.pow(3).mean(), at=x, weight=Balance(balance=ratio))
    (of_faint,) = torch.autograd.grad(faint.weighed(0.0, score, lambda v: v), x)
    assert 0 < float(of_faint.norm()) < 1e-6
    nothing = Term(loss=0 * x.sum(), at=x, weight=Balance(balance=ratio))
    (of_nothing,) = torch.autograd.grad(total(base, [nothing], 0.0, score, lambda v: v), x)
    assert torch.equal(of_nothing, of_score)


def test_ranks_balance_together():
    """Each rank scales by what all have, so that how samples are spread does not matter."""
    x = torch.randn(4, *LATENT, generator=seeded(0), requires_grad=True)
    score = torch.randn(4, *LATENT, generator=seeded(1))
    balance = Balance(balance=Ramp(start=2.0, end=1.0))
    whole = Term(loss=x.pow(3).mean(), at=x, weight=balance).weighed(0.5, score, lambda v: v)
    (expected,) = torch.autograd.grad(whole, x)
    halves = []
    strengths = [[g[k : k + 2].square().mean() for k in (0, 2)] for g in (score, 3 * x.detach().square())]
    for k in (0, 2):
        part = x[k : k + 2].detach().requires_grad_()
        means = iter([sum(s) / 2 for s in strengths])
        term = Term(loss=part.pow(3).mean(), at=part, weight=balance)
        (g,) = torch.autograd.grad(term.weighed(0.5, score[k : k + 2], lambda _, means=means: next(means)), part)
        halves.append(g / 2)  # as DDP averages
    torch.testing.assert_close(torch.cat(halves), expected)


@pytest.mark.parametrize(
    "settings", [{"anchor": {"weight": {"balance": 0.5}}}, {"moments": {"weight": {"balance": 2}}}]
)
def test_any_auxiliary_term_can_be_balanced(settings):
    method = build_method(Method(name="decoupled", rollout="unroll", **settings), WAN22, RectifiedFlow(), "flow")
    (phase,), student, cond = method.phases, experts(0), Conditions(embeds=torch.ones(4, 1, 2))
    sample = rolled(method, phase, student, cond)
    queries = method.queries(sample, phase, draws(), 0.0)
    half = torch.randn(4, *LATENT, generator=seeded(0))
    answers = [Answer(value=half, uncond=-half if q.split else None) for q in queries]
    walked = torch.zeros(4, *LATENT) if method.anchor else None
    at = sample.first if method.anchor else sample.x
    loss = method.generator_loss(experts(3), sample, cond, queries, answers, 0.0, walked=walked)
    plain = build_method(Method(name="decoupled", rollout="unroll"), WAN22, RectifiedFlow(), "flow")
    score = plain.generator_loss(experts(3), sample, cond, queries, answers, 0.0)
    (all_,) = torch.autograd.grad(loss, at, retain_graph=True)
    (of_score,) = torch.autograd.grad(score, sample.x, retain_graph=True)
    of_term = all_ if method.anchor else all_ - of_score
    torch.testing.assert_close(of_term.norm() / of_score.norm(), torch.tensor(0.5 if method.anchor else 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.gan": {}}, r"method\.gan\.data: Field required"),
        ({"method.gan.weight": 0}, "never hears"),
        ({"method.gan.weight": {"start": 0, "end": 0}}, "never hears"),
        ({"method.gan.weight": {"balance": 0}}, "balance"),
        ({"method.gan.weight": {"balance": {"start": 0, "end": 0}}}, "balance=0 switches the term off"),
        ({"method.gan.critic_weight": 0}, "untrained"),
        ({"method.gan.critic_weight": {"balance": 1}}, "critic_weight"),
        ({"method.guidance": {"balance": 1}}, "guidance"),
        ({"method.gan.r1": {"kind": "exact", "sigma": 0.2}}, "sigma=0.2 does nothing"),
        ({"method.gan.depths": [0.0]}, "depths"),
        ({"training.fake_updates": 0}, r"needs training\.fake_updates"),
        ({"training.sharding": "fsdp", "method.gan.r1.kind": "exact"}, r"sharding=fsdp does not allow"),
        ({"training.gradient_checkpointing": True, "method.gan.r1.kind": "exact"}, "kind=approximate"),
        ({"method.gan.critic": 1}, r"unknown recipe key 'method\.gan\.critic'"),
    ],
    ids=str,
)
def test_what_can_not_work_is_refused(changes, message):
    given = {"method.gan.data": "clips", **changes} if "method.gan" not in changes else changes
    with pytest.raises(InputError, match=message):
        derive(Recipe(), given)


def test_a_gan_is_off_unless_asked_for():
    assert Recipe().method.gan is None
    asked = derive(Recipe(), {"method.gan.data": "clips", "method.gan.weight": {"balance": 0.1}, "method.gan.r1": {}})
    assert asked.method.gan.weight == Balance(balance=0.1)
    assert asked.method.gan.critic_weight == 1e-2
    assert asked.method.gan.r1.kind == "approximate"
    assert Recipe.model_validate(asked.model_dump(mode="json")) == asked
