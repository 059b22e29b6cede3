import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raydmd.errors import InputError, NonFiniteError, RaydmdError
from raydmd.guidance import Guidance
from raydmd.methods.terms import Answer
from raydmd.models.base import Conditions, Denoiser, Experts, Routing
from raydmd.process import RectifiedFlow
from raydmd.sampling import sample
from raydmd.serving.client import ReplicaFailed
from raydmd.serving.engine import TeacherEngine, answer_each
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import ScoreRequest, WalkRequest
from raydmd.serving.teacher import answer

pytestmark = pytest.mark.unit


class Tiny(Denoiser):
    """One linear layer over latents, time and mean condition; remembers how many rows it saw."""

    def __init__(self, seed: int) -> None:
        super().__init__(nn.Linear(8 + 1 + 4, 8), (), width=8, autocast=torch.float32)
        self.prediction = "flow"
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        self.seen: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        self.seen.append(len(x_t))
        if (x_t == 13).any():
            raise RuntimeError("bad luck")
        out: Tensor = self.network(torch.cat([x_t.flatten(1), t[:, None], cond.embeds.mean(1)], 1))
        return torch.where(x_t == 99, torch.nan, out.view_as(x_t))


def experts() -> Experts:
    modules = {"high": Tiny(0), "low": Tiny(1)}
    return Experts(modules, Routing(("high", "low"), (0.875,)), RectifiedFlow(), "flow")


CONDITIONS = Conditions(embeds=torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2)))


def ask(seed: int, size: int = 2, *, scale: float = 4.0, expert: str = "high") -> ScoreRequest:
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(size, generator=draw)
    return ScoreRequest(
        x_t=torch.randn(size, 4, 2, generator=draw),
        t=0.875 + 0.125 * t if expert == "high" else 0.8 * t,
        conditions=tuple(torch.randint(1, 5, (size,), generator=draw).tolist()),
        guidance=Guidance(scale),
        expert=expert,
        name=f"request {seed}",
    )


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_a_batch_of_requests_equals_each_alone(expert: str, scale: float) -> None:
    requests = [ask(i, i + 1, scale=scale, expert=expert) for i in range(4)]
    together = answer(experts(), CONDITIONS, requests)
    for request, found in zip(requests, together, strict=True):
        x0 = found.value
        alone = answer(experts(), CONDITIONS, [request])[0].value
        assert x0.shape == request.x_t.shape
        assert x0.dtype == torch.float32
        torch.testing.assert_close(x0, alone, atol=1e-6, rtol=1e-6)


def test_guidance_is_combined_from_both_halves_with_row_0_as_the_negative_prompt() -> None:
    teacher = experts()
    request = ask(0, 3, scale=4.0)
    with torch.no_grad():
        cond = teacher.x0(request.x_t, request.t, CONDITIONS.rows(request.conditions))
        uncond = teacher.x0(request.x_t, request.t, CONDITIONS.rows((0, 0, 0)))
    expected = uncond + 4.0 * (cond - uncond)
    x0 = answer(teacher, CONDITIONS, [request])[0].value
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-5)


def test_a_split_answer_has_both_halves_and_they_make_the_guided_one() -> None:
    request = ask(0, 3, scale=4.0)
    guided = answer(experts(), CONDITIONS, [request])[0].value
    teacher = experts()
    halves = answer(teacher, CONDITIONS, [dataclasses.replace(request, split=True)])[0]
    cond, uncond = halves.value, halves.uncond
    network = teacher.modules["high"]
    assert isinstance(network, Tiny)
    assert network.seen == [6]
    assert uncond is not None
    torch.testing.assert_close(uncond + 4.0 * (cond - uncond), guided, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="cannot share a forward"):
        answer(experts(), CONDITIONS, [request, dataclasses.replace(request, split=True)])


