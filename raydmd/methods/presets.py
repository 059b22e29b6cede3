"""From a recipe's ``method`` section and a teacher's experts to a :class:`~raydmd.methods.method.Method`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raydmd.guidance import Guidance
from raydmd.methods.method import Adaptation, AnchorTerm, Method, MomentsTerm
from raydmd.methods.phases import Phase, TimeRange, Window, split_grid
from raydmd.methods.regression import RegressionTerm
from raydmd.methods.rollout import Rollout
from raydmd.methods.terms import Decoupled, Matching, ScoreTerm
from raydmd.models.base import Routing
from raydmd.process import Prediction, Process, RectifiedFlow, step_grid

if TYPE_CHECKING:
    from raydmd.recipe_method import Anchor
    from raydmd.recipe_method import Method as Settings


def student_routing(m: Settings, teacher: Routing) -> Routing:
    """The student's experts: one per phase, or the teacher's own where there are no phases."""
    if not m.boundaries:
        return teacher
    first = teacher.experts[0]
    names = [f"{first}_{k + 1}" if k else first for k in range(len(m.boundaries) + 1)]
    return Routing(tuple(names), m.boundaries)


def source_expert(m: Settings, teacher: Routing, expert: str) -> str:
    """The teacher's expert that a student's expert starts from: the one for its first step."""
    if not m.boundaries:
        return expert
    grid = step_grid(m.steps, m.shift)
    k = student_routing(m, teacher).experts.index(expert)
    return teacher.expert(grid[split_grid(grid, m.boundaries)[k].start])


def build_method(m: Settings, teacher: Routing, process: Process, prediction: Prediction) -> Method:
    """Put a method together for a teacher with the given experts.

    Raises:
        ValueError: if a window leaves no time to renoise at.
    """
    grid = tuple(step_grid(m.steps, m.shift))
    decoupled = m.decouple is not None and m.decouple.schedule != "coupled"
    constrained = m.decouple is not None and m.decouple.schedule == "constrained"
    match = Window(teacher, m.times_shift or m.shift, m.times, m.times_end or m.times, cleaner=constrained)
    augment = None
    if m.decouple is not None and decoupled:
        start, end = m.decouple.augment_times, m.decouple.augment_times_end or m.decouple.augment_times
        augment = Window(teacher, m.times_shift or m.shift, start, end, cleaner=m.decouple.schedule != "full")
    rollout = Rollout(
        process=process,
        grid=grid,
        solver=m.solver,
        unroll=m.rollout == "unroll",
        anchored=m.anchor is not None,
        detach=m.anchor is None or m.anchor.detach,
    )
    phases = _phases(m, teacher, grid, match)
    for phase in phases:  # refused now, not at the first draw that meets it
        for window in filter(None, (match, augment)):
            for step in rollout.exits(phase):
                for progress in (0.0, 1.0):
                    window.at(phase.floor, grid[step], progress)
    return Method(
        process=process,
        prediction=prediction,
        phases=phases,
        rollout=rollout,
        score=_score(m, process, match, augment),
        anchor=_anchor(m.anchor, m, process) if m.anchor else None,
        moments=MomentsTerm(weight=m.moments.weight, mean=m.moments.mean, variance=m.moments.variance)
        if m.moments
        else None,
        regression=RegressionTerm(weight=m.regression.weight) if m.regression else None,
        adaptation=Adaptation(**m.adapt.model_dump(exclude={"rewards"})) if m.adapt else None,
        fake_weight_cap=m.fake_weight_cap,
    )


def _phases(m: Settings, teacher: Routing, grid: tuple[float, ...], match: Window) -> tuple[Phase, ...]:
    """One phase that ends clean, or reverse nested intervals, each from its end up to noise (Phased DMD)."""
    names = student_routing(m, teacher).experts
    phases = []
    for k, steps in enumerate(split_grid(grid, m.boundaries)):
        end = grid[steps.stop]
        # A teacher with an expert of its own for this phase is asked only where that expert was trained
        # (Wan2.2: above 0.875), though the student's samples lie a little lower (appendix B).
        own_expert = k < len(m.boundaries) and any(
            math.isclose(m.boundaries[k], b, abs_tol=1e-4) for b in teacher.boundaries
        )
        floor = max(end, m.boundaries[k]) if own_expert else end
        fake = TimeRange.between(floor, 1.0, teacher, mu=m.fake_shift or m.shift)
        phases.append(
            Phase(
                index=k,
                first=steps.start,
                last=steps.stop,
                end=end,
                floor=floor,
                student=(names[k],) if m.boundaries else names,
                fake=fake,
                fake_experts=tuple(dict.fromkeys((*match.experts(floor), *fake.experts))),
            )
        )
    return tuple(phases)


def _score(m: Settings, process: Process, match: Window, augment: Window | None) -> ScoreTerm:
    if m.decouple is None:
        return Matching(
            process=process,
            guidance=Guidance(m.guidance),
            window=match,
            normaliser=m.normaliser,
            floor=m.normaliser_floor,
        )
    return Decoupled(
        process=process,
        guidance=Guidance(m.guidance),
        match_window=match,
        augment_window=augment,
        match=m.decouple.match,
        augment=m.decouple.augment,
        normaliser=m.normaliser,
        floor=m.normaliser_floor,
    )


def _anchor(a: Anchor, m: Settings, process: Process) -> AnchorTerm:
    grid = step_grid(a.of, a.shift or m.shift)[: a.steps + 1]
    straight = isinstance(process, RectifiedFlow)
    return AnchorTerm(
        grid=tuple(grid) if straight or grid[-1] == 0 else (*grid, 0.0),
        level=grid[-1],
        straight=straight,
        guidance=Guidance(m.guidance if a.guidance is None else a.guidance),
        weight=a.weight,
    )
