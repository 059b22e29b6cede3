"""What a sweep is looked at for before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.recipe import derive
from raydmd.training.cluster import lasting
from raydmd.training.prepare import check_method, prepare
from raydmd.tuning.figures import reported
from raydmd.tuning.population import check_population, check_shapes, state_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from raydmd.recipe import Recipe
    from raydmd.training.prepare import Prepared
    from raydmd.tuning.spec import Sweep


def pinned(spec: Sweep, base: Recipe) -> Recipe:
    """The base with what all trials must have in common, and places of its own."""
    output = lasting(base.output)
    folder = output / spec.name
    e = base.evaluation
    changes: dict[str, Any] = {
        "output": folder / "trials",
        "name": "base",
        "data.cache": base.data.cache or folder / "conditions",
        # What students are compared with must not move with what is searched.
        "evaluation.guidance": base.method.guidance if e.guidance is None else e.guidance,
        "evaluation.shift": base.method.shift if e.shift is None else e.shift,
        "tracking.weights": base.tracking.weights or "best",
        "tracking.uri": base.tracking.uri or f"sqlite:///{output / 'mlflow.db'}",
    }
    return derive(base, changes)


def check(spec: Sweep, base: Recipe) -> Prepared:
    """Look at a sweep as closely as can be done without a cluster.

    Raises:
        InputError: if one of its recipes can't be run, or an objective is no figure of its evaluation.
    """
    prepared = prepare(base)
    figures = reported(base)
    for name in spec.objectives:
        if name not in figures:
            raise InputError(
                f"sweep {spec.name!r}: no trial reports {name!r}; the evaluation of this recipe has "
                f"{', '.join(sorted(figures))}"
            )
    if spec.stopping and not base.evaluation.every:
        raise InputError(
            f"sweep {spec.name!r}: stopping compares trials on their way, and evaluation.every=0 evaluates at the end "
            "alone; set evaluation.every"
        )
    if spec.budget.gpu_hours and not base.placement.worker_gpus:
        raise InputError(f"sweep {spec.name!r}: budget.gpu_hours does nothing where placement.worker_gpus=0")
    if base.placement.workers_least:
        raise InputError(
            f"sweep {spec.name!r}: placement.workers_least is for runs alone: the workers of one trial would grow into "
            "the room of the next; leave it out"
        )
    check_population(spec, base)
    if spec.search.kind == "grid":
        spec.grid(base)
    for changes, recipe in spec.corners(base):
        try:
            check_method(recipe, prepared.family)
        except InputError as error:
            said = ", ".join(f"{k}={v}" for k, v in changes.items())
            raise InputError(f"sweep {spec.name!r} can come to {said}: {error}") from None
    if spec.population:
        check_shapes(spec, spec.corners(base), prepared.family)
    return prepared


def fitting(spec: Sweep, prepared: Prepared) -> Callable[[Recipe], None]:
    """What refuses a recipe that can't be run, or that can't go on from the training states of the others."""
    _, any_of_them = next(spec.corners(prepared.recipe))
    shape = state_shape(any_of_them, prepared.family)

    def fits(recipe: Recipe) -> None:
        check_method(recipe, prepared.family)
        if state_shape(recipe, prepared.family) != shape:
            raise InputError("it would train other networks")

    return fits
