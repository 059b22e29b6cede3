"""What a plan says: ways to place a run, and what becomes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from raydmd.planning.memory import Budget, Placement, Sharding
    from raydmd.planning.simulate import Outcome
    from raydmd.planning.timing import Exchange, Step


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to place a run.

    Attributes:
        placement: of the teacher.
        sharding: of what trains.
        workers: that train.
        teachers: replicas of the pool; 0 where the teacher is not remote.
        teacher_gpus: of each.
        sequence: workers that share each sample.
    """

    placement: Placement
    sharding: Sharding
    workers: int
    teachers: int = 0
    teacher_gpus: float = 1.0
    sequence: int = 1

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.workers + math.ceil(self.teachers * self.teacher_gpus)

    def __str__(self) -> str:
        more = f" + {self.teachers} teacher{'s' * (self.teachers != 1)}" if self.placement == "remote" else ""
        how = "" if self.sharding == "single" else f", {self.sharding}"
        how += f", sequence {self.sequence}" if self.sequence > 1 else ""
        return f"{self.placement}{how}, {self.workers} worker{'s' * (self.workers != 1)}{more}"


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase under one option.

    Attributes:
        budget: of a worker's memory.
        pool: of a replica's, where there is one.
        step: a worker's cycle, on average over sizes.
        sizes: the same for each size of latent.
        exchange: between workers.
        seconds: of a cycle, waiting included.
        wait: seconds of it in which a worker waits for the teacher.
        wire: bytes a cycle between a worker and the pool.
        host: bytes of a worker's activations in its node's memory, at most.
        cycles: of the phase.
    """

    budget: Budget
    pool: Budget | None
    step: Step
    sizes: tuple[Step, ...]
    exchange: Exchange
    seconds: float
    wait: float
    wire: float
    host: float
    cycles: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What becomes of a run under one option.

    Attributes:
        option: the placement.
        phases: in their order.
        room: bytes that tensors of a GPU can have.
        host_room: bytes of the node's memory that activations of a worker can have; 0 where it is not known.
        hours: of the run's training, warm-up included, without evaluation.
        price: of an hour, of all GPUs.
    """

    option: Option
    phases: tuple[PhasePlan, ...]
    room: float
    host_room: float
    hours: float
    price: float

    @property
    def worst(self) -> PhasePlan:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda p: p.budget.peak)

    @property
    def peak(self) -> float:
        """Bytes on a worker's GPU at most."""
        return self.worst.budget.peak

    @property
    def pool_peak(self) -> float:
        """Bytes on a teacher's GPU at most; 0 without a pool."""
        return max((p.pool.peak for p in self.phases if p.pool), default=0.0)

    @property
    def needs(self) -> float:
        """Bytes on the fullest GPU, a worker's or a teacher's."""
        return max(self.peak, self.pool_peak)

    @property
    def host(self) -> float:
        """Bytes of a worker's activations in its node's memory at most."""
        return max(p.host for p in self.phases)

    @property
    def fits(self) -> bool:
        """Whether both fit, and what waits in the node's memory does."""
        return self.needs <= self.room and (not self.host_room or self.host <= self.host_room)

    @property
    def seconds(self) -> float:
        """Of a cycle, over all phases."""
        return sum(p.seconds * p.cycles for p in self.phases) / sum(p.cycles for p in self.phases)

    @property
    def gpu_hours(self) -> float:
        """Of the run."""
        return self.hours * self.option.gpus

    @property
    def cost(self) -> float:
        """US$ for the run."""
        return self.hours * self.price

    def played(self, outcomes: Sequence[Outcome]) -> Answer:
        """The same with the simulator's cycles, one outcome for each phase, and the hours that they make."""
        phases = tuple(replace(p, seconds=o.step) for p, o in zip(self.phases, outcomes, strict=True))
        found = replace(self, phases=phases)
        return replace(found, hours=self.hours * found.seconds / self.seconds)


def nearest(answers: Iterable[Answer]) -> Answer:
    """Of answers of which none fits, the one that needs least of a GPU."""
    return min(answers, key=lambda a: a.needs)
