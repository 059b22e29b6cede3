"""A run's prompts: read as its recipe says, and encoded by as many processes as the cluster has room for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import ray

from raydmd.data.prompts import read_prompts
from raydmd.errors import RunFailed, RunStopped
from raydmd.models import load_family
from raydmd.models.places import locate
from raydmd.serving.order import ANYWHERE
from raydmd.training.room import living_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from raydmd.models.family import Family
    from raydmd.recipe import Recipe

AHEAD = 64
"""Parts that are asked for at once; more would only wait."""


def training_prompts(recipe: Recipe, family: Family) -> list[str]:
    """What the recipe's data are, or the prompts that come with its model.

    Args:
        recipe: the run.
        family: its pipeline, whose prompts may have pictures.

    Raises:
        InputError: if they can't be read.
    """
    data = recipe.data
    if data.prompts is None:
        return read_prompts(locate(recipe.model).prompts, pictures=family.pictures)
    return read_prompts(data.prompts, column=data.column, split=data.split, pictures=family.pictures)


def encode(recipe: Recipe, family: Family, prompts: Sequence[str], cache: Path, stop: Path) -> Path:
    """Encode prompts once, in parallel where they are many or a GPU can do it; what is done is kept, whatever happens.

    Args:
        recipe: the run, whose teacher's resources each process gets.
        family: its pipeline.
        prompts: what to encode.
        cache: on storage that all nodes see.
        stop: ends it when it exists.

    Returns:
        The table's file, see :meth:`~raydmd.models.family.Family.encode`.

    Raises:
        RunStopped: if it was stopped.
        RunFailed: if a part fails, or none is ready for ``data.timeout``.
    """
    p, limit = recipe.placement, recipe.data.timeout
    gpus = p.teacher_gpus or p.worker_gpus

    def spread(parts: Sequence[Sequence[str]], folder: Path) -> None:
        if len(parts) < 2 and not gpus:
            for part in parts:
                family.encode_part(part, folder)
            return
        task = ray.remote(encode_part).options(
            num_cpus=min(p.teacher_cpus, p.worker_cpus), num_gpus=gpus, max_retries=2, scheduling_strategy=ANYWHERE
        )
        # As many as have a GPU: for each one more Ray's autoscaler would bring a node.
        ahead = max(1, min(AHEAD, int(sum(n.get("GPU", 0.0) for n in living_nodes()) // gpus))) if gpus else AHEAD
        waiting, under_way = list(parts), list[ray.ObjectRef[None]]()
        done, last = 0, time.monotonic()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < ahead:
                    under_way.append(task.remote(recipe, waiting.pop(0), folder))
                ready, under_way = ray.wait(under_way, timeout=1.0)
                for reference in ready:
                    ray.get(reference)
                    done, last = done + 1, time.monotonic()
                    print(f"encoding prompts: part {done} of {len(parts)}", flush=True)
                if stop.exists():
                    raise RunStopped(f"run '{recipe.name}' stopped; the {done} parts of prompts it encoded are kept")
                if time.monotonic() - last > limit:
                    raise RunFailed(
                        f"encoding prompts: no part was ready within data.timeout={limit:g} s; {done} of {len(parts)} "
                        f"are kept in {folder}"
                    )
        except ray.exceptions.RayError as error:
            raise RunFailed(f"encoding prompts: {str(error).strip().splitlines()[-1]}") from error
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)

    return family.encode(prompts, cache, spread=spread)


def encode_part(recipe: Recipe, prompts: Sequence[str], folder: Path) -> None:
    """Encode a part; runs in a process of its own."""
    load_family(recipe.model).encode_part(prompts, folder)
