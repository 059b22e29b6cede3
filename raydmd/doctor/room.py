"""How much room a run's checkpoints will take, told from its recipe and its model's settings, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.doctor.facts import GIB, Need
from raydmd.errors import InputError
from raydmd.training.cluster import lasting
from raydmd.training.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.recipe import Recipe

FP32 = 4.0
"""Bytes of a parameter, of its moving average, and of each of Adam's two moments: checkpoints hold no other numbers."""


def need_of(recipe: Recipe) -> Need | None:
    """What a run's checkpoints will ask of its ``output``: those that stay, and one that is being written.

    ``None`` if they go to object storage, or if the model's settings can't be read here.
    """
    if recipe.checkpoints.storage:
        return None
    try:
        size = largest(recipe)
    except InputError:
        return None
    output = lasting(recipe.output)
    count = recipe.checkpoints_kept + 1 - _there(output / recipe.name)
    return Need(str(output), each=size / GIB, count=max(1, count))


def largest(recipe: Recipe) -> float:
    """Bytes of the largest checkpoint of a run.

    In each phase it holds what may train of the student's experts so far and of the fake score's, a moving average of
    the student, and two moments for all that trains then; the last one has the student once more, to be exported.

    Raises:
        InputError: if the recipe's model can't be found or understood.
    """
    # Heavy, and of no use to a doctor without a recipe.
    from raydmd.methods.presets import build_method
    from raydmd.models.reading import understood
    from raydmd.planning.known import family_of
    from raydmd.planning.network import Networks

    training, gan = recipe.training, recipe.method.gan
    with understood(f"model {recipe.model.path!r}"):
        family, lengths = family_of(recipe.model)
        phases = build_method(recipe.method, family.routing(), family.process, family.prediction).phases
        networks = Networks(family, lengths)
        head = networks.head(len(gan.depths)) if gan else 0

        def own(role: str) -> tuple[int, int]:
            """An expert's parameters that a role keeps, and those of them that train."""
            lora = (training.student if role == "student" else training.fake).lora
            net = networks.size(lora)
            return (net.adapters, net.adapters) if lora else (net.parameters, net.parameters - net.idle)

        kept, learnt = own("student")
        fake_kept, fake_learnt = own("fake")
    sizes, so_far = [], set[str]()
    for phase in phases:
        so_far |= set(phase.student)
        student = len(so_far) * kept + len(phase.student) * learnt * (3 if training.ema else 2)
        fake = len(phase.fake_experts) * (fake_kept + 2 * fake_learnt + 3 * head)
        sizes.append(FP32 * (student + fake))
    sizes[-1] += FP32 * len(so_far) * kept
    return max(sizes)


def _there(folder: Path) -> int:
    """Checkpoints that a run to be resumed has already, as far as this machine sees its folder."""
    try:
        return len(Store.of(folder, None).names())
    except (OSError, ValueError, InputError):
        return 0
