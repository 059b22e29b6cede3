"""A cluster in miniature: workers, their barriers, and a pool of teachers, event by event. Pure and seeded.

Workers are those of :mod:`raydmd.training.cycle`: each makes a rollout, asks, trains the fake score, waits for its
answers, and trains the student; after every update all wait for the slowest. Replicas batch with the same
:class:`~raydmd.serving.batcher.Batcher` as real ones, and clients choose by the same
:func:`~raydmd.serving.router.choose`. Several runs may share a pool.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import Any

from raydmd.serving.batcher import Batcher, Key
from raydmd.serving.router import Candidate, choose, seat

Process = Generator[tuple[str, Any], Any, None]
WARM = 2
"""Cycles that are not counted."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One of several sizes of latents: its seconds in those of the mean.

    Attributes:
        weight: how often it is drawn, in all weights.
        rollout: until a worker asks.
        fake: a fake update's.
        generator: the student's update's.
        answer: a forward pass's of the teacher.
    """

    weight: float
    rollout: float
    fake: float
    generator: float
    answer: float


SAME = Size(weight=1.0, rollout=1.0, fake=1.0, generator=1.0, answer=1.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is simulated.

    Attributes:
        workers: of each run; a group of ranks that share their samples is one.
        runs: that share the pool.
        replicas: of the teacher; 0 where workers answer themselves.
        rollout: seconds until a worker asks.
        fake_updates: seconds of each.
        generator: seconds of the student's update.
        requests: that each worker asks a cycle, at once.
        items: samples of a request.
        service: seconds of a forward pass over so many samples, steps of a walk counted.
        sizes: of latents, of which all workers of a run draw the same for each update; one where there are none.
        batch_items: samples in a forward pass at most.
        batch_wait: seconds that a replica waits for company.
        transfer: seconds of a request's way there and back.
        jitter: standard deviation of a time, in itself.
        slower: times that a worker's own work takes, of workers that share cores.
        cycles: counted.
        seed: of the jitter.
        name: of the run; its clients go round the replicas from a place of its own.
    """

    workers: int
    runs: int = 1
    replicas: int = 0
    rollout: float
    fake_updates: tuple[float, ...]
    generator: float
    requests: int = 1
    items: int = 1
    service: Callable[[int], float] = field(default=lambda _: 0.0)
    sizes: tuple[Size, ...] = ()
    batch_items: int = 64
    batch_wait: float = 0.003
    transfer: float = 0.0
    jitter: float = 0.0
    slower: float = 1.0
    cycles: int = 20
    seed: int = 0
    name: str = "run"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out.

    Attributes:
        step: seconds of a cycle.
        wait: share of a worker's time that it waits for the teacher.
        barrier: share that it waits for other workers.
        replica_idle: share of a replica's time without a batch.
        batch: samples in a batch, on average.
        queue: seconds that a request waits in a replica, on average.
    """

    step: float
    wait: float
    barrier: float
    replica_idle: float
    batch: float
    queue: float

    @property
    def idle(self) -> float:
        """Share of a worker's time in which it does nothing."""
        return self.wait + self.barrier


class _Clock:
    """Runs processes in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, what))

    def run(self) -> None:
        while self._heap:
            self.now, _, what = heapq.heappop(self._heap)
            what()


class _Replica:
    """Batches, and answers one batch after the other."""

    def __init__(self, clock: _Clock, shape: Shape, noise: Callable[[float], float]) -> None:
        self._clock, self._shape, self._noise = clock, shape, noise
        self._batcher: Batcher[tuple[float, Callable[[], None]]] = Batcher(
            max_items=shape.batch_items, max_wait=shape.batch_wait, max_queue=1 << 30
        )
        self._busy = False
        self._due: float | None = None
        self.spans: list[tuple[float, float]] = []
        self.items: list[int] = []
        self.queued: list[float] = []

    def ask(self, kind: str, client: str, times: float, done: Callable[[], None]) -> None:
        self._batcher.offer(Key(kind, (), 1.0), client, self._shape.items, (times, done), self._clock.now)
        self._look()

    def _look(self) -> None:
        if self._busy:
            return
        batch = self._batcher.take(self._clock.now)
        if batch is None:
            due = self._batcher.next_due()
            if due is not None and due != self._due:
                self._due = due
                self._clock.at(max(due, self._clock.now), self._look)
            return
        self._busy, self._due = True, None
        items = sum(entry.items for entry in batch)
        end = self._clock.now + self._noise(self._shape.service(items) * batch[0].payload[0])
        self.spans.append((self._clock.now, end))
        self.items.append(items)
        self.queued += [self._clock.now - entry.arrived for entry in batch]

        def done() -> None:
            self._busy = False
            for entry in batch:
                entry.payload[1]()
            self._look()

        self._clock.at(end, done)


class _Barrier:
    """Lets all of a run's workers go on once the last one has come."""

    def __init__(self, clock: _Clock, size: int) -> None:
        self._clock, self._size = clock, size
        self._waiting: list[Callable[[], None]] = []

    def join(self, go: Callable[[], None]) -> None:
        self._waiting.append(go)
        if len(self._waiting) == self._size:
            going, self._waiting = self._waiting, []
            for each in going:
                self._clock.at(self._clock.now, each)


