"""Where a recipe's pairs come from, and whether pairs that lie there are these."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.errors import InputError
from raydmd.models.identity import fingerprint
from raydmd.models.places import locate
from raydmd.pairs.manifest import Origin, PairsError, prompts_digest, refuse_other
from raydmd.pairs.store import PairStore, noise_digest
from raydmd.recipe_regression import Regression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.models.family import Family
    from raydmd.recipe import Recipe

SHARD_BYTES = 256 << 20
MOST = 4096
TRAINED = ("latent", "teacher", "boundaries", "text_length", "guidance", "steps", "shift", "solver", "noise")
"""Fields that must agree for training; pairs of other prompts, seeds and numbers will do."""


def origin_of(recipe: Recipe, family: Family, prompts: Sequence[str], count: int, shard: int | None = None) -> Origin:
    """What ``raydmd pairs`` makes of a recipe; its ``method.regression`` section, or the defaults without one.

    Args:
        recipe: the run whose teacher walks.
        family: its pipeline.
        prompts: to walk with, in turn.
        count: pairs.
        shard: pairs in a shard; default: about 256 MiB.

    Raises:
        InputError: if shards would not be whole numbers of requests, or the teacher's files can't be read.
    """
    m, latent = recipe.method, family.shape().latent
    settings = m.regression or Regression()
    most = recipe.placement.batch_items
    request = min(most, shard) if shard else most
    if shard is None:
        shard = request * max(1, min(MOST, SHARD_BYTES // (4 * prod(latent))) // request)
    if shard % request:
        raise InputError(f"--shard={shard} is no multiple of placement.batch_items={request}, the size of a request")
    model, routing = locate(recipe.model).settings, family.routing()
    return Origin(
        teacher=fingerprint(model, (*routing.experts, *family.conditioning())),
        boundaries=routing.boundaries,
        text_length=family.text_length(),
        precision=recipe.training.precision,
        guidance=m.guidance if settings.guidance is None else settings.guidance,
        steps=settings.steps,
        shift=settings.shift or m.shift,
        solver="euler",
        seed=recipe.seed,
        prompts=prompts_digest(recipe.model.negative_prompt, prompts),
        latent=latent,
        count=count,
        shard=shard,
        request=request,
        noise=noise_digest(recipe.seed, latent),
    )


def check(store: PairStore, recipe: Recipe, family: Family) -> None:
    """Refuse pairs that a recipe can't be trained with.

    Raises:
        PairsError: if they are of another teacher or walk, of another shape, or too few for a batch.
    """
    found = store.manifest.origin
    wanted = origin_of(recipe.model_copy(update={"seed": found.seed}), family, (), found.count)
    refuse_other(store.folder, found, wanted, TRAINED)
    batch = batch_of(recipe)
    if found.count < batch:
        raise PairsError(f"pairs in {store.folder}: {found.count} are too few for a batch of {batch}")


def batch_of(recipe: Recipe) -> int:
    """Pairs per student update, over all workers."""
    return (recipe.method.regression and recipe.method.regression.batch) or recipe.training.batch


def folder_of(recipe: Recipe) -> Path:
    """Where a recipe's pairs lie; as absolute as the recipe's paths are."""
    given = recipe.method.regression and recipe.method.regression.pairs
    return given or recipe.output / f"pairs-{Path(recipe.model.path).name}"
