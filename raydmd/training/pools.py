"""The pools that a run asks: what is in them, and by which key other runs find them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from raydmd import __version__
from raydmd.errors import InputError
from raydmd.models import load_family, load_teacher
from raydmd.models.identity import fingerprint
from raydmd.models.places import locate
from raydmd.models.sizes import training_latents
from raydmd.pairs.manifest import prompts_digest
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import load_teacher_engine
from raydmd.serving.order import Order, Packed, Replicas, key_of
from raydmd.serving.pool import Pool
from raydmd.training.sampling import load_sampler_engine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from raydmd.models.base import Experts, Routing
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.recipe_placement import Placement


def teacher_pool(
    recipe: Recipe,
    family: Family,
    conditions: Path,
    latent: tuple[int, ...],
    *,
    holder: str | None = None,
    timeout: float | None = None,
) -> Pool:
    """The pool of a run's teacher, shared with whoever uses the same weights in the same way.

    Args:
        recipe: the run.
        family: its pipeline.
        conditions: the file of its encoded prompts.
        latent: shape of one latent, for the warm-up.
        holder: who holds it; default: the run.
        timeout: seconds until a request's deadline; default: a step's.
    """
    p, routing = recipe.placement, family.routing()
    asked = teacher_replicas(p)
    facts = {**teacher_facts(recipe, family), **_facts(asked, deterministic=recipe.deterministic)}
    order = Order(
        key=key_of(f"teacher-{_name(recipe)}", facts),
        build=Packed.of(
            functools.partial(load_teacher_engine, functools.partial(build_teacher, recipe), str(conditions), latent)
        ),
        asked=asked,
        deterministic=recipe.deterministic,
        routing=routing if asked.each else None,
    )
    return Pool(
        order,
        holder or recipe.name,
        request_timeout=timeout or recipe.training.step_timeout,
        table=str(conditions),
    )


def reward_pool(recipe: Recipe, family: Family, prompts: Sequence[str]) -> Pool:
    """The pool of a run's reward models, shared with whoever has the same prompts judged by them.

    Args:
        recipe: the run; its method adapts to rewards.
        family: decodes for them.
        prompts: the training prompts, in the order of the condition table.
    """
    p = recipe.placement
    asked = Replicas(
        copies=p.rewards,
        cpus=p.reward_cpus,
        gpus=p.reward_gpus,
        resources=p.reward_resources,
        threads=p.threads,
        batch_items=p.batch_items,
        batch_wait=p.batch_wait,
        wire=p.wire,
    )
    facts = {
        "model": locate(recipe.model).settings.model_dump(mode="json"),
        "rewards": [reward.model_dump(mode="json") for reward in recipe.method.adapt.rewards]
        if recipe.method.adapt
        else [],
        "prompts": prompts_digest(recipe.model.negative_prompt, prompts),
        "latents": list(training_latents(family, recipe.data)),
        **_facts(asked, deterministic=recipe.deterministic),
    }
    order = Order(
        key=key_of(f"reward-{_name(recipe)}", facts),
        build=Packed.of(functools.partial(load_reward_engine, recipe, prompts)),
        asked=asked,
        deterministic=recipe.deterministic,
    )
    return Pool(order, recipe.name, request_timeout=recipe.training.step_timeout)


def sampler_pool(recipe: Recipe, conditions: Path) -> Pool:
    """The pool that draws a run's samples for fake updates; the run's own, since it follows its student.

    Args:
        recipe: the run.
        conditions: the file of its encoded prompts.
    """
    p = recipe.placement
    asked = Replicas(
        copies=p.samplers,
        cpus=p.sampler_cpus,
        gpus=p.sampler_gpus,
        threads=p.threads,
        batch_items=p.batch_items,
        wire=p.wire,
    )
    order = Order(
        key=key_of(f"sampler-{recipe.name}", {"recipe": recipe.to_yaml(), **_facts(asked, deterministic=False)}),
        build=Packed.of(functools.partial(load_sampler_engine, recipe, str(conditions))),
        asked=asked,
    )
    return Pool(order, recipe.name, request_timeout=recipe.training.step_timeout)


def teacher_facts(recipe: Recipe, family: Family) -> dict[str, Any]:
    """What decides a frozen teacher's answers, its process aside."""
    p, routing = recipe.placement, family.routing()
    return {
        "pipeline": (family.pipeline.__name__, family.prediction, repr(family.process)),
        "weights": fingerprint(locate(recipe.model).settings, routing.experts),
        "boundaries": routing.boundaries,
        "precision": recipe.training.precision,
        "compile": p.teacher_compile,
        "quantize": p.teacher_quantize,
    }


def teacher_replicas(p: Placement) -> Replicas:
    """What the teacher's pool gets."""
    return Replicas(
        copies=p.teachers,
        most=p.teachers_most,
        cpus=p.teacher_cpus,
        gpus=p.teacher_gpus,
        resources=p.teacher_resources,
        threads=p.threads,
        batch_items=p.batch_items,
        batch_wait=p.batch_wait,
        each=p.teacher_experts,
        wire=p.wire,
    )


def build_teacher(recipe: Recipe, device: torch.device, experts: tuple[str, ...] = ()) -> Experts:
    """Load the frozen teacher, or some of its experts; runs in a replica, which sees its own GPUs alone."""
    p = recipe.placement
    return load_teacher(
        load_family(recipe.model),
        recipe.training.precision,
        device=device,
        spread=p.teacher_gpus > 1,
        experts=experts,
        compile_mode=p.teacher_compile,
        quantize=p.teacher_quantize,
    )


def check_experts(p: Placement, who: str, asked: Sequence[str], routing: Routing) -> None:
    """Refuse a pool that cannot hold what is asked at once.

    Args:
        p: the run's placement.
        who: asks, e.g. ``phase 1``.
        asked: experts.
        routing: the teacher's.

    Raises:
        InputError: if its replicas are too few, or there is nothing to hold some of.
    """
    each = p.teacher_experts
    if not each:
        return
    if each >= len(routing.experts):
        raise InputError(
            f"placement.teacher_experts={each}: this teacher has {len(routing.experts)} expert(s); set 0, and each "
            "replica holds all"
        )
    if p.teachers * each < len(asked):
        raise InputError(
            f"placement.teachers={p.teachers} with placement.teacher_experts={each} can't hold the {len(asked)} "
            f"experts that {who} asks ({', '.join(asked)}); set placement.teachers={-(-len(asked) // each)} or "
            "placement.teacher_experts=0"
        )


def _facts(asked: Replicas, *, deterministic: bool) -> dict[str, Any]:
    """What of a pool's processes sharers must agree on; how many there are is not among it."""
    return {
        "raydmd": __version__,
        "deterministic": deterministic,
        "cpus": asked.cpus,
        "gpus": asked.gpus,
        "resources": dict(asked.resources),
        "threads": asked.threads,
        "batch": (asked.batch_items, asked.batch_wait),
        "each": asked.each,
        "wire": asked.wire,
    }


def _name(recipe: Recipe) -> str:
    """The model's name as far as people need it."""
    return recipe.model.path.rstrip("/").rsplit("/", 1)[-1]