def simulate(shape: Shape) -> Outcome:
    """Run the cycles.

    Raises:
        ValueError: if there is nobody to do anything.
    """
    if shape.workers < 1 or shape.runs < 1 or shape.cycles < 1:
        raise ValueError(f"nothing to simulate: {shape.workers=}, {shape.runs=}, {shape.cycles=}")
    draw = random.Random(shape.seed)

    def noise(seconds: float) -> float:
        return max(0.0, seconds * draw.gauss(1.0, shape.jitter)) if shape.jitter else seconds

    clock = _Clock()
    pool = [_Replica(clock, shape, noise) for _ in range(shape.replicas)]
    log: list[tuple[float, float, float, float]] = []  # when a cycle began and ended, waits, barriers

    plans = [_drawn(shape, run) for run in range(shape.runs)]

    def worker(run: int, rank: int, barrier: _Barrier, phase: float) -> Process:
        mine, client = [0] * len(pool), f"{shape.name}{run or ''}/rank{rank}"
        yield "sleep", phase
        for cycle in range(WARM + shape.cycles):
            began, blocked, met = clock.now, 0.0, 0.0
            own, *fakes = plans[run][cycle]
            yield "sleep", noise(shape.rollout * own.rollout) * shape.slower
            pending = {"left": 0, "go": None}
            for k in range(shape.requests if pool else 0):
                seen = [Candidate(name=str(i), tier=0, outstanding=mine[i]) for i in range(len(pool))]
                turn = seat(f"{shape.name}{run or ''}", rank) + cycle * shape.requests + k
                at = int(choose(seen, request="", turn=turn, deterministic=False) or 0)
                mine[at] += 1
                pending["left"] += 1  # type: ignore[operator]
                yield "ask", (at, f"{run}.{k}", client, own.answer, mine, pending)
            for seconds, size in zip(shape.fake_updates, fakes, strict=True):
                yield "sleep", noise(seconds * size.fake) * shape.slower
                since = clock.now
                yield "meet", barrier
                met += clock.now - since
            since = clock.now
            yield "wait", pending
            blocked += clock.now - since
            since = clock.now
            yield "meet", barrier  # all go on once all have their answers
            blocked += clock.now - since
            yield "sleep", noise(shape.generator * own.generator) * shape.slower
            since = clock.now
            yield "meet", barrier
            met += clock.now - since
            if cycle >= WARM:
                log.append((began, clock.now, blocked, met))

    def drive(process: Process) -> None:
        try:
            what, about = next(process)
        except StopIteration:
            return
        if what == "sleep":
            clock.at(clock.now + about, lambda: drive(process))
        elif what == "meet":
            about.join(lambda: drive(process))
        elif what == "ask":
            at, kind, client, times, mine, pending = about

            def answered() -> None:
                mine[at] -= 1
                pending["left"] -= 1
                if not pending["left"] and pending["go"]:
                    pending["go"]()

            half = shape.transfer / 2
            clock.at(
                clock.now + half,
                lambda: pool[at].ask(kind, client, times, lambda: clock.at(clock.now + half, answered)),
            )
            clock.at(clock.now, lambda: drive(process))
        elif about["left"]:
            about["go"] = lambda: drive(process)
        else:
            clock.at(clock.now, lambda: drive(process))

    each = shape.rollout + sum(shape.fake_updates) + shape.generator
    for run in range(shape.runs):
        barrier = _Barrier(clock, shape.workers)
        for rank in range(shape.workers):  # runs do not begin together
            drive(worker(run, rank, barrier, each * run / shape.runs))
    clock.run()
    start, end = min(row[0] for row in log), max(row[1] for row in log)
    busy = [sum(max(0.0, min(b, end) - max(a, start)) for a, b in r.spans) for r in pool]
    total = sum(b - a for a, b, _, _ in log)
    return Outcome(
        step=fmean(b - a for a, b, _, _ in log),
        wait=sum(row[2] for row in log) / total,
        barrier=sum(row[3] for row in log) / total,
        replica_idle=1 - fmean(busy) / (end - start) if pool else 0.0,
        batch=fmean([i for r in pool for i in r.items]) if any(r.items for r in pool) else 0.0,
        queue=fmean([q for r in pool for q in r.queued]) if any(r.queued for r in pool) else 0.0,
    )


def _drawn(shape: Shape, run: int) -> list[list[Size]]:
    """Sizes of each cycle's student's update and fake updates.

    Over the cycles that are counted an update has each size as often as its weight says, in an order of its own: a few
    cycles then take as long as many on average.
    """
    sizes = shape.sizes or (SAME,)
    ends = list(accumulate(s.weight for s in sizes))
    draw = random.Random(f"{shape.seed}/{run}/sizes")

    def slot() -> list[Size]:
        places = [(k + draw.random()) / shape.cycles for k in range(shape.cycles)]
        draw.shuffle(places)
        places = [draw.random() for _ in range(WARM)] + places
        return [sizes[min(bisect_right(ends, p * ends[-1]), len(sizes) - 1)] for p in places]

    return [list(row) for row in zip(*(slot() for _ in range(1 + len(shape.fake_updates))), strict=True)]
