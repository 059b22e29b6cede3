"""Population based training (arXiv:1711.09846): what may move, when, who takes over whose training state. Pure.

All members of a population train to the same cycle, where each leaves a checkpoint and is evaluated. There the worst
take over the best ones' training states, with settings moved a little, and all go on to the next such cycle.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raydmd.errors import InputError
from raydmd.methods.presets import build_method, source_expert, student_routing
from raydmd.recipe_types import Above1, Count, Fraction, Section
from raydmd.training.plan import CyclePlan

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Iterable, Mapping

    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.tuning.rows import Row
    from raydmd.tuning.spec import Sweep

MOVABLE = (
    "method.adapt.clip",
    "method.adapt.epsilon",
    "method.adapt.fake_strength",
    "method.adapt.strength",
    "method.anchor.detach",
    "method.anchor.guidance",
    "method.anchor.of",
    "method.anchor.shift",
    "method.anchor.steps",
    "method.anchor.weight",
    "method.boundaries",
    "method.decouple.augment",
    "method.decouple.augment_times",
    "method.decouple.augment_times_end",
    "method.decouple.match",
    "method.decouple.schedule",
    "method.fake_shift",
    "method.fake_weight_cap",
    "method.gan.critic_weight",
    "method.gan.r1.sigma",
    "method.gan.r1.weight",
    "method.gan.rate",
    "method.gan.weight",
    "method.guidance",
    "method.moments.mean",
    "method.moments.variance",
    "method.moments.weight",
    "method.normaliser",
    "method.normaliser_floor",
    "method.regression.weight",
    "method.times",
    "method.times_end",
    "method.times_shift",
    "training.decay",
    "training.ema",
    "training.fake.betas",
    "training.fake.clip",
    "training.fake.eps",
    "training.fake.rate",
    "training.fake.weight_decay",
    "training.fake_updates",
    "training.student.betas",
    "training.student.clip",
    "training.student.eps",
    "training.student.rate",
    "training.student.weight_decay",
    "training.warmup",
)
"""Keys that may change under a training state: neither its tensors nor what they mean depend on them."""
REASONS = {
    "model": "its networks are other ones",
    "data": "it trains on other data",
    "seed": "members draw the same numbers",
    "monitor": "what it remembers is part of the training state",
    "method.steps": "a student has learnt its own steps",
    "method.shift": "a student has learnt its own steps",
    "method.solver": "a student has learnt its own steps",
    "method.rollout": "a student has learnt its own steps",
    "method.name": "a fake score follows one method's student",
    "method.gan.depths": "the discriminator's heads have other shapes",
    "method.adapt.group": "updates have other samples",
    "method.regression": "its pairs and their errors are part of the training state",
    "training.student.lora": "its weights have other shapes",
    "training.fake.lora": "its weights have other shapes",
    "training.fake_warmup": "it is over when a state is taken over",
    "training.batch": "updates have other samples",
    "training.cycles": "members are compared at the same cycles",
    "training.phase_split": "members are compared in the same phase",
    "training.precision": "its frozen weights have another dtype",
}
"""Why not, for keys that begin so."""


class Population(Section):
    """Population based training (arXiv:1711.09846): the worst take over the best ones' training states as they train.

    The members are the sweep's ``budget.trials``, all of one cluster. They go from one takeover to the next in legs, as
    many at a time as there is room for; between two legs a member is a checkpoint and nothing else.
    """

    every: Count = 1
    """Evaluations (``evaluation.every``) between two takeovers."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """The worst so many take over from the best so many, by the first objective."""
    resample: Fraction = 0.25
    """Probability that a number of the donor's settings is drawn anew."""
    factor: Above1 = 1.2
    """That it is multiplied with or divided by otherwise; a choice moves to its neighbour."""


@dataclass(frozen=True)
class Entry:
    """Settings that a member has had from some cycle on.

    Attributes:
        cycle: cycles done by then.
        donor: folder number of the member whose state was taken over; ``None`` at the start.
        changes: of the recipe.
        numbers: that they were made of.
    """

    cycle: int
    donor: int | None
    changes: dict[str, Any]
    numbers: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def check_space(keys: Iterable[str]) -> None:
    """Refuse keys that can't change under a training state.

    Raises:
        ValueError: naming the first one and the reason.
    """
    for key in keys:
        if key in MOVABLE:
            continue
        prefixes = sorted((p for p in REASONS if key == p or key.startswith(f"{p}.")), key=len)
        why = f": {REASONS[prefixes[-1]]}" if prefixes else ""
        raise ValueError(
            f"space: {key!r} can't change under a training state that is taken over{why}. A population may move "
            f"{', '.join(MOVABLE)}"
        )


