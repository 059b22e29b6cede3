"""The papers' methods as compositions of the same parts."""

from __future__ import annotations

import math

from raydmd.guidance import Guidance
from raydmd.methods.method import DistributionMatching, Method
from raydmd.methods.phases import Phase, TimeRange, split_grid
from raydmd.methods.rollout import BackwardSimulation
from raydmd.models.base import Routing
from raydmd.process import Prediction, Process, step_grid
from raydmd.recipe import Dmd2, Phased


def student_routing(method: Phased | Dmd2, teacher: Routing) -> Routing:
    """The student's experts: one per phase for ``phased``, the teacher's own for ``dmd2``."""
    if isinstance(method, Dmd2):
        return teacher
    names = [f"transformer_{k + 1}" if k else "transformer" for k in range(len(method.boundaries) + 1)]
    return Routing(tuple(names), method.boundaries)


def source_expert(method: Phased | Dmd2, teacher: Routing, expert: str) -> str:
    """The teacher's expert that a student's expert starts from: the one for its first step."""
    if isinstance(method, Dmd2):
        return expert
    grid = step_grid(method.steps, method.shift)
    k = student_routing(method, teacher).experts.index(expert)
    return teacher.expert(grid[split_grid(grid, method.boundaries)[k].start])


def build_method(method: Phased | Dmd2, teacher: Routing, process: Process, prediction: Prediction) -> Method:
    """Put a method together for a teacher with the given experts."""
    return (
        _phased(method, teacher, process, prediction)
        if isinstance(method, Phased)
        else _dmd2(method, teacher, process, prediction)
    )


def _phased(m: Phased, teacher: Routing, process: Process, prediction: Prediction) -> Method:
    """Phased DMD (arXiv:2510.27684): reverse nested intervals, each from its phase's end up to noise."""
    grid = step_grid(m.steps, m.shift)
    names = student_routing(m, teacher).experts
    phases = []
    for k, steps in enumerate(split_grid(grid, m.boundaries)):
        end = grid[steps.stop]
        # A teacher with an expert of its own for this phase is asked only where that expert was trained
        # (Wan2.2: above 0.875), though the student's samples lie a little lower (appendix B).
        own_expert = k < len(m.boundaries) and any(
            math.isclose(m.boundaries[k], b, abs_tol=1e-4) for b in teacher.boundaries
        )
        low = max(end, m.boundaries[k]) if own_expert else end
        phases.append(
            Phase(
                index=k,
                first=steps.start,
                last=steps.stop,
                end=end,
                student=(names[k],),
                match=TimeRange.above(low, teacher, mu=m.shift, clip=m.times),
                fake=TimeRange.above(low, teacher, mu=m.fake_shift or m.shift),
            )
        )
    return Method(
        process=process,
        prediction=prediction,
        phases=tuple(phases),
        rollout=BackwardSimulation(process, tuple(grid), "euler"),
        terms=(DistributionMatching(process, Guidance(m.guidance), m.normaliser, m.normaliser_floor),),
        fake_weight_cap=m.fake_weight_cap,
    )


def _dmd2(m: Dmd2, teacher: Routing, process: Process, prediction: Prediction) -> Method:
    """DMD2 without its GAN (arXiv:2405.14867): one phase that ends clean."""
    grid = step_grid(m.steps, m.shift)
    phase = Phase(
        index=0,
        first=0,
        last=m.steps,
        end=0.0,
        student=teacher.experts,
        match=TimeRange.above(0.0, teacher, mu=m.shift, clip=m.times),
        fake=TimeRange.above(0.0, teacher, mu=m.fake_shift or m.shift),
    )
    return Method(
        process=process,
        prediction=prediction,
        phases=(phase,),
        rollout=BackwardSimulation(process, tuple(grid), m.solver),
        terms=(DistributionMatching(process, Guidance(m.guidance), m.normaliser, m.normaliser_floor),),
        fake_weight_cap=1.0,
    )
