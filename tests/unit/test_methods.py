"""Phases, rollouts and the composition: what is trained, where it renoises, what carries a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raydmd.draws import Draws, shuffled
from raydmd.guidance import Guidance
from raydmd.methods.phases import TimeRange, split_grid
from raydmd.methods.presets import build_method, source_expert, student_routing
from raydmd.methods.terms import Answer
from raydmd.models.base import Conditions, Experts, Routing
from raydmd.process import RectifiedFlow, step_grid, unshift
from raydmd.recipe_method import Method

pytestmark = pytest.mark.unit
PHASED, DMD2 = Method(name="phased"), Method(name="dmd2")
WAN22 = Routing(("transformer", "transformer_2"), (0.875,))
WAN21 = Routing(("transformer",))
LATENT = (2, 3)


class Flow(nn.Module):
    """A linear flow network, so that its gradient is easy to see."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x_t, t, cond):
        return self.weight[0] * x_t + self.weight[1] * t.view(-1, 1, 1) + cond.embeds.mean((1, 2)).view(-1, 1, 1)


def cond_of(embeds: torch.Tensor) -> Conditions:
    return Conditions(embeds=embeds)


def none(cond: Conditions) -> Conditions:
    return cond_of(torch.zeros_like(cond.embeds))


def experts(routing: Routing, seed: int) -> Experts:
    modules = {name: Flow(seed + i) for i, name in enumerate(routing.experts)}
    return Experts(modules, routing, RectifiedFlow(), "flow")


def draws(update: str = "0/student", count: int = 4) -> Draws:
    return Draws(7, update, range(count))


def test_the_papers_phases_of_wan22():
    """Two steps a phase, phase 1 ends at 0.8333 but renoises above the teacher's boundary (appendix B)."""
    method = build_method(PHASED, WAN22, RectifiedFlow(), "flow")
    high, low = method.phases
    assert (high.first, high.last, low.first, low.last) == (0, 2, 2, 4)
    assert round(high.end, 4) == 0.8333
    assert low.end == 0.0
    assert high.student == ("transformer",)
    assert low.student == ("transformer_2",)
    assert high.fake_experts == ("transformer",)
    assert low.fake_experts == ("transformer", "transformer_2")
    t, expert = high.fake.draw(draws(count=500), "t")
    assert expert == "transformer"
    assert t.min() > 0.875
    assert t.max() < 1


def test_phases_of_a_teacher_with_one_expert_nest_down_to_their_end():
    method = build_method(PHASED, WAN21, RectifiedFlow(), "flow")
    assert [p.student for p in method.phases] == [("transformer",), ("transformer_2",)]
    low = float(unshift(torch.tensor(method.phases[0].end), 5.0))
    window = method.score.window.at(method.phases[0].floor, 1.0, 0.0)
    assert window.parts == (("transformer", pytest.approx(low), 0.98),)
    assert source_expert(PHASED, WAN21, "transformer_2") == "transformer"
    assert source_expert(PHASED, WAN22, "transformer_2") == "transformer_2"


def test_dmd2_is_one_phase_of_all_experts():
    method = build_method(DMD2, WAN22, RectifiedFlow(), "flow")
    assert len(method.phases) == 1
    assert method.phases[0].student == WAN22.experts
    assert method.phases[0].end == 0.0
    assert student_routing(DMD2, WAN22) == WAN22


def test_times_are_uniform_before_the_shift_and_one_expert_a_batch():
    times = TimeRange.between(0.0, 1.0, WAN22, mu=5.0)
    u, seen = [], {"transformer": 0, "transformer_2": 0}
    for i in range(400):
        t, expert = times.draw(draws(f"{i}/x", 8), f"p{i}")
        assert {WAN22.expert(float(v)) for v in t} == {expert}
        seen[expert] += 1
        u.append(unshift(t, 5.0))
    assert abs(seen["transformer"] / 400 - (1 - float(unshift(torch.tensor(0.875), 5.0)))) < 0.08
    assert abs(torch.cat(u).mean() - 0.5) < 0.05
    with pytest.raises(ValueError, match="no time lies between"):
        TimeRange.between(0.999, 1.0, WAN22, mu=1.0, clip=(0.0, 0.5))


def test_split_grid_sends_a_step_at_the_boundary_to_the_noisier_phase():
    grid = step_grid(4, 1.0)
    assert split_grid(grid, (0.75,)) == [range(0, 2), range(2, 4)]
    assert split_grid(grid, ()) == [range(0, 4)]


@pytest.mark.parametrize("name", ["phased", "dmd2"])
def test_only_the_exit_step_carries_a_gradient_and_jumps_to_the_phases_end(name):
    method = build_method(PHASED if name == "phased" else DMD2, WAN22, RectifiedFlow(), "flow")
    student, cond = experts(WAN22, 0), cond_of(torch.randn(4, 1, 2))
    for phase in method.phases:
        exits = set()
        for i in range(24):
            sample = method.rollout(student, cond, draws(f"{i}/student"), phase, LATENT, grad=True)
            exits.add(sample.exit_step)
            assert float(sample.s[0]) == pytest.approx(phase.end)
            used = student.routing.expert(method.rollout.grid[sample.exit_step])
            student.modules[used].zero_grad()
            sample.x.sum().backward()
            for expert, module in student.modules.items():
                got = module.weight.grad is not None and bool(module.weight.grad.abs().sum() > 0)
                assert got == (expert == used)
                module.weight.grad = None
        assert exits == set(range(phase.first, phase.last))


