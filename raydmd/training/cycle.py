"""One training cycle: the heart of the project, on one screen.

The teacher's request leaves first and is answered elsewhere while the fake score trains here. The
student does not change during the fake updates, so its rollout can be drawn before them and the
generator's update uses its own sample's scores: nothing is stale.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from raydmd.errors import NonFiniteError
from raydmd.serving.messages import RewardRequest, ScoreRequest, WalkRequest
from raydmd.training.blame import blame, placed
from raydmd.training.quarantine import Poisoned

if TYPE_CHECKING:
    from raydmd.methods.gan import Adversary
    from raydmd.methods.method import Method, Walk
    from raydmd.methods.phases import Phase
    from raydmd.methods.regression import Distance
    from raydmd.methods.rollout import Sample
    from raydmd.methods.terms import Answer, Query
    from raydmd.methods.weighing import Mean, Term
    from raydmd.pairs.stream import PairStream
    from raydmd.serving.client import Client, Pending
    from raydmd.training.blame import Everyone
    from raydmd.training.roles import TrainedRole
    from raydmd.training.sampling import Samplers
    from raydmd.training.stream import Batch, Stream

T = TypeVar("T")
Agree = Callable[[Exception | None], None]
"""Raises on every rank if any rank brings an error; called at the same places by all."""

BANDS = (0.0, 0.5, 0.8, 0.95, 1.01)
ERRORS = tuple(f"fake/error_{low:g}_{min(high, 1):g}" for low, high in itertools.pairwise(BANDS))
"""Metric of the fake score's error in each band of noise levels."""

SATURATED = 3.0
"""Latents further from the teacher's mean than so many of its standard deviations count as saturated."""


@dataclass
class Stopwatch:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True, kw_only=True)
class Actors:
    """What a cycle works with.

    Attributes:
        method: rollout, score terms, fake loss.
        phase: the phase in progress.
        student: trained by the generator loss.
        fake: trained to follow the student.
        teacher: frozen, here or elsewhere.
        rewards: reward models, where the method adapts to them.
        stream: makes batches by position.
        latent: shape of one latent of the model's own size; an update's are its batch's.
        fake_updates: per student update.
        progress: share of the phase that is done, by cycle.
        agree: see :data:`Agree`.
        mean: of a scalar over all ranks.
        isolate: puts samples into quarantine, or raises if the run may not; called by all ranks with the same.
        everyone: see :data:`~raydmd.training.blame.Everyone`.
        adversary: discriminator and real samples, where the method has a GAN.
        pairs: noise-image pairs, where the method regresses to them.
        distance: of samples to pairs.
        samplers: draw the fake updates' samples elsewhere, where the run asks for that.
        reference: mean and standard deviation of the teacher's answers when the phase began, which saturation is
            measured by once they are known; until then by the cycle's own.
    """

    method: Method
    phase: Phase
    student: TrainedRole
    fake: TrainedRole
    teacher: Client
    rewards: Client | None
    stream: Stream
    latent: tuple[int, ...]
    fake_updates: int
    progress: Callable[[int], float]
    agree: Agree
    mean: Mean
    isolate: Callable[[Poisoned], None]
    everyone: Everyone
    adversary: Adversary | None = None
    pairs: PairStream | None = None
    distance: Distance | None = None
    samplers: Samplers | None = None
    reference: tuple[float, float] | None = None


