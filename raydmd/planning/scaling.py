"""The same run on ever more GPUs, played through, and where more of them stop to pay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from raydmd.planning.show import seconds, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from raydmd.planning.answer import Answer
    from raydmd.planning.planner import Planner
    from raydmd.planning.simulate import Outcome

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
KNEE = 1.5
"""Twice the GPUs that make less than so many times the samples are past the knee."""
CROWD = 20_000
"""Workers' cycles that are played at most for one size."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A run on so many GPUs.

    Attributes:
        gpus: that there are.
        answer: the best placement on them.
        batch: samples of an update.
        played: its phases in the simulator.
    """

    gpus: int
    answer: Answer
    batch: int
    played: tuple[Outcome, ...]

    @property
    def step(self) -> float:
        """Seconds of a cycle, over all phases."""
        return self._mean([o.step for o in self.played])

    @property
    def speed(self) -> float:
        """Samples of student updates a second."""
        return self.batch / self.step

    @property
    def exchange(self) -> float:
        """Share of a cycle in which workers wait for each other's data."""
        return self._mean([p.step.exchange / p.seconds for p in self.answer.phases])

    def idle(self, what: str) -> float:
        """A share of time, over all phases."""
        return self._mean([float(getattr(o, what)) for o in self.played])

    def _mean(self, values: Sequence[float]) -> float:
        cycles = [p.cycles for p in self.answer.phases]
        return sum(v * n for v, n in zip(values, cycles, strict=True)) / sum(cycles)


def sizes(planner: Planner, gpus: Iterable[int] = GPUS, *, grow: bool = False, seed: int = 0) -> list[Size]:
    """The best placement on each number of GPUs on which one fits.

    Args:
        planner: of the recipe.
        gpus: how many.
        grow: a worker keeps its samples, so that the batch grows; else the batch is the recipe's own.
        seed: of the simulator.
    """
    found: list[Size] = []
    share = planner.share(planner.own)
    for count in gpus:
        if grow:
            plans = [planner.with_batch(max(1, share * n // planner.own.sequence)) for n in _workers(count)]
        else:
            plans = [planner]
        bests = [(p, p.best(count)[1]) for p in plans]
        fitting = [(p, a) for p, a in bests if a is not None]
        if not fitting:
            continue
        own, best = min(fitting, key=lambda pair: pair[1].seconds / pair[0].recipe.training.batch)
        batch = own.recipe.training.batch
        cycles = max(4, min(20, CROWD // best.option.workers))
        played = tuple(own.simulated(best, cycles=cycles, seed=seed))
        now = Size(gpus=count, answer=best, batch=batch, played=played)
        if found and found[-1].speed > now.speed:  # nobody has to use them all
            now = replace(found[-1], gpus=count)
        found.append(now)
    return found


def knee(found: Sequence[Size]) -> int | None:
    """The number of GPUs after which twice as many make less than :data:`KNEE` times the samples; ``None``: not yet."""
    for a, b in pairwise(found):
        if b.speed / a.speed < KNEE ** math.log2(b.gpus / a.gpus):
            return a.gpus
    return None


def said(found: Sequence[Size]) -> str:
    """The knee, in a sentence."""
    if not found:
        return "Nothing fits on any of these."
    at = knee(found)
    if at is None:
        return f"No knee up to {found[-1].gpus} GPUs: each doubling makes at least {KNEE:g} times the samples."
    a = next(s for s in found if s.gpus == at)
    b = found[found.index(a) + 1]
    used = b.answer.option.gpus
    exchange = b.exchange
    if used < 0.75 * b.gpus:
        why = f"the batch of {b.batch} samples keeps {b.answer.option.workers} workers busy, and no more"
    elif exchange > max(b.idle("barrier"), b.idle("wait")):
        why = f"workers wait {exchange:.0%} of a cycle for each other's shards and gradients"
    else:
        why = f"workers wait {b.idle('wait') + b.idle('barrier'):.0%} of a cycle for the teacher and for each other"
    return f"The knee is at {at} GPUs: {b.gpus} make {b.speed / a.speed:.2f} times the samples, since {why}."


def text(found: Sequence[Size]) -> str:
    """A table of sizes, and the knee."""
    first = found[0].speed / found[0].gpus if found else 1.0
    rows = [
        [
            str(s.gpus),
            str(s.answer.option),
            str(s.batch),
            seconds(s.step),
            f"{s.speed:.3g}",
            f"{s.speed / s.gpus / first:.0%}",
            f"{s.idle('wait'):.0%}",
            f"{s.idle('barrier'):.0%}",
            f"{s.exchange:.0%}",
            f"{s.idle('replica_idle'):.0%}" if s.answer.option.teachers else "",
        ]
        for s in found
    ]
    head = [
        "GPUs",
        "placement",
        "batch",
        "cycle, s",
        "samples/s",
        "of the first, a GPU",
        "wait",
        "barrier",
        "exchange",
        "teachers idle",
    ]
    return f"{table(head, rows)}\n  {said(found)}"


def pools(planner: Planner, workers: int, teachers: Iterable[int], *, seed: int = 0) -> list[Size]:
    """The same workers with pools of several sizes.

    Args:
        planner: of the recipe.
        workers: that train.
        teachers: replicas.
        seed: of the simulator.
    """
    found = []
    for count in teachers:
        option = replace(planner.own, placement="remote", workers=workers, teachers=count)
        answer = planner.answer(option)
        played = tuple(planner.simulated(answer, seed=seed))
        found.append(Size(gpus=option.gpus, answer=answer, batch=planner.recipe.training.batch, played=played))
    return found


def _workers(gpus: int) -> list[int]:
    """Numbers of workers that leave room for a pool of some size, or for none."""
    return sorted({gpus, *(gpus - max(1, gpus // k) for k in (64, 32, 16, 8, 4))})