def test_the_last_exit_of_the_last_phase_is_the_sampler():
    """Leaving at the last step gives exactly what sampling the student gives."""
    from raydmd.sampling import sample

    method = build_method(PHASED, WAN22, RectifiedFlow(), "flow")
    student, cond = experts(WAN22, 0), cond_of(torch.randn(4, 1, 2))
    phase = method.phases[1]
    for i in range(20):
        d = draws(f"{i}/student")
        made = method.rollout(student, cond, d, phase, LATENT, grad=False)
        if made.exit_step == 3:
            noise = d.normal("noise", LATENT)
            grid = step_grid(4, 5.0)
            torch.testing.assert_close(made.x, sample(student, noise, cond, cond, grid=grid, guidance=Guidance()))
            return
    raise AssertionError("no rollout left at the last step")


def test_a_fake_that_equals_the_teacher_gives_no_gradient_without_guidance():
    for settings in (Method(name="phased", guidance=1.0), Method(name="dmd2", guidance=1.0)):
        method = build_method(settings, WAN22, RectifiedFlow(), "flow")
        student, teacher, cond = experts(WAN22, 0), experts(WAN22, 5), cond_of(torch.randn(4, 1, 2))
        for phase in method.phases:
            sample = method.rollout(student, cond, draws(), phase, LATENT, grad=True)
            (query,) = method.queries(sample, phase, draws(), 0.0)
            answer = teacher.guided_x0(query.x_t, query.t, cond, none(cond), query.guidance).detach()
            loss = method.generator_loss(teacher, sample, cond, [query], [Answer(value=answer)], 0.0)
            assert float(loss.detach()) == 0.0


def test_gradient_routing():
    """The generator's loss moves the student alone, the fake's loss the fake alone."""
    method = build_method(PHASED, WAN22, RectifiedFlow(), "flow")
    student, fake, teacher, cond = (
        experts(WAN22, 0),
        experts(WAN22, 3),
        experts(WAN22, 5),
        cond_of(torch.randn(4, 1, 2)),
    )
    phase = method.phases[1]
    sample = method.rollout(student, cond, draws(), phase, LATENT, grad=True)
    (query,) = method.queries(sample, phase, draws(), 0.0)
    answer = teacher.guided_x0(query.x_t, query.t, cond, none(cond), query.guidance)
    method.generator_loss(fake, sample, cond, [query], [Answer(value=answer)], 0.0).backward()
    assert all(m.weight.grad is None for e in (fake, teacher) for m in e.modules.values())
    assert any(m.weight.grad is not None for m in student.modules.values())
    for m in student.modules.values():
        m.weight.grad = None
    loss, _, _ = method.fake_loss(fake, sample, cond, draws(), phase)
    loss.backward()
    assert all(m.weight.grad is None for m in student.modules.values())
    assert any(m.weight.grad is not None for m in fake.modules.values())


def test_the_fakes_loss_of_a_clean_phase_is_plain_flow_matching():
    method = build_method(PHASED, WAN22, RectifiedFlow(), "flow")
    phase, cond, fake = method.phases[1], cond_of(torch.randn(4, 1, 2)), experts(WAN22, 3)
    sample = method.rollout(experts(WAN22, 0), cond, draws(), phase, LATENT, grad=False)
    loss, _, t = method.fake_loss(fake, sample, cond, draws(), phase)
    noise = draws().normal("fake.noise", LATENT)
    x_t = method.process.add_noise(sample.x, noise, t)
    expected = (fake.raw(x_t, t, cond) - (noise - sample.x)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_draws_depend_on_position_and_purpose_alone():
    whole = Draws(3, "5/student", range(8)).normal("noise", LATENT)
    half = Draws(3, "5/student", range(4, 8)).normal("noise", LATENT)
    assert torch.equal(whole[4:], half)
    assert not torch.equal(whole[:4], half)
    assert not torch.equal(half, Draws(3, "5/student", range(4, 8)).normal("other", LATENT))
    assert not torch.equal(half, Draws(4, "5/student", range(4, 8)).normal("noise", LATENT))
    assert Draws(3, "5/student", [0]).shared("exit") == Draws(3, "5/student", [9]).shared("exit")
    assert sorted(shuffled(0, 0, 10)) == list(range(10))
    assert shuffled(0, 0, 10) != shuffled(0, 1, 10)


def test_one_batch_one_expert():
    with pytest.raises(ValueError, match="one batch, one expert"):
        experts(WAN22, 0).x0(torch.zeros(2, *LATENT), torch.tensor([0.9, 0.8]), torch.zeros(2, 1, 2))


def test_guidance_scale_one_is_conditional_and_zero_is_unconditional():
    cond, uncond = torch.tensor([2.0]), torch.tensor([1.0])
    assert Guidance(1.0).combine(cond, uncond) == 2
    assert Guidance(0.0).combine(cond, uncond) == 1
    assert Guidance.from_extra(3.0) == Guidance(4.0)
    assert not Guidance(1.0).active
