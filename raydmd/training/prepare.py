"""What a run is looked at for before anything starts: its recipe, and the files that it names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydmd.data.real import Source, inspect
from raydmd.errors import InputError
from raydmd.evaluation.check import check_instruments
from raydmd.methods.presets import build_method
from raydmd.models import load_family
from raydmd.models.sizes import size_notes, training_latents
from raydmd.models.speed import check_quantize
from raydmd.serving.direct import check_wire
from raydmd.training.cluster import lasting
from raydmd.training.encoding import training_prompts
from raydmd.training.folder import trained
from raydmd.training.pairing import check_pairs
from raydmd.training.pools import check_experts
from raydmd.training.retention import check_best
from raydmd.training.store import check_storage

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A run whose recipe was looked at as closely as can be done without a cluster.

    Attributes:
        recipe: with an absolute output folder.
        family: its pipeline.
        prompts: to train with.
        source: real samples, where the method has a GAN.
    """

    recipe: Recipe
    family: Family
    prompts: list[str]
    source: Source | None


def prepare(recipe: Recipe) -> Prepared:
    """Look at a recipe, and at the files it names.

    Raises:
        InputError: if it can't be run.
    """
    quiet()
    recipe = recipe.model_copy(update={"output": lasting(recipe.output)})
    family = load_family(recipe.model)
    check_method(recipe, family)
    check_quantize(recipe.placement.teacher_quantize)
    check_wire(recipe.placement.wire)
    for note in [*family.notes(recipe.method), *size_notes(family, recipe)]:
        print(f"note: {note}")
    check_instruments(recipe.evaluation)
    check_best(recipe)
    check_storage(recipe.checkpoints.storage)
    prompts = training_prompts(recipe, family)
    check_quarantine(recipe, len(prompts))
    source = inspect(recipe.method.gan, family.shape()) if recipe.method.gan else None
    if not trained(recipe.folder):
        check_pairs(recipe, family)
    return Prepared(recipe, family, prompts, source)


def check_method(recipe: Recipe, family: Family) -> None:
    """See that a family can be taught by a recipe's method, in its placement.

    Raises:
        InputError: if it can't.
    """
    family.check(recipe.method)
    family.check_roles(recipe.training)
    family.check_spread(recipe.placement.teacher_gpus)
    family.check_sequence(recipe.placement.sequence, training_latents(family, recipe.data))
    try:
        method = build_method(recipe.method, family.routing(), family.process, family.prediction)
    except ValueError as error:
        raise InputError(f"method: {error}") from None
    for phase in method.phases:
        asked = method.asks(phase, family.routing())
        check_experts(recipe.placement, f"phase {phase.index + 1}", asked, family.routing())


def check_quarantine(recipe: Recipe, prompts: int) -> None:
    """See that the prompts to leave out are there, and that others are left.

    Raises:
        InputError: if not.
    """
    without = set(recipe.data.quarantine)
    if absent := sorted(number for number in without if number > prompts):
        raise InputError(f"data.quarantine: there is no prompt {absent[0]}, the last one is {prompts}")
    if len(without) == prompts:
        raise InputError(f"data.quarantine leaves out all of {prompts} prompts; there is nothing left to train on")


def quiet() -> None:
    """Leave the terminal to the run: libraries report errors alone, and draw no bars of their own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