def train_cycle(a: Actors, cycle: int) -> dict[str, float]:
    """One student update and its fake updates.

    Returns:
        Metrics; times under ``time/``.

    Raises:
        NonFiniteError: from a loss, a gradient or the teacher, on all ranks alike.
    """
    watch = Stopwatch()
    asked = ask(a, cycle)
    watch.lap("rollout")

    slots = [f"fake.{k}" for k in range(a.fake_updates)]
    if a.samplers:
        a.samplers.ahead(cycle, a.student, a.phase, a.stream, slots, a.agree)
    seen: dict[str, list[float]] = {}
    # The student stands still meanwhile, so the next sample can be judged elsewhere while this one is learnt from.
    for drawn in ahead(draw(a, cycle, slot) for slot in slots):
        for key, value in learn(a, drawn).items():
            seen.setdefault(key, []).append(value)
    metrics = {key: sum(values) / len(values) for key, values in seen.items()}
    watch.lap("fake")

    metrics |= sound(a, asked, lambda asked: update_student(a, asked, watch), lambda: ask(a, cycle))
    return metrics | {f"time/{k}": v for k, v in watch.seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sample for the student's update, and what was asked about it.

    Attributes:
        cycle: that it belongs to.
        batch: positions, conditions and random numbers.
        sample: of the student, with its gradient.
        queries: the score terms' to the teacher.
        walk: the anchor's, if it has one.
        pending: the teacher's answers, the walk's last.
        judged: its rewards, where the method adapts to them.
    """

    cycle: int
    batch: Batch
    sample: Sample
    queries: tuple[Query, ...]
    walk: Walk | None
    pending: list[Pending]
    judged: Pending | None


def ask(a: Actors, cycle: int) -> Asked:
    """Make the sample of a student update, and have teacher and rewards look at it."""
    batch = a.stream.batch(cycle, "student")
    sample = a.method.rollout(a.student.experts, batch.cond, batch.draws, a.phase, batch.latent, grad=True)
    queries, walk = a.method.queries(sample, a.phase, batch.draws, a.progress(cycle)), a.method.walk(sample)
    judged = a.rewards.submit(reward_request(sample, batch, f"cycle {cycle} reward")) if a.rewards else None
    pending = [a.teacher.submit(score_request(q, batch, f"cycle {cycle} {i}")) for i, q in enumerate(queries)]
    pending += [a.teacher.submit(walk_request(walk, batch, f"cycle {cycle} walk"))] if walk else []
    return Asked(cycle=cycle, batch=batch, sample=sample, queries=queries, walk=walk, pending=pending, judged=judged)


def update_student(a: Actors, asked: Asked, watch: Stopwatch) -> dict[str, float]:
    """The student's update, once the answers are there."""
    cycle, batch, sample, progress = asked.cycle, asked.batch, asked.sample, a.progress(asked.cycle)
    metrics: dict[str, float] = {}
    error: Exception | None = None
    answers: list[Answer] = []
    rewards: Tensor | None = None
    try:
        answers = [p.result().answer for p in asked.pending]
        rewards = asked.judged.result().answer.value if asked.judged else None
    except Exception as e:  # raised again below, by all ranks together
        error = placed(e, batch, cycle, "student")
    a.agree(error)
    watch.lap("teacher_wait")

    walked = answers.pop().value if asked.walk else None
    others: list[Term] = []
    if a.adversary:
        judged_term, found = a.adversary.student_term(sample, batch.cond, batch.draws, a.phase, progress)
        others += [judged_term] if judged_term else []
        metrics |= found
    errors: Tensor | None = None
    if a.pairs and a.distance and a.method.regresses(progress):
        term, errors = a.method.paired_term(a.student.experts, a.pairs.batch(cycle), a.distance, a.phase, a.latent)
        others.append(term)
        metrics["student/regression"] = float(errors.mean())
    sample.x.retain_grad()  # it shows which sample is the cause, should one be
    loss = a.method.generator_loss(
        a.fake.experts,
        sample,
        batch.cond,
        asked.queries,
        answers,
        progress,
        walked=walked,
        rewards=rewards,
        others=others,
        mean=a.mean,
    )
    metrics["student/gradient"] = step(
        a, a.student, loss, batch, cycle, "student", lambda: {"its sample": sample.x, "its gradient": sample.x.grad}
    )
    if a.pairs and errors is not None:
        a.pairs.learn(cycle, errors)
    watch.lap("generator")

    metrics["student/x0_mean"] = float(sample.x0.mean())
    metrics["student/x0_std"] = float(sample.x0.std())
    said = torch.cat([answer.value for answer in answers])
    metrics["teacher/x0_mean"], metrics["teacher/x0_std"] = float(said.mean()), float(said.std())
    mean, std = a.reference or (metrics["teacher/x0_mean"], metrics["teacher/x0_std"])
    metrics["student/saturation"] = float(((sample.x0 - mean).abs() > SATURATED * std).float().mean())
    if rewards is not None:
        metrics["student/reward"] = float(rewards.mean())
    return metrics


def sound(a: Actors, made: T, use: Callable[[T], dict[str, float]], anew: Callable[[], T]) -> dict[str, float]:
    """Use samples for an update; poison is drawn anew as often as the run allows, and nothing has moved before.

    Args:
        a: puts poison into quarantine, or raises.
        made: the samples.
        use: makes the update.
        anew: draws the same samples, but those in quarantine.
    """
    while True:
        try:
            return use(made)
        except Poisoned as error:
            a.isolate(error)
        made = anew()


def step(
    a: Actors,
    role: TrainedRole,
    loss: Tensor,
    batch: Batch,
    cycle: int,
    slot: str,
    looked: Callable[[], dict[str, Tensor | None]],
) -> float:
    """An optimizer's step; if its gradient is not finite, the error names the samples that ``looked`` shows."""
    try:
        return role.update(loss, where=f"cycle {cycle}, {slot}")
    except NonFiniteError as error:
        here = float(loss.detach())
        raise blame(error, batch, cycle, slot, loss=here, looked=looked(), everyone=a.everyone) from None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A sample for one fake update.

    Attributes:
        cycle: that it belongs to.
        purpose: its slot in the stream.
        batch: positions, conditions and random numbers.
        sample: of the student as it is now, without gradient.
        judged: its rewards, where the method weighs the fake score's loss by them.
        age: student updates since the weights that it was drawn with.
    """

    cycle: int
    purpose: str
    batch: Batch
    sample: Sample
    judged: Pending | None
    age: int = 0


def draw(a: Actors, cycle: int, purpose: str) -> Drawn:
    """Make a fake update's sample and have it judged."""
    batch = a.stream.batch(cycle, purpose)
    taken = _taken(a, a.samplers, cycle, purpose, batch) if a.samplers else None
    if taken is not None:
        sample, age = taken
    else:
        age = 0
        with torch.no_grad():
            sample = a.method.rollout(a.student.experts, batch.cond, batch.draws, a.phase, batch.latent, grad=False)
    asked = a.rewards if a.method.adapts_fake else None
    judged = asked.submit(reward_request(sample, batch, f"cycle {cycle} {purpose} reward")) if asked else None
    return Drawn(cycle=cycle, purpose=purpose, batch=batch, sample=sample, judged=judged, age=age)


def _taken(a: Actors, samplers: Samplers, cycle: int, purpose: str, batch: Batch) -> tuple[Sample, int] | None:
    """A sample that was drawn elsewhere, and its age; an error is raised by all ranks together."""
    error: Exception | None = None
    found: tuple[Sample, int] | None = None
    try:
        found = samplers.take(cycle, purpose, batch, a.method, a.phase)
    except Exception as e:
        error = e
    a.agree(error)
    return found


def learn(a: Actors, drawn: Drawn) -> dict[str, float]:
    """One update of the fake score, with other samples for those that are poison."""
    return sound(a, drawn, lambda d: update_fake(a, d), lambda: draw(a, drawn.cycle, drawn.purpose))


def update_fake(a: Actors, drawn: Drawn) -> dict[str, float]:
    """One update of the fake score."""
    batch, sample, cycle, metrics = drawn.batch, drawn.sample, drawn.cycle, {}
    start = time.perf_counter()
    rewards = _rewards(a, drawn)
    if drawn.judged is not None:
        metrics["reward/wait"] = time.perf_counter() - start
    loss, error, t = a.method.fake_loss(a.fake.experts, sample, batch.cond, batch.draws, a.phase, rewards)
    metrics["fake/loss"] = float(loss.detach())
    if a.samplers:
        metrics["fake/age"] = float(drawn.age)
    if a.adversary:
        more, found = a.adversary.critic_loss(sample, batch.cond, batch.draws, a.phase, t, a.progress(cycle))
        loss = loss if more is None else loss + more
        metrics |= found
    metrics["fake/gradient"] = step(
        a, a.fake, loss, batch, cycle, drawn.purpose, lambda: {"its sample": sample.x, "its error": error[:, None]}
    )
    for key, low, high in zip(ERRORS, BANDS, BANDS[1:], strict=False):
        here = (t >= low) & (t < high)
        if here.any():
            metrics[key] = float(error[here].mean())
    return metrics


def ahead(items: Iterable[Drawn]) -> Iterator[Drawn]:
    """Each item, once the one after it has been made."""
    last: Drawn | None = None
    for item in items:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last


def _rewards(a: Actors, drawn: Drawn) -> Tensor | None:
    """Rewards of a fake update's sample; an error is raised by all ranks together."""
    if drawn.judged is None:
        return None
    error: Exception | None = None
    rewards: Tensor | None = None
    try:
        rewards = drawn.judged.result().answer.value
    except Exception as e:
        error = placed(e, drawn.batch, drawn.cycle, drawn.purpose)
    a.agree(error)
    return rewards


def score_request(query: Query, batch: Batch, name: str) -> ScoreRequest:
    """A score term's question on the wire."""
    return ScoreRequest(
        x_t=query.x_t,
        t=query.t,
        conditions=batch.conditions,
        guidance=query.guidance,
        expert=query.expert,
        split=query.split,
        name=_name(name, batch),
    )


def walk_request(walk: Walk, batch: Batch, name: str) -> WalkRequest:
    """An anchor's question on the wire."""
    return WalkRequest(
        x_t=walk.noise,
        grid=walk.grid,
        conditions=batch.conditions,
        guidance=walk.guidance,
        name=_name(name, batch),
    )


def reward_request(sample: Sample, batch: Batch, name: str) -> RewardRequest:
    """A sample's clean prediction, to be judged."""
    return RewardRequest(x_t=sample.x0, conditions=batch.conditions, name=_name(name, batch))


def _name(name: str, batch: Batch) -> str:
    return f"{name} positions {batch.positions[0]}..{batch.positions[-1]}"