def test_a_walk_is_the_sampler_and_crosses_experts() -> None:
    teacher, start = experts(), torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(3))
    grid = (1.0, 0.9, 0.5, 0.2)
    walk = WalkRequest(x_t=start, grid=grid, conditions=(1, 2, 3), guidance=Guidance(2.0), name="walk")
    end, twin = answer(teacher, CONDITIONS, [walk, walk])
    cond = CONDITIONS.rows((1, 2, 3))
    expected = sample(experts(), start, cond, CONDITIONS.rows((0, 0, 0)), grid=grid, guidance=Guidance(2.0))
    assert end.uncond is None
    torch.testing.assert_close(end.value, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(end.value, twin.value)
    assert {name for name, m in teacher.modules.items() if isinstance(m, Tiny) and m.seen} == {"high", "low"}
    for bad in ((1.0,), (0.5, 0.9), (1.2, 0.5)):
        with pytest.raises(InputError, match="times of a walk must fall"):
            answer(experts(), CONDITIONS, [dataclasses.replace(walk, grid=bad)])
    with pytest.raises(InputError, match="cannot share a forward"):
        answer(experts(), CONDITIONS, [walk, ask(0)])


def test_both_halves_go_in_one_forward_and_guidance_1_runs_no_unconditional_half() -> None:
    for scale, rows in ((4.0, 10), (1.0, 5)):
        teacher = experts()
        answer(teacher, CONDITIONS, [ask(0, 2, scale=scale), ask(1, 3, scale=scale)])
        network = teacher.modules["high"]
        assert isinstance(network, Tiny)
        assert network.seen == [rows]


def test_no_gradient_and_no_autocast_reach_the_answer() -> None:
    plain = answer(experts(), CONDITIONS, [ask(0)])[0].value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = answer(experts(), CONDITIONS, [ask(0)])[0].value
    assert torch.equal(plain, inside)
    assert not inside.requires_grad
    assert not inside.is_inference()  # a trainer may save it for its backward


def test_non_finite_answers_name_request_and_sample() -> None:
    request = ask(3, 3)
    request.x_t[1, 0, 0] = 99
    with pytest.raises(NonFiniteError, match=r"'request 3', sample 1 .*: 1 of 8 values") as caught:
        answer(experts(), CONDITIONS, [ask(0), request])
    assert caught.value.samples == (1,)
    request.x_t[1, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="its x_t was not finite already"):
        answer(experts(), CONDITIONS, [request])


def test_only_the_guilty_requests_of_a_batch_fail() -> None:
    requests = [ask(i) for i in range(4)]
    requests[1].x_t[0, 0, 0] = 13
    requests[2].x_t[0, 0, 0] = 99
    outcomes = answer_each(TeacherEngine(experts(), CONDITIONS), requests, who="teacher/7")
    assert isinstance(outcomes[1], ReplicaFailed)
    assert str(outcomes[1]) == "replica 'teacher/7', request 'request 1': RuntimeError: bad luck"
    assert isinstance(outcomes[2], NonFiniteError)
    for i in (0, 3):
        expected = answer(experts(), CONDITIONS, [requests[i]])[0].value
        assert isinstance(outcomes[i], Answer)
        assert torch.equal(outcomes[i].value, expected)


def change(request: ScoreRequest, **fields: object) -> ScoreRequest:
    names = ("x_t", "t", "conditions", "guidance", "expert", "name")
    return ScoreRequest(**{**{n: getattr(request, n) for n in names}, **fields})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: change(r, expert="middle"), r"no expert 'middle' here, there is \['high', 'l"),
        (lambda r: change(r, conditions=(1,)), "2 samples, times of shape .* and 1 conditions"),
        (lambda r: change(r, t=r.t[:1]), r"times of shape \(1,\)"),
        (lambda r: change(r, conditions=(1, 5)), r"conditions \[5\] are not in the table of 5"),
        (lambda r: change(r, conditions=(-1, 1)), r"conditions \[-1\]"),
        (lambda r: change(r, t=r.t * 0.5), r"asks expert 'high', its times .* belong to \['low'"),
        (lambda r: change(r, guidance=Guidance(2.0)), "cannot share a forward with .*'request 0'"),
    ],
)
def test_requests_that_do_not_fit_are_refused_by_name(
    spoil: Callable[[ScoreRequest], ScoreRequest], message: str
) -> None:
    with pytest.raises(InputError, match=f"^request 'request 1': .*{message}"):
        answer(experts(), CONDITIONS, [ask(0), spoil(ask(1))])


def test_local_teacher_answers_eagerly_and_raises_late() -> None:
    ticks = iter([10.0, 10.5, 20.0])
    teacher = LocalClient(TeacherEngine(experts(), CONDITIONS), name="here", clock=lambda: next(ticks))
    request = ask(0, 3)
    pending = teacher.submit(request)
    expected = answer(experts(), CONDITIONS, [request])[0].value
    request.x_t.zero_()
    reply = pending.result()
    assert torch.equal(reply.answer.value, expected)
    assert (reply.replica, reply.seconds, reply.batch_items) == ("here", 0.5, 3)
    assert pending.result() is reply
    assert (pending.waited, teacher.retries) == (0.0, 0)

    bad = ask(1)
    bad.x_t[0, 0, 0] = 13
    failed = teacher.submit(bad)
    for _ in range(2):
        with pytest.raises(RaydmdError, match="bad luck"):
            failed.result()


def test_the_pure_modules_bring_in_no_ray() -> None:
    modules = [
        "batcher",
        "client",
        "codec",
        "engine",
        "fleet",
        "health",
        "leases",
        "local",
        "messages",
        "replica",
        "router",
        "scaling",
        "teacher",
    ]
    imports = "; ".join(f"import raydmd.serving.{m}" for m in modules)
    check = "import sys; assert not {'ray', 'diffusers', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, timeout=120)
