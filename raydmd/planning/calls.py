"""How often a method calls each network, found by running the method itself on numbers that cost nothing.

The networks are stood in for by one that notes who called it, with how many samples, and whether the call is
differentiated. What a cycle does is what :mod:`raydmd.training.cycle` does, in its order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from raydmd.draws import Draws
from raydmd.methods.presets import build_method, student_routing
from raydmd.methods.terms import Answer
from raydmd.models.base import Conditions, Experts
from raydmd.recipe_types import Balance, value_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raydmd.methods.method import Method
    from raydmd.methods.phases import Phase
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe

Stage = Literal["rollout", "fake", "generator", "teacher"]
Kind = Literal["forward", "record", "backward"]
"""A forward pass without gradient, one that is recorded, and the backward pass of such a one."""
SAMPLES = 2
DRAWS = 4
"""Cycles that are looked at for each exit step."""


@dataclass(frozen=True)
class Calls:
    """Of one kind, in one stage of a cycle, by one role.

    Attributes:
        stage: of the cycle; the teacher's are wherever its answers are made.
        role: whose network.
        kind: of pass.
        count: calls a cycle, on average over exit steps.
        rows: samples that one of them takes, in a worker's share of the batch.
    """

    stage: Stage
    role: Literal["student", "fake", "teacher"]
    kind: Kind
    count: float
    rows: float


@dataclass(frozen=True)
class PhaseCalls:
    """A phase's cycle.

    Attributes:
        phase: whose.
        calls: of networks.
        queries: requests to the teacher a cycle, of one worker.
        answers: latents that come back for each sample, over all requests.
        held: recorded forward passes of the student that wait for their backward pass at once, at most.
        fake_rows: rows, in shares of the batch, of a fake update's recorded passes together.
    """

    phase: Phase
    calls: tuple[Calls, ...]
    queries: int
    answers: int
    held: float
    fake_rows: float

    def total(self, role: str, *kinds: Kind) -> float:
        """Rows a cycle, in shares of the batch, that a role's network takes in some kinds of pass."""
        return sum(c.count * c.rows for c in self.calls if c.role == role and (not kinds or c.kind in kinds))


@dataclass
class _Log:
    stage: Stage = "rollout"
    seen: Counter[tuple[Stage, str, Kind, float]] = field(default_factory=Counter)

    def note(self, role: str, kind: Kind, rows: float, times: float = 1.0, stage: Stage | None = None) -> None:
        self.seen[stage or self.stage, role, kind, rows] += times  # type: ignore[assignment]


class _StandIn(nn.Module):
    """Notes its calls."""

    def __init__(self, role: str, log: _Log) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self._role, self._log = role, log

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        del t, cond
        self._log.note(self._role, "record" if torch.is_grad_enabled() else "forward", len(x) / SAMPLES)
        return self.one * x


@dataclass(frozen=True)
class _Draws(Draws):
    """Draws of a cycle that leaves its rollout at a step of our choice."""

    leave: float = 0.5

    def shared(self, purpose: str) -> float:
        return self.leave if purpose == "exit" else super().shared(purpose)


def count(recipe: Recipe, family: Family) -> list[PhaseCalls]:
    """What a cycle of each phase calls.

    Args:
        recipe: the run.
        family: its pipeline.
    """
    method = build_method(recipe.method, family.routing(), family.process, family.prediction)
    return [_phase(recipe, family, method, phase) for phase in method.phases]


def _phase(recipe: Recipe, family: Family, method: Method, phase: Phase) -> PhaseCalls:
    exits, updates = len(method.rollout.exits(phase)), recipe.training.fake_updates
    cycles = [(k, (e + 0.5) / exits) for e in range(exits) for k in range(DRAWS)]
    log, held, queries, answers, fake_rows = _Log(), [], 0, 0, 1.0
    student, fake = (
        Experts({e: _StandIn(role, log) for e in routing.experts}, routing, family.process, family.prediction)
        for role, routing in (
            ("student", student_routing(recipe.method, family.routing())),
            ("fake", family.routing()),
        )
    )
    latent, progress = (1,) * len(family.shape().latent), 0.5
    for cycle, leave in cycles:

        def draws(what: str, cycle: int = cycle, leave: float = leave) -> _Draws:
            return _Draws(0, f"{cycle}/{what}", range(SAMPLES), leave=leave)

        cond = Conditions(embeds=torch.zeros(SAMPLES, 1, 1))
        log.stage = "rollout"
        before = _recorded(log, "student")
        sample = method.rollout(student, cond, draws("student"), phase, latent, grad=True)
        asked, walk = method.queries(sample, phase, draws("student"), progress), method.walk(sample)
        held.append(_recorded(log, "student") - before)
        for query in asked:
            log.note("teacher", "forward", 2.0 if query.guidance.active or query.split else 1.0, stage="teacher")
        steps = len(walk.grid) - 1 if walk else 0
        if walk:
            log.note("teacher", "forward", 2.0 if walk.guidance.active else 1.0, steps, stage="teacher")
        queries, answers = len(asked) + bool(walk), sum(1 + q.split for q in asked) + bool(walk)

        log.stage = "fake"
        for k in range(updates):
            with torch.no_grad():
                made = method.rollout(student, cond, draws(f"fake.{k}"), phase, latent, grad=False)
            method.fake_loss(fake, made, cond, draws(f"fake.{k}"), phase)
            log.note("fake", "backward", 1.0)
            if critic := _critic(recipe, progress):
                log.note("fake", "record", critic)
                log.note("fake", "backward", critic)
                fake_rows = 1.0 + critic

        log.stage = "generator"
        replies = [Answer(value=q.x_t, uncond=q.x_t if q.split else None) for q in asked]
        walked, rewards = (sample.noise if walk else None), torch.zeros(SAMPLES)
        if method.adaptation is None or SAMPLES % method.adaptation.group:
            rewards = None  # type: ignore[assignment]
        method.generator_loss(fake, sample, cond, asked, replies, progress, walked=walked, rewards=rewards)
        if _critic(recipe, progress):
            log.note("fake", "record", 1.0)
            log.note("fake", "backward", 1.0)
        if recipe.method.regression and method.regresses(progress):
            share = (recipe.method.regression.batch or recipe.training.batch) / recipe.training.batch
            log.note("student", "record", share)
            log.note("student", "backward", share)
            held[-1] += share
        log.note("student", "backward", 1.0, _recorded(log, "student", stage="rollout") - before)
    calls = tuple(
        Calls(stage, role, kind, times / len(cycles), rows)  # type: ignore[arg-type]
        for (stage, role, kind, rows), times in log.seen.items()
    )
    return PhaseCalls(phase, calls, queries, answers, max(held), fake_rows)


def _recorded(log: _Log, role: str, *, stage: Stage = "rollout") -> float:
    return sum(n for (where, who, kind, _), n in log.seen.items() if (where, who, kind) == (stage, role, "record"))


def _critic(recipe: Recipe, progress: float) -> float:
    """Rows of a discriminator's pass, in shares of the batch; 0 without a GAN."""
    gan = recipe.method.gan
    if gan is None or (not isinstance(gan.weight, Balance) and not value_at(gan.weight, progress)):
        return 0.0
    return 3.0 if gan.r1 and gan.r1.kind == "approximate" else 2.0


def mean_rows(calls: Iterable[Calls]) -> float:
    """Rows a call, on average."""
    found = list(calls)
    return fmean([c.rows for c in found], weights=[c.count for c in found]) if found else 0.0
