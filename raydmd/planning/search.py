"""Which placements there are on a number of GPUs, and which of their answers is the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.planning.answer import Option, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raydmd.planning.answer import Answer
    from raydmd.planning.memory import Placement, Sharding
    from raydmd.planning.planner import Planner

SEQUENCES = (1, 2, 4, 8)
"""Workers that may share a sample."""
NEAR = 1.01
"""Times the fewest hours that still count as the fewest, where fewer GPUs are enough for them."""


def options(planner: Planner, gpus: int) -> list[Option]:
    """Every sensible way to use at most so many GPUs: more workers than the best number can be slower."""
    found: list[Option] = []
    own, before = planner.own, 0
    training, adapt = planner.recipe.training, planner.recipe.method.adapt
    adapters = training.student.lora is not None and training.fake.lora is not None
    places: tuple[Placement, ...] = ("tied", "local", "remote") if adapters else ("local", "remote")
    for sequence in dict.fromkeys((own.sequence, *SEQUENCES)):
        workers = _workers(gpus, sequence, training.batch, adapt.group if adapt else 1)
        # To share a sample only pays where there are more workers than samples.
        workers = [n for n in workers if n > before]
        if sequence < own.sequence or not workers or not _splits(planner, sequence):
            continue
        before = workers[-1]
        for placement in places:
            for teachers in _pools(gpus, own.teacher_gpus) if placement == "remote" else (0,):
                left = gpus - math.ceil(teachers * own.teacher_gpus)
                for n in (n for n in workers if n <= left):
                    shardings: tuple[Sharding, ...] = ("ddp", "fsdp") if n > 1 else ("single",)
                    found += [
                        Option(
                            placement=placement,
                            sharding=sharding,
                            workers=n,
                            teachers=teachers,
                            teacher_gpus=own.teacher_gpus if teachers else 1.0,
                            sequence=sequence,
                        )
                        for sharding in shardings
                    ]
    return found


def top(answers: Iterable[Answer]) -> Answer:
    """The best: that fits, is fast, and has no more GPUs and no larger pool than it needs.

    At most 1% more hours are as few. Where none fits it is the one that needs least of a GPU.
    """
    found = list(answers)
    fitting = [a for a in found if a.fits]
    if not fitting:
        return nearest(found)
    fastest = min(a.hours for a in fitting)
    near = [a for a in fitting if a.hours <= NEAR * fastest]
    return min(near, key=lambda a: (a.option.gpus, a.option.teachers, a.hours, a.peak))


def _workers(gpus: int, sequence: int, batch: int, group: int) -> list[int]:
    """Numbers of workers that can share the batch, the fewest first; a prompt's samples stay on one worker."""
    groups = range(1, gpus // sequence + 1)
    return [sequence * n for n in groups if not batch % n and not batch // n % group]


def _pools(gpus: int, each: float) -> list[int]:
    """Numbers of replicas worth a look: up to half of the GPUs."""
    return sorted({n for k in range(11) for n in (2**k, 3 * 2**k) if n * each <= gpus / 2} | {1})


def _splits(planner: Planner, sequence: int) -> bool:
    """Whether so many workers can share a sample."""
    place = planner.recipe.placement
    if sequence > 1 and (place.samplers or planner.recipe.method.gan):
        return sequence == place.sequence
    try:
        planner.family.check_sequence(sequence, planner.latents)
    except InputError:
        return False
    return True
