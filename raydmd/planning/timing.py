"""How long the parts of a cycle take, from what hardware is said to do or was measured to do. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.planning.calls import Calls, Kind, PhaseCalls
    from raydmd.planning.hardware import Hardware
    from raydmd.planning.memory import RoleSize, Setting

Seconds = Callable[[str, "Kind", float], float]
"""Of one pass of a role's network, without what workers exchange for it: role, kind, rows in shares of the batch."""
DRAWN = 2000
"""Ways to draw the sizes of a cycle's fake updates that are gone through; where there are more, sizes are averaged."""
TOUCHED = 36.0
"""Bytes that a step of fused AdamW and the clipping before it read and write, for each parameter that trains."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What workers send each other in one phase's cycle; bytes are those that leave a worker.

    Attributes:
        pass_seconds: of gathering a network for one pass, by role: forward, and backward with its reduction.
        update_seconds: after a backward pass, by role.
        size: bytes a cycle.
    """

    pass_seconds: dict[str, tuple[float, float]]
    update_seconds: dict[str, float]
    size: float

    def with_tokens(self, sent: float, calls: PhaseCalls, *, here: bool, again: bool) -> Exchange:
        """The same with what sequence parallelism sends.

        Args:
            sent: bytes in a forward pass of a worker's share; see :func:`tokens_sent`.
            calls: of its networks.
            here: whether the teacher answers in the worker.
            again: whether gradient checkpointing computes activations again.
        """
        times = sum(c.count * _crossings(c, here=here, again=again) for c in calls.calls)
        return replace(self, size=self.size + sent * times)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A cycle of one worker that waits for nobody, and what it asks of the teacher.

    Attributes:
        rollout: seconds until the teacher is asked, its answer included where it is made here.
        fake_updates: seconds of each.
        generator: seconds from the answer to the end of the student's update.
        answer: seconds of the teacher for one worker's requests, one after the other.
        exchange: seconds of them all that workers wait for each other's data.
    """

    rollout: float
    fake_updates: tuple[float, ...]
    generator: float
    answer: float
    exchange: float

    @property
    def busy(self) -> float:
        """Seconds of a cycle in which a worker works."""
        return self.rollout + sum(self.fake_updates) + self.generator


def on_paper(hardware: Hardware, roles: dict[str, RoleSize], precision: str, compute: float) -> Seconds:
    """Passes as long as their arithmetic, or the reading of their weights, takes.

    Args:
        hardware: on which.
        roles: ``student``, ``fake`` and ``teacher``.
        precision: of the forward pass.
        compute: bytes of a value there.
    """

    def seconds(role: str, kind: Kind, rows: float) -> float:
        r = roles[role]
        flops = (r.passes.backward if kind == "backward" else r.passes.forward) * rows
        reading = r.network.parameters * compute * (2 if kind == "backward" else 1) / (hardware.hbm * 1e9)
        crossing = r.passes.moved * rows / (hardware.host * 1e9) if kind != "forward" else 0.0
        return max(flops / hardware.rate(precision, train=kind != "forward"), reading) + crossing

    return seconds


def update_on_paper(hardware: Hardware, role: RoleSize, setting: Setting) -> float:
    """Seconds of an optimizer's step, which memory's bandwidth sets."""
    split = setting.workers if setting.sharding == "fsdp" else 1
    return TOUCHED * role.learnt / split / (hardware.hbm * 1e9 * hardware.wire)


def exchange(hardware: Hardware, student: RoleSize, fake: RoleSize, setting: Setting, calls: PhaseCalls) -> Exchange:
    """What workers send each other: FSDP gathers every pass, DDP reduces in one bucket after each backward pass."""
    n = setting.workers
    if n == 1 or setting.sharding == "single":
        return Exchange(pass_seconds={}, update_seconds={}, size=0.0)
    share, speed, hops = (n - 1) / n, hardware.bandwidth(n), (n - 1) * hardware.latency_us / 1e6
    passes: dict[str, tuple[float, float]] = {}
    updates: dict[str, float] = {}
    size = 0.0
    for name, role in (("student", student), ("fake", fake)):
        count = {
            k: sum(c.count for c in calls.calls if c.role == name and c.kind == k)
            for k in ("forward", "record", "backward")
        }
        each = role.learnt / max(role.trained, 1)
        if setting.sharding == "ddp":
            reduced = 2 * 4.0 * each * share
            updates[name] = reduced / speed + 2 * hops
            size += reduced * max(round(count["backward"]), 1)
            continue
        bare = role.network.parameters * setting.compute if role.full else role.network.stored(setting.compute)
        there = (bare + (0.0 if role.full else 4.0 * role.network.adapters)) * share
        reduced = 4.0 * each * share
        late = role.network.units * hops
        passes[name] = there / speed + late, (there + reduced) / speed + 2 * late
        size += (count["forward"] + count["record"]) * there + count["backward"] * (there + reduced)
    if setting.placement == "tied" and setting.sharding == "fsdp":
        passes["teacher"] = passes["student"][0], 0.0
    return Exchange(pass_seconds=passes, update_seconds=updates, size=size)


def tokens_sent(blocks: int, width: int, tokens: int, sequence: int, compute: float) -> float:
    """Bytes that a worker sends in a forward pass of a sample that several share: four exchanges in each block.

    Args:
        blocks: with attention.
        width: of a token there.
        tokens: of the sample.
        sequence: workers that share it.
        compute: bytes of a value.
    """
    return float(4 * blocks * tokens * width * compute / sequence * (sequence - 1) / sequence)


def _crossings(c: Calls, *, here: bool, again: bool) -> float:
    """Forward passes of a share that send as much as a call does."""
    if c.role == "teacher" and not here:
        return 0.0
    return c.rows * (1 + again if c.kind == "backward" else 1)


def step(
    calls: PhaseCalls,
    seconds: Seconds,
    *,
    updates: dict[str, float],
    traffic: Exchange,
    here: bool,
    fake_updates: int,
    beside: dict[str, float] | None = None,
    tokens: float = 0.0,
    again: bool = False,
) -> Step:
    """A cycle's parts.

    Args:
        calls: of its networks.
        seconds: of their passes.
        updates: seconds of an optimizer's step, by role.
        traffic: between workers.
        here: whether the teacher answers in the worker, and not elsewhere.
        fake_updates: in a cycle.
        beside: seconds by stage that are no network's: draws, losses, bookkeeping.
        tokens: seconds that workers exchange tokens of samples they share, in a forward pass of a share.
        again: whether gradient checkpointing computes activations again.
    """
    parts, waits = {"rollout": 0.0, "fake": 0.0, "generator": 0.0, "teacher": 0.0}, 0.0
    for c in calls.calls:
        alone = seconds(c.role, c.kind, c.rows)
        there = traffic.pass_seconds.get(c.role, (0.0, 0.0))[c.kind == "backward"]
        if c.role == "teacher" and not here:
            there = 0.0
        # FSDP gathers the next block while one computes; attention waits for its tokens.
        together = max(alone, there) + tokens * _crossings(c, here=here, again=again)
        parts[c.stage] += c.count * together
        waits += c.count * (together - alone)
    answer = parts["teacher"]
    extra = dict(beside or {})
    generator = parts["generator"] + updates["student"] + traffic.update_seconds.get("student", 0.0)
    each = (parts["fake"] / fake_updates if fake_updates else 0.0) + updates["fake"]
    each += traffic.update_seconds.get("fake", 0.0)
    waits += traffic.update_seconds.get("student", 0.0) + fake_updates * traffic.update_seconds.get("fake", 0.0)
    return Step(
        rollout=parts["rollout"] + (answer if here else 0.0) + extra.get("rollout", 0.0),
        fake_updates=(each + extra.get("fake", 0.0) / max(fake_updates, 1),) * fake_updates,
        generator=generator + extra.get("generator", 0.0),
        answer=answer,
        exchange=waits,
    )


def waited(steps: Sequence[Step], weights: Sequence[float], load: float) -> float:
    """Seconds of a cycle in which a worker waits for the teacher: expected, as each update draws a size of its own.

    Args:
        steps: by size of the latents.
        weights: of the sizes.
        load: workers that a replica answers one after the other.
    """
    shares = [w / sum(weights) for w in weights]
    updates = len(steps[0].fake_updates)
    if math.comb(updates + len(steps) - 1, updates) > DRAWN:
        whole = mean(list(steps), list(weights))
        return max(0.0, whole.answer * load - sum(whole.fake_updates))
    hidden = {(0,) * len(steps): 1.0}  # chances of how many fake updates are of each size
    for _ in range(updates):
        more: dict[tuple[int, ...], float] = {}
        for counts, chance in hidden.items():
            for k, share in enumerate(shares):
                key = (*counts[:k], counts[k] + 1, *counts[k + 1 :])
                more[key] = more.get(key, 0.0) + chance * share
        hidden = more
    each = [sum(s.fake_updates) / max(updates, 1) for s in steps]
    return math.fsum(
        share * chance * max(0.0, s.answer * load - sum(n * e for n, e in zip(counts, each, strict=True)))
        for s, share in zip(steps, shares, strict=True)
        for counts, chance in hidden.items()
    )


def mean_of(values: Sequence[float], weights: Sequence[float]) -> float:
    """A weighted mean."""
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def mean(steps: list[Step], weights: list[float]) -> Step:
    """A step on average over sizes."""
    if len(steps) == 1:
        return steps[0]
    return Step(
        rollout=mean_of([s.rollout for s in steps], weights),
        fake_updates=tuple(mean_of(list(each), weights) for each in zip(*(s.fake_updates for s in steps), strict=True)),
        generator=mean_of([s.generator for s in steps], weights),
        answer=mean_of([s.answer for s in steps], weights),
        exchange=mean_of([s.exchange for s in steps], weights),
    )
