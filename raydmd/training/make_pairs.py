"""``raydmd pairs``: the driver that starts a teacher and lets it walk."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import ray
import torch

from raydmd.errors import DONE
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.pairs.make import begin, make_pairs
from raydmd.pairs.manifest import MANIFEST, Manifest
from raydmd.pairs.origin import folder_of, origin_of
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool_client import PoolClient
from raydmd.training.cluster import connect, lasting
from raydmd.training.encoding import training_prompts
from raydmd.training.lock import locked
from raydmd.training.pools import check_experts, teacher_pool
from raydmd.training.prepare import quiet
from raydmd.training.ray_worker import prepare_process
from raydmd.training.room import make_room, untrained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from raydmd.models.family import Family
    from raydmd.pairs.manifest import Origin
    from raydmd.recipe import Recipe
    from raydmd.serving.client import Client

AHEAD = 3
"""Requests under way per replica: one that runs, and others so that it never waits."""


def make(recipe: Recipe, count: int, folder: Path | None = None, *, shard: int | None = None) -> int:
    """Make a recipe's noise-image pairs; what is there already is kept.

    Args:
        recipe: a run; its model, prompts, seed, placement and ``method.regression`` count.
        count: pairs.
        folder: for them; default: where the run looks for them.
        shard: pairs in a shard; default: about 256 MiB.

    Returns:
        The exit code, ``DONE``.

    Raises:
        InputError: before anything starts; also if the folder has pairs of another origin.
        PoolError: or NonFiniteError, from the teacher; shards that were written stay.
    """
    quiet()
    recipe = recipe.model_copy(update={"output": lasting(recipe.output)})
    folder = lasting(folder or folder_of(recipe))
    family = load_family(recipe.model)
    family.check_spread(recipe.placement.teacher_gpus)
    prompts = training_prompts(recipe, family)
    origin = origin_of(recipe, family, prompts, count, shard)
    with locked(folder):
        manifest = begin(folder, origin, recipe.model.negative_prompt, prompts)
        if not manifest.finished:
            conditions = family.encode(prompts, (recipe.data.cache or folder / "conditions").absolute())
            with teacher(recipe, family, conditions, origin) as client:
                ahead = AHEAD * recipe.placement.teachers
                make_pairs(folder, manifest, len(prompts), client, ahead=ahead, tell=teller(manifest))
    print(f"pairs     {folder} ({count} pairs in {origin.shards} shard(s))")
    return DONE


def make_missing(recipe: Recipe, count: int) -> None:
    """Make a recipe's pairs as :func:`make` does, unless its folder has some of another number already."""
    folder = lasting(folder_of(recipe))
    if not (folder / MANIFEST).is_file() or Manifest.read(folder).origin.count == count:
        make(recipe, count)


@contextlib.contextmanager
def teacher(recipe: Recipe, family: Family, conditions: Path, origin: Origin) -> Iterator[Client]:
    """The frozen teacher for as long as the block lasts: a pool, or a copy in this process."""
    p = recipe.placement
    if p.teacher != "remote":
        prepare_process(threads=p.threads, deterministic=recipe.deterministic)
        device = torch.device("cuda" if p.worker_gpus and torch.cuda.is_available() else "cpu")
        experts = load_teacher(family, recipe.training.precision, device=device)
        yield LocalClient(TeacherEngine(experts, Conditions.read(conditions)))
        return
    connect()
    try:
        make_room(untrained(recipe))
        check_experts(p, "a walk", family.routing().experts, family.routing())
        # Full requests leave no room for another in a forward, so that batches don't depend on timing.
        p = p.model_copy(update={"batch_items": origin.request})
        pool = teacher_pool(
            recipe.model_copy(update={"placement": p}),
            family,
            conditions,
            origin.latent,
            holder="pairs",
            timeout=AHEAD * recipe.training.step_timeout,  # each waits for those before it
        )
        with pool:
            pool.wait()
            client = PoolClient(pool.client_spec(), pool.client_spec().holder)
            client.expect(family.routing().experts)  # a walk from noise to a clean latent meets all
            yield client
    finally:
        ray.shutdown()


def teller(manifest: Manifest) -> Callable[[Manifest], None]:
    """What prints a line after each shard, with the rate since ``manifest``."""
    start, before = time.monotonic(), sum(s.pairs for s in manifest.shards)
    if before:
        print(f"{before} of {manifest.origin.count} pairs are there already", flush=True)

    def tell(now: Manifest) -> None:
        done = sum(s.pairs for s in now.shards)
        rate = (done - before) / max(time.monotonic() - start, 1e-9)
        left = (now.origin.count - done) / rate
        print(
            f"shard {len(now.shards)} of {now.origin.shards}   {done} of {now.origin.count} pairs   "
            f"{rate:.3g} pairs/s   {left / 60:.1f} min left",
            flush=True,
        )

    return tell
