"""Which figures the evaluation of a recipe's student has: what a sweep may have as objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.models.places import locate
from raydmd.zoo.judge import AttributeJudge

if TYPE_CHECKING:
    from raydmd.recipe import Recipe

ALWAYS = ("evaluations", "seconds", "brightness", "saturation")
MOVING = ("flow", "dynamic_degree", "flow_ratio")
JUDGED = ("frechet", "joint", "diversity", "coverage_entropy", "coverage_distance", "missing_modes")
POOLED = ("pooled_entropy", "pooled_distance", "pooled_missing")


def reported(recipe: Recipe) -> set[str]:
    """Names of the figures, as its report has them."""
    e, place = recipe.evaluation, locate(recipe.model)
    found = set(ALWAYS)
    if (place.settings.frames or 1) > 1:
        found |= set(MOVING)
    if place.judge:
        attributes = AttributeJudge.load(place.judge).language.attributes
        found |= {*JUDGED, *POOLED, *(f"accuracy_{name}" for name in attributes)}
        found |= {f"joint_{k + 1}" for k in range(len(attributes))}
    for network in e.networks:
        found |= {f"{kind}_{network.name}" for kind in ("frechet", "diversity", "precision", "recall", "vendi")}
    if e.lpips:
        found.add("diversity_lpips")
    for i, reward in enumerate(e.rewards):
        alike = sum(other.kind == reward.kind for other in e.rewards[:i])
        found.add(f"reward_{reward.kind}_{alike + 1}" if alike else f"reward_{reward.kind}")
    return found