def check_population(spec: Sweep, base: Recipe) -> None:
    """See that a recipe leaves a population something to do.

    Raises:
        InputError: if not.
    """
    name, every = spec.name, base.evaluation.every
    if spec.population is None:
        return
    if not every:
        raise InputError(
            f"sweep {name!r}: a population is compared on its way, and evaluation.every=0 evaluates at the end alone; "
            "set evaluation.every"
        )
    if not generations(spec, base):
        raise InputError(
            f"sweep {name!r}: population.every={spec.population.every} times evaluation.every={every} is not below "
            f"training.cycles={base.training.cycles}, so that nothing would ever be taken over"
        )
    if base.monitor.action == "rollback":
        raise InputError(
            f"sweep {name!r}: monitor.action=rollback would go back behind what was taken over; a population replaces "
            "its bad members itself, use warn, stop, raise_ratio or cut_rate"
        )
    pairs = base.method.regression
    if pairs and pairs.guidance is None and "method.guidance" in spec.space:
        raise InputError(
            f"sweep {name!r}: the pairs of method.regression were made with method.guidance, which is in the space; "
            "set method.regression.guidance"
        )


def generations(spec: Sweep, base: Recipe) -> tuple[int, ...]:
    """Cycles at which members are compared."""
    assert spec.population is not None
    step = base.evaluation.every * spec.population.every
    return tuple(range(step, base.training.cycles, step)) if step else ()


def state_shape(recipe: Recipe, family: Family) -> tuple[Any, ...]:
    """What decides which tensors a training state has, and of which networks; equal ones can take each other's over.

    Raises:
        InputError: if the method can't be had.
    """
    m, routing, t = recipe.method, family.routing(), recipe.training
    try:
        phases = build_method(m, routing, family.process, family.prediction).phases
    except ValueError as error:
        raise InputError(f"method: {error}") from None
    experts = tuple((p.index, p.student, p.fake_experts) for p in phases)
    sources = tuple((e, source_expert(m, routing, e)) for e in student_routing(m, routing).experts)
    return experts, sources, CyclePlan.of(t, len(phases)).ends, bool(t.ema), t.student.lora, t.fake.lora


def check_shapes(spec: Sweep, corners: Iterable[tuple[Mapping[str, Any], Recipe]], family: Family) -> None:
    """See that every corner of a population's space can take over every other one's training state.

    Raises:
        InputError: naming two that can't.
    """
    first: tuple[Mapping[str, Any], tuple[Any, ...]] | None = None
    for changes, recipe in corners:
        shape = state_shape(recipe, family)
        if first is None:
            first = changes, shape
        elif shape != first[1]:
            a, b = ({k: c.get(k) for k in spec.space if first[0].get(k) != changes.get(k)} for c in (first[0], changes))
            raise InputError(
                f"sweep {spec.name!r}: {_said(a)} and {_said(b)} train other networks, so that neither takes over the "
                "other's state; leave a population's space one number of phases, each within one of the teacher's "
                "experts, and an average (training.ema) always or never"
            )


def kept_keys(base: Recipe, changes: Mapping[str, Any], cycle: int) -> tuple[str, ...]:
    """Keys that may not change at this cycle: boundaries, once a phase has trained an expert up to its own."""
    boundaries = changes.get("method.boundaries", base.method.boundaries)
    ends = CyclePlan.of(base.training, len(boundaries) + 1).ends
    return ("method.boundaries",) if boundaries and cycle >= ends[0] else ()


def takeovers(
    costs: Mapping[int, float],
    members: Collection[int],
    stuck: Collection[int],
    *,
    quantile: float,
    rng: random.Random,
) -> dict[int, int]:
    """Who takes over from whom: the worst quantile, and all that can't go on, each from one of the best quantile.

    Args:
        costs: by member, the lower the better; those without a figure count as worst.
        members: all.
        stuck: members whose run has failed.
        quantile: see :class:`Population`.
        rng: draws the donors.

    Returns:
        The donor by taker.
    """
    ranked = sorted((m for m in members if m in costs and m not in stuck), key=lambda m: (costs[m], m))
    order = [*ranked, *sorted(m for m in members if m not in ranked)]
    count = min(math.ceil(len(order) * quantile), len(order) // 2)
    best = ranked[:count]
    worst = {*order[len(order) - count :], *stuck} - {*best}
    found = {}
    for taker in sorted(worst):
        known = taker in ranked
        donors = [d for d in best if not known or costs[d] < costs[taker]]
        if donors:
            found[taker] = rng.choice(donors)
    return found


def schedule(rows: Iterable[Row], root: int) -> list[Entry]:
    """The settings that a member's student was trained with from its first cycle on, whoever had them.

    Args:
        rows: all trials of the sweep.
        root: folder number of the member.
    """
    lineages = {row.root: row.lineage for row in rows if row.state != "lost"}

    def before(member: int, cycle: float) -> list[Entry]:
        entries = [e for e in lineages.get(member, ()) if e.cycle < cycle]
        if not entries:
            return []
        last = entries[-1]
        return [last] if last.donor is None else [*before(last.donor, last.cycle), last]

    return before(root, math.inf)


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in changes.items())
